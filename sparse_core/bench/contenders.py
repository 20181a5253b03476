"""Ours and PyTorch's own attentions on one problem, ready to be called."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparse_core.bench.cases import Case, Problem
from sparse_core.bench.flex_mask import MaskMod, mask_mod, raster_order
from sparse_core.bench.layouts import median_seconds
from sparse_core.bench.record import OURS
from sparse_core.building import build_layout
from sparse_core.ops import choose_engine, sparse_attention
from sparse_core.patterns import Causal, Dense

FLEX, FLEX_OUR_ORDER, FLEX_AUTOTUNED = "flex", "flex in our order", "flex max-autotune"
CUDNN, FLASH = "cudnn", "flash"
SDPA = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}

SMALL_MASK = 2**15
"""Tokens up to which Flex's mask is made without compiling: at 16,384 that took three minutes."""


@dataclass(frozen=True)
class Call:
    """An attention with its inputs in the shape it takes; `back` makes results [T, H, D] again."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    back: Callable[[Tensor], Tensor]
    engine: str
    visited_pairs: int
    layout_ms: float | None = None
    layout_bytes: int | None = None


def contenders(case: Case, *, flex: bool = True, autotune: bool = False) -> list[str]:
    """Name who is measured on a case: ours first, then whoever can compute the same.

    FlexAttention sees grids in raster order, its best, and once more in our order.
    """
    names = [OURS]
    if flex and case.flex:
        names += [FLEX]
        names += [FLEX_OUR_ORDER] if case.place == "grid" else []
        names += [FLEX_AUTOTUNED] if autotune else []
    if isinstance(case.pattern, Dense | Causal):
        names += SDPA
    return names


def engine_of(q: Tensor) -> str:
    """Name the engine that serves such queries."""
    return choose_engine("auto", q)


def prepare_ours(problem: Problem) -> Call:
    """Build the layout, and time that; the call gives the log-sum-exp too."""
    case, place = problem.case, problem.place
    build = partial(
        build_layout, case.pattern, place.coords,
        segments=place.segments, block_size=case.block_size, device=problem.device,
    )  # fmt: skip
    layout = build()
    return Call(
        partial(sparse_attention, layout=layout, return_lse=True),
        _leaves(problem.q, problem.k, problem.v),
        problem.grad_out,
        lambda x: x[0],
        engine_of(problem.q),
        layout.visited_pairs(),
        1e3 * median_seconds(build, problem.device),
        layout.nbytes(),
    )


def prepare_peer(name: str, problem: Problem) -> Call:
    """Bring tensors, mask and compiled function of a peer into being; may raise anything."""
    return _prepare_sdpa(name, problem) if name in SDPA else _prepare_flex(name, problem)


def _prepare_flex(name: str, problem: Problem) -> Call:
    case, place = problem.case, problem.place
    raster = case.place == "grid" and name != FLEX_OUR_ORDER
    order = raster_order(place) if raster else None
    torch._dynamo.reset()
    build = partial(
        _block_mask,
        mask_mod(case.pattern, place, problem.device, raster=raster),
        place.num_tokens,
        problem.device,
    )
    mask = build()
    mode = "max-autotune-no-cudagraphs" if name == FLEX_AUTOTUNED else None
    # a backward pass that gives its buffers away can be timed only once
    functorch_config.donated_buffer = False
    attend = partial(
        torch.compile(flex_attention, mode=mode),
        block_mask=mask,
        enable_gqa=problem.q.shape[2] != problem.k.shape[2],
    )
    there = partial(_heads_first, order=order)
    return Call(
        attend,
        _leaves(*map(there, (problem.q, problem.k, problem.v))),
        there(problem.grad_out),
        partial(_tokens_first, order=order),
        name,
        _visited_by_flex(mask),
        1e3 * median_seconds(build, problem.device),
    )


def _prepare_sdpa(name: str, problem: Problem) -> Call:
    is_causal = isinstance(problem.case.pattern, Causal)
    tokens = problem.place.num_tokens

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    there = partial(_heads_first, order=None)
    return Call(
        attend,
        _leaves(*map(there, (problem.q, problem.k, problem.v))),
        there(problem.grad_out),
        partial(_tokens_first, order=None),
        name,
        tokens * (tokens + 1) // 2 if is_causal else tokens**2,
    )


def _block_mask(mod: MaskMod, tokens: int, device: torch.device) -> BlockMask:
    with warnings.catch_warnings():
        # newer versions compile without being told, and say so
        warnings.simplefilter("ignore", DeprecationWarning)
        return create_block_mask(
            mod, None, None, tokens, tokens, device=device, _compile=tokens > SMALL_MASK
        )


def _visited_by_flex(mask: BlockMask) -> int:
    blocks = int(mask.kv_num_blocks.sum())
    if mask.full_kv_num_blocks is not None:
        blocks += int(mask.full_kv_num_blocks.sum())
    return blocks * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]


def _leaves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (x.detach().requires_grad_() for x in (q, k, v))
    return first, second, third


def _heads_first(x: Tensor, *, order: Tensor | None) -> Tensor:
    """[1, T, H, D] to [1, H, T, D], with the tokens in another order."""
    x = x if order is None else x[:, order]
    return x.transpose(1, 2).contiguous()


def _tokens_first(x: Tensor, *, order: Tensor | None) -> Tensor:
    """[1, H, T, D] to [T, H, D], with the tokens in the problem's order."""
    x = x[0].transpose(0, 1)
    return x if order is None else x[order.argsort()]
