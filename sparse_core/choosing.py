"""The best blocks for each block, without ever holding all scores.

Some queries at a time: keys are put in groups, and the best keys are looked for in the groups with
the best maxima, there in the best parts of groups. That is exact: the K best keys lie in the K best
groups, for if a key's group is not among them, each of those holds a key that comes before it.
Groups where only some keys may be chosen are taken by all of their keys; a query has at most EDGES
of them, and takes as many more groups. So a pass over all scores does no more than write them and
find maxima, and what is sorted after it is short.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_NUMBERS = 2**26
"""Scores of pairs of blocks, or channels of chosen ones, held at a time."""
GROUP, PART = 32, 8
"""Blocks in a group, and in a part of one."""
EDGES = 4
"""Ends of what a query may choose from, before and after the blocks that are near."""

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
    num_blocks = keys.shape[2]
    number = torch.arange(num_blocks, device=queries.device)
    if not queries.shape[:3].numel() or not num_chosen:
        return number.new_empty((*queries.shape[:3], num_chosen))
    before, after = number - num_near, number + num_near + 1
    ends = torch.stack([low, torch.minimum(high, before), torch.maximum(low, after), high])
    grouped = num_blocks > GROUP * (num_chosen + EDGES)
    step = max(1, CHUNK_NUMBERS // (queries.shape[:2].numel() * num_blocks))
    found = []
    with torch.amp.autocast(queries.device.type, enabled=False):
        table = _in_groups(keys).mT if grouped else keys.mT
        rows = zip(queries.split(step, 2), ends[..., None].split(step, 1), strict=True)
        for some, within in rows:
            scores, column = some @ table, number
            if grouped:
                scores, column = _best_groups(scores, within, num_chosen)
            else:
                scores.masked_fill_(~_allowed(within, number, number), -torch.inf)
            rank = _rank(scores, column)
            found.append(rank.topk(num_chosen, dim=3).values)
    best = torch.cat(found, 2)
    return torch.where(best >> 32 > _NOTHING, _number(best), num_blocks)


@choose.register_fake
def _choose_fake(
    queries: Tensor, keys: Tensor, low: Tensor, high: Tensor, num_near: int, num_chosen: int
) -> Tensor:
    return queries.new_empty((*queries.shape[:3], num_chosen), dtype=torch.int64)


@torch.library.custom_op("gigasparse::score_blocks", mutates_args=())
def score_blocks(queries: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    """Multiply each query [B, H, R, D] with the keys that it chose [B, H, R, K].

    Differentiable; what stands for none gets any score.
    """
    if not chosen.numel():
        return queries.new_empty(chosen.shape)
    with torch.amp.autocast(queries.device.type, enabled=False):
        found = [
            (_gather(keys, names) @ some[..., None])[..., 0]
            for some, names in _some_rows(keys, chosen, queries, chosen)
        ]
    return torch.cat(found, 2)


@score_blocks.register_fake
def _score_blocks_fake(queries: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    return queries.new_empty(chosen.shape)


@torch.library.custom_op("gigasparse::score_blocks_backward", mutates_args=())
def _score_blocks_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums go in a fixed order: those of a key over sorted entries."""
    by_query, by_key = [], torch.zeros_like(keys).flatten(0, 2)
    with torch.amp.autocast(queries.device.type, enabled=False):
        for some, mine, names in _some_rows(keys, chosen, grad, queries, chosen):
            by_query.append((some[..., None, :] @ _gather(keys, names))[..., 0, :])
            by_entry = some[..., None] * mine[..., None, :]
            by_key += torch.ops.aten.embedding_dense_backward(
                by_entry, _places(names, keys), by_key.shape[0], -1, False
            )
    return torch.cat(by_query, 2), by_key.view(keys.shape)


