"""From chosen blocks to lists and a schedule: static sizes, so that nothing waits for the device.

`build_layout` and `make_schedule` ask the device how many entries there are. Here a row has at most
as many as are chosen, known before, and what is not used is left at the end of each group's share.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.blocking import Blocks
from sparse_core.layout import BlockLayout, Lists, Part
from sparse_core.schedule import (
    ITEM_TOKENS,
    Agenda,
    Family,
    Launch,
    Side,
    cut_ranges,
    mark_untouched,
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
    """Fill in the lists of a layout's last part: key blocks chosen by each query block.

    Each head of each sample gets lists of its own; no key block is named twice in a row. Blocks
    shorter than their size need a mask, all others none. The numbers of `block_bias`
    [B, Hkv, R * K] are in the order of `chosen`. Nothing is copied to the host.
    """
    *others, part = layout.parts
    num_rows, width = chosen.shape[2:]
    column, alive = (x.flatten(0, 1).flatten(1) for x in (torch.where(exists, chosen, 0), exists))
    row = (torch.arange(column.shape[1], device=chosen.device) // width).expand_as(column)
    full = alive
    if part.queries.num_tokens < num_rows * part.queries.size:
        whole = part.queries.count == part.queries.size
        full = whole[row] & whole[column]
    by_row = _compress(row, full, alive, num_major=num_rows)
    by_column = _compress(column, full, alive, num_major=num_rows)
    rows, columns = (
        Lists(ptr, first_full, index.flatten().int(), part.rows.tile, place.flatten().int())
        for (ptr, first_full, place), index in (
            (by_row, column.gather(1, by_row[2])),
            (by_column, by_column[2] // width),
        )
    )
    filled = replace(part, rows=rows, columns=columns, num_biases=num_rows * width)
    parts = (*others, filled)
    schedule = replace(
        layout.schedule,
        queries=_agenda(layout.schedule.queries, parts, "queries", longest=width, width=width),
        keys=_agenda(layout.schedule.keys, parts, "keys", longest=num_rows, width=width),
    )
    numbers = torch.arange(column.shape[0], device=chosen.device, dtype=torch.int32)
    group_of = numbers.view(chosen.shape[:2])
    found = replace(layout, parts=parts, schedule=schedule, group_of=group_of)
    if not torch.compiler.is_compiling():
        found.__dict__["_filled"] = layout
    return found


def _compress(
    major: Int[Tensor, "G N"],
    full: Bool[Tensor, "G N"],
    alive: Bool[Tensor, "G N"],
    *,
    num_major: int,
) -> tuple[Int[Tensor, "G R+1"], Int[Tensor, "G R"], Int[Tensor, "G N"]]:
    """Sort entries by row, partial before full, else as they come; the dead go to the end.

    Gives where rows begin, where their full entries begin, and which entry comes at each place.
    """
    groups, num_entries = major.shape
    ranks = groups * (2 * num_major + 1)
    dtype = torch.int32 if ranks < 2**31 else torch.int64
    edges = torch.arange(ranks, device=major.device, dtype=dtype).view(groups, -1)
    rank = torch.where(alive, torch.add(full, major, alpha=2), 2 * num_major)
    rank, order = torch.sort((rank + edges[:, :1]).to(dtype).flatten(), stable=True)
    place = torch.searchsorted(rank, edges, out_int32=True)
    order = order.view(groups, num_entries) % num_entries
    return place[:, ::2].contiguous(), place[:, 1::2].contiguous(), order


def _agenda(
    agenda: Agenda, parts: tuple[Part, ...], side: Side, *, longest: int, width: int
) -> Agenda:
    """Plan anew the launch of the last part, whose lists hold at most `longest` entries.

    Where other parts' lists were not split, and these are short, neither are both together.
    """
    chosen = len(parts) - 1
    launches = list(agenda.launches)
    for number, launch in enumerate(launches):
        if chosen in launch.part_numbers:
            size = max(getattr(parts[n], _OTHER[side]).size for n in launch.part_numbers)
            limit = max(ITEM_TOKENS // size, SHARE * width)
            if launch.num_slots or longest > limit:
                found = _cut(launch, parts, side, limit)
                if agenda.complete and agenda.state_of.numel() and number == len(launches) - 1:
                    found = mark_untouched(found, _blocks(launch, parts, side), agenda.state_of)
            else:
                found = _fill(launch, getattr(parts[chosen], _LISTS[side]), chosen)
            launches[number] = found
    return replace(agenda, launches=tuple(launches))


def _fill(launch: Launch, lists: Lists, part_number: int) -> Launch:
    """Exchange a part's ranges in items that are whole, long ones first."""
    groups, at = lists.ptr.shape[0], launch.part_numbers.index(part_number)
    ends = torch.stack([lists.ptr[:, :-1], lists.full, lists.ptr[:, 1:]], 2)
    first = lists.index[ends[..., :2].clamp(max=lists.index.numel() - 1)]
    mine = torch.cat([ends, first], 2)
    block = launch.items[0, :, 0]
    if launch.places[at].numel():
        mine = mine.new_zeros(groups, block.numel(), 5).index_copy(1, launch.places[at], mine)
    ranges = launch.ranges.expand(groups, -1, -1, -1).clone()
    ranges[:, :, at] = mine.index_select(1, block)
    length, order = torch.sort(
        (ranges[..., 2] - ranges[..., 0]).sum(2), dim=1, descending=True, stable=True
    )
    items = launch.items[0][order]
    items[..., 2] = length
    return replace(
        launch, items=items, ranges=ranges.gather(1, order[..., None, None].expand_as(ranges)),
        splits=launch.splits.expand(groups, -1, -1),
    )  # fmt: skip


