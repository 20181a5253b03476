"""In what pieces and in what order kernels work through a layout.

Parts share a launch where the blocks of one are all among those of the other. Launches follow one
another: all but the last leave what they found of their tokens in a float32 state, from which the
next goes on. Lists
much longer than the rest are cut into items of about equal size, whose pieces are joined in a fixed
order, so that results are the same in every run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.blocking import Blocks

if TYPE_CHECKING:
    from sparse_core.layout import Lists, Part

Side = Literal["queries", "keys"]
Spacing = Literal["free", "segments", "tokens"]
SPACINGS: tuple[Spacing, ...] = ("free", "segments", "tokens")

WHOLE, UNTOUCHED = -1, -2
"""Slots of items that are no pieces; of untouched ones no earlier launch left a state."""

ITEM_TOKENS = 4096
"""An item walks over at least so many tokens of the other side before its block is split."""
MAX_SPLIT_TOKENS = 2**15
"""Tokens in split pieces, a head, unless half the side's tokens are more."""


@dataclass(frozen=True)
class Launch:
    """One run of a kernel: the blocks of one side, in items.

    `items` are (block, first, last, slot): list entries `first` to `last - 1` of a block, counted
    through the lists of all its parts. A piece of a split block goes to its slot; that of a whole
    block is WHOLE or UNTOUCHED. `splits` are (block, first slot, number of pieces). Where groups
    differ in number, the rest is filled with block -1; where all share the lists, G is 1.

    `ranges` says what items say part by part, so that a kernel need not read one number to find the
    next: where in the part's list an item begins, up to where entries need a mask, where it ends,
    and the blocks at the first and the second of these. The first of `part_numbers` has all blocks
    that the launch works through. `affine` says of each part whether full blocks of any list follow
    one another in memory.

    `places` say where each part's blocks are among the first's; empty if they are the same.
    """

    items: Int[Tensor, "G I 4"]
    ranges: Int[Tensor, "G I S 5"]
    splits: Int[Tensor, "G K 3"]
    part_numbers: tuple[int, ...]
    affine: tuple[bool, ...]
    num_slots: int
    places: tuple[Int[Tensor, "R"], ...] = ()


@dataclass(frozen=True)
class Agenda:
    """The launches of one side. With `complete`, the last one reaches every token.

    `state_of` gives the place in the state of each token that a launch before the last reaches, -1
    for others; it is empty where every token has the place of its own number. With `fresh` the
    first launch writes all of the state.
    """

    launches: tuple[Launch, ...]
    state_of: Int[Tensor, "T"]
    num_states: int
    complete: bool
    fresh: bool


@dataclass(frozen=True)
class Schedule:
    """Agendas by queries (forward, dQ) and by keys (dK, dV).

    `spacing` says what token numbers tell of coordinates: "tokens" if they are the coordinates,
    "segments" if within a sequence they differ as the coordinates do, else "free".
    """

    queries: Agenda
    keys: Agenda
    spacing: Spacing


def make_schedule(
    parts: tuple["Part", ...],
    query_coords: Int[Tensor, "Tq P"],
    key_coords: Int[Tensor, "Tk P"],
    lengths: Int[Tensor, "S"],
    key_lengths: Int[Tensor, "S"],
) -> Schedule:
    """Plan the launches for the parts of a layout."""
    by_queries, by_keys = _families(parts, "queries"), _families(parts, "keys")
    cutter = _Cutter()
    queries = _agenda(parts, by_queries, "queries", query_coords.shape[0], cutter)
    if query_coords.shape[0] == key_coords.shape[0] and _mirrored(parts, by_queries, by_keys):
        turns, _ = _in_turn(by_keys, key_coords.shape[0])
        launches = [
            replace(launch, part_numbers=tuple(family.numbers), places=family.places_given())
            for launch, family in zip(queries.launches, turns, strict=True)
        ]
        keys = replace(queries, launches=tuple(launches))
    else:
        keys = _agenda(parts, by_keys, "keys", key_coords.shape[0], cutter)
    return Schedule(queries, keys, _spacing(query_coords, key_coords, lengths, key_lengths))


