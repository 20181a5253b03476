"""Attention to pooled keys: cells of tokens, who sees which of them, and what stands for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
import torch.utils._pytree as pytree
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.blocking import sequence_tokens
from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout, register_pytree
from sparse_core.ops import Backend, Precision, sparse_attention
from sparse_core.patterns import Hierarchical, Pattern
from sparse_core.patterns.joined import check_axes, take_apart
from sparse_core.patterns.terms import UNBOUNDED, Clause, Interval, KeyIn, Members, QueryIn

_FAR_AWAY = 2**29
"""A cell that no other is near; differences still fit int32."""


@dataclass(frozen=True)
class Level:
    """Cells of one size. `order` sorts what they are made of by cell, `sizes` count it.

    The first level is made of tokens, each next one of the cells before it. `num_tokens` are the
    tokens of each cell.
    """

    order: Int[Tensor, "N"]
    sizes: Int[Tensor, "C"]
    num_tokens: Int[Tensor, "C"]


@dataclass(frozen=True)
class PooledLayout:
    """Who sees which tokens and which cells; made by `build_pooled_layout`, a pytree.

    The keys of `layout` are, in each sequence, its tokens followed by some `entries`: numbers of
    cells, counted through all levels, once for each cell of queries that sees them. `place` puts
    tokens and entries in that order; it is empty where there is one sequence. `log_count` is the
    logarithm of how many tokens a key stands for.
    """

    layout: BlockLayout
    coords: Int[Tensor, "T P"]
    levels: tuple[Level, ...]
    entries: Int[Tensor, "N"]
    place: Int[Tensor, "Tk"]
    log_count: Float[Tensor, "Tk"]

    @property
    def query_coords(self) -> Int[Tensor, "T P"]:
        """Coordinates of the tokens."""
        return self.coords

    def to(self, device: torch.device | str) -> "PooledLayout":
        """Copy to a device."""
        moved: PooledLayout = pytree.tree_map_only(Tensor, lambda t: t.to(device), self)
        return moved


register_pytree(Level)
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

    Raises ValueError for other patterns, and for `Causal()` with more than one axis.
    """
    cells, beside = take_apart(pattern, Hierarchical)
    tokens, segment = sequence_tokens(coords, segments, device)
    check_axes(pattern, tokens.coords.shape[1])
    members = beside.members.contains(tokens.index)
    tree = _grow(cells, tokens.coords.long(), segment, ~members)
    cell, entries = _entries(tree, cells, causal=beside.causal)
    num_sequences = 1 if segments is None else len(segments)
    sequence = torch.cat([segment, tree[0].segment[cell]])
    place = torch.sort(sequence, stable=True).indices
    query_coords = _helper_coords(tree[0], tokens.coords, members)
    key_coords = torch.cat([query_coords, query_coords.new_empty(len(cell), query_coords.shape[1])])
    dims = tokens.coords.shape[1]
    key_coords[: len(segment), dims] = -1  # tokens are keys of their own
    key_coords[len(segment) :, :dims] = _FAR_AWAY
    key_coords[len(segment) :, dims] = cell.to(torch.int32)
    key_coords[len(segment) :, dims + 1] = 1
    key_coords[len(segment) :, dims + 2] = -_FAR_AWAY
    layout = build_layout(
        _Seen(cells.near, beside.members, beside.causal),
        query_coords,
        key_coords[place],
        segments=segments,
        key_segments=torch.bincount(sequence, minlength=num_sequences),
        block_size=block_size,
    )
    counts = torch.cat([node.num_tokens for node in tree])[entries]
    log_count = torch.nn.functional.pad(counts.double().log(), (len(segment), 0))
    return PooledLayout(
        layout,
        tokens.coords,
        tuple(Level(node.order, node.sizes, node.num_tokens) for node in tree if len(entries)),
        entries,
        place[:0] if num_sequences == 1 else place,
        log_count[place],
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
    keys, values = k, v
    if len(pooled.levels):
        cells = torch.cat(list(_pool(torch.stack([k, v]), pooled.levels, scores)), 2)
        keys, values = torch.cat([torch.stack([k, v]), cells[:, :, pooled.entries]], 2).unbind(0)
    if pooled.place.numel():
        keys, values = (x.index_select(1, pooled.place) for x in (keys, values))
    bias = None
    if count:
        exact = torch.promote_types(k.dtype, torch.float32)
        bias = pooled.log_count.to(exact).expand(k.shape[0], -1)
    return sparse_attention(
        q, keys, values, pooled.layout,
        scale=scale, key_bias=bias, backend=backend, precision=precision, return_lse=return_lse,
    )  # fmt: skip


def _pool(
    both: Float[Tensor, "2 B T Hkv D"],
    levels: tuple[Level, ...],
    scores: Float[Tensor, "B T Hkv"] | None,
) -> Iterator[Float[Tensor, "2 B C Hkv D"]]:
    """Average keys and values level by level; sums are taken in at least float32."""
    dtype = torch.promote_types(both.dtype, torch.float32)
    below, total = both.to(dtype), None if scores is None else scores.to(dtype)
    for number, level in enumerate(levels):
        pieces = below.index_select(2, level.order)
        if total is None:
            inside = 1 if number == 0 else levels[number - 1].num_tokens[level.order]
            cell = level.num_tokens.repeat_interleave(level.sizes, output_size=pieces.shape[2])
            share = (inside / cell.to(dtype))[:, None, None]
        else:
            ours = total.index_select(1, level.order)
            total = _log_sum_exp(ours, level.sizes)
            spread = total.repeat_interleave(level.sizes, 1, output_size=ours.shape[1])
            share = (ours - spread).exp()[..., None]
        below = _sums(pieces * share, level.sizes, 2)
        yield below.to(both.dtype)


def _log_sum_exp(x: Float[Tensor, "B N Hkv"], sizes: Int[Tensor, "C"]) -> Tensor:
    first = x.detach().movedim(1, 0).contiguous()
    largest = torch.segment_reduce(first, "max", lengths=sizes, unsafe=True).movedim(0, 1)
    spread = largest.repeat_interleave(sizes, 1, output_size=x.shape[1])
    return _sums((x - spread).exp(), sizes, 1).log() + largest


def _sums(x: Tensor, sizes: Int[Tensor, "C"], dim: int) -> Tensor:
    """Sum runs of `sizes` along a dimension, each in a fixed order."""
    first = x.movedim(dim, 0).contiguous()
    return torch.segment_reduce(first, "sum", lengths=sizes, unsafe=True).movedim(0, dim)


@dataclass(frozen=True, repr=False)
class _Seen(Pattern):
    """The pairs of a pooled layout, told by helper coordinates of queries and keys.

    Axes are those of the query's cell, then the cell's number (of an entry: the cell whose queries
    see it; of tokens -1), whether a key is an entry, and the place in the sequence.
    """

    near: int
    members: Members
    causal: bool

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Near tokens; a cell's own entries; global tokens."""
        axes = range(dims - 3)
        clauses: list[Clause] = [
            tuple(Interval(axis, -self.near, self.near) for axis in axes),
            (Interval(dims - 3, 0, 0),),
        ]
        if self.members.first or self.members.positions:
            tokens = Interval(dims - 2, 0, 0)
            clauses += [(QueryIn(self.members), tokens), (KeyIn(self.members), tokens)]
        before: Clause = (Interval(dims - 1, 0, UNBOUNDED),) if self.causal else ()
        return tuple(clause + before for clause in clauses)


@dataclass(frozen=True)
class _Node:
    """The cells of one level while the tree grows; `cell_of` is that of each token or child."""

    segment: Int[Tensor, "C"]
    coords: Int[Tensor, "C P"]
    order: Int[Tensor, "N"]
    sizes: Int[Tensor, "C"]
    num_tokens: Int[Tensor, "C"]
    cell_of: Int[Tensor, "N"]
    key: Int[Tensor, "C"]
    widths: tuple[int, ...] = field(default=())


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
    index = chosen.nonzero()[:, 0]
    cells = (coords[index] - low[segment[index]]) // pattern.cell
    node = _gather_cells(segment[index], cells, torch.ones_like(index), index)
    tree = [node]
    while pattern.levels is None or len(tree) < pattern.levels:
        above = [-(-width // pattern.factor) for width in node.widths]
        if max(above, default=0) - 1 <= pattern.near:
            break
        numbers = torch.arange(len(node.sizes), device=index.device)
        node = _gather_cells(node.segment, node.coords // pattern.factor, node.num_tokens, numbers)
        tree.append(node)
    return tree


def _gather_cells(
    segment: Int[Tensor, "N"],
    coords: Int[Tensor, "N P"],
    num_tokens: Int[Tensor, "N"],
    index: Int[Tensor, "N"],
) -> _Node:
    widths = tuple(int(n) + 1 for n in coords.amax(0).tolist()) if len(coords) else ()
    key = segment.clone()
    for axis, width in enumerate(widths):
        key = key * width + coords[:, axis]
    unique, cell_of, sizes = torch.unique(key, return_inverse=True, return_counts=True)
    sorting = torch.sort(cell_of, stable=True).indices
    first = sorting[sizes.cumsum(0) - sizes]
    counts = torch.zeros_like(unique).index_add_(0, cell_of, num_tokens)
    return _Node(
        segment[first], coords[first], index[sorting], sizes, counts, cell_of, unique, widths
    )


def _entries(
    tree: list[_Node], pattern: Hierarchical, *, causal: bool
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """List (cell of queries, number of the far cell that they see), by cell, then by number."""
    near, factor = pattern.near, pattern.factor
    own = torch.arange(len(tree[0].sizes), device=tree[0].key.device)
    if pattern.levels is None and max(tree[0].widths, default=0) - 1 <= near:
        return own[:0], own[:0]
    dims = tree[0].coords.shape[1]
    device = own.device
    around = torch.tensor(list(product(range(-near, near + 1), repeat=dims)), device=device)
    child = torch.tensor(list(product(range(factor), repeat=dims)), device=device)
    ancestor, offset = own, 0
    found = []
    for number, node in enumerate(tree):
        if number:
            ancestor = node.cell_of[ancestor]
        mine = node.coords // factor
        cells = (mine[:, None] + around) * factor  # first children of near parents
        cells = (cells[:, :, None] + child).flatten(1, 2)  # [C, K, P]
        far = ((cells - node.coords[:, None]).abs() > near).any(-1)
        if causal:
            far &= (cells < node.coords[:, None]).all(-1)
        place, exists = _look_up(node, cells)
        exists &= far
        which, column = exists[ancestor].nonzero(as_tuple=True)
        found.append((which, place[ancestor[which], column] + offset))
        offset += len(node.sizes)
    cell, entry = (torch.cat(x) for x in zip(*found, strict=True))
    order = torch.sort(cell * offset + entry).indices
    return cell[order], entry[order]


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


def _helper_coords(
    node: _Node, coords: Int[Tensor, "T P"], members: Bool[Tensor, "T"]
) -> Int[Tensor, "T Q"]:
    """Cell coordinates, cell number, 0, and the first coordinate; global tokens are nowhere."""
    num_tokens, dims = coords.shape
    helper = torch.full((num_tokens, dims + 3), -_FAR_AWAY, dtype=torch.int32, device=coords.device)
    index = (~members).nonzero()[:, 0]
    helper[index, :dims] = node.coords[node.cell_of].to(torch.int32)
    helper[index, dims] = node.cell_of.to(torch.int32)
    helper[:, dims + 1] = 0
    helper[:, dims + 2] = coords[:, 0]
    return helper
