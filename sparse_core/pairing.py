"""Finding the pairs of blocks that a pattern touches, in time proportional to their number."""

from functools import reduce
from operator import and_, or_
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.listed import Listed, expand_blocks
from sparse_core.patterns.terms import UNBOUNDED, Boxes, Clause, Interval

FEW = 64
"""Boxes of which all pairs are looked at, before they are quartered."""

Pairs = tuple[Int[Tensor, "Z"], Int[Tensor, "Z"]]
"""Rows (query blocks) and columns (key blocks), sorted by row, then column."""


def touching_pairs(own: list[Clause], query: Boxes, key: Boxes, *, single: bool) -> Pairs:
    """List the pairs of boxes of one group that some clause may touch.

    Boxes stand in the order of their groups; `single` says that there is one.
    """
    if not len(query) or not len(key):
        empty = torch.zeros(0, dtype=torch.int64, device=query.bounds.device)
        return empty, empty
    if () in own and single:
        number = (
            torch.arange(len(x), device=x.bounds.device, dtype=torch.int32) for x in (query, key)
        )
        row, column = torch.meshgrid(*number, indexing="ij")
        return row.flatten(), column.flatten()
    if () in own:
        wanted, groups = query.group_low, key.group_low
        begin = torch.searchsorted(groups, wanted)
        return _spread(begin, torch.searchsorted(groups, wanted, right=True))
    one_axis = query.bounds.shape[1] == 4
    if not (one_axis and _is_sorted(query) and (key is query or _is_sorted(key))):
        return _refine(own, query, key)
    row, column = _runs(own, query, key, single=single)
    if len(own) == 1 and len(own[0]) == 1 and isinstance(own[0][0], Interval):
        return row, column
    touched = may_touch(own, query[row], key[column])
    return (row, column) if bool(touched.all()) else (row[touched], column[touched])


