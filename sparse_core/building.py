"""From a pattern and coordinates to a BlockLayout."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import gcd, lcm, prod

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from sparse_core.blocking import Blocks, boxes_of, cut, sequence_tokens
from sparse_core.layout import BlockLayout, Lists, Part, merge, stack, stack_lists
from sparse_core.masking import Program, clauses_keep, encode, member_flags, pack_bits
from sparse_core.pairing import Pairs, covers, listed_pairs, may_touch, touching_pairs
from sparse_core.patterns.base import Pattern, Sum
from sparse_core.patterns.listed import Listed
from sparse_core.patterns.terms import (
    UNBOUNDED,
    Boxes,
    Clause,
    Congruent,
    InSegment,
    Interval,
    KeyIn,
    Members,
    QueryIn,
    Term,
    Tokens,
    simplify,
)
from sparse_core.schedule import make_schedule, split_copies

MIN_BLOCK, SMALL_BLOCK, BLOCK = 16, 32, 64
MAX_PAIRS = 2**21
"""Above so many pairs of blocks, blocks grow instead."""
TILE_PAIRS = 2**24
"""Token pairs whose bits are drawn at a time."""

Sorting = Congruent | InSegment
"""Terms that sort tokens into classes, of which none sees another."""


def build_layout(
    pattern: Pattern,
    query_coords: Int[Tensor, "Tq P"] | Int[Tensor, "Tq"] | int,
    key_coords: Int[Tensor, "Tk P"] | Int[Tensor, "Tk"] | int | None = None,
    *,
    segments: Int[Tensor, "S"] | list[int] | None = None,
    key_segments: Int[Tensor, "S"] | list[int] | None = None,
    block_size: int | None = None,
    num_kv_heads: int | None = None,
    device: torch.device | str | None = None,
) -> BlockLayout:
    """Find the blocks that a pattern touches, and which of their pairs it keeps.

    `query_coords` are integer coordinates, or a number of tokens whose coordinates count from 0 in
    each sequence. Without `key_coords` queries and keys are the same tokens. `segments` are the
    lengths of packed sequences, which never see each other; `key_segments` those of the keys.
    `block_size` is chosen from the pattern if not given: 64, fewer for small windows and short
    sequences, more where lists would outgrow 2**21 entries. `num_kv_heads` is needed where the
    pattern differs from head to head.

    Cost is proportional to tokens plus stored blocks; memory likewise. Tokens that are near in
    coordinates should be near in order (a Hilbert curve on tissue), or many blocks are touched.

    Raises ValueError for coordinates that are not integers, lengths that do not add up, a pattern
    that does not fit the number of axes, or one that needs `num_kv_heads`.
    """
    if isinstance(pattern, Sum):
        summands = [
            build_layout(
                part, query_coords, key_coords, segments=segments, key_segments=key_segments,
                block_size=block_size, num_kv_heads=num_kv_heads, device=device,
            )
            for part in pattern.parts
        ]  # fmt: skip
        return merge(_align_groups(summands, num_kv_heads))
    query, query_segment = sequence_tokens(query_coords, segments, device)
    key, key_segment = query, query_segment
    lengths = key_lengths = _lengths(segments, query)
    if key_coords is not None:
        given = segments if key_segments is None else key_segments
        key, key_segment = sequence_tokens(key_coords, given, query.coords.device)
        key_lengths = _lengths(given, key)
    if key.coords.shape[-1] != query.coords.shape[-1] or len(key_lengths) != len(lengths):
        raise ValueError("queries and keys need the same axes and the same number of sequences")
    clauses = _clauses(pattern, query.coords.shape[-1])
    num_groups = _count_groups(pattern, clauses, num_kv_heads)
    group_of = _group_of_heads(num_groups, num_kv_heads, query.coords.device)
    plans = _plan_parts(clauses)
    if num_groups > 1 and len(plans) > 1:  # what an earlier part keeps differs from head to head
        variants = [
            build_layout(
                pattern.of_head(head), query_coords, key_coords, segments=segments,
                key_segments=key_segments, block_size=block_size, device=device,
            )
            for head in range(num_groups)
        ]  # fmt: skip
        return stack(variants, group_of)
    named = (t for clause in clauses for t in clause if isinstance(t, QueryIn | KeyIn))
    members = list(dict.fromkeys(term.members for term in named))
    sides = _Sides(query, query_segment, key, key_segment, len(lengths))
    size = block_size or _choose_block_size(clauses, sides)
    drafts = []
    earlier: list[Clause] = []
    for plan in plans:
        part_size = _part_block_size(plan, size, sides) if block_size is None else size
        drafts.append(_draft_part(plan, earlier, sides, members, part_size))
        earlier += plan.clauses
    parts = tuple(_give_groups(part, num_groups) for part in _list_parts(drafts))
    query_flags = member_flags(query.index, members)
    return BlockLayout(
        parts=parts,
        schedule=make_schedule(parts, query.coords, key.coords, lengths, key_lengths),
        query_coords=query.coords,
        key_coords=key.coords,
        query_flags=query_flags,
        key_flags=query_flags if key is query else member_flags(key.index, members),
        lengths=lengths,
        key_lengths=key_lengths,
        group_of=group_of,
        pattern=repr(pattern),
    )


def _count_groups(pattern: Pattern, clauses: list[Clause], num_kv_heads: int | None) -> int:
    """After how many heads the pattern repeats."""
    num_groups = lcm(*(n for clause in clauses for n in _periods(clause)))
    if num_groups > 1 and num_kv_heads is None:
        raise ValueError(f"{pattern!r} differs from head to head: give num_kv_heads")
    return num_groups


def _group_of_heads(
    num_groups: int, num_kv_heads: int | None, device: torch.device
) -> Int[Tensor, "B Hkv"]:
    if num_groups == 1 or num_kv_heads is None:
        return torch.empty(0, 0, dtype=torch.int32, device=device)
    head = torch.arange(num_kv_heads, dtype=torch.int32, device=device)
    return (head % num_groups)[None]


def _periods(terms: Clause) -> list[int]:
    """After how many heads the terms repeat that differ from head to head."""
    return [t.dilation for t in terms if isinstance(t, InSegment) and t.offset is None]


def _align_groups(layouts: list[BlockLayout], num_kv_heads: int | None) -> list[BlockLayout]:
    """Give all layouts as many groups as the heads need after which all of them repeat."""
    num_groups = lcm(*(layout.num_groups for layout in layouts))
    group_of = _group_of_heads(num_groups, num_kv_heads, layouts[0].device)
    return [
        replace(x, parts=tuple(_give_groups(p, num_groups) for p in x.parts), group_of=group_of)
        for x in layouts
    ]


def _give_groups(part: Part, num_groups: int) -> Part:
    """Repeat the lists of a part whose heads repeat earlier; entries are stored once."""
    missing = num_groups // part.rows.ptr.shape[0]
    if missing == 1:
        return part
    return replace(part, rows=_repeat(part.rows, missing), columns=_repeat(part.columns, missing))


def _repeat(lists: Lists, times: int) -> Lists:
    return replace(lists, ptr=lists.ptr.repeat(times, 1), full=lists.full.repeat(times, 1))


@dataclass
class _Sides:
    """Both sides' tokens, and the sequence of each; remembers how they were cut."""

    query: Tokens
    query_segment: Int[Tensor, "Tq"]
    key: Tokens
    key_segment: Int[Tensor, "Tk"]
    num_segments: int
    cuts: dict[tuple[object, ...], tuple[Blocks, Boxes]] = field(default_factory=dict)

    def cut_queries(self, plan: "_Plan", size: int) -> tuple[Blocks, Boxes]:
        """Cut a part's queries into blocks, and bound them."""
        return self._cut(self.query, self.query_segment, plan.query_members, plan.classes, size)

    def cut_keys(self, plan: "_Plan", size: int) -> tuple[Blocks, Boxes]:
        """Cut a part's keys into blocks, and bound them."""
        return self._cut(self.key, self.key_segment, plan.key_members, plan.classes, size)

    def _cut(
        self,
        tokens: Tokens,
        segment: Int[Tensor, "T"],
        members: Members | None,
        classes: tuple[Sorting, ...],
        size: int,
    ) -> tuple[Blocks, Boxes]:
        chosen = (id(tokens), members, classes, size)
        if chosen not in self.cuts:
            blocks, group = _cut_side(
                tokens, segment, members, classes, size,
                longest=self.longest, is_single=self.num_segments == 1,
            )  # fmt: skip
            self.cuts[chosen] = blocks, boxes_of(blocks, tokens, group)
        return self.cuts[chosen]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.num_segments == 1:
            return max(self.query.index.shape[0], self.key.index.shape[0])
        sides = {id(x): x for x in (self.query.length, self.key.length)}
        return max(_largest(length) for length in sides.values())


