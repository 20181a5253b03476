"""Patterns as FlexAttention's mask_mod, written as its users would write them."""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from sparse_core.bench.cases import Place
from sparse_core.patterns import (
    Causal,
    Dense,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
    Union,
)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) to whether the pair is kept."""
Axes = Callable[[Tensor], tuple[Tensor, ...]]
"""From a token's number to its coordinates."""


def mask_mod(
    pattern: Pattern, place: Place, device: torch.device | str, *, raster: bool = False
) -> MaskMod:
    """Keep the same pairs as the pattern, for one sequence or one grid.

    Tokens stand in the place's order, or with `raster` row by row. Raises ValueError for patterns
    and places that no case asks for.
    """
    if place.segments is not None:
        raise ValueError("packed sequences are not asked of FlexAttention")
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    axes = _axes(place, raster=raster)
    return reduce(_either, (_single(part, axes, place.num_tokens, device) for part in parts))


def raster_order(place: Place) -> Tensor:
    """The tokens of a full grid row by row."""
    assert isinstance(place.coords, Tensor)
    assert place.side
    x, y = place.coords.long().unbind(-1)
    return (y * place.side + x).argsort()


def _axes(place: Place, *, raster: bool) -> Axes:
    side = place.side
    if raster:
        return lambda token: (token % side, token // side)
    if isinstance(place.coords, int):
        return lambda token: (token,)
    x, y = (axis.contiguous() for axis in place.coords.unbind(-1))
    return lambda token: (x[token], y[token])


def _single(pattern: Pattern, axes: Axes, tokens: int, device: torch.device | str) -> MaskMod:
    if isinstance(pattern, Dense):
        return lambda b, h, q, k: q >= 0
    if isinstance(pattern, Causal):
        return lambda b, h, q, k: q >= k
    if isinstance(pattern, SlidingWindow):
        return _window(pattern, axes)
    if isinstance(pattern, Strided):
        block, stride = pattern.block, pattern.stride
        return lambda b, h, q, k: (q // block - k // block) % stride == 0
    if isinstance(pattern, GlobalTokens):
        return _global(pattern, tokens, device)
    if isinstance(pattern, RandomBlocks):
        return _random(pattern, tokens, device)
    raise ValueError(f"no mask_mod for {pattern!r}")


def _window(pattern: SlidingWindow, axes: Axes) -> MaskMod:
    if pattern.radius is None:
        left, right = pattern.left, pattern.right
        assert left is not None
        assert right is not None
        return lambda b, h, q, k: (q - k <= left) & (k - q <= right)
    radius = pattern.radius
    assert isinstance(radius, int)

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        differences = [(x - y).abs() <= radius for x, y in zip(axes(q), axes(k), strict=True)]
        return differences[0] if len(differences) == 1 else differences[0] & differences[1]

    return near


def _global(pattern: GlobalTokens, tokens: int, device: torch.device | str) -> MaskMod:
    first = pattern.first
    if not pattern.positions:
        return lambda b, h, q, k: (q < first) | (k < first)
    marked = torch.zeros(tokens, dtype=torch.bool, device=device)
    marked[:first] = True
    marked[[position for position in pattern.positions if position < tokens]] = True
    return lambda b, h, q, k: marked[q] | marked[k]


def _random(pattern: RandomBlocks, tokens: int, device: torch.device | str) -> MaskMod:
    block = pattern.block
    num_blocks = -(-tokens // block)
    row = torch.arange(num_blocks, device=device)
    columns, exists = pattern.draws(row, torch.full_like(row, num_blocks))
    table = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=device)
    table[row[:, None].expand_as(columns)[exists], columns[exists]] = True
    return lambda b, h, q, k: table[q // block, k // block]


def _either(one: MaskMod, other: MaskMod) -> MaskMod:
    return lambda b, h, q, k: one(b, h, q, k) | other(b, h, q, k)