def _cut(launch: Launch, parts: tuple[Part, ...], side: Side, limit: int) -> Launch:
    """Cut lists of all parts longer than a limit into pieces, long ones first."""
    groups, blocks = parts[-1].rows.ptr.shape[0], _blocks(launch, parts, side)
    lists = [_expand(getattr(parts[n], _LISTS[side]), groups) for n in launch.part_numbers]
    places = [
        None if mine.full.shape[1] == len(blocks) and not place.numel() else place
        for mine, place in zip(lists, launch.places, strict=True)
    ]
    others = tuple(getattr(parts[n], _OTHER[side]) for n in launch.part_numbers)
    rows = rows_of([Family(blocks, launch.part_numbers, tuple(lists), others, tuple(places))])
    shares = (parts[n].num_blocks // parts[n].rows.ptr.shape[0] for n in launch.part_numbers)
    most_splits = max(sum(shares) // limit, 1)
    length = (rows.ends[:, 2] - rows.ends[:, 0]).sum(0).view(groups, len(blocks))
    items, splits = _items(length, limit, most_splits)
    row = torch.arange(groups, device=items.device)[:, None] * len(blocks)
    row = (row + items[..., 0].clamp(min=0)).flatten()
    ranges = cut_ranges(rows, row, items[..., 1:3].flatten(0, 1).T)
    return replace(
        launch,
        items=items,
        ranges=ranges.unflatten(0, items.shape[:2]),
        splits=splits,
        num_slots=2 * most_splits,
    )


_LISTS: dict[Side, str] = {"queries": "rows", "keys": "columns"}
_OTHER: dict[Side, Side] = {"queries": "keys", "keys": "queries"}


def _blocks(launch: Launch, parts: tuple[Part, ...], side: Side) -> Blocks:
    blocks: Blocks = getattr(parts[launch.part_numbers[0]], side)
    return blocks


def _expand(lists: Lists, groups: int) -> Lists:
    """Write out that all groups share lists."""
    if lists.ptr.shape[0] == groups:
        return lists
    return replace(lists, ptr=lists.ptr.expand(groups, -1), full=lists.full.expand(groups, -1))


def _items(
    length: Int[Tensor, "G R"], limit: int, most_splits: int
) -> tuple[Int[Tensor, "G I 4"], Int[Tensor, "G K 3"]]:
    """Write the items and splits of each group, where at most `most_splits` lists are split."""
    groups, num_rows = length.shape
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
    items = items.gather(1, order[..., None].expand_as(items))
    return items.int(), _splits(split, first_slot, pieces, most_splits)


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