@dataclass
class _Plan:
    """Clauses that share a blocking: the tokens it selects, and the classes it sorts them by."""

    query_members: Members | None = None
    key_members: Members | None = None
    classes: tuple[Sorting, ...] = ()
    listed: list[Listed] = field(default_factory=list)
    clauses: list[Clause] = field(default_factory=list)

    def residual(self) -> list[Clause]:
        """Clauses without the terms that the blocking already guarantees."""
        owned: set[Term] = {*self.classes, *self.listed}
        if self.query_members:
            owned.add(QueryIn(self.query_members))
        if self.key_members:
            owned.add(KeyIn(self.key_members))
        return list(dict.fromkeys(tuple(t for t in c if t not in owned) for c in self.clauses))

    def num_variants(self) -> int:
        """After how many heads this part repeats."""
        return lcm(*_periods(self.classes))

    def reaches(self, index: Int[Tensor, "R"], variant: int) -> Bool[Tensor, "R"] | None:
        """Tell which blocks, by one token's position, take part for a variant; None if all do."""
        chosen = None
        for term in self.classes:
            if isinstance(term, InSegment) and term.dilation > 1:
                offset = variant % term.dilation if term.offset is None else term.offset
                found = term.place(index) == offset
                chosen = found if chosen is None else chosen & found
        return chosen


