"""Run the real kernels on the CPU in Triton's interpreter; test_interpreter starts it.

The interpreter must be switched on before triton is imported, hence a process of its own. It has no
bfloat16 products, so those are tried on GPUs only.
"""

import sys
import time
from collections.abc import Callable

import torch

from sparse_core import kernels, listing
from sparse_core.patterns import (
    BlockList,
    Causal,
    Dense,
    DilatedSegments,
    DilatedWindow,
    GlobalTokens,
    Hierarchical,
    Pattern,
    RandomBlocks,
    Routed,
    SlidingWindow,
    Strided,
)
from sparse_core.pooling import build_pooled_layout, pooled_attention
from sparse_core.routing import (
    build_routed_layout,
    choose_blocks,
    describe_blocks,
    routed_attention,
)
from sparse_core.testing import (
    TOLERANCE,
    Engine,
    Inputs,
    check_against_float64,
    make_inputs,
    make_tissue,
)

PATTERNS = [
    Dense(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(left=40, right=0),
    DilatedWindow(3, 4),
    Strided(3, block=16),
    GlobalTokens(2, (50,)),
    RandomBlocks(2, 16),
    BlockList(((0, 1), (2, 0)), 16),
    SlidingWindow(20) | GlobalTokens(2) | RandomBlocks(2, 16),
    (SlidingWindow(20) | DilatedWindow(5, 7) | GlobalTokens(1)) & Causal(),
]
DTYPES = (torch.float32, torch.float16)
TOKENS = (63, 129, 2, 100, 1)
HEADS = ((2, 2), (4, 2), (1, 1))
HEAD_DIMS = (16, 48, 32, 72)
PLAIN = (False, True, False)


def main() -> int:
    """Try each pattern with two settings of the rest, so that any two values meet somewhere."""
    torch.set_num_threads(1)
    assert kernels.INTERPRETED, "set TRITON_INTERPRET=1"
    begin = time.perf_counter()
    for number in range(2 * len(PATTERNS)):
        heads, kv_heads = HEADS[number % 3]
        _check(
            PATTERNS[number % len(PATTERNS)],
            tokens=TOKENS[number % 5],
            dtype=DTYPES[(number // len(PATTERNS) + number) % 2],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=HEAD_DIMS[number % 4],
            plain=PLAIN[(number + number // 7) % 3],
            packed=number % 5 < 2,
        )
    for dtype in DTYPES:
        _check(
            SlidingWindow(60) | GlobalTokens(3), tokens=400, dtype=dtype, heads=1, kv_heads=1,
            head_dim=16, plain=True, packed=False,
        )  # fmt: skip
    outgrowing = make_inputs(300, heads=1, head_dim=32, dtype=torch.float16)
    outgrowing.k[:, 200:250] *= 16
    check_against_float64(SlidingWindow(150), outgrowing, Engine("triton", "cpu"), plain=True)
    _check(
        DilatedSegments(16) + DilatedSegments(64, 2), tokens=63, dtype=torch.float16, heads=2,
        kv_heads=2, head_dim=48, plain=True, packed=False,
    )  # fmt: skip
    _check_routed(Routed(16, 2, near=0) | GlobalTokens(2), 90, torch.float32)
    _check_routed(Routed(96, 2, near=0), 410, torch.float16)
    _check_pooled(Hierarchical(4, factor=2) | GlobalTokens(2), make_tissue(70), torch.float32)
    _check_pooled(Hierarchical(16), 200, torch.float16)
    print(f"{2 * len(PATTERNS) + 8} cases agree, {time.perf_counter() - begin:.0f} s")
    return 0


def _check(
    pattern: Pattern,
    *,
    tokens: int,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    plain: bool,
    packed: bool,
) -> None:
    begin = time.perf_counter()
    inputs = make_inputs(tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    segments = [tokens // 3, 0, tokens - tokens // 3] if packed else None
    name = f"{pattern}, {tokens} tokens, {dtype}, {heads}/{kv_heads} x {head_dim}, {plain=}"
    print(name, segments or "", end=" ", flush=True)
    engine = Engine("triton", "cpu")
    check_against_float64(pattern, inputs, engine, segments=segments, plain=plain)
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)


def _check_routed(pattern: Pattern, tokens: int, dtype: torch.dtype) -> None:
    """Hold chosen blocks to the other engine; columns are so long that they split."""
    listing.ITEM_TOKENS, listing.SHARE = 16, 1
    inputs = make_inputs(tokens, heads=2, kv_heads=1, dtype=dtype)
    routed = build_routed_layout(pattern, tokens, segments=[20, tokens - 20])
    chosen = choose_blocks(*describe_blocks(inputs.q, inputs.k, routed), routed)
    assert (chosen < len(routed.tokens)).any()
    _check_against_blockwise(
        pattern, inputs, dtype, lambda *x, **y: routed_attention(*x, routed, chosen=chosen, **y)
    )


def _check_pooled(pattern: Pattern, where: torch.Tensor | int, dtype: torch.dtype) -> None:
    """Hold near and far blocks to the other engine."""
    tokens = where if isinstance(where, int) else len(where)
    inputs = make_inputs(tokens, heads=2, kv_heads=1, head_dim=16, dtype=dtype)
    pooled = build_pooled_layout(pattern, where)
    _check_against_blockwise(
        pattern, inputs, dtype, lambda *x, **y: pooled_attention(*x, pooled, **y)
    )


def _check_against_blockwise(
    pattern: Pattern, inputs: Inputs, dtype: torch.dtype, attend: Callable[..., torch.Tensor]
) -> None:
    """Compare with the other engine in float64, gradients too."""
    begin = time.perf_counter()
    results = []
    for backend, kind in (("triton", dtype), ("blockwise", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = attend(*leaves, backend=backend)
        loss = (out * inputs.grad_out.to(kind)).sum()
        results.append((out, *torch.autograd.grad(loss, leaves)))
    for found, right in zip(*results, strict=True):
        error = float(((found.double() - right).norm() / right.norm()).detach())
        assert error < 5 * TOLERANCE[dtype], f"{pattern}: relative error {error}"
    print(f"{pattern}, {dtype}, {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
