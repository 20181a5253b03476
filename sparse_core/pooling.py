"""Attention to pooled keys: cells of tokens, who sees which of them, and what stands for them."""

from dataclasses import dataclass, replace
from itertools import accumulate, product

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.blocking import Blocks, cut, sequence_tokens
from sparse_core.building import BLOCK, MIN_BLOCK, both_lists
from sparse_core.layout import BlockLayout, Part, register_pytree
from sparse_core.masking import KEEP_ALL, Program, encode
from sparse_core.ops import Backend, Precision, sparse_attention
from sparse_core.pairing import Pairs
from sparse_core.patterns import Hierarchical, Pattern
from sparse_core.patterns.joined import check_axes, take_apart
from sparse_core.patterns.terms import UNBOUNDED, Interval
from sparse_core.schedule import make_schedule

_FAR_AWAY = 2**29
"""Beyond any coordinate of a cell."""


@dataclass(frozen=True)
class Groups:
    """R rows, of which N are in C groups.

    `order` are the rows of the first group, then of the second, and so on; `sizes` count them.
    `group_of` is each row's group, C for rows in none. With `run` the last N rows are in order, and
    groups are runs of so many, but for the last.
    """

    order: Int[Tensor, "N"]
    sizes: Int[Tensor, "C"]
    group_of: Int[Tensor, "R"]
    run: int


@dataclass(frozen=True)
class PooledLayout:
    """Who sees which tokens and which cells; made by `build_pooled_layout`, a pytree.

    The first of `levels` puts tokens into cells, each next one the cells before it into larger
    ones. Cells are numbered through all levels; `num_tokens` are the tokens of each. The keys of
    `layout` are all tokens, followed by `entries`: a cell stands there once for each list that
    names it. `log_count` is the logarithm of how many tokens a key stands for.
    """

    layout: BlockLayout
    coords: Int[Tensor, "T P"]
    levels: tuple[Groups, ...]
    num_tokens: Int[Tensor, "C"]
    entries: Groups
    log_count: Float[Tensor, "Tk"]

    @property
    def query_coords(self) -> Int[Tensor, "T P"]:
        """Coordinates of the tokens."""
        return self.coords

    def to(self, device: torch.device | str) -> "PooledLayout":
        """Copy to a device."""
        moved: PooledLayout = pytree.tree_map_only(Tensor, lambda t: t.to(device), self)
        return moved


register_pytree(Groups, "run")
register_pytree(PooledLayout)


def build_pooled_layout(
    pattern: Pattern,
    coords: Int[Tensor, "T P"] | Int[Tensor, "T"] | int,
    *,
    segments: Int[Tensor, "S"] | list[int] | None = None,
    block_size: int | None = None,
    device: torch.device | str | None = None,
) -> PooledLayout:
    """Find for each cell of queries the tokens near it and the cells further out.

    `pattern` is a `Hierarchical`, which `| GlobalTokens(...)` and `& Causal()` may join; other
    arguments are those of `build_layout`. Cells count from the smallest coordinates of each
    sequence, so that moving a sequence changes nothing. Global tokens belong to no cell. Cost is
    proportional to tokens plus stored blocks.

    Blocks hold tokens of one cell, so that all of a block see the same: blocks of near cells, and
    blocks of entries that list the far cells of their own cell or of one that it lies in.

    Raises ValueError for other patterns, and for `Causal()` with more than one axis.
    """
    cells, beside = take_apart(pattern, Hierarchical)
    tokens, segment = sequence_tokens(coords, segments, device)
    check_axes(pattern, tokens.coords.shape[1])
    members = beside.members.contains(tokens.index)
    lengths = torch.as_tensor([len(segment)] if segments is None else segments)
    lengths = lengths.to(segment.device, torch.int64)
    tree = _grow(cells, tokens.coords.long(), segment, ~members)
    size = block_size or _block_size(tree[0].groups.sizes)
    far = _list_far(tree, cells, size, causal=beside.causal)
    sides = _cut(tree[0], segment, len(lengths), far, size)
    near = _near_part(tree[0], sides, tokens.coords[:, 0], cells.near, causal=beside.causal)
    parts = [replace(near, takes_key_bias=False)]  # a token counts once: log 1
    if len(far.entry):
        parts.append(_far_part(sides, far))
    num_tokens = torch.cat([node.num_tokens for node in tree])
    sequence = torch.cat([node.segment for node in tree])[far.owner]
    key_lengths = lengths + torch.bincount(sequence, minlength=len(lengths))
    return PooledLayout(
        _join(tuple(parts), tokens.coords, lengths, key_lengths, repr(pattern)),
        tokens.coords,
        tuple(node.groups for node in tree if len(far.entry)),
        num_tokens,
        _group(far.entry, len(num_tokens)),
        F.pad(num_tokens[far.entry].double().log(), (len(segment), 0)),
    )