def _lengths(segments: Tensor | list[int] | None, tokens: Tokens) -> Int[Tensor, "S"]:
    given = [tokens.index.shape[0]] if segments is None else segments
    return torch.as_tensor(given).to(tokens.index.device, torch.int64)


def _clauses(pattern: Pattern, dims: int) -> list[Clause]:
    simplified = (simplify(clause) for clause in pattern.terms(dims))
    clauses = list(dict.fromkeys(c for c in simplified if c is not None))
    return [()] if () in clauses else clauses


def _plan_parts(clauses: list[Clause]) -> list[_Plan]:
    """Group clauses by blocking: global tokens, residue classes, plain blocks, lists.

    A later part leaves out what an earlier one keeps. Global tokens come first because leaving them
    out of the rest is one bit for each token; lists last because no term could leave them out.
    """
    plans: dict[tuple[int, object], _Plan] = {}
    for clause in clauses:
        listed = [t for t in clause if isinstance(t, Listed)]
        keys = [t.members for t in clause if isinstance(t, KeyIn)]
        queries = [t.members for t in clause if isinstance(t, QueryIn)]
        classes = tuple(t for t in clause if isinstance(t, Sorting))
        if len(listed) == 1:
            others = frozenset(t for t in clause if t not in listed)
            plan = plans.setdefault((4, others), _Plan())
            plan.listed += listed
        elif keys or queries:
            chosen = queries[0] if queries else None, keys[0] if keys else None
            plan = plans.setdefault((0 if keys else 1, chosen), _Plan(*chosen))
        elif classes:
            plan = plans.setdefault((2, classes), _Plan(classes=classes))
        else:
            plan = plans.setdefault((3, None), _Plan())
        plan.clauses.append(clause)
    return [plans[key] for key in sorted(plans, key=lambda key: key[0])]


