"""BlockLayout: a pattern's answer for one batch of sequences, in blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
import torch.utils._pytree as pytree
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from sparse_core.blocking import Blocks
from sparse_core.masking import KEY_FLAG, QUERY_FLAG, Program, decode, evaluate, unpack_bits
from sparse_core.schedule import Agenda, Launch, Schedule, make_schedule


@dataclass(frozen=True)
class Lists:
    """For each of G groups and R blocks of one side, the blocks of the other side that it meets.

    A layout's groups may all share lists: G is then 1. `index[ptr[g, r] : ptr[g, r + 1]]` are the
    blocks of row r, in ascending order unless they were chosen, those that need a mask first; from
    `full[g, r]` on every pair is kept. `tile` names each partial entry's bits, if the part has any.
    `bias` names the number that each entry's scores take from `block_bias`; None if they take none.
    """

    ptr: Int[Tensor, "G R+1"]
    full: Int[Tensor, "G R"]
    index: Int[Tensor, "Z"]
    tile: Int[Tensor, "Z"]
    bias: Int[Tensor, "Z"] | None = None

    def ends(self, group: int) -> tuple[list[int], list[int]]:
        """Copy a group's `ptr` and `full` to the host."""
        row = group if self.ptr.shape[0] > 1 else 0
        return self.ptr[row].tolist(), self.full[row].tolist()


@dataclass(frozen=True)
class Part:
    """Pairs of blocks under one blocking of queries and one of keys.

    `rows` lists key blocks by query block, `columns` query blocks by key block. Partial blocks are
    masked by `program`, or by `tiles` of bits where no program exists. Entries' biases are among
    the first `num_biases` of `block_bias`. Where keys have a bias of 0 throughout, the part need
    not take `key_bias`, which spares work.
    """

    queries: Blocks
    keys: Blocks
    rows: Lists
    columns: Lists
    tiles: UInt8[Tensor, "U M W"]
    program: Program
    num_biases: int = 0
    takes_key_bias: bool = True

    @property
    def num_blocks(self) -> int:
        """Stored pairs of blocks, of all groups."""
        return self.rows.index.shape[0]


@dataclass(frozen=True)
class BlockLayout:
    """Who attends to whom in one batch of packed sequences, ready for any engine.

    The op takes one softmax over all parts; no pair of tokens is kept by two of them. Sequences
    are packed along the token axis and never see each other. Made by `build_layout`, `concat`,
    `merge` and `stack`. It is a pytree; sizes are host integers, so no engine asks the device.
    `schedule` says in what pieces kernels work through it.

    `query_flags` hold the bits that programs ask for; `group_of` is empty where all heads and
    samples share the lists of group 0, and names the group of each otherwise.
    """

    parts: tuple[Part, ...]
    schedule: Schedule
    query_coords: Int[Tensor, "Tq P"]
    key_coords: Int[Tensor, "Tk P"]
    query_flags: Int[Tensor, "Tq"]
    key_flags: Int[Tensor, "Tk"]
    lengths: Int[Tensor, "S"]
    key_lengths: Int[Tensor, "S"]
    group_of: Int[Tensor, "B Hkv"]
    pattern: str

    @property
    def num_queries(self) -> int:
        """Query tokens, of all sequences."""
        return self.query_coords.shape[0]

    @property
    def num_keys(self) -> int:
        """Key tokens, of all sequences."""
        return self.key_coords.shape[0]

    @property
    def num_blocks(self) -> int:
        """Stored pairs of blocks, of all parts and groups."""
        return sum(part.num_blocks for part in self.parts)

    @property
    def num_groups(self) -> int:
        """Sets of lists that heads and samples choose from."""
        return max([1, *(part.rows.ptr.shape[0] for part in self.parts)])

    @property
    def num_biases(self) -> int:
        """How many numbers `block_bias` holds for each head; 0 if no pair of blocks takes one."""
        return max([0, *(part.num_biases for part in self.parts)])

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self.query_coords.device

    def to(self, device: torch.device | str) -> "BlockLayout":
        """Copy to a device."""
        moved: BlockLayout = pytree.tree_map_only(Tensor, lambda t: t.to(device), self)
        return moved

    def visited_pairs(self) -> int:
        """Count the token pairs in blocks of all groups: what engines pay for, masked or not."""
        total = 0
        for part in self.parts:
            row, entry = _entries(part.rows)
            queries = part.queries.count.long()[row % max(len(part.queries), 1)]
            keys = part.keys.count.long()[part.rows.index.long()[entry]]
            total += int((queries * keys).sum())
        return total

    def nbytes(self, *, coords: bool = False) -> int:
        """Count the memory of the lists and blocks, and of coordinates and flags if asked."""
        leaves = pytree.tree_leaves((self.parts, self.schedule))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if coords:
            tensors += [self.query_coords, self.key_coords, self.query_flags, self.key_flags]
        return sum(t.numel() * t.element_size() for t in tensors)

    def counts(self, group: int = 0) -> Int[Tensor, "Tq Tk"]:
        """Write out how often each pair of tokens is kept: 0 or 1, more only after `merge`."""
        total = torch.zeros(self.num_queries, self.num_keys, dtype=torch.int32, device=self.device)
        for part in self.parts:
            for query, key, _, kept in self.kept(part, group):
                total[query[:, None], key] += kept.to(torch.int32)
        return total

    def kept(
        self, part: Part, group: int = 0
    ) -> Iterator[tuple[Int[Tensor, "M"], Int[Tensor, "N"], int, Bool[Tensor, "M N"]]]:
        """Go through a part's entries: their queries, keys, place, and which pairs are kept."""
        query_tokens, query_exists = part.queries.tokens()
        key_tokens, key_exists = part.keys.tokens()
        ptr, full = part.rows.ends(group)
        for row in range(len(part.queries)):
            for entry in range(ptr[row], ptr[row + 1]):
                column = int(part.rows.index[entry])
                query = query_tokens[row][query_exists[row]]
                key = key_tokens[column][key_exists[column]]
                kept = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
                if entry < full[row] and part.program:
                    kept = evaluate(
                        part.program,
                        self.query_coords[query],
                        self.key_coords[key],
                        self.query_flags[query],
                        self.key_flags[key],
                    )
                elif entry < full[row]:
                    bits = part.tiles[part.rows.tile[entry].long()]
                    kept = unpack_bits(bits, part.keys.size)[: len(query), : len(key)]
                yield query, key, entry, kept

    def mask(self, group: int = 0) -> Bool[Tensor, "Tq Tk"]:
        """Write out which pairs of tokens are kept. Memory is Tq x Tk."""
        return self.counts(group) > 0

    def __repr__(self) -> str:
        return (
            f"BlockLayout({self.pattern}, {self.num_queries} x {self.num_keys} tokens, "
            f"{self.lengths.shape[0]} sequences, {len(self.parts)} parts, {self.num_blocks} blocks)"
        )


