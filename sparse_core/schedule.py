"""In what pieces and in what order kernels work through a layout.

Parts share a launch where the blocks of one are all among those of the other. Launches follow one
another: all but the last leave what they found of their tokens in a float32 state, from which the
next goes on. Lists
much longer than the rest are cut into items of about equal size, whose pieces are joined in a fixed
order, so that results are the same in every run.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
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
    num_queries, num_keys = query_coords.shape[0], key_coords.shape[0]
    by_queries = _in_turn(_families(parts, "queries"), num_queries)
    by_keys = _in_turn(_families(parts, "keys"), num_keys)
    if num_queries == num_keys and _mirrored(parts, by_queries, by_keys):
        launches = _launches(by_queries, [num_queries] * len(by_queries))
        queries = _agenda(by_queries, launches, num_queries)
        mirrored = [
            replace(launch, part_numbers=tuple(family.numbers), places=family.places_given())
            for launch, family in zip(queries.launches, by_keys, strict=True)
        ]
        keys = replace(queries, launches=tuple(mirrored))
    else:
        num_tokens = [num_queries] * len(by_queries) + [num_keys] * len(by_keys)
        launches = _launches([*by_queries, *by_keys], num_tokens)
        queries = _agenda(by_queries, launches[: len(by_queries)], num_queries)
        keys = _agenda(by_keys, launches[len(by_queries) :], num_keys)
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
    """Parts that share a launch: of each its number, its lists and the blocks that these name.

    Also where its blocks are among the first's; no places where they are the same in the same
    order.
    """

    blocks: Blocks
    numbers: tuple[int, ...]
    lists: tuple["Lists", ...]
    others: tuple[Blocks, ...]
    places: tuple[Int[Tensor, "R"] | None, ...] = (None,)

    @property
    def num_blocks(self) -> int:
        """Stored pairs of blocks, of all parts and groups."""
        return sum(lists.index.shape[0] for lists in self.lists)

    def join(self, other: "Family", places: Int[Tensor, "R"] | None) -> "Family":
        """Add parts whose blocks are at these places."""
        return Family(
            self.blocks,
            self.numbers + other.numbers,
            self.lists + other.lists,
            self.others + other.others,
            (*self.places, places),
        )

    def places_given(self) -> tuple[Int[Tensor, "R"], ...]:
        """Write places as tensors, empty where blocks are the same."""
        return tuple(self.blocks.start[:0] if x is None else x for x in self.places)


def _families(parts: tuple["Part", ...], side: Side) -> list[Family]:
    """Put parts together, those that reach most tokens first, then those of most blocks."""
    single = [
        Family(part.queries, (number,), (part.rows,), (part.keys,))
        if side == "queries"
        else Family(part.keys, (number,), (part.columns,), (part.queries,))
        for number, part in enumerate(parts)
    ]
    families: list[Family] = []
    for part in sorted(single, key=_reach, reverse=True):
        for index, family in enumerate(families):
            found, places = _places(family.blocks, part.blocks)
            if found:
                families[index] = family.join(part, places)
                break
        else:
            families.append(part)
    if len(families) > 2:
        return _fullest_first(families)
    return sorted(families, key=_reach, reverse=True)


def _fullest_first(families: list[Family]) -> list[Family]:
    """Put families that reach most tokens first, of these the ones with fewest empty lists.

    The first and the last launch touch the state of all tokens, those between them only that of
    blocks whose lists hold something.
    """
    counts = [
        torch.stack([(lists.ptr[:, 1:] > lists.ptr[:, :-1]).sum() for lists in family.lists]).sum()
        for family in families
    ]
    filled = torch.stack(counts).tolist()  # the host waits
    order = sorted(
        range(len(families)),
        key=lambda n: (families[n].blocks.num_tokens, filled[n], families[n].num_blocks),
        reverse=True,
    )
    return [families[n] for n in order]


def _reach(family: Family) -> tuple[int, int]:
    return family.blocks.num_tokens, family.num_blocks


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
    found, wanted = (torch.stack([x.start, x.count]) for x in (base, blocks))
    return torch.equal(found.index_select(1, places), wanted), places


def _in_turn(families: list[Family], num_tokens: int) -> list[Family]:
    """Put a family that reaches every token last."""
    complete = bool(families) and families[0].blocks.num_tokens == num_tokens
    return [*families[1:], families[0]] if complete else families


def _agenda(families: list[Family], launches: list[Launch], num_tokens: int) -> Agenda:
    complete = bool(families) and families[-1].blocks.num_tokens == num_tokens
    early = [family.blocks for family in (families[:-1] if complete else families)]
    state_of, num_states = _state_places(early, num_tokens)
    fresh = bool(early) and early[0].num_tokens == num_states
    if complete and state_of.numel():  # earlier blocks have nothing but tokens in the state
        last = mark_untouched(launches[-1], families[-1].blocks, state_of)
        launches = [*launches[:-1], last]
    return Agenda(tuple(launches), state_of, num_states, complete, fresh)


def _state_places(early: list[Blocks], num_tokens: int) -> tuple[Int[Tensor, "T"], int]:
    """Give the tokens of these blocks places in the state; none where all tokens have one."""
    device = early[0].start.device if early else torch.device("cpu")
    none = torch.empty(0, dtype=torch.int32, device=device)
    if not early or any(b.num_tokens == num_tokens for b in early):
        return none, num_tokens if early else 0
    known = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    for blocks in early:
        if len(blocks):
            known[blocks.tokens()[0]] = True
    place = known.cumsum(0)
    num_states = early[0].num_tokens if len(early) == 1 else int(place[-1])
    return torch.where(known, place - 1, -1).to(torch.int32), num_states


@dataclass(frozen=True)
class Rows:
    """Where lists lie, for S parts and N blocks: those of each group of each launch in turn.

    `ends` are the begin of a list, its first full entry, its end, and the last entry of all of the
    part's lists, counted from the place that comes fifth: where the part's begin in `entries`.
    """

    ends: Int[Tensor, "S 5 N"]
    entries: Int[Tensor, "Z"]


def rows_of(families: list[Family]) -> Rows:
    """Read parts' lists as those of a launch's blocks; blocks that a part lacks have none."""
    num_slots = max(len(family.lists) for family in families)
    found, entries, start = [], [], 0
    for family in families:
        ends: list[Tensor] = []
        for lists, place in zip(family.lists, family.places, strict=True):
            own = [lists.ptr[:, :-1], lists.full, lists.ptr[:, 1:]]
            if place is not None:
                shape = (3, lists.full.shape[0], len(family.blocks))
                own = [*lists.ptr.new_zeros(shape).index_copy(2, place, torch.stack(own))]
            index = _at_least_one(lists.index)
            entries.append(index)
            ends += [*own, *(torch.full_like(own[0], n) for n in (index.shape[0] - 1, start))]
            start += index.shape[0]
        if len(family.lists) < num_slots:
            ends += [torch.zeros_like(ends[0])] * 5 * (num_slots - len(family.lists))
        found.append(torch.stack(ends).view(num_slots, 5, -1))
    return Rows(torch.cat(found, 2), torch.cat(entries))


def _at_least_one(index: Int[Tensor, "Z"]) -> Int[Tensor, "Z"]:
    return index if index.numel() else index.new_zeros(1)


def _launches(families: list[Family], num_tokens: list[int]) -> list[Launch]:
    """Cut the lists of families into items, given the number of tokens on the side of each."""
    if not families:
        return []
    groups = families[0].lists[0].ptr.shape[0]
    rows = rows_of(families)
    cut = _cut(rows, families, num_tokens)
    items, splits, row = _items(cut)
    num_items, items = _pad(items, cut.num_items, groups)
    num_splits, splits = _pad(splits, cut.num_splits, groups)
    if num_items != cut.num_items:
        row = _spread(cut.first_row, num_items) + items[:, 0].clamp(min=0)
    inside = items[:, 1:3].T if any(num_splits) else None
    ranges = cut_ranges(rows, row, inside)
    sizes = [sum(n) for n in _by_launch(num_items, groups)]
    tables = zip(
        items.to(torch.int32).split(sizes),
        split_copies(ranges, sizes, 0),
        split_copies(splits.to(torch.int32), [sum(n) for n in _by_launch(num_splits, groups)], 0),
        strict=True,
    )
    launches = []
    for number, (family, own) in enumerate(zip(families, tables, strict=True)):
        first, end, num_parts = number * groups, (number + 1) * groups, len(family.numbers)
        own_ranges = own[1][:, :num_parts].contiguous()
        launches.append(
            Launch(
                items=own[0].view(groups, num_items[first], 4),
                ranges=own_ranges.view(groups, num_items[first], num_parts, 5),
                splits=own[2].view(groups, num_splits[first], 3),
                part_numbers=family.numbers,
                affine=tuple(not any(torn[first:end]) for torn in cut.num_torn[:num_parts]),
                num_slots=max(cut.num_slots[first:end]),
                places=family.places_given(),
            )
        )
    return launches


@dataclass(frozen=True)
class _Cut:
    """How the lists of N rows are cut, which form L stretches: one for each group of each launch.

    A list of `length` entries is cut after every `limit` into pieces: one and `further`. The host
    knows how many items, slots and rows of several pieces are in each stretch, and of each part how
    many lists are torn.
    """

    stretch: Int[Tensor, "N"]
    first_row: Int[Tensor, "L"]
    length: Int[Tensor, "N"]
    limit: Int[Tensor, "N"]
    further: Int[Tensor, "N"]
    num_items: list[int]
    num_slots: list[int]
    num_splits: list[int]
    num_torn: list[list[int]]


def _cut(rows: Rows, families: list[Family], num_tokens: list[int]) -> _Cut:
    """Take few entries a piece, as long as the pieces do not need too much memory."""
    groups = families[0].lists[0].ptr.shape[0]
    sizes = [len(family.blocks) for family in families for _ in range(groups)]
    rooms = [
        max(MAX_SPLIT_TOKENS, number // 2) // family.blocks.size
        for family, number in zip(families, num_tokens, strict=True)
    ]
    limits = [max(1, ITEM_TOKENS // max(b.size for b in f.others)) for f in families]
    begin, _, end, _, _ = rows.ends.unbind(1)
    length, torn = (end - begin).sum(0), _torn(rows, families)
    known = torch.tensor([sizes, list(accumulate(sizes, initial=0))[:-1]]).to(length.device)
    stretch = torch.arange(len(sizes), device=length.device)
    stretch = stretch.repeat_interleave(known[0], output_size=length.numel())
    while True:
        each = torch.tensor([n for n in limits for _ in range(groups)]).to(length.device)
        limit = each.index_select(0, stretch)
        further = ((length - 1) // limit).clamp(min=0)
        counted = torch.cat([torch.stack([further, further > 0]), torn])
        total = counted.new_zeros(len(counted), len(sizes)).index_add_(1, stretch, counted)
        num_further, num_splits, *num_torn = total.tolist()  # the host waits
        num_slots = [a + b for a, b in zip(num_further, num_splits, strict=True)]
        needed = [max(n) for n in _by_launch(num_slots, groups)]
        fits = [n <= room for n, room in zip(needed, rooms, strict=True)]
        if all(fits):
            break
        limits = [n if fit else 2 * n for n, fit in zip(limits, fits, strict=True)]
    num_items = [a + b for a, b in zip(sizes, num_further, strict=True)]
    return _Cut(
        stretch, known[1], length, limit, further, num_items, num_slots, num_splits, num_torn
    )


def _items(cut: _Cut) -> tuple[Int[Tensor, "I 4"], Int[Tensor, "K 3"], Int[Tensor, "I"]]:
    """Write the items of each stretch, long ones first, and its splits; also the row of each."""
    device = cut.length.device
    row = torch.arange(cut.length.numel(), device=device)
    block = row - cut.first_row.index_select(0, cut.stretch)
    first, last, stretch = torch.zeros_like(row), cut.length, cut.stretch
    slot, splits = first + WHOLE, first.new_empty(0, 3)
    if any(cut.num_splits):
        several = cut.further > 0
        slots = cut.further + several
        before = torch.tensor([0, *accumulate(cut.num_slots)][:-1]).to(device)
        first_slot = slots.cumsum(0) - slots - before.index_select(0, stretch)
        number = torch.arange(1, sum(cut.num_splits) + 1, device=device)
        chosen = torch.searchsorted(several.cumsum(0), number)
        splits = torch.stack([block, first_slot, slots], 1).index_select(0, chosen)
        before = row + cut.further.cumsum(0) - cut.further
        known = torch.stack([stretch, block, cut.length, cut.limit, first_slot, before])
        row = row.repeat_interleave(cut.further + 1, output_size=sum(cut.num_items))
        stretch, block, length, limit, slot, before = known.index_select(1, row).unbind(0)
        piece = torch.arange(row.numel(), device=device) - before
        first = piece * limit
        last = torch.minimum(first + limit, length)
        slot = torch.where(length > limit, slot + piece, WHOLE)
    order = torch.sort(stretch * 64 - size_class(last - first), stable=True).indices
    items = torch.stack([block, first, last, slot], 1).index_select(0, order)
    return items, splits, row.index_select(0, order)


def cut_ranges(
    rows: Rows, row: Int[Tensor, "I"], inside: Int[Tensor, "2 I"] | None = None
) -> Int[Tensor, "I S 5"]:
    """Read the ranges of items: the lists of their rows, whole or from where to where."""
    begin, middle, end, final, start = rows.ends.index_select(2, row).unbind(1)
    if inside is not None:
        length = end - begin
        before = length.cumsum(0) - length
        inside = (inside.clamp(min=0)[:, None] - before).clamp(min=0)
        begin, end = torch.minimum(begin + inside, end).unbind(0)
        middle = middle.clamp(min=begin, max=end)
    ends = torch.stack([begin, middle, end]).to(torch.int32)
    # the first partial and the first full block, or anything
    named = rows.entries[torch.minimum(ends[:2], final) + start]
    return torch.cat([ends, named]).permute(2, 1, 0).contiguous()


def _torn(rows: Rows, families: list[Family]) -> Bool[Tensor, "S N"]:
    """Tell of each list whether its full blocks do not lie one after another."""
    others = [blocks for family in families for blocks in family.others]
    uneven = {id(blocks): blocks for blocks in others if len(blocks) and not blocks.regular}
    number = rows.entries
    if uneven:
        places = {key: blocks.places() for key, blocks in uneven.items()}
        lists = [_at_least_one(lists.index) for family in families for lists in family.lists]
        number = torch.cat(
            [
                places[id(blocks)][index] if id(blocks) in uneven else index
                for index, blocks in zip(lists, others, strict=True)
            ]
        )
    _, first, end, final, start = rows.ends.unbind(1)
    at = torch.minimum(torch.stack([first, end - 1]).clamp(min=0), final) + start
    low, high = number[at].unbind(0)
    # places ascend: as many as lie between the first and the last are all of them
    return (high - low != end - first - 1) & (end > first)


def _by_launch(counts: list[int], groups: int) -> list[list[int]]:
    return [counts[n : n + groups] for n in range(0, len(counts), groups)]


def _spread(values: Int[Tensor, "L"], counts: list[int]) -> Int[Tensor, "N"]:
    """Repeat each value, in a number of times that the host knows."""
    times = torch.tensor(counts).to(values.device)
    return values.repeat_interleave(times, output_size=sum(counts))


def split_copies(values: Int[Tensor, "..."], sizes: list[int], dim: int) -> list[Tensor]:
    """Cut one axis into tensors that own their memory: kernels want it aligned."""
    pieces: list[Tensor] = torch.ops.aten.split_with_sizes_copy(values, sizes, dim)
    return pieces


def mark_untouched(launch: Launch, blocks: Blocks, state_of: Int[Tensor, "T"]) -> Launch:
    """Say which whole blocks have no token with a place in the state."""
    tokens, _ = blocks.tokens()  # what does not exist repeats the first
    touched = (state_of[tokens] >= 0).any(1)[launch.items[..., 0].long()]
    slot = launch.items[..., 3]
    slot = torch.where((slot == WHOLE) & ~touched, UNTOUCHED, slot)
    return replace(launch, items=torch.cat([launch.items[..., :3], slot[..., None]], -1))


def size_class(length: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Bits of a length: long items start first, of about equal ones neighbours stay together."""
    return torch.frexp(length.double()).exponent


def _pad(
    rows: Int[Tensor, "N W"], counts: list[int], groups: int
) -> tuple[list[int], Int[Tensor, "M W"]]:
    """Give every group of a launch as many rows as the largest has, of -1; also count them."""
    widths = [max(n) for n in _by_launch(counts, groups) for _ in n]
    if widths == counts:
        return widths, rows
    firsts = accumulate(widths, initial=0)
    shifts = [a - b for a, b in zip(firsts, accumulate(counts, initial=0), strict=True)][:-1]
    shift = _spread(torch.tensor(shifts).to(rows.device), counts)
    padded = rows.new_full((sum(widths), rows.shape[1]), -1)
    padded[torch.arange(rows.shape[0], device=rows.device) + shift] = rows
    return widths, padded
