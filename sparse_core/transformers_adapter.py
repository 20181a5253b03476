"""Sparse attention inside Hugging Face models, by their own registry of attentions.

    from sparse_core.transformers_adapter import register
    register("window", SlidingWindow(512) | GlobalTokens(1))
    model = AutoModel.from_pretrained(NAME, attn_implementation="window")

Needs the extra `transformers`. The interfaces are `AttentionInterface` (called by each layer) and
`AttentionMaskInterface` (called once a forward pass) of `transformers` 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout
from sparse_core.ops import Backend, sparse_attention
from sparse_core.patterns import Causal, Pattern

_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of positions",
    "sliding_window": "its own sliding window; set the model's sliding_window to None",
    "head_mask": "a mask of heads",
}


def register(name: str, pattern: Pattern, *, backend: Backend = "auto") -> None:
    """Make `pattern` an attention that models are built with: `attn_implementation=name`.

    Encoders attend as the pattern says, decoders as `pattern & Causal()`. A 2-D mask of padding
    leaves the real tokens of each row as one packed sequence: padding is neither seen nor computed,
    and positions count from the first real token. Rows of padding come out as zeros.

    While a model runs, ValueError is raised for what would be lost without a word: dropout of
    attention weights, prepared 4-D masks, masks of a model's own (sliding windows, packing by
    position ids), sinks, caches that hold earlier tokens, and cross-attention.
    """
    AttentionMaskInterface.register(name, partial(_describe_mask, pattern=pattern))
    AttentionInterface.register(name, partial(_attend, pattern=pattern, backend=backend))


@dataclass(frozen=True)
class PaddedLayout:
    """What a forward pass hands its layers as a mask: who sees whom, and which tokens are real.

    `rows` are the places of the real tokens in the flattened batch; None where all are real.
    """

    layout: BlockLayout
    rows: Int[Tensor, "N"] | None


def _describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: Bool[Tensor, "B T"] | None = None,
    device: torch.device | str = "cpu",
    *,
    pattern: Pattern,
    **_: object,
) -> PaddedLayout:
    """Turn what a model knows of its mask into a layout, once a forward pass."""
    if q_length != kv_length or q_offset or kv_offset:
        raise ValueError(
            f"sparse attention is for whole sequences: got {q_length} queries and {kv_length} keys "
            "(a cache or cross-attention); run the model with use_cache=False"
        )
    if mask_function is causal_mask_function:
        pattern = pattern & Causal()
    elif mask_function is not bidirectional_mask_function:
        raise ValueError(
            "the model asks for a mask of its own (a sliding window, packing by position_ids or "
            "the like); switch that off and let the registered pattern say who sees whom"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return PaddedLayout(_layout(pattern, q_length, str(device)), None)
    real = attention_mask.to(device)
    layout = build_layout(pattern, int(real.sum()), segments=real.sum(1), device=device)
    return PaddedLayout(layout, real.flatten().nonzero()[:, 0])


def _attend(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B Hkv T D"],
    value: Float[Tensor, "B Hkv T D"],
    attention_mask: PaddedLayout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    pattern: Pattern,
    backend: Backend,
    **options: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Attend in one layer."""
    _check_options(dropout, options)
    if isinstance(attention_mask, Tensor):
        raise ValueError("sparse attention takes a 2-D mask of padding, no prepared 4-D mask")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"sparse attention is for whole sequences: got {query.shape[2]} queries and "
            f"{key.shape[2]} keys; run the model with use_cache=False, without cross-attention"
        )
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        seen = pattern & Causal() if causal else pattern
        attention_mask = PaddedLayout(_layout(seen, query.shape[2], str(query.device)), None)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    rows = attention_mask.rows
    if rows is not None:
        q, k, v = (x.flatten(0, 1)[rows][None] for x in (q, k, v))
    out = sparse_attention(q, k, v, attention_mask.layout, scale=scaling, backend=backend)
    assert isinstance(out, Tensor)
    if rows is not None:
        batch, _, tokens, _ = query.shape
        whole = out.new_zeros(batch * tokens, *out.shape[2:])
        out = whole.index_copy(0, rows, out[0]).unflatten(0, (batch, tokens))
    return out.contiguous(), None


def _check_options(dropout: float, options: dict[str, object]) -> None:
    if dropout:
        raise ValueError(
            f"sparse attention drops no attention weights; got dropout={dropout}: set the model's "
            "attention dropout to 0"
        )
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"sparse attention cannot serve this model, which asks for {what}")


@lru_cache(maxsize=64)
def _layout(pattern: Pattern, tokens: int, device: str) -> BlockLayout:
    """Build the layout of an unpadded batch; every layer and step of that length shares it."""
    return build_layout(pattern, tokens, device=device)