def concat(layouts: list[BlockLayout]) -> BlockLayout:
    """Pack layouts of one pattern one after another; their sequences never see each other.

    Raises ValueError if patterns or block sizes differ.
    """
    first = layouts[0]
    _check_no_biases(layouts)
    for other in layouts[1:]:
        same = other.pattern == first.pattern and len(other.parts) == len(first.parts)
        if not same or other.num_groups != first.num_groups:
            raise ValueError(f"concat takes layouts of one pattern; got {first!r} and {other!r}")
    parts = []
    for members in zip(*(layout.parts for layout in layouts), strict=True):
        queries = _concat_blocks([p.queries for p in members], [x.num_queries for x in layouts])
        keys = _concat_blocks([p.keys for p in members], [x.num_keys for x in layouts])
        tiles = torch.cat([p.tiles for p in members])
        shifts = _offsets([p.tiles.shape[0] for p in members])
        rows = _concat_lists([p.rows for p in members], [len(p.keys) for p in members], shifts)
        columns = _concat_lists(
            [p.columns for p in members], [len(p.queries) for p in members], shifts
        )
        parts.append(Part(queries, keys, rows, columns, tiles, members[0].program))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(layout, name) for layout in layouts])

    return with_parts(
        first,
        tuple(parts),
        query_coords=joined("query_coords"),
        key_coords=joined("key_coords"),
        query_flags=joined("query_flags"),
        key_flags=joined("key_flags"),
        lengths=joined("lengths"),
        key_lengths=joined("key_lengths"),
    )


def merge(layouts: list[BlockLayout]) -> BlockLayout:
    """Put the parts of layouts of the same tokens under one softmax.

    Unlike `a | b`, a pair that several keep counts once for each, as in LongNet's mixture (Ding et
    al. 2023, dilated attention). It is what `build_layout` makes of `a + b`.
    """
    first = layouts[0]
    _check_no_biases(layouts)
    tokens = (first.num_queries, first.num_keys, first.num_groups)
    if any((x.num_queries, x.num_keys, x.num_groups) != tokens for x in layouts):
        raise ValueError("merge takes layouts of the same tokens and groups")
    if any(not torch.equal(x.query_coords, first.query_coords) for x in layouts):
        raise ValueError("merge takes layouts of the same coordinates")
    parts, query_flags, key_flags, used = [], first.query_flags * 0, first.key_flags * 0, 0
    for layout in layouts:
        width = int(max(layout.query_flags.max(), layout.key_flags.max())).bit_length()
        query_flags = query_flags | (layout.query_flags << used)
        key_flags = key_flags | (layout.key_flags << used)
        parts += [_shift_flags(part, used) for part in layout.parts]
        used += width
    return with_parts(
        first,
        tuple(parts),
        query_flags=query_flags,
        key_flags=key_flags,
        pattern=" + ".join(f"({layout.pattern})" for layout in layouts),
    )