def pooled_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T Hkv D"],
    v: Float[Tensor, "B T Hkv D"],
    pooled: PooledLayout,
    *,
    scores: Float[Tensor, "B T Hkv"] | None = None,
    count: bool = True,
    scale: float | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
    return_lse: bool = False,
) -> Float[Tensor, "B T H D"] | tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H T"]]:
    """Attend to near tokens and far cells in one softmax; other arguments as `sparse_attention`.

    A cell's key and value are the means of its tokens' keys and values, or, with `scores`, their
    averages by the softmax of the scores over the cell (learned pooling). With `count`, a cell's
    score grows by the logarithm of its number of tokens: it then weighs as much as they would if
    all were alike. Exact, and differentiable in q, k, v and scores.
    """
    bias = None
    if pooled.levels:
        shares = None if scores is None else _shares(scores, pooled.levels)
        k, v = (_with_entries(x, pooled, shares) for x in (k, v))
        if count:
            exact = torch.promote_types(k.dtype, torch.float32)
            bias = pooled.log_count.to(exact).expand(k.shape[0], -1)
    return sparse_attention(
        q, k, v, pooled.layout,
        scale=scale, key_bias=bias, backend=backend, precision=precision, return_lse=return_lse,
    )  # fmt: skip


def _with_entries(
    x: Float[Tensor, "B T Hkv D"],
    pooled: PooledLayout,
    shares: list[Float[Tensor, "B N Hkv"]] | None,
) -> Float[Tensor, "B Tk Hkv D"]:
    """Average tokens by cells, level by level, and append what entries name."""
    found, below = [], x
    for number, level in enumerate(pooled.levels):
        if shares is not None:
            below = below * shares[number][..., None]
        below = _Total.apply(below, level)
        found.append(below)
    cells = torch.cat(found, 1)
    if shares is None:
        cells = cells / pooled.num_tokens[:, None, None].to(cells.dtype)
    entries: Tensor = _Spread.apply(cells.to(x.dtype), pooled.entries)
    return torch.cat([x, entries], 1)


def _shares(
    scores: Float[Tensor, "B T Hkv"], levels: tuple[Groups, ...]
) -> list[Float[Tensor, "B N Hkv"]]:
    """Say of each level how much the rows are of their groups, by a softmax of the scores."""
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32))
    found = []
    for level in levels:
        if _has_outsiders(level):
            outside = level.group_of == level.sizes.shape[0]
            logits = logits.masked_fill(outside[:, None], -torch.inf)
        inside = logits.detach()[:, level.order].transpose(0, 1).contiguous()
        largest = torch.segment_reduce(inside, "max", lengths=level.sizes, unsafe=True)
        largest = largest.transpose(0, 1)
        weights = (logits - _spread(largest, level)).exp()
        total = _Total.apply(weights, level).log() + largest
        found.append((logits - _Spread.apply(total, level)).exp())
        logits = total
    return found


class _Total(torch.autograd.Function):
    """Sum the rows of each group, in at least float32 and in a fixed order."""

    @staticmethod
    def forward(ctx, x, groups):  # type: ignore[no-untyped-def]
        """[B, R, ...] to [B, C, ...]."""
        ctx.groups, ctx.dtype = groups, x.dtype
        return _total(x, groups)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Spread."""
        return _spread(grad.to(ctx.dtype), ctx.groups), None


class _Spread(torch.autograd.Function):
    """Give each row what its group has, and 0 to rows without a group."""

    @staticmethod
    def forward(ctx, x, groups):  # type: ignore[no-untyped-def]
        """[B, C, ...] to [B, R, ...]."""
        ctx.groups, ctx.dtype = groups, x.dtype
        return _spread(x, groups)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Sum."""
        return _total(grad, ctx.groups).to(ctx.dtype), None


def _total(x: Float[Tensor, "B R ..."], groups: Groups) -> Float[Tensor, "B C ..."]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if groups.run:
        runs = x[:, x.shape[1] - groups.order.shape[0] :]
        whole = runs.shape[1] // groups.run * groups.run
        total = runs[:, :whole].unflatten(1, (-1, groups.run)).sum(2, dtype=dtype)
        rest = runs[:, whole:]
        if not rest.shape[1]:
            return total
        return torch.cat([total, rest.sum(1, keepdim=True, dtype=dtype)], 1)
    rows = x.transpose(0, 1).flatten(1)
    first = F.pad(groups.sizes.cumsum(0), (1, 0))
    # means, because sums may be beyond what float16 holds
    means = F.embedding_bag(groups.order, rows, first, mode="mean", include_last_offset=True)
    total = means.to(dtype) * groups.sizes[:, None]
    return total.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1)


