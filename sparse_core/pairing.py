"""Finding the pairs of blocks that a pattern touches, in time proportional to their number."""

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.listed import Listed, expand_blocks
from sparse_core.patterns.terms import UNBOUNDED, Boxes, Clause, Interval

Pairs = tuple[Int[Tensor, "Z"], Int[Tensor, "Z"]]
"""Rows (query blocks) and columns (key blocks), sorted by row, then column."""


def touching_pairs(own: list[Clause], query: Boxes, key: Boxes) -> Pairs:
    """List the pairs of boxes of one group that some clause may touch."""
    if not query.low.shape[0] or not key.low.shape[0]:
        empty = torch.zeros(0, dtype=torch.int64, device=query.low.device)
        return empty, empty
    one_axis = query.low.shape[-1] == 1
    if one_axis and _is_sorted(query) and (key is query or _is_sorted(key)):
        row, column = _runs(own, query, key)
    else:
        row, column = _refine(own, query, key)
    touched = may_touch(own, query, key, (row, column))
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
    device = query.low.device
    segment = torch.arange(num_segments, device=device)
    first_column = torch.searchsorted(key.group_low, segment)
    columns = torch.searchsorted(key.group_low, segment, right=True) - first_column
    key_length = torch.zeros(num_segments, dtype=torch.int64, device=device)
    key_length.scatter_(0, key.group_low, key.length_low.long())
    keys = []
    for term in listed:
        pattern, factor = term.pattern, term.pattern.block // size
        row_segment = query.group_low
        num_columns = (key_length[row_segment] + pattern.block - 1) // pattern.block
        row, coarse = pattern.block_pairs(query.index_low.long() // pattern.block, num_columns)
        place, column = expand_blocks(coarse, factor)
        row = row[place]
        exists = column < columns[row_segment[row]]
        row, column = row[exists], column[exists]
        keys.append(row * key.low.shape[0] + first_column[row_segment[row]] + column)
    unique = torch.unique(torch.cat(keys))
    return unique // max(key.low.shape[0], 1), unique % max(key.low.shape[0], 1)


def may_touch(clauses: list[Clause], query: Boxes, key: Boxes, pairs: Pairs) -> Bool[Tensor, "Z"]:
    """Tell for each pair of boxes whether some clause may hold somewhere in it."""
    return _any_clause(clauses, query, key, pairs, "may_touch")


def covers(clauses: list[Clause], query: Boxes, key: Boxes, pairs: Pairs) -> Bool[Tensor, "Z"]:
    """Tell for each pair of boxes whether some clause surely holds all over it."""
    return _any_clause(clauses, query, key, pairs, "covers")


def _any_clause(
    clauses: list[Clause],
    query: Boxes,
    key: Boxes,
    pairs: Pairs,
    test: Literal["may_touch", "covers"],
) -> Bool[Tensor, "Z"]:
    row, column = pairs
    if () in clauses or not clauses:
        return torch.full_like(row, () in clauses, dtype=torch.bool)
    boxes_q, boxes_k = query[row], key[column]
    found = torch.zeros_like(row, dtype=torch.bool)
    for clause in clauses:
        found |= torch.stack([getattr(t, test)(boxes_q, boxes_k) for t in clause]).all(0)
    return found


def _is_sorted(boxes: Boxes) -> bool:
    low, high = boxes.low[:, 0], boxes.high[:, 0]
    same_group = boxes.group_low[1:] == boxes.group_low[:-1]
    return bool(((low[1:] > high[:-1]) | ~same_group).all())


def _runs(own: list[Clause], query: Boxes, key: Boxes) -> Pairs:
    """In one dimension a row's keys lie between two blocks that a binary search finds."""
    low, high = _difference_bounds(own)
    smallest = torch.minimum(query.low.min(), key.low.min()).long()
    largest = torch.maximum(query.high.max(), key.high.max()).long()
    width = largest - smallest + 3
    first_key = query.low[:, 0].long() - high
    last_key = query.high[:, 0].long() - low

    def place(group: Tensor, coordinate: Tensor) -> Tensor:
        inside = torch.minimum((coordinate - smallest + 1).clamp(min=0), width - 1)
        return group * width + inside

    begin = torch.searchsorted(
        place(key.group_low, key.high[:, 0].long()), place(query.group_low, first_key)
    )
    end = torch.searchsorted(
        place(key.group_low, key.low[:, 0].long()), place(query.group_low, last_key), right=True
    )
    count = (end - begin).clamp(min=0)
    total = int(count.sum())
    row = torch.arange(count.numel(), device=count.device, dtype=torch.int32)
    row = row.repeat_interleave(count, output_size=total)
    shift = begin - (count.cumsum(0) - count)
    column = torch.arange(total, device=count.device, dtype=torch.int32)
    return row, column + shift.to(torch.int32)[row]


def _difference_bounds(own: list[Clause]) -> tuple[int, int]:
    """Find the smallest interval of query - key that holds all clauses."""
    lows, highs = [], []
    for clause in own:
        intervals = [t for t in clause if isinstance(t, Interval)]
        lows.append(max((t.low for t in intervals), default=-UNBOUNDED))
        highs.append(min((t.high for t in intervals), default=UNBOUNDED))
    return min(lows), max(highs)


def _refine(own: list[Clause], query: Boxes, key: Boxes) -> Pairs:
    """Halve both sides from one box each down to the blocks, keeping the pairs that touch."""
    query_levels, key_levels = _pyramid(query), _pyramid(key)
    depth = max(len(query_levels), len(key_levels))
    query_levels += query_levels[-1:] * (depth - len(query_levels))
    key_levels += key_levels[-1:] * (depth - len(key_levels))
    row = torch.zeros(1, dtype=torch.int64, device=query.low.device)
    column = row
    for q, k in zip(reversed(query_levels[:-1]), reversed(key_levels[:-1]), strict=True):
        row = torch.stack([2 * row, 2 * row, 2 * row + 1, 2 * row + 1]).flatten()
        column = torch.stack([2 * column, 2 * column + 1] * 2).flatten()
        exists = (row < q.low.shape[0]) & (column < k.low.shape[0])
        row, column = row[exists], column[exists]
        meet = (q.group_low[row] <= k.group_high[column]) & (
            k.group_low[column] <= q.group_high[row]
        )
        kept = meet & may_touch(own, q, k, (row, column))
        row, column = row[kept], column[kept]
    if depth == 1:
        same_group = query.group_low[row] == key.group_low[column]
        row, column = row[same_group], column[same_group]
    pair = torch.sort(row * key.low.shape[0] + column).values
    return pair // key.low.shape[0], pair % key.low.shape[0]


def _pyramid(boxes: Boxes) -> list[Boxes]:
    """Join neighbours two by two until one box is left."""
    levels = [boxes]
    while levels[-1].low.shape[0] > 1:
        below = levels[-1]
        left = torch.arange(0, below.low.shape[0], 2, device=below.low.device)
        right = (left + 1).clamp(max=below.low.shape[0] - 1)
        first, second = below[left], below[right]
        levels.append(
            Boxes(
                torch.minimum(first.low, second.low),
                torch.maximum(first.high, second.high),
                torch.minimum(first.index_low, second.index_low),
                torch.maximum(first.index_high, second.index_high),
                torch.minimum(first.length_low, second.length_low),
                torch.maximum(first.length_high, second.length_high),
                torch.minimum(first.group_low, second.group_low),
                torch.maximum(first.group_high, second.group_high),
            )
        )
    return levels
