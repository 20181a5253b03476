"""From chosen blocks to lists and a schedule: static sizes, so that nothing waits for the device.

`build_layout` and `make_schedule` ask the device how many entries there are. Here a row has at most
as many as are chosen, known before, and what is not used is left at the end of each group's share.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.layout import BlockLayout, Lists
from sparse_core.schedule import (
    ITEM_TOKENS,
    Agenda,
    Family,
    Launch,
    cut_ranges,
    rows_of,
    size_class,
)

SHARE = 16
"""A column is split when it is longer than so many of the longest rows: pieces then hold at most
an eighth of the tokens."""


def with_chosen(
    layout: BlockLayout,
    chosen: Int[Tensor, "B Hkv R K"],
    exists: Bool[Tensor, "B Hkv R K"],
) -> BlockLayout:
    """Fill in the lists of a layout that has one part: key blocks chosen by each query block.

    Each head of each sample gets lists of its own; no key block is named twice in a row. Blocks
    shorter than their size need a mask, all others none. Nothing is copied to the host.
    """
    (part,) = layout.parts
    num_rows, width = chosen.shape[2:]
    flat, alive = chosen.flatten(0, 1), exists.flatten(0, 1)
    column = torch.where(alive, flat, len(part.keys))
    column, order = torch.sort(column, dim=2)
    alive = alive.gather(2, order)
    column = torch.where(alive, column, 0)
    row = torch.arange(num_rows, device=chosen.device)[:, None].expand_as(column)
    short_query, short_key = (b.count < b.size for b in (part.queries, part.keys))
    full = ~(short_query[row] | short_key[column])
    entries = [x.flatten(1) for x in (row, column, full, alive)]
    rows = _compress(entries[0], entries[1], *entries[2:], num_major=num_rows)
    columns = _compress(entries[1], entries[0], *entries[2:], num_major=len(part.keys))
    filled = replace(part, rows=rows, columns=columns)
    schedule = replace(
        layout.schedule,
        queries=_agenda(
            layout.schedule.queries,
            Family(part.queries, (0,), (rows,), (part.keys,)),
            longest=width,
            limit=width,
        ),
        keys=_agenda(
            layout.schedule.keys,
            Family(part.keys, (0,), (columns,), (part.queries,)),
            longest=num_rows,
            limit=max(ITEM_TOKENS // part.queries.size, SHARE * width, 1),
        ),
    )
    numbers = torch.arange(flat.shape[0], device=chosen.device, dtype=torch.int32)
    group_of = numbers.view(chosen.shape[:2])
    return replace(layout, parts=(filled,), schedule=schedule, group_of=group_of)


def _compress(
    major: Int[Tensor, "G N"],
    minor: Int[Tensor, "G N"],
    full: Bool[Tensor, "G N"],
    alive: Bool[Tensor, "G N"],
    *,
    num_major: int,
) -> Lists:
    """Sort entries by row, partial before full, else as they come; the dead go to the end."""
    groups, num_entries = major.shape
    rank = torch.where(alive, 2 * major + full, 2 * num_major)
    rank, order = torch.sort(rank, dim=1, stable=True)
    edges = torch.arange(2 * num_major + 1, device=major.device).expand(groups, -1).contiguous()
    first = torch.arange(groups, device=major.device)[:, None] * num_entries
    place = (torch.searchsorted(rank, edges) + first).to(torch.int32)
    index = minor.gather(1, order).flatten().to(torch.int32)
    return Lists(place[:, ::2].contiguous(), place[:, 1::2].contiguous(), index, index[:0])


def _agenda(agenda: Agenda, family: Family, *, longest: int, limit: int) -> Agenda:
    """Cut lists longer than `limit` into pieces, long ones first; none exceeds `longest`."""
    (lists,) = family.lists
    groups, num_rows = lists.full.shape
    most_splits = lists.index.shape[0] // groups // limit if longest > limit else 0
    length = (lists.ptr[:, 1:] - lists.ptr[:, :-1]).long()
    pieces = ((length + limit - 1) // limit).clamp(min=1)
    split = pieces > 1
    slots = torch.where(split, pieces, 0)
    first_slot = slots.cumsum(1) - slots
    end = pieces.cumsum(1)
    number = torch.arange(num_rows + most_splits, device=length.device).expand(groups, -1)
    block = torch.searchsorted(end, number.contiguous(), right=True)
    used = block < num_rows
    block = block.clamp(max=num_rows - 1)
    piece = number - (end - pieces).gather(1, block)
    first = piece * limit
    last = torch.minimum(first + limit, length.gather(1, block))
    slot = torch.where(split.gather(1, block), first_slot.gather(1, block) + piece, -1)
    items = torch.stack([block, first, last, slot], 2).masked_fill(~used[..., None], -1)
    size = size_class(items[..., 2] - items[..., 1])
    order = torch.sort(size, dim=1, descending=True, stable=True).indices
    items = items.gather(1, order[..., None].expand_as(items)).to(torch.int32)
    splits = _splits(split, first_slot, pieces, most_splits)
    row = items[..., 0].clamp(min=0)
    row = row + torch.arange(groups, device=row.device)[:, None] * num_rows
    ranges = cut_ranges(rows_of([family]), row.flatten(), items[..., 1:3].flatten(0, 1).T)
    return replace(
        agenda,
        launches=(
            Launch(
                items=items,
                ranges=ranges.unflatten(0, items.shape[:2]),
                splits=splits,
                part_numbers=family.numbers,
                affine=(False,),
                num_slots=2 * most_splits,
            ),
        ),
    )


def _splits(
    split: Bool[Tensor, "G R"],
    first_slot: Int[Tensor, "G R"],
    pieces: Int[Tensor, "G R"],
    most: int,
) -> Int[Tensor, "G K 3"]:
    """List the split rows of each group; what is left over is -1."""
    rows = torch.arange(split.shape[1], device=split.device).expand_as(split)
    found = torch.stack([rows, first_slot, pieces], 2)
    place = torch.where(split, split.cumsum(1) - 1, most)
    table = found.new_full((split.shape[0], most + 1, 3), -1)
    table.scatter_(1, place[..., None].expand_as(found), found)
    return table[:, :most].to(torch.int32).contiguous()