def _mirrored(
    parts: tuple["Part", ...], by_queries: list["Family"], by_keys: list["Family"]
) -> bool:
    """Whether keys meet the same lists in the same blocks as queries, as in symmetric patterns."""
    if [len(f.numbers) for f in by_queries] != [len(f.numbers) for f in by_keys]:
        return False
    mine, other = [], []
    for a, b in zip(by_queries, by_keys, strict=True):
        for m, n in zip(a.numbers, b.numbers, strict=True):
            one, two = parts[m], parts[n]
            for x, y in ((one.queries, two.keys), (one.keys, two.queries)):
                if (x.stride, x.size, x.num_tokens) != (y.stride, y.size, y.num_tokens):
                    return False
                if x is not y:
                    mine += [x.start, x.count, x.order]
                    other += [y.start, y.count, y.order]
            if one.rows is not two.columns:
                mine += [one.rows.ptr, one.rows.full, one.rows.index]
                other += [two.columns.ptr, two.columns.full, two.columns.index]
    if [x.shape for x in mine] != [x.shape for x in other]:
        return False
    return not mine or torch.equal(*(torch.cat([x.flatten() for x in s]) for s in (mine, other)))


def _spacing(
    query_coords: Tensor, key_coords: Tensor, lengths: Tensor, key_lengths: Tensor
) -> Spacing:
    if query_coords.shape[1] != 1:
        return "free"
    sides = [(query_coords[:, 0], lengths), (key_coords[:, 0], key_lengths)]
    if key_coords is query_coords:
        sides = sides[:1]
    if all(_counts_up(coords, None) for coords, _ in sides):
        return "tokens"
    alike = torch.equal(lengths, key_lengths)
    return "segments" if alike and all(_counts_up(*side) for side in sides) else "free"


def _counts_up(coords: Int[Tensor, "T"], lengths: Int[Tensor, "S"] | None) -> bool:
    """Whether coordinates count from 0, in all or in each sequence."""
    token = torch.arange(coords.shape[0], device=coords.device)
    if lengths is not None:
        first = lengths.cumsum(0) - lengths
        token = token - first.repeat_interleave(lengths, output_size=coords.shape[0])
    return torch.equal(coords.long(), token)


@dataclass(frozen=True)
class Family:
    """Parts that share a launch: the numbers of each, and where its blocks are among the first's.

    No places where they are the same blocks in the same order.
    """

    blocks: Blocks
    numbers: list[int]
    places: list[Int[Tensor, "R"] | None]
    num_blocks: int

    def places_given(self) -> tuple[Int[Tensor, "R"], ...]:
        """Write places as tensors, empty where blocks are the same."""
        return tuple(self.blocks.start[:0] if x is None else x for x in self.places)


def _families(parts: tuple["Part", ...], side: Side) -> list[Family]:
    """Put parts together, those that reach most tokens first, then those of most blocks."""
    sides: list[Blocks] = [getattr(part, side) for part in parts]
    families: list[Family] = []
    reach = [(x.num_tokens, part.num_blocks) for x, part in zip(sides, parts, strict=True)]
    for number in sorted(range(len(parts)), key=reach.__getitem__, reverse=True):
        for index, family in enumerate(families):
            found, places = _places(family.blocks, sides[number])
            if found:
                families[index] = replace(
                    family,
                    numbers=[*family.numbers, number],
                    places=[*family.places, places],
                    num_blocks=family.num_blocks + parts[number].num_blocks,
                )
                break
        else:
            families.append(Family(sides[number], [number], [None], parts[number].num_blocks))
    return sorted(families, key=lambda f: (f.blocks.num_tokens, f.num_blocks), reverse=True)


