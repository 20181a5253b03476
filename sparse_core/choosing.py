"""The best blocks for each block, without ever holding all scores.

A first pass finds groups of blocks by their best, a second the best blocks of these groups. That
is exact: the K best blocks lie in the K groups with the best maxima, for if a block's group is not
among them, each of those holds a block that comes before it. There are few maxima, so that ordering
them costs little beside making the scores.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_NUMBERS = 2**25
"""Scores of pairs of blocks, or channels of chosen ones, held at a time."""
GROUP = 16
"""Blocks in a group."""

_LOW = 2**31 - 1
_NOTHING = -2139095041
"""The upper half of a rank whose score is minus infinity."""


@torch.library.custom_op("gigasparse::choose", mutates_args=())
def choose(
    queries: Tensor, keys: Tensor, low: Tensor, high: Tensor, num_near: int, num_chosen: int
) -> Tensor:
    """Find the `num_chosen` keys [B, H, R, D] with the largest product with each query, by number.

    Query r chooses from `low[r]` up to, not including, `high[r]`, and none of the `num_near` to
    each side. The largest stands first, equal ones (as float32) by number; R stands for none.
    """
    number = torch.arange(queries.shape[2], device=queries.device)
    if not queries.shape[:3].numel() or not num_chosen:
        return number.new_empty((*queries.shape[:3], num_chosen))
    ends = low, high, num_near
    with torch.amp.autocast(queries.device.type, enabled=False):
        groups = _best_groups(queries, keys, number, ends, num_chosen)
        best = _best_members(queries, keys, number, ends, groups)
    return torch.where(best >> 32 > _NOTHING, _number(best), len(number))


@choose.register_fake
def _choose_fake(
    queries: Tensor, keys: Tensor, low: Tensor, high: Tensor, num_near: int, num_chosen: int
) -> Tensor:
    return queries.new_empty((*queries.shape[:3], num_chosen), dtype=torch.int64)


_Ends = tuple[Int[Tensor, "R"], Int[Tensor, "R"], int]


def _best_groups(
    queries: Float[Tensor, "B H R D"],
    keys: Float[Tensor, "B H R D"],
    number: Int[Tensor, "R"],
    ends: _Ends,
    num_chosen: int,
) -> Int[Tensor, "B H R K"]:
    """Keep the best groups so far while going through the keys."""
    shape = (*queries.shape[:3], num_chosen)
    best = torch.full(shape, _NOTHING << 32, device=queries.device)
    step = max(1, CHUNK_NUMBERS // (queries.shape[:3].numel() * GROUP)) * GROUP
    for begin in range(0, len(number), step):
        column = number[begin : begin + step]
        scores = queries @ keys[:, :, begin : begin + step].mT
        scores.masked_fill_(~_allowed(number[:, None], column, ends), -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, -len(column) % GROUP), value=-torch.inf)
        rank = _rank(scores.unflatten(3, (-1, GROUP)).amax(4), column[::GROUP] // GROUP)
        best = torch.cat([best, rank], 3).topk(num_chosen, dim=3).values
    return _number(best)


def _best_members(
    queries: Float[Tensor, "B H R D"],
    keys: Float[Tensor, "B H R D"],
    number: Int[Tensor, "R"],
    ends: _Ends,
    groups: Int[Tensor, "B H R K"],
) -> Int[Tensor, "B H R K"]:
    """Rank the keys of each query's groups, some queries at a time."""
    batch, heads, num_blocks, channels = keys.shape
    num_chosen = groups.shape[3]
    table = keys.reshape(-1, channels)
    head = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1, 1)
    inside = torch.arange(GROUP, device=keys.device)
    found = []
    step = max(1, CHUNK_NUMBERS // (batch * heads * num_chosen * GROUP * channels))
    for row, group in zip(number.split(step), groups.split(step, 2), strict=True):
        column = (group[..., None] * GROUP + inside).flatten(3)
        exists = column < num_blocks
        column = column.clamp(max=num_blocks - 1)
        members = torch.nn.functional.embedding(head * num_blocks + column, table)
        scores = (members @ queries.index_select(2, row)[..., None])[..., 0]
        scores.masked_fill_(~(exists & _allowed(row[:, None], column, ends)), -torch.inf)
        found.append(_rank(scores, column).topk(num_chosen, dim=3).values)
    return torch.cat(found, 2)


def _allowed(
    row: Int[Tensor, "..."], column: Int[Tensor, "..."], ends: _Ends
) -> Bool[Tensor, "..."]:
    low, high, near = ends
    within = (column >= low[row]) & (column < high[row])
    return within & ((column < row - near) | (column > row + near))


def _rank(scores: Float[Tensor, "..."], number: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Order by score, as float32, and where it is equal by number, smallest first: an integer."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0 is equal to 0
    bits = bits ^ ((bits >> 31) & _LOW)
    return (bits.long() << 32) + (_LOW - number)


def _number(rank: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    return _LOW - (rank & 0xFFFFFFFF)