@_score_blocks_backward.register_fake
def _score_blocks_backward_fake(
    grad: Tensor, queries: Tensor, keys: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    found = torch.ops.gigasparse.score_blocks_backward(grad, *ctx.saved_tensors)
    return *found, None


score_blocks.register_autograd(_differentiate, setup_context=_save)


def _in_groups(keys: Float[Tensor, "B H R D"]) -> Float[Tensor, "B H R+ D"]:
    """Order keys by their places in groups of consecutive ones: maxima are then of whole rows."""
    padded = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[2] % GROUP))
    return padded.unflatten(2, (-1, GROUP)).transpose(2, 3).flatten(2, 3)


def _best_groups(
    scores: Float[Tensor, "B H r R+"], within: Int[Tensor, "4 r 1"], num_chosen: int
) -> tuple[Float[Tensor, "B H r N"], Int[Tensor, "B H r N"]]:
    """Give the scores of keys in the best parts of the best groups, and their numbers."""
    members = scores.unflatten(3, (GROUP, -1))
    first = torch.arange(members.shape[4], device=scores.device) * GROUP
    some_allowed = _allowed(within, first, first + GROUP - 1)
    best = members.amax(3).masked_fill_(~some_allowed, -torch.inf)
    members, first = _take(members, first, best, num_chosen + EDGES)
    members = members.unflatten(3, (-1, PART)).transpose(3, 4).flatten(4)
    part = torch.arange(GROUP // PART, device=scores.device)[:, None] * PART
    first = (first[:, :, :, None] + part).flatten(3)
    inside = torch.arange(PART, device=scores.device)[:, None]
    number = first[:, :, :, None] + inside
    allowed = _allowed(within[..., None], number, number)
    members = members.masked_fill(~allowed, -torch.inf)
    members, first = _take(members, first, members.amax(3), num_chosen)
    return members.flatten(3), (first[:, :, :, None] + inside).flatten(3)


def _take(
    members: Float[Tensor, "B H r M G"],
    first: Int[Tensor, "G"] | Int[Tensor, "B H r G"],
    best: Float[Tensor, "B H r G"],
    count: int,
) -> tuple[Float[Tensor, "B H r M N"], Int[Tensor, "B H r N"]]:
    """Keep the groups with the best maxima: their members, and their first keys' numbers."""
    place = _rank(best, first).topk(count, dim=3, sorted=False).indices
    taken = members.gather(4, place[:, :, :, None].expand(-1, -1, -1, members.shape[3], -1))
    return taken, first.expand_as(best).gather(3, place)


def _allowed(
    within: Int[Tensor, "4 r 1"], first: Int[Tensor, "..."], last: Int[Tensor, "..."]
) -> Bool[Tensor, "..."]:
    """Whether rows may choose some of the blocks from `first` to `last`: those of two runs."""
    low, before, after, high = within.unbind(0)
    return ((last >= low) & (first < before)) | ((last >= after) & (first < high))


def _rank(scores: Float[Tensor, "..."], number: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Order by score, as float32, and where it is equal by number, smallest first: an integer."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0 is equal to 0
    bits = bits ^ ((bits >> 31) & _LOW)
    return torch.add(_LOW - number, bits, alpha=2**32)


def _number(rank: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    return _LOW - (rank & 0xFFFFFFFF)


def _some_rows(
    keys: Float[Tensor, "B H R D"], chosen: Int[Tensor, "B H R K"], *tensors: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors [B, H, R, ...] so that the keys of some rows' choices are few."""
    row_numbers = chosen[:, :, 0].numel() * keys.shape[3]
    step = max(1, CHUNK_NUMBERS // max(row_numbers, 1))
    return zip(*(x.split(step, 2) for x in tensors), strict=True)


def _places(chosen: Int[Tensor, "B H r K"], keys: Float[Tensor, "B H R D"]) -> Tensor:
    """Where chosen keys are in a table of those of all heads."""
    batch, heads, num_blocks, _ = keys.shape
    head = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1, 1)
    return chosen.clamp(max=num_blocks - 1) + head * num_blocks


def _gather(
    keys: Float[Tensor, "B H R D"], chosen: Int[Tensor, "B H r K"]
) -> Float[Tensor, "B H r K D"]:
    return torch.nn.functional.embedding(_places(chosen, keys), keys.flatten(0, 2))