def _choose_block_size(clauses: list[Clause], sides: _Sides) -> int:
    """About a window's tokens, within limits: larger blocks visit pairs that no one keeps."""
    dims, longest = sides.query.coords.shape[-1], sides.longest
    reach = max((_reach(clause, dims) for clause in clauses if not _is_narrow(clause)), default=0)
    window = _power_of_two(reach // 2 + 1) if reach else UNBOUNDED
    size = max(SMALL_BLOCK, min(BLOCK, window))
    size = max(MIN_BLOCK, min(size, _power_of_two(longest)))
    while (
        dims == 1
        and (sides.query.index.shape[0] // size) * (min(longest, reach) // size) > MAX_PAIRS
    ):
        size *= 2
    return size


def _part_block_size(plan: _Plan, size: int, sides: _Sides) -> int:
    """Do not make blocks larger than the tokens of a residue class, nor lists too long."""
    stride = prod(term.num_classes(sides.longest) for term in plan.classes)
    members = -(-sides.longest // stride)
    reach = max((_reach(clause, 1) for clause in plan.residual()), default=UNBOUNDED)
    while plan.classes and reach == UNBOUNDED and stride * (members // size) ** 2 > MAX_PAIRS:
        size *= 2
    return max(MIN_BLOCK, min(size, _power_of_two(members)))


def _is_narrow(clause: Clause) -> bool:
    return any(isinstance(t, QueryIn | KeyIn | Listed | Sorting) for t in clause)


def _reach(clause: Clause, dims: int) -> int:
    """Count the positions that a query sees if all of them are there."""
    spans = {t.axis: t.high - t.low + 1 for t in clause if isinstance(t, Interval)}
    return min(prod(spans.values()), UNBOUNDED) if len(spans) == dims else UNBOUNDED


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


Entries = tuple[Tensor, Tensor, Tensor, Tensor]
"""Row, column, whether the pair needs no mask, and its tile; given by row, then column."""


@dataclass
class _Draft:
    """A part before its lists are made: the entries of each variant of heads."""

    queries: Blocks
    keys: Blocks
    variants: list[Entries]
    tiles: UInt8[Tensor, "U M W"]
    program: Program


def _draft_part(
    plan: _Plan, earlier: list[Clause], sides: _Sides, members: list[Members], size: int
) -> _Draft:
    own = plan.residual()
    if plan.listed:
        size = _common_grain(plan.listed, size)
    queries, query_boxes = sides.cut_queries(plan, size)
    keys, key_boxes = sides.cut_keys(plan, size)
    if plan.listed:
        row, column = listed_pairs(
            plan.listed, query_boxes, key_boxes, size=size, num_segments=sides.num_segments
        )
    else:
        single = sides.num_segments == 1 and not plan.classes
        row, column = touching_pairs(own, query_boxes, key_boxes, single=single)
    row, column, full = _classify(own, earlier, (row, column), query_boxes, key_boxes)
    for blocks, which in ((queries, row), (keys, column)):
        if blocks.num_tokens < len(blocks) * blocks.size:
            full = full & (blocks.count == blocks.size)[which]
    program = encode(own, earlier, members)
    tiles = torch.empty(0, 0, 0, dtype=torch.uint8, device=row.device)
    tile = torch.empty(0, dtype=torch.int32, device=row.device)
    if program is None:
        drawn = _draw_tiles(own, earlier, sides, (queries, keys), (row, column, full))
        row, column, full, tile, tiles = drawn
    entries = (row, column, full, tile)
    variants = [_of_variant(plan, query_boxes, entries, v) for v in range(plan.num_variants())]
    return _Draft(queries, keys, variants, tiles, program or ())


def _of_variant(plan: _Plan, query: Boxes, entries: Entries, variant: int) -> Entries:
    """Choose the entries of one variant of heads."""
    reached = plan.reaches(query.index_low, variant)
    if reached is None:
        return entries
    chosen = reached[entries[0]]
    row, column, full, tile = entries
    return row[chosen], column[chosen], full[chosen], tile[chosen] if tile.numel() else tile


def _list_parts(drafts: list[_Draft]) -> list[Part]:
    """Make the lists of all parts."""
    found = iter(_all_lists([(e, d.queries, d.keys) for d in drafts for e in d.variants]))
    parts = []
    for draft in drafts:
        variants = [next(found) for _ in draft.variants]
        rows, columns = (
            stack_lists(list(lists), [0] * len(lists)) for lists in zip(*variants, strict=True)
        )
        parts.append(Part(draft.queries, draft.keys, rows, columns, draft.tiles, draft.program))
    return parts


def both_lists(entries: Entries, queries: Blocks, keys: Blocks) -> tuple[Lists, Lists]:
    """List entries from both sides."""
    return _all_lists([(entries, queries, keys)])[0]


def _all_lists(found: list[tuple[Entries, Blocks, Blocks]]) -> list[tuple[Lists, Lists]]:
    """List all entries from both sides: in one sort, by list, row and partial before full."""
    if not found:
        return []
    sides = []
    for (row, column, full, tile), queries, keys in found:
        sides += [(row, column, full, tile, len(queries)), (column, row, full, tile, len(keys))]
    majors, minors, fulls, tiles, sizes = zip(*sides, strict=True)
    lengths = [x.numel() for x in majors]
    firsts = list(accumulate(lengths, initial=0))[:-1]
    steps = [size + 1 for size in sizes]  # the end of a list is not the first of the next
    shifts = accumulate(steps, initial=0)
    major = torch.cat([x + shift for x, shift in zip(majors, shifts, strict=False)])
    rank, order = torch.sort((2 * major + torch.cat(fulls)).to(torch.int32), stable=True)
    edges = torch.arange(2 * sum(steps), dtype=torch.int32, device=rank.device)
    place = torch.searchsorted(rank, edges.view(-1, 2).T.contiguous(), out_int32=True)
    known = torch.tensor([firsts, steps], dtype=torch.int32).to(rank.device)
    place -= known[0].repeat_interleave(known[1], output_size=sum(steps))
    index = torch.cat(minors).to(torch.int32).index_select(0, order)
    lists = [
        Lists(ptr, full, index, tile[order - first] if tile.numel() else tile)
        for ptr, full, index, tile, order, first in zip(
            split_copies(place[:1], steps, 1),
            split_copies(place[1:], [n for size in sizes for n in (size, 1)], 1)[::2],
            split_copies(index, lengths, 0),
            tiles,
            order.split(lengths),
            firsts,
            strict=True,
        )
    ]
    return list(zip(lists[::2], lists[1::2], strict=True))


def _common_grain(listed: list[Listed], size: int) -> int:
    """Largest power-of-two part of the block sizes' common divisor, or the divisor itself."""
    grain = gcd(*(term.pattern.block for term in listed))
    while grain > size and grain % 2 == 0:
        grain //= 2
    return grain


def _cut_side(
    tokens: Tokens,
    segment: Int[Tensor, "T"],
    members: Members | None,
    classes: tuple[Sorting, ...],
    size: int,
    *,
    longest: int,
    is_single: bool,
) -> tuple[Blocks, Int[Tensor, "R"]]:
    group = segment
    for term in classes:
        group = group * term.num_classes(longest) + term.classify(tokens)
    chosen = None
    if members:
        chosen = members.contains(tokens.index)
        most = _power_of_two(members.first + len(members.positions))
        size = max(MIN_BLOCK, min(size, most))
    is_single = is_single and not classes
    return cut(group, size=size, members=chosen, in_order=not classes, is_single=is_single)


def _classify(
    own: list[Clause],
    earlier: list[Clause],
    pairs: Pairs,
    query: Boxes,
    key: Boxes,
) -> tuple[Int[Tensor, "Z"], Int[Tensor, "Z"], Bool[Tensor, "Z"]]:
    """Drop pairs of blocks that earlier parts keep whole; tell which need no mask."""
    row, column = pairs
    if not earlier and () in own:
        return row, column, torch.ones_like(row, dtype=torch.bool)
    query, key = query[row], key[column]
    full = covers(own, query, key)
    if not earlier:
        return row, column, full
    left = (~covers(earlier, query, key)).nonzero()[:, 0]
    full &= ~may_touch(earlier, query, key)
    return row[left], column[left], full[left]


def _draw_tiles(
    own: list[Clause],
    earlier: list[Clause],
    sides: _Sides,
    blocks: tuple[Blocks, Blocks],
    entries: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate partial blocks pair by pair; keep each distinct tile of bits once."""
    keep = clauses_keep(own, earlier)
    row, column, full = entries
    query_tokens, query_exists = blocks[0].tokens()
    key_tokens, key_exists = blocks[1].tokens()
    partial = (~full).nonzero()[:, 0]
    step = max(1, TILE_PAIRS // (blocks[0].size * blocks[1].size))
    packed, complete, empty = [], [], []
    for chosen in partial.split(step):
        r, c = row[chosen], column[chosen]
        exists = query_exists[r][:, :, None] & key_exists[c][:, None, :]
        queries, keys = sides.query[query_tokens[r]], sides.key[key_tokens[c]]
        kept = keep(queries.as_rows(), keys.as_columns()) & exists
        packed.append(pack_bits(kept))
        complete.append(kept.flatten(1).all(1))
        empty.append(~kept.flatten(1).any(1))
    tile = torch.zeros_like(row, dtype=torch.int32)
    if not packed:
        nothing = torch.empty(0, 0, 0, dtype=torch.uint8, device=row.device)
        return row, column, full, tile, nothing
    bits = torch.cat(packed)
    unique, which = torch.unique(bits.flatten(1), dim=0, return_inverse=True)
    tile[partial] = which.to(torch.int32)
    full = full.clone()
    full[partial] = torch.cat(complete)
    kept_entries = torch.ones_like(full)
    kept_entries[partial] = ~torch.cat(empty)
    chosen = kept_entries.nonzero()[:, 0]
    tiles = unique.unflatten(1, bits.shape[1:])
    return row[chosen], column[chosen], full[chosen], tile[chosen], tiles