def _places(base: Blocks, blocks: Blocks) -> tuple[bool, Int[Tensor, "R"] | None]:
    """Tell whether blocks are all among those of `base`, and where if not all in their order."""
    if base is blocks:
        return True, None
    alike = (base.order.numel(), base.stride, base.size)
    if alike != (blocks.order.numel(), blocks.stride, blocks.size) or len(blocks) > len(base):
        return False, None
    if base.order.numel() and not torch.equal(base.order, blocks.order):
        return False, None
    if len(base) == len(blocks) and torch.equal(base.start, blocks.start):
        return torch.equal(base.count, blocks.count), None
    if base.regular:
        places = (blocks.start.long() // base.size).clamp(max=len(base) - 1)
    else:
        starts, order = torch.sort(base.start)
        places = order[torch.searchsorted(starts, blocks.start).clamp(max=len(base) - 1)]
    same = (base.start[places] == blocks.start) & (base.count[places] == blocks.count)
    return bool(same.all()), places


def _in_turn(families: list[Family], num_tokens: int) -> tuple[list[Family], bool]:
    """Put a family that reaches every token last, and say whether there is one."""
    complete = bool(families) and families[0].blocks.num_tokens == num_tokens
    return ([*families[1:], families[0]] if complete else families), complete


def _agenda(
    parts: tuple["Part", ...],
    found: list[Family],
    side: Side,
    num_tokens: int,
    cutter: "_Cutter",
) -> Agenda:
    families, complete = _in_turn(found, num_tokens)
    launches = tuple(_launch(parts, family, side, num_tokens, cutter) for family in families)
    early = [family.blocks for family in (families[:-1] if complete else families)]
    state_of, num_states = _state_places(early, num_tokens)
    fresh = bool(early) and early[0].num_tokens == num_states
    if complete and state_of.numel():  # earlier blocks have nothing but tokens in the state
        last = mark_untouched(launches[-1], families[-1].blocks, state_of)
        launches = (*launches[:-1], last)
    return Agenda(launches, state_of, num_states, complete, fresh)


def _state_places(early: list[Blocks], num_tokens: int) -> tuple[Int[Tensor, "T"], int]:
    """Give the tokens of these blocks places in the state; none where all tokens have one."""
    device = early[0].start.device if early else torch.device("cpu")
    none = torch.empty(0, dtype=torch.int32, device=device)
    if not early or any(b.num_tokens == num_tokens for b in early):
        return none, num_tokens if early else 0
    known = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    for blocks in early:
        if len(blocks):
            tokens, exists = blocks.tokens()
            known[tokens[exists]] = True
    place = known.cumsum(0) - 1
    return torch.where(known, place, -1).to(torch.int32), int(known.sum())


@dataclass(frozen=True)
class Rows:
    """For S parts and R blocks, where each block's list lies: begin, the first full entry, end.

    `entries` are the other side's blocks that the lists of each part name, at least one.
    """

    ends: Int[Tensor, "3 S G R"]
    entries: tuple[Int[Tensor, "Z"], ...]


def rows_of(lists: list["Lists"], places: list[Int[Tensor, "N"] | None], num_blocks: int) -> Rows:
    """Read parts' lists as those of a launch's blocks; blocks that a part lacks have none."""
    found = []
    for part, place in zip(lists, places, strict=True):
        ends = torch.stack([part.ptr[:, :-1], part.full, part.ptr[:, 1:]])
        if place is not None:
            ends = ends.new_zeros((3, ends.shape[1], num_blocks)).index_copy(2, place, ends)
        found.append(ends)
    entries = (part.index if part.index.numel() else part.index.new_zeros(1) for part in lists)
    return Rows(torch.stack(found, 1), tuple(entries))


def _launch(
    parts: tuple["Part", ...], family: Family, side: Side, num_tokens: int, cutter: "_Cutter"
) -> Launch:
    other = "keys" if side == "queries" else "queries"
    lists = [parts[n].rows if side == "queries" else parts[n].columns for n in family.numbers]
    rows = rows_of(lists, family.places, len(family.blocks))
    others: list[Blocks] = [getattr(parts[n], other) for n in family.numbers]
    length = (rows.ends[2] - rows.ends[0]).sum(0)
    affine = _runs(rows, others)
    longest = length.max()[None] if length.numel() else length.new_zeros(1)
    longest, *runs = torch.cat([longest, affine]).tolist()  # the host waits once
    own_size, other_size = family.blocks.size, max(b.size for b in others)
    limit = _item_length(length, longest, own_size, other_size, num_tokens)
    items, splits, num_slots = cutter.items(length, longest, limit)
    ranges = cut_ranges(rows, items, whole=longest <= limit)
    numbers = tuple(family.numbers)
    return Launch(
        items, ranges, splits, numbers, tuple(map(bool, runs)), num_slots,
        family.places_given(),
    )  # fmt: skip


def _item_length(
    length: Int[Tensor, "G R"], longest: int, own_size: int, other_size: int, num_tokens: int
) -> int:
    """Entries that an item may hold: few, as long as the pieces do not need too much memory."""
    limit = max(1, ITEM_TOKENS // other_size)
    room = max(MAX_SPLIT_TOKENS, num_tokens // 2) // own_size
    while longest > limit:
        split = (length + limit - 1) // limit
        if int(torch.where(split > 1, split, 0).sum(1).max()) <= room:
            break
        limit *= 2
    return limit


class _Cutter:
    """Cuts lists into items, and remembers how: both sides' lists are often as long."""

    def __init__(self) -> None:
        self._known: list[tuple[Int[Tensor, "G R"], int, Items]] = []

    def items(self, length: Int[Tensor, "G R"], longest: int, limit: int) -> "Items":
        """Write the items of each group, long ones first."""
        for known, known_limit, items in self._known:
            alike = known_limit == limit and known.shape == length.shape
            if alike and torch.equal(known, length):
                return items
        items = _items(length, longest, limit)
        self._known.append((length, limit, items))
        return items


Items = tuple[Int[Tensor, "G I 4"], Int[Tensor, "G K 3"], int]
"""Items, splits and the number of slots of a launch."""


def _items(length: Int[Tensor, "G R"], longest: int, limit: int) -> Items:
    groups, rows = length.shape
    device = length.device
    if longest <= limit:
        none = torch.empty(groups, 0, 3, dtype=torch.int32, device=device)
        order = torch.sort(size_class(length), dim=1, descending=True, stable=True).indices
        zero = torch.zeros_like(order)
        whole = torch.stack([order, zero, length.gather(1, order), zero - 1], 2)
        return whole.to(torch.int32), none, 0
    pieces = ((length + limit - 1) // limit).clamp(min=1)
    split = pieces > 1
    slots = torch.where(split, pieces, 0)
    first_slot = slots.cumsum(1) - slots
    totals = torch.stack([pieces.sum(1), slots.sum(1), split.sum(1)])
    widest, num_slots, most_splits = totals.amax(1).tolist()
    # pieces of all rows, one after another, and what is known of the row of each
    end = pieces.flatten().cumsum(0)
    row = torch.arange(groups * rows, device=device).repeat_interleave(
        pieces.flatten(), output_size=widest if groups == 1 else None
    )
    known = torch.stack([end - pieces.flatten(), length.flatten(), first_slot.flatten()])
    start, row_length, slot = known.index_select(1, row).unbind(0)
    piece = torch.arange(row.numel(), device=device) - start
    first = piece * limit
    last = torch.minimum(first + limit, row_length)
    slot = torch.where(row_length > limit, slot + piece, WHOLE)
    order = torch.sort(row // rows * 64 - size_class(last - first), stable=True).indices
    found = torch.stack([row % rows, first, last, slot], 1)[order].to(torch.int32)
    chosen = split.flatten().nonzero()[:, 0]
    known = torch.stack([first_slot.flatten(), pieces.flatten()], 1)[chosen]
    splits = torch.cat([(chosen % rows)[:, None], known], 1).to(torch.int32)
    return _pad(found, totals[0], widest), _pad(splits, totals[2], most_splits), num_slots


def cut_ranges(
    rows: Rows, items: Int[Tensor, "G I 4"], *, whole: bool = False
) -> Int[Tensor, "G I S 5"]:
    """Cut each item's range out of the list of every part of its block, or take all lists whole."""
    block, first, last, _ = items.long().clamp(min=0).unbind(-1)
    count = rows.ends.shape[1]
    ends = rows.ends.gather(3, block.expand(3, count, *block.shape))
    if not whole:
        begin, middle, end = ends.unbind(0)
        length = end - begin
        before = length.cumsum(0) - length
        low = torch.minimum(begin + (first - before).clamp(min=0), end)
        high = torch.minimum(begin + (last - before).clamp(min=0), end)
        ends = torch.stack([low, middle.clamp(min=low, max=high), high])
    ends = ends.to(torch.int32)
    found = [ends]
    for place in ends[:2].unbind(0):  # the first partial and the first full block, or anything
        found.append(torch.stack(_look_up(rows, place))[None])
    return torch.cat(found).permute(2, 3, 1, 0).contiguous()


def _look_up(rows: Rows, places: Iterable[Int[Tensor, "..."]]) -> list[Int[Tensor, "..."]]:
    """Read each part's entries at its places; any entry where a place is beyond the last."""
    return [
        entries[at.clamp(max=entries.numel() - 1)]
        for entries, at in zip(rows.entries, places, strict=True)
    ]


def mark_untouched(launch: Launch, blocks: Blocks, state_of: Int[Tensor, "T"]) -> Launch:
    """Say which whole blocks have no token with a place in the state."""
    tokens, exists = blocks.tokens()
    touched = ((state_of[tokens] >= 0) & exists).any(1)[launch.items[..., 0].long()]
    slot = launch.items[..., 3]
    slot = torch.where((slot == WHOLE) & ~touched, UNTOUCHED, slot)
    return replace(launch, items=torch.cat([launch.items[..., :3], slot[..., None]], -1))


def size_class(length: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Bits of a length: long items start first, of about equal ones neighbours stay together."""
    return torch.frexp(length.double()).exponent


def _pad(
    rows: Int[Tensor, "N W"], per_group: Int[Tensor, "G"], widest: int
) -> Int[Tensor, "G I W"]:
    """Give every group as many rows as the largest has, of -1."""
    if per_group.numel() == 1:
        return rows[None]
    group = torch.arange(per_group.numel(), device=rows.device).repeat_interleave(per_group)
    place = torch.arange(rows.shape[0], device=rows.device)
    place = place - (per_group.cumsum(0) - per_group)[group]
    padded = rows.new_full((per_group.numel(), widest, rows.shape[1]), -1)
    padded[group, place] = rows
    return padded


def _runs(rows: Rows, others: list[Blocks]) -> Bool[Tensor, "S"]:
    """Tell of each part whether the full blocks of every list lie one after another."""
    first, end = rows.ends[1:].unbind(0)
    at = torch.stack([first, end - 1]).clamp(min=0).unbind(1)
    ends = _look_up(rows, at)
    # entries ascend: as many as lie between the first and the last are all of them
    torn = (torch.stack([high - low for low, high in ends]) != end - first - 1) & (end > first)
    for number, (blocks, (low, high)) in enumerate(zip(others, ends, strict=True)):
        if not blocks.regular and len(blocks) > 1:
            gaps = (blocks.start.diff() != blocks.size * blocks.stride).cumsum(0)
            gaps = torch.cat([gaps.new_zeros(1), gaps])
            torn[number] |= (gaps[low] != gaps[high]) & (end > first)[number]
    return ~torn.flatten(1).any(1)
