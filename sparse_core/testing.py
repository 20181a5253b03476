"""Inputs and tolerances for tests of anything that computes attention."""

import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout
from sparse_core.ops import Backend, Precision, sparse_attention
from sparse_core.patterns import Pattern
from sparse_core.reference import coordinate_distance, reference_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Allowed relative error of each dtype; the absolute part scales with the inputs."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of one attention call, with the gradients that flow into its two results."""

    q: Float[Tensor, "B Tq H D"]
    k: Float[Tensor, "B Tk Hkv D"]
    v: Float[Tensor, "B Tk Hkv D"]
    key_bias: Float[Tensor, "B Tk"]
    alibi_slopes: Float[Tensor, "H"]
    grad_out: Float[Tensor, "B Tq H D"]
    grad_lse: Float[Tensor, "B H Tq"]


def make_inputs(
    num_queries: int,
    num_keys: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw normal inputs, rounded to `dtype` so that a float64 reference sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys
    kv_heads = kv_heads or heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return Inputs(
        draw(batch, num_queries, heads, head_dim),
        draw(batch, num_keys, kv_heads, head_dim),
        draw(batch, num_keys, kv_heads, head_dim),
        draw(batch, num_keys),
        draw(heads).abs() * 0.1,
        draw(batch, num_queries, heads, head_dim),
        draw(batch, heads, num_queries),
    )


def peak_memory() -> int:
    """Bytes that this process has held at most; on Linux without what its parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_tissue(num_tiles: int) -> Int[Tensor, "T 2"]:
    """Coordinates of ragged tissue that fills 40 % of its grid, along a Z-order curve."""
    bits = (int(num_tiles / 0.4) - 1).bit_length()
    position = torch.arange(1 << bits)
    x, y = torch.zeros_like(position), torch.zeros_like(position)
    for bit in range(bits):
        axis = x if bit % 2 == 0 else y
        axis |= ((position >> bit) & 1) << (bit // 2)
    height = torch.sin(x / 37) + torch.sin(y / 53) + torch.sin((x + y) / 71)
    sea_level = height[:: max(1, height.numel() // 2**20)].quantile(0.6)
    return torch.stack([x, y], -1)[height > sea_level][:num_tiles]


Attention = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, key_bias, alibi_slopes) to (out, lse)."""

RESULTS = ("out", "lse", "dq", "dk", "dv", "dkey_bias", "dalibi_slopes")


def run_with_gradients(attention: Attention, inputs: Inputs) -> dict[str, Tensor]:
    """Compute results and all gradients; a log-sum-exp of -inf takes no gradient."""
    names = ("q", "k", "v", "key_bias", "alibi_slopes")
    leaves = [getattr(inputs, name).detach().clone().requires_grad_() for name in names]
    out, lse = attention(*leaves)
    finite = torch.isfinite(lse)
    loss = (out * inputs.grad_out.to(out.dtype)).sum()
    loss = loss + (torch.where(finite, lse, 0) * inputs.grad_lse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [out, lse, *gradients]
    shapes = [None, None, *leaves]
    filled = [torch.zeros_like(s) if x is None else x for x, s in zip(found, shapes, strict=True)]
    return dict(zip(RESULTS, (x.detach() for x in filled), strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for a CUDA device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def reference_results(
    inputs: Inputs,
    counts: Int[Tensor, "*G Tq Tk"] | Bool[Tensor, "*G Tq Tk"],
    distance: Float[Tensor, "Tq Tk"],
) -> dict[str, Tensor]:
    """Compute what is right, in float64."""
    exact = Inputs(*(getattr(inputs, name).double() for name in Inputs.__dataclass_fields__))

    def attention(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        alibi = -slopes[:, None, None] * distance.double()
        return reference_attention(q, k, v, counts, key_bias=bias, alibi=alibi)

    return run_with_gradients(attention, exact)


@dataclass(frozen=True)
class Engine:
    """An engine of `sparse_attention` and the device it is tried on."""

    backend: Backend
    device: str
    precision: Precision = "ieee"

    def run(self, layout: BlockLayout, inputs: Inputs, *, plain: bool = False) -> dict[str, Tensor]:
        """Compute results and gradients there, and bring them back; `plain` leaves out biases."""
        there = Inputs(
            *(getattr(inputs, name).to(self.device) for name in Inputs.__dataclass_fields__)
        )
        moved = layout.to(self.device)

        def attention(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor
        ) -> tuple[Tensor, Tensor]:
            found = sparse_attention(
                q, k, v, moved,
                key_bias=None if plain else bias, alibi_slopes=None if plain else slopes,
                backend=self.backend, precision=self.precision, return_lse=True,
            )  # fmt: skip
            assert isinstance(found, tuple)
            return found

        return {name: x.cpu() for name, x in run_with_gradients(attention, there).items()}


def check_against_float64(
    pattern: Pattern,
    inputs: Inputs,
    engine: Engine,
    *,
    coords: Int[Tensor, "T P"] | None = None,
    segments: list[int] | None = None,
    block_size: int | None = None,
    plain: bool = False,
) -> None:
    """Hold an engine to the reference on one pattern: results and all gradients.

    `plain` leaves out key bias and slopes.
    """
    where = inputs.q.shape[1] if coords is None else coords
    heads, kv_heads = inputs.q.shape[2], inputs.k.shape[2]
    layout = build_layout(
        pattern, where, segments=segments, block_size=block_size, num_kv_heads=kv_heads
    )
    distance = coordinate_distance(layout.query_coords, layout.key_coords, torch.float64)
    counts = torch.stack(
        [
            pattern.counts(where, segments=segments, head=head * kv_heads // heads)
            for head in range(heads)
        ]
        if layout.num_groups > 1
        else [pattern.counts(where, segments=segments)]
    )
    if plain:
        none = (torch.zeros_like(x) for x in (inputs.key_bias, inputs.alibi_slopes))
        inputs = replace(inputs, **dict(zip(("key_bias", "alibi_slopes"), none, strict=True)))
    expected = reference_results(inputs, counts, distance)
    if plain:
        for name in ("dkey_bias", "dalibi_slopes"):
            expected[name].zero_()
    assert_close(engine.run(layout, inputs, plain=plain), expected, inputs)


def assert_close(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    inputs: Inputs,
    *,
    scale: float | None = None,
) -> None:
    """Hold results to `tolerance * |expected| + eps * |dO| |V| |K| * scale`, elementwise.

    The norms are the largest of single tokens' vectors, times the root of the number of terms in a
    sum; slopes sum over all pairs, each weighted by its distance. Infinite log-sum-exps must agree.
    """
    dtype = inputs.q.dtype
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else scale
    norms = [float(x.double().norm(dim=-1).amax()) for x in (inputs.grad_out, inputs.v, inputs.k)]
    tokens = max(inputs.k.shape[1], inputs.q.shape[1], 1)
    terms = tokens * inputs.q.shape[2] // inputs.k.shape[2]
    unit = torch.finfo(dtype).eps * max(1.0, norms[0] * norms[1] * norms[2] * scale) * terms**0.5
    for name, wanted in expected.items():
        got = found[name].double()
        assert not got.isnan().any(), f"{name} holds NaN"
        finite = torch.isfinite(wanted)
        assert torch.equal(torch.isfinite(got), finite), f"{name}: infinities differ"
        error = (got - wanted)[finite].abs()
        slack = unit * tokens if name == "dalibi_slopes" else unit
        allowed = TOLERANCE[dtype] * wanted[finite].abs() + slack
        worst = float((error / allowed).max()) if error.numel() else 0.0
        assert worst <= 1, f"{name}: error is {worst:.2f} times what {dtype} allows"