def stack(layouts: list[BlockLayout], group_of: Int[Tensor, "B Hkv"]) -> BlockLayout:
    """Give heads or samples lists of their own: `group_of[b, h]` names the layout they use.

    The layouts cover the same tokens in the same blocks: patterns of one shape, such as
    `RandomBlocks` with a seed for each head.
    """
    first = layouts[0]
    _check_no_biases(layouts)
    if int(group_of.min()) < 0 or int(group_of.max()) >= len(layouts):
        raise ValueError(f"group_of names layouts 0 to {len(layouts) - 1}; got {group_of.tolist()}")
    parts = []
    for other in layouts[1:]:
        if [_shape(p) for p in other.parts] != [_shape(p) for p in first.parts]:
            raise ValueError("stack takes layouts that differ in their lists only")
    for members in zip(*(layout.parts for layout in layouts), strict=True):
        shifts = _offsets([p.tiles.shape[0] for p in members])
        rows = stack_lists([p.rows for p in members], shifts)
        columns = stack_lists([p.columns for p in members], shifts)
        tiles = torch.cat([p.tiles for p in members])
        parts.append(replace(members[0], rows=rows, columns=columns, tiles=tiles))
    names = " / ".join(dict.fromkeys(layout.pattern for layout in layouts))
    chosen = group_of.to(first.device, torch.int32)
    return with_parts(first, tuple(parts), group_of=chosen, pattern=names)


def with_block_biases(layout: BlockLayout) -> BlockLayout:
    """Let every stored pair of blocks take a number of `block_bias`.

    Numbers are in the order of the parts' `rows`, one part after another. Packing comes before.
    """
    parts, used = [], 0
    for part in layout.parts:
        place = torch.arange(part.num_blocks, dtype=torch.int32, device=layout.device) + used
        rows = replace(part.rows, bias=place)
        columns = replace(part.columns, bias=place[_mirrored_places(part)])
        used += part.num_blocks
        parts.append(replace(part, rows=rows, columns=columns, num_biases=used))
    return replace(layout, parts=tuple(parts))


def _mirrored_places(part: Part) -> Int[Tensor, "Z"]:
    """Find the entry of `rows` that each entry of `columns` mirrors."""
    num_rows, num_columns = max(len(part.queries), 1), max(len(part.keys), 1)
    row, at = _entries(part.rows)
    column, beside = _entries(part.columns)
    mine = row * num_columns + part.rows.index[at]
    group, column = column // num_columns, column % num_columns
    theirs = (group * num_rows + part.columns.index[beside]) * num_columns + column
    places = torch.empty_like(part.columns.index, dtype=torch.int64)
    places[beside[torch.argsort(theirs)]] = at[torch.argsort(mine)]
    return places


def with_parts(
    layout: BlockLayout, parts: tuple[Part, ...], **changes: Tensor | str
) -> BlockLayout:
    """Exchange the parts, and plan the work anew."""
    values = {f.name: getattr(layout, f.name) for f in fields(layout)} | changes
    names = ("query_coords", "key_coords", "lengths", "key_lengths")
    schedule = make_schedule(parts, *(values[name] for name in names))
    return BlockLayout(**values | {"parts": parts, "schedule": schedule})


def _check_no_biases(layouts: list[BlockLayout]) -> None:
    if any(layout.num_biases for layout in layouts):
        raise ValueError("pack layouts first, then let their blocks take biases")


