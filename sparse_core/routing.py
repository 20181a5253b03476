"""Learned choice of blocks: what a block of queries is like decides which blocks of keys it sees.

The router's score of query block i and key block j is `scale * mean(q_i) . mean(k_j)`, by means
over the tokens of each block (and over the query heads of a key head): with plain means, the
average attention score of all their pairs. The blocks that score highest are seen, and their score
is added to those of all pairs in them, so that a block that helped is scored higher next time. The
choice itself has no gradient. Blocks that are seen in any case have no score added. All is one call
of the op, in which each chosen block takes a number of `block_bias`.
"""

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.blocking import Blocks, cut, sequence_tokens
from sparse_core.building import both_lists, build_layout
from sparse_core.choosing import choose, score_blocks
from sparse_core.layout import BlockLayout, Lists, Part, register_pytree, with_parts
from sparse_core.listing import with_chosen
from sparse_core.masking import KEEP_ALL, encode
from sparse_core.ops import Backend, Precision, sparse_attention
from sparse_core.patterns import Causal, GlobalTokens, Pattern, Routed
from sparse_core.patterns.joined import Beside, check_axes, take_apart
from sparse_core.patterns.terms import UNBOUNDED, Interval, Tokens


@dataclass(frozen=True)
class RoutedLayout:
    """Blocks of tokens, what they see in any case, and what they may choose from.

    Made by `build_routed_layout`, a pytree. `seen` holds the neighbours and global tokens, and, if
    anything is to be chosen, a last part without entries. `tokens` are those of each block,
    `exists` tells them from padding; `asking` are the tokens whose queries a block chooses by.
    Block r chooses at most `num_chosen` of the blocks from `low[r]` up to, not including,
    `high[r]`, and none of the `num_near` to each side. With `whole` the tokens of all blocks, one
    after another, are those of the sequence.
    """

    seen: BlockLayout
    tokens: Int[Tensor, "R M"]
    exists: Bool[Tensor, "R M"]
    asking: Int[Tensor, "R M"]
    low: Int[Tensor, "R"]
    high: Int[Tensor, "R"]
    num_chosen: int
    num_near: int
    whole: bool
    causal: bool

    @property
    def query_coords(self) -> Int[Tensor, "T P"]:
        """Coordinates of the tokens."""
        return self.seen.query_coords

    def to(self, device: torch.device | str) -> "RoutedLayout":
        """Copy to a device."""
        moved: RoutedLayout = pytree.tree_map_only(Tensor, lambda t: t.to(device), self)
        return moved


register_pytree(RoutedLayout, "num_chosen", "num_near", "whole", "causal")


def build_routed_layout(
    pattern: Pattern,
    coords: Int[Tensor, "T P"] | Int[Tensor, "T"] | int,
    *,
    segments: Int[Tensor, "S"] | list[int] | None = None,
    device: torch.device | str | None = None,
) -> RoutedLayout:
    """Cut tokens into blocks, and find what each sees in any case; the rest waits for queries.

    `pattern` is a `Routed`, which `| GlobalTokens(...)` and `& Causal()` may join; other arguments
    are those of `build_layout`. Blocks are runs of tokens in the order given, whatever their
    coordinates: tissue should be ordered along a curve.

    Raises ValueError for other patterns, for `Causal()` with more than one axis, and for `Causal()`
    where coordinates fall within a sequence.
    """
    routed, beside = take_apart(pattern, Routed)
    tokens, segment = sequence_tokens(coords, segments, device)
    check_axes(pattern, tokens.coords.shape[1])
    if beside.causal:
        _check_order(tokens, segment)
    members = beside.members.contains(tokens.index)
    has_members = bool(beside.members.first or beside.members.positions)
    num_sequences = 1 if segments is None else len(segments)
    blocks, sequence = cut(
        segment, size=routed.block, members=~members if has_members else None,
        is_single=num_sequences == 1 and not has_members,
    )  # fmt: skip
    number = torch.arange(len(blocks), device=sequence.device)
    low = torch.searchsorted(sequence, sequence)
    high = torch.searchsorted(sequence, sequence, right=True)
    longest = int((high - low).max()) if len(blocks) else 0
    within, exists = blocks.tokens()
    order = within[exists]
    num_chosen = min(routed.top, max(longest - 1 - routed.near, 0))
    seen = _seen(routed.near, beside, tokens, blocks, (low, high), segments, num_chosen)
    asking = within
    if beside.causal:  # queries up to the first of the block
        high = torch.minimum(high, number - routed.near)
        back = torch.arange(1 - routed.block, 1, device=order.device)
        asking = order[(_first(blocks)[:, None] + back).clamp(min=0)]
    return RoutedLayout(
        seen=seen,
        tokens=within,
        exists=exists,
        asking=asking,
        low=low,
        high=high,
        num_chosen=num_chosen,
        num_near=routed.near,
        whole=blocks.regular and blocks.num_tokens == len(blocks) * blocks.size,
        causal=beside.causal,
    )