def _spread(x: Float[Tensor, "B C ..."], groups: Groups) -> Float[Tensor, "B R ..."]:
    if _has_outsiders(groups):
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))
    return x.index_select(1, groups.group_of)


def _has_outsiders(groups: Groups) -> bool:
    return groups.order.shape[0] < groups.group_of.shape[0]


def _group(group_of: Int[Tensor, "R"], num_groups: int) -> Groups:
    """Sort rows by group; those of group `num_groups` are in none."""
    sizes = torch.bincount(group_of, minlength=num_groups + 1)[:num_groups]
    rows = torch.arange(len(group_of), device=group_of.device)
    order = torch.sort(group_of, stable=True).indices[: int(sizes.sum())]
    even = (sizes[:-1] == sizes[:1]).all() & (sizes[-1:] <= sizes[:1]).all() & (sizes > 0).all()
    in_order = torch.equal(order, rows[len(rows) - len(order) :])
    return Groups(order, sizes, group_of, int(sizes[0]) if num_groups and in_order and even else 0)


@dataclass(frozen=True)
class _Node:
    """The cells of one level while the tree grows, and what groups they make of those below."""

    segment: Int[Tensor, "C"]
    coords: Int[Tensor, "C P"]
    num_tokens: Int[Tensor, "C"]
    groups: Groups
    key: Int[Tensor, "C"]
    widths: tuple[int, ...]