def _entries(lists: Lists) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Row number and place of each entry of all groups, which may share places."""
    starts = lists.ptr[:, :-1].reshape(-1).long()
    count = lists.ptr[:, 1:].reshape(-1).long() - starts
    row = torch.arange(count.numel(), device=starts.device).repeat_interleave(count)
    inner = torch.arange(row.numel(), device=starts.device) - (count.cumsum(0) - count)[row]
    return row, starts[row] + inner


def _offsets(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _concat_blocks(blocks: list[Blocks], num_tokens: list[int]) -> Blocks:
    if len({b.size for b in blocks}) != 1:
        raise ValueError("layouts have different block sizes; build them with one block_size")
    used = [b for b in blocks if len(b)] or blocks[:1]
    if any(b.order.numel() for b in used) or len({b.stride for b in used}) != 1:
        blocks = [b.indexed() for b in blocks]
    token_shift, order_shift = _offsets(num_tokens), _offsets([b.order.numel() for b in blocks])
    ordered = any(b.order.numel() for b in blocks)
    start = [
        b.start + (o if ordered else t)
        for b, t, o in zip(blocks, token_shift, order_shift, strict=True)
    ]
    order = [
        b.order + t if b.order.numel() else b.order
        for b, t in zip(blocks, token_shift, strict=True)
    ]
    count = torch.cat([b.count for b in blocks])
    stride = 1 if ordered else used[0].stride
    total, regular = sum(b.num_tokens for b in blocks), len(blocks) == 1 and blocks[0].regular
    return Blocks(torch.cat(start), count, torch.cat(order), stride, blocks[0].size, total, regular)


def _concat_lists(lists: list[Lists], widths: list[int], tile_shifts: list[int]) -> Lists:
    """Join rows within each group; entries of a group stay together."""
    index_shift = _offsets(widths)
    ptrs, fulls, indices, tiles, used = [], [], [], [], 0
    for group in range(lists[0].ptr.shape[0]):
        group_ptr, group_full = [], []
        for i, member in enumerate(lists):
            begin, end = int(member.ptr[group, 0]), int(member.ptr[group, -1])
            group_ptr.append(member.ptr[group, :-1] - begin + used)
            group_full.append(member.full[group] - begin + used)
            indices.append(member.index[begin:end] + index_shift[i])
            if member.tile.numel():
                tiles.append(member.tile[begin:end] + tile_shifts[i])
            used += end - begin
        group_ptr.append(group_ptr[0].new_tensor([used]))
        ptrs.append(torch.cat(group_ptr))
        fulls.append(torch.cat(group_full))
    tile = torch.cat(tiles) if tiles else lists[0].tile[:0]
    return Lists(torch.stack(ptrs), torch.stack(fulls), torch.cat(indices), tile)


def stack_lists(lists: list[Lists], tile_shifts: list[int]) -> Lists:
    """Put the groups of all lists side by side; `tile_shifts` are added to their tiles."""
    if len(lists) == 1 and not tile_shifts[0]:
        return lists[0]
    shifts = _offsets([x.index.shape[0] for x in lists])
    shifted = list(zip(lists, shifts, tile_shifts, strict=True))
    return Lists(
        torch.cat([x.ptr + s for x, s, _ in shifted]),
        torch.cat([x.full + s for x, s, _ in shifted]),
        torch.cat([x.index for x in lists]),
        torch.cat([x.tile + t for x, _, t in shifted]),
    )


def _shape(part: Part) -> tuple[object, ...]:
    sides = (part.queries, part.keys)
    return (*((len(b), b.size, b.stride, b.order.numel()) for b in sides), part.program)


def _shift_flags(part: Part, shift: int) -> Part:
    if not part.program or not shift:
        return part
    own, earlier = decode(part.program)
    numbers = [len(own), len(earlier)]
    for clause in own + earlier:
        numbers.append(len(clause))
        for code, a, b, c in clause:
            numbers += [code, a + shift if code in (QUERY_FLAG, KEY_FLAG) else a, b, c]
    return replace(part, program=tuple(numbers))


def register_pytree(cls: type, *constants: str) -> None:
    """Make a dataclass a pytree: of tensors and nested values, except the named constants.

    What is None is no leaf.
    """
    names = [f.name for f in fields(cls) if f.name not in constants]

    def present(value: object) -> tuple[str, ...]:
        return tuple(n for n in names if getattr(value, n) is not None)

    def flatten(value: object) -> tuple[list[object], tuple[object, ...]]:
        children = present(value)
        context = children, *(getattr(value, n) for n in constants)
        return [getattr(value, n) for n in children], context

    def unflatten(values: object, context: tuple[object, ...]) -> object:
        children, *rest = context
        given = dict.fromkeys(names) | dict(zip(children, values, strict=True))  # type: ignore[call-overload]
        return cls(**given, **dict(zip(constants, rest, strict=True)))

    def flatten_with_keys(
        value: object,
    ) -> tuple[list[tuple[pytree.KeyEntry, object]], tuple[object, ...]]:
        values, context = flatten(value)
        keys = map(pytree.GetAttrKey, present(value))
        return list(zip(keys, values, strict=True)), context

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


register_pytree(Blocks, "stride", "size", "num_tokens", "regular")
register_pytree(Lists)
register_pytree(Part, "program", "num_biases", "takes_key_bias")
register_pytree(Launch, "part_numbers", "affine", "num_slots")
register_pytree(Agenda, "num_states", "complete", "fresh")
register_pytree(Schedule, "spacing")
register_pytree(BlockLayout, "pattern")