def routed_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T Hkv D"],
    v: Float[Tensor, "B T Hkv D"],
    routed: RoutedLayout,
    *,
    query_scores: Float[Tensor, "B T Hkv"] | None = None,
    key_scores: Float[Tensor, "B T Hkv"] | None = None,
    chosen: Int[Tensor, "B Hkv R K"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
    return_lse: bool = False,
) -> Float[Tensor, "B T H D"] | tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H T"]]:
    """Choose blocks by queries and keys, and attend; other arguments as `sparse_attention`.

    With `query_scores` or `key_scores` a block's query or key is not the mean of its tokens' but
    their average by the softmax of these scores (learned pooling). `chosen` are blocks from
    `choose_blocks`, or any others, to be seen instead of those that score highest: of its own
    sequence, none twice in a row and none that is near; the number of blocks stands for none.

    Exact, and differentiable in q, k, v and the scores at fixed choice, also through what is added
    to the scores of chosen blocks.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    layout, gates = routed.seen, None
    if routed.num_chosen:
        about_q, about_k = describe_blocks(
            q, k, routed, query_scores=query_scores, key_scores=key_scores
        )
        about_q = about_q * scale
        if chosen is None:
            chosen = choose_blocks(about_q, about_k, routed)
        layout = with_chosen(routed.seen, chosen, chosen < routed.exists.shape[0])
        gates = score_blocks(about_q.transpose(1, 2), about_k.transpose(1, 2), chosen).flatten(2)
    return sparse_attention(
        q, k, v, layout,
        scale=scale, block_bias=gates, backend=backend, precision=precision, return_lse=return_lse,
    )  # fmt: skip


def describe_blocks(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T Hkv D"],
    routed: RoutedLayout,
    *,
    query_scores: Float[Tensor, "B T Hkv"] | None = None,
    key_scores: Float[Tensor, "B T Hkv"] | None = None,
) -> tuple[Float[Tensor, "B R Hkv D"], Float[Tensor, "B R Hkv D"]]:
    """Average queries and keys over each block, in at least float32.

    Queries are averaged over the query heads of each key head, too.
    """
    if q.shape[2] != k.shape[2]:
        q = q.unflatten(2, (k.shape[2], -1)).mean(3)
    asking = None if routed.whole and not routed.causal else routed.asking
    asking_exists = torch.ones_like(routed.exists) if routed.causal else routed.exists
    return (
        _average(q, query_scores, asking, asking_exists),
        _average(k, key_scores, None if routed.whole else routed.tokens, routed.exists),
    )


def choose_blocks(
    about_q: Float[Tensor, "B R Hkv D"],
    about_k: Float[Tensor, "B R Hkv D"],
    routed: RoutedLayout,
) -> Int[Tensor, "B Hkv R K"]:
    """Find the blocks whose key has the largest product with a block's query; no gradient.

    The largest stands first; equal ones (as float32) in the order of blocks. Where fewer than K
    blocks may be chosen, the number of blocks stands for none. Scores are made and forgotten chunk
    by chunk: memory is proportional to blocks, never to their pairs.
    """
    queries, keys = (x.detach().transpose(1, 2) for x in (about_q, about_k))
    return choose(queries, keys, routed.low, routed.high, routed.num_near, routed.num_chosen)


def _average(
    x: Float[Tensor, "B T Hkv D"],
    scores: Float[Tensor, "B T Hkv"] | None,
    tokens: Int[Tensor, "R M"] | None,
    exists: Bool[Tensor, "R M"],
) -> Float[Tensor, "B R Hkv D"]:
    """Average over the tokens of each block; None where these are all, in their order."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = _gather(x, tokens, exists)
    if scores is None:
        if tokens is None:
            return blocks.sum(2, dtype=dtype) / blocks.shape[2]
        blocks = torch.where(exists[:, :, None, None], blocks, 0)
        return blocks.sum(2, dtype=dtype) / exists.sum(1)[:, None, None].to(dtype)
    logits = _gather(scores, tokens, exists).to(dtype)
    share = logits.masked_fill(~exists[:, :, None], -torch.inf).softmax(2)
    return torch.einsum("brmh,brmhd->brhd", share.to(x.dtype), blocks).to(dtype)