def _grow(
    pattern: Hierarchical,
    coords: Int[Tensor, "T P"],
    segment: Int[Tensor, "T"],
    chosen: Bool[Tensor, "T"],
) -> list[_Node]:
    """Cut the chosen tokens into cells, these into larger ones, until all others are near."""
    num_sequences = int(segment.max()) + 1 if segment.numel() else 1
    low = torch.full((num_sequences, coords.shape[1]), _FAR_AWAY, device=coords.device)
    inside = torch.where(chosen[:, None], coords, _FAR_AWAY)
    low.scatter_reduce_(0, segment[:, None].expand_as(coords), inside, "amin")
    node = _gather(segment, (coords - low[segment]) // pattern.cell, chosen.long())
    tree = [node]
    while pattern.levels is None or len(tree) < pattern.levels:
        above = [-(-width // pattern.factor) for width in node.widths]
        if max(above, default=0) - 1 <= pattern.near:
            break
        node = _gather(node.segment, node.coords // pattern.factor, node.num_tokens)
        tree.append(node)
    return tree


def _gather(
    segment: Int[Tensor, "R"], coords: Int[Tensor, "R P"], num_tokens: Int[Tensor, "R"]
) -> _Node:
    """Put what has the same coordinates into one cell, but for what has no tokens."""
    inside = num_tokens.nonzero()[:, 0]
    where, sequence = coords[inside], segment[inside]
    widths = (where.amax(0) + 1).tolist() if len(inside) else [0] * coords.shape[1]
    key = sequence
    for axis, width in enumerate(widths):
        key = key * width + where[:, axis]
    unique, cell_of = torch.unique(key, return_inverse=True)
    group_of = torch.full_like(num_tokens, len(unique)).index_copy_(0, inside, cell_of)
    groups = _group(group_of, len(unique))
    first = groups.order[groups.sizes.cumsum(0) - groups.sizes]
    counts = torch.zeros_like(unique).index_add_(0, cell_of, num_tokens[inside])
    return _Node(segment[first], coords[first], counts, groups, unique, tuple(widths))


@dataclass(frozen=True)
class _Far:
    """The lists of far cells: N entries, sorted by the cell that owns the list.

    `seen_by` are the owners of the L lists that queries of each cell see.
    """

    owner: Int[Tensor, "N"]
    entry: Int[Tensor, "N"]
    seen_by: Int[Tensor, "C L"]


def _list_far(tree: list[_Node], pattern: Hierarchical, size: int, *, causal: bool) -> _Far:
    """List the far cells of each level, once for all queries of a cell.

    Several levels share lists, owned by the cells of the first, as far as these fit into a block.
    """
    found = [_far_of(node, pattern, causal=causal) for node in tree]
    most = torch.stack([F.pad(far.sum(1), (0, 1)).amax() for _, far in found]).amax()
    step = max(1, size // max(int(most), 1))
    offsets = [0, *accumulate(len(node.coords) for node in tree)]
    above = torch.arange(len(tree[0].coords), device=most.device)  # of cells of the first level
    up = above  # of owners
    owners, entries, seen_by = [], [], []
    for number, (node, (place, far)) in enumerate(zip(tree, found, strict=True)):
        if number:
            above, up = node.groups.group_of[above], node.groups.group_of[up]
        if number % step == 0:
            up, first_owner = torch.arange(len(node.coords), device=most.device), offsets[number]
            seen_by.append(above + first_owner)
        which, column = far[up].nonzero(as_tuple=True)
        owners.append(which + first_owner)
        entries.append(place[up[which], column] + offsets[number])
    owner, entry = torch.cat(owners), torch.cat(entries)
    order = torch.sort(owner * offsets[-1] + entry).indices
    return _Far(owner[order], entry[order], torch.stack(seen_by, 1))


def _far_of(
    node: _Node, pattern: Hierarchical, *, causal: bool
) -> tuple[Int[Tensor, "C K"], Bool[Tensor, "C K"]]:
    """Find the cells whose parents are near those of a cell, and which of them are far from it."""
    dims, near, factor = node.coords.shape[1], pattern.near, pattern.factor
    mine = node.coords[:, None]
    child = _grid(0, factor - 1, dims, mine.device)
    cells = (mine // factor + _grid(-near, near, dims, mine.device)) * factor
    cells = (cells[:, :, None] + child).flatten(1, 2)  # [C, K, P]
    far = ((cells - mine).abs() > near).any(-1)
    if causal:
        far &= (cells < mine).all(-1)
    place, exists = _look_up(node, cells)
    return place, exists & far


def _grid(low: int, high: int, dims: int, device: torch.device) -> Int[Tensor, "K P"]:
    return torch.tensor(list(product(range(low, high + 1), repeat=dims)), device=device)


def _look_up(
    node: _Node, cells: Int[Tensor, "C K P"]
) -> tuple[Int[Tensor, "C K"], Bool[Tensor, "C K"]]:
    """Find cells by their coordinates, in the sequence of each row."""
    widths = torch.tensor(node.widths, device=cells.device)
    inside = ((cells >= 0) & (cells < widths)).all(-1)
    key = node.segment[:, None].expand(cells.shape[:2])
    for axis, width in enumerate(node.widths):
        key = key * width + cells[..., axis]
    place = torch.searchsorted(node.key, key.contiguous()).clamp(max=len(node.key) - 1)
    return place, inside & (node.key[place] == key)


@dataclass(frozen=True)
class _Sides:
    """Blocks of queries and of keys, none of which holds tokens of two labels, and their labels.

    Labels count the first level's cells, then sequences, whose global tokens they stand for, then
    owners of entries. Keys begin with the blocks of queries; `sequence` is that of each.
    """

    queries: Blocks
    keys: Blocks
    query_label: Int[Tensor, "R"]
    key_label: Int[Tensor, "C"]
    sequence: Int[Tensor, "R"]
    num_cells: int
    num_sequences: int


def _block_size(sizes: Int[Tensor, "C"]) -> int:
    """About the size of a token's cell, within limits."""
    typical = int((sizes * sizes).sum() / sizes.sum().clamp(min=1))
    return max(MIN_BLOCK, min(BLOCK, 1 << max(typical - 1, 0).bit_length()))


def _cut(
    node: _Node, segment: Int[Tensor, "T"], num_sequences: int, far: _Far, size: int
) -> _Sides:
    num_cells, cell = len(node.coords), node.groups.group_of
    label = torch.where(cell == num_cells, num_cells + segment, cell)
    num_labels = num_cells + num_sequences
    # a table of tokens costs more than the blocks of a few cells that lie in pieces
    in_order = 4 * int((label.diff() != 0).sum()) <= 5 * num_labels
    queries, query_label = cut(label, size=size, in_order=in_order)
    keys, key_label = queries, query_label
    if len(far.entry):
        both = torch.cat([label, num_labels + far.owner])
        keys, key_label = cut(both, size=size, in_order=in_order)
    sequences = torch.arange(num_sequences, device=segment.device)
    sequence = torch.cat([node.segment, sequences])[query_label]
    return _Sides(queries, keys, query_label, key_label, sequence, num_cells, num_sequences)


def _near_part(
    node: _Node, sides: _Sides, coords: Int[Tensor, "T"], near: int, *, causal: bool
) -> Part:
    """Let tokens see those of near cells and global ones, and these all of their sequence."""
    label, num_cells = sides.query_label, sides.num_cells
    ordinary = label < num_cells
    in_cell, in_none = ordinary.nonzero()[:, 0], (~ordinary).nonzero()[:, 0]
    around = _grid(-near, near, node.coords.shape[1], coords.device)
    place, exists = _look_up(node, node.coords[:, None] + around)
    place = torch.cat([place, num_cells + node.segment[:, None]], 1)[label[in_cell]]
    which, column = F.pad(exists, (0, 1), value=True)[label[in_cell]].nonzero(as_tuple=True)
    near_pairs = _meet(in_cell[which], place[which, column], label)
    global_pairs = _meet(in_none, sides.sequence[in_none], sides.sequence)
    row, column = (torch.cat(x) for x in zip(near_pairs, global_pairs, strict=True))
    if not causal:
        return _part(sides, (row, column), KEEP_ALL)
    low, high = torch.aminmax(coords[sides.queries.tokens()[0]], dim=1)
    kept = high[row] >= low[column]
    row, column = row[kept], column[kept]
    program = encode([(Interval(0, 0, UNBOUNDED),)], [], []) or KEEP_ALL
    return _part(sides, (row, column), program, ordered=low[row] >= high[column])


def _far_part(sides: _Sides, far: _Far) -> Part:
    """Let tokens of cells see the lists of their own cell and of those that it lies in."""
    in_cell = (sides.query_label < sides.num_cells).nonzero()[:, 0]
    seen = far.seen_by[sides.query_label[in_cell]] + sides.num_cells + sides.num_sequences
    row = in_cell.repeat_interleave(seen.shape[1])
    return _part(sides, _meet(row, seen.flatten(), sides.key_label), KEEP_ALL)


def _meet(row: Int[Tensor, "N"], wanted: Int[Tensor, "N"], label: Int[Tensor, "R"]) -> Pairs:
    """Pair each row with all blocks of the label that it wants."""
    labels, order = torch.sort(label, stable=True)
    first = torch.searchsorted(labels, wanted)
    number = torch.searchsorted(labels, wanted, right=True) - first
    which = torch.arange(len(row), device=row.device).repeat_interleave(number)
    inner = torch.arange(len(which), device=row.device) - (number.cumsum(0) - number)[which]
    return row[which], order[first[which] + inner]


def _part(
    sides: _Sides, pairs: Pairs, program: Program, *, ordered: Bool[Tensor, "Z"] | None = None
) -> Part:
    """List pairs of blocks, without a mask where those walked over are whole and all `ordered`.

    A block's own lanes beyond its tokens need no mask, so the lists of both sides differ in that.
    """
    queries, keys = sides.queries, sides.keys
    order = torch.sort(pairs[0] * len(keys) + pairs[1]).indices
    row, column = pairs[0][order], pairs[1][order]
    whole_query, whole_key = ((x.count == x.size) for x in (queries, keys))
    by_query, by_key = whole_key[column], whole_query[row]
    if ordered is not None:
        by_query, by_key = by_query & ordered[order], by_key & ordered[order]
    none = torch.empty(0, dtype=torch.int32, device=row.device)
    rows, _ = both_lists((row, column, by_query, none), queries, keys)
    _, columns = both_lists((row, column, by_key, none), queries, keys)
    bits = torch.empty(0, 0, 0, dtype=torch.uint8, device=row.device)
    return Part(queries, keys, rows, columns, bits, program)


def _join(
    parts: tuple[Part, ...],
    coords: Int[Tensor, "T P"],
    lengths: Int[Tensor, "S"],
    key_lengths: Int[Tensor, "S"],
    pattern: str,
) -> BlockLayout:
    """Make a layout whose keys are the tokens and, after all of them, the entries."""
    num_tokens, num_keys = len(coords), parts[0].keys.num_tokens
    key_coords = coords
    if num_keys > num_tokens:
        # no one asks for the entries' coordinates; these count on where the tokens' do
        beyond = torch.arange(num_tokens, num_keys, device=coords.device, dtype=torch.int32)
        key_coords = torch.cat([coords, beyond[:, None].expand(-1, coords.shape[1])])
    flags = torch.zeros(num_keys, dtype=torch.int32, device=coords.device)
    return BlockLayout(
        parts=parts,
        schedule=make_schedule(parts, coords, key_coords, lengths, key_lengths),
        query_coords=coords,
        key_coords=key_coords,
        query_flags=flags[:num_tokens],
        key_flags=flags,
        lengths=lengths,
        key_lengths=key_lengths,
        group_of=flags.new_empty(0, 0),
        pattern=pattern,
    )