def listed_pairs(
    listed: list[Listed],
    query: Boxes,
    key: Boxes,
    *,
    size: int,
    num_segments: int,
) -> Pairs:
    """List the pairs of blocks of `size` tokens that patterns enumerate themselves."""
    device = query.bounds.device
    segment = torch.arange(num_segments, device=device)
    first_column = torch.searchsorted(key.group_low, segment)
    columns = torch.searchsorted(key.group_low, segment, right=True) - first_column
    key_length = torch.zeros(num_segments, dtype=torch.int64, device=device)
    key_length.scatter_(0, key.group_low, key.length_low)
    keys = []
    for term in listed:
        pattern, factor = term.pattern, term.pattern.block // size
        row_segment = query.group_low
        num_columns = (key_length[row_segment] + pattern.block - 1) // pattern.block
        row, coarse = pattern.block_pairs(query.index_low // pattern.block, num_columns)
        place, column = expand_blocks(coarse, factor)
        row = row[place]
        exists = (column < columns[row_segment[row]]).nonzero()[:, 0]
        row, column = row[exists], column[exists]
        keys.append(row * len(key) + first_column[row_segment[row]] + column)
    unique = torch.unique(torch.cat(keys))
    return unique // max(len(key), 1), unique % max(len(key), 1)


def may_touch(clauses: list[Clause], query: Boxes, key: Boxes) -> Bool[Tensor, "Z"]:
    """Tell for each pair of boxes, one of each side, whether some clause may hold in it."""
    return _any_clause(clauses, query, key, "may_touch")


def covers(clauses: list[Clause], query: Boxes, key: Boxes) -> Bool[Tensor, "Z"]:
    """Tell for each pair of boxes, one of each side, whether some clause holds all over it."""
    return _any_clause(clauses, query, key, "covers")


def _any_clause(
    clauses: list[Clause], query: Boxes, key: Boxes, test: Literal["may_touch", "covers"]
) -> Bool[Tensor, "Z"]:
    if () in clauses or not clauses:
        return torch.full_like(query.index_low, () in clauses, dtype=torch.bool)
    found = ([getattr(term, test)(query, key) for term in clause] for clause in clauses)
    return reduce(or_, (reduce(and_, terms) for terms in found))


def _is_sorted(boxes: Boxes) -> bool:
    low, high = boxes.on_axis(0)
    next_group = boxes.group_low[1:] != boxes.group_low[:-1]
    return bool(((low[1:] > high[:-1]) | next_group).all())


def _runs(own: list[Clause], query: Boxes, key: Boxes, *, single: bool) -> Pairs:
    """In one dimension a row's keys lie between two blocks that a binary search finds."""
    low, high = _difference_bounds(own)
    (query_low, query_high), (key_low, key_high) = query.on_axis(0), key.on_axis(0)
    first, last = query_low - high, query_high - low
    if not single:
        smallest = torch.minimum(query_low.min(), key_low.min())
        width = torch.maximum(query_high.max(), key_high.max()) - smallest + 3

        def place(boxes: Boxes, *coordinates: Tensor) -> tuple[Tensor, ...]:
            inside = (torch.stack(coordinates) - (smallest - 1)).clamp_(min=0)
            return (boxes.group_low * width + torch.minimum(inside, width - 1)).unbind(0)

        key_low, key_high = place(key, key_low, key_high)
        first, last = place(query, first, last)
    begin = torch.searchsorted(key_high, first)
    return _spread(begin, torch.searchsorted(key_low, last, right=True))


def _spread(begin: Int[Tensor, "R"], end: Int[Tensor, "R"]) -> Pairs:
    """Pair each row with the columns from `begin` up to, not including, `end`."""
    count = (end - begin).clamp_(min=0)
    place = count.cumsum(0)
    total = int(place[-1])
    row = torch.arange(count.numel(), device=count.device, dtype=torch.int32)
    row = row.repeat_interleave(count, output_size=total)
    shift = (begin - place + count).to(torch.int32)
    column = torch.arange(total, device=count.device, dtype=torch.int32)
    return row, column + shift.index_select(0, row)


def _difference_bounds(own: list[Clause]) -> tuple[int, int]:
    """Find the smallest interval of query - key that holds all clauses."""
    lows, highs = [], []
    for clause in own:
        intervals = [t for t in clause if isinstance(t, Interval)]
        lows.append(max((t.low for t in intervals), default=-UNBOUNDED))
        highs.append(min((t.high for t in intervals), default=UNBOUNDED))
    return min(lows), max(highs)


def _refine(own: list[Clause], query: Boxes, key: Boxes) -> Pairs:
    """Quarter both sides from a few boxes down to the blocks, keeping the pairs that touch."""
    levels = [(query, key)]
    while max(map(len, levels[-1])) > FEW:
        q, k = levels[-1]
        above = q.joined().joined()
        levels.append((above, above if k is q else k.joined().joined()))
    device = query.bounds.device
    pairs = torch.cartesian_prod(
        *(torch.arange(len(boxes), device=device) for boxes in levels[-1])
    ).T
    inner = torch.cartesian_prod(*[torch.arange(4, device=device)] * 2).T[:, None]
    while levels:
        q, k = levels.pop()
        row, column = pairs.unbind(0)
        boxes_q, boxes_k = q[row.clamp(max=len(q) - 1)], k[column.clamp(max=len(k) - 1)]
        kept = (row < len(q)) & (column < len(k)) & may_touch(own, boxes_q, boxes_k)
        kept &= boxes_q.group_low <= boxes_k.group_high
        kept &= boxes_k.group_low <= boxes_q.group_high
        pairs = pairs.index_select(1, kept.nonzero()[:, 0])
        if levels:
            pairs = (4 * pairs[..., None] + inner).flatten(1)
    pair = torch.sort(pairs[0] * len(key) + pairs[1]).values
    return pair // len(key), pair % len(key)