def _gather(
    x: Float[Tensor, "B T ..."], tokens: Int[Tensor, "R M"] | None, exists: Bool[Tensor, "R M"]
) -> Float[Tensor, "B R M ..."]:
    taken = x if tokens is None else x.index_select(1, tokens.flatten())
    return taken.unflatten(1, exists.shape)


def _check_order(tokens: Tokens, segment: Int[Tensor, "T"]) -> None:
    coords = tokens.coords[:, 0]
    if bool(((coords[1:] < coords[:-1]) & (segment[1:] == segment[:-1])).any()):
        raise ValueError("with Causal(), routed tokens stand in the order of their coordinates")


def _first(blocks: Blocks) -> Int[Tensor, "R"]:
    """Where each block begins among the tokens of all blocks."""
    return blocks.count.long().cumsum(0) - blocks.count


def _seen(
    near: int,
    beside: Beside,
    tokens: Tokens,
    blocks: Blocks,
    ends: tuple[Int[Tensor, "R"], Int[Tensor, "R"]],
    segments: Int[Tensor, "S"] | list[int] | None,
    num_chosen: int,
) -> BlockLayout:
    """Lay out what is seen in any case: global tokens, and blocks at most `near` blocks away.

    Then comes an empty part for `num_chosen` blocks of each.
    """
    members = beside.members
    pattern: Pattern = GlobalTokens(members.first, members.positions)
    if beside.causal:
        pattern = pattern & Causal()
    layout = build_layout(pattern, tokens.coords, segments=segments)
    row = torch.arange(len(blocks), device=tokens.index.device)[:, None]
    column = row + torch.arange(-near, 1 if beside.causal else near + 1, device=row.device)
    exists = (column >= ends[0][:, None]) & (column < ends[1][:, None])
    row, column = row.expand_as(column)[exists], column[exists]
    full = (blocks.count == blocks.size)[row] & (blocks.count == blocks.size)[column]
    program = KEEP_ALL
    if beside.causal:
        program = encode([(Interval(0, 0, UNBOUNDED),)], [], []) or KEEP_ALL
        full &= row != column
    none = torch.empty(0, dtype=torch.int32, device=row.device)
    rows, columns = both_lists((row, column, full, none), blocks, blocks)
    bits = torch.empty(0, 0, 0, dtype=torch.uint8, device=row.device)
    parts = [*layout.parts, Part(blocks, blocks, rows, columns, bits, program)]
    if num_chosen:
        ptr = torch.zeros(1, len(blocks) + 1, dtype=torch.int32, device=row.device)
        empty = Lists(ptr, ptr[:, 1:], none, none, none)
        num_biases = num_chosen * len(blocks)
        parts.append(Part(blocks, blocks, empty, empty, bits, KEEP_ALL, num_biases))
    return with_parts(layout, tuple(parts))
