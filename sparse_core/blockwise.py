"""The CPU's engine: PyTorch on the stored blocks, in chunks of bounded size.

Works on any device and in any floating dtype; half precisions are computed in float32. Forward
keeps a running (output, log-sum-exp) for each query and merges each chunk into it (Milakov and
Gimelshein 2018). Backward recomputes the probabilities from the log-sum-exp (Dao et al. 2022,
algorithm 4), so nothing but output and log-sum-exp is saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.layout import BlockLayout, Lists, Part
from sparse_core.masking import KEEP_ALL, evaluate, unpack_bits
from sparse_core.reference import coordinate_distance

CHUNK_SCORES = 2**21
"""Scores held at a time."""


def forward(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    layout: BlockLayout,
    *,
    scale: float,
    key_bias: Float[Tensor, "B Tk"] | None,
    alibi_slopes: Float[Tensor, "H"] | None,
    block_bias: Float[Tensor, "B Hkv N"] | None,
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B H Tq"]]:
    """Compute output and log-sum-exp."""
    dtype = _accumulator(q.dtype)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for view in _views(q, k, layout, key_bias, alibi_slopes, block_bias):
        for chunk in _chunks(view, layout):
            scores, values = _scores(view, chunk, layout, q, k, v, scale)
            largest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            partial = torch.bmm(weights.flatten(0, 1).flatten(1, 2), values.flatten(0, 1))
            partial = partial.view(*weights.shape[:-1], -1).div_(total.clamp(min=1e-30))
            chunk_lse = (total.log_() + largest)[..., 0]
            tokens = chunk.query_tokens[chunk.query_exists]
            new_out = _by_token(partial, chunk)
            new_lse = _by_token(chunk_lse[..., None], chunk)[..., 0]
            old_out, old_lse = view.take(out, tokens), view.take(lse, tokens)
            merged, merged_lse = _merge_pair(old_out, old_lse, new_out, new_lse)
            view.put(out, tokens, merged)
            view.put(lse, tokens, merged_lse)
    return out.to(q.dtype), lse.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs; those of absent inputs are None."""

    q: Float[Tensor, "B Tq H D"]
    k: Float[Tensor, "B Tk Hkv D"]
    v: Float[Tensor, "B Tk Hkv D"]
    key_bias: Float[Tensor, "B Tk"] | None
    alibi_slopes: Float[Tensor, "H"] | None
    block_bias: Float[Tensor, "B Hkv N"] | None


def backward(
    grad_out: Float[Tensor, "B Tq H D"],
    grad_lse: Float[Tensor, "B H Tq"] | None,
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    out: Float[Tensor, "B Tq H D"],
    lse: Float[Tensor, "B H Tq"],
    layout: BlockLayout,
    *,
    scale: float,
    key_bias: Float[Tensor, "B Tk"] | None,
    alibi_slopes: Float[Tensor, "H"] | None,
    block_bias: Float[Tensor, "B Hkv N"] | None,
) -> Gradients:
    """Compute all gradients in one pass over the stored blocks."""
    dtype = _accumulator(q.dtype)
    delta = torch.einsum("bthd,bthd->bth", out.to(dtype), grad_out.to(dtype))
    if grad_lse is not None:
        delta -= grad_lse.transpose(1, 2).to(dtype)
    row_lse = lse.transpose(1, 2).to(dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=dtype, device=q.device)
    dv = torch.zeros(k.shape, dtype=dtype, device=q.device)
    dbias = None if key_bias is None else torch.zeros_like(key_bias, dtype=dtype)
    dslopes = None if alibi_slopes is None else torch.zeros_like(alibi_slopes, dtype=dtype)
    dblocks = None if block_bias is None else torch.zeros_like(block_bias, dtype=dtype)
    for view in _views(q, k, layout, key_bias, alibi_slopes, block_bias):
        for chunk in _chunks(view, layout):
            weights, values = _scores(view, chunk, layout, q, k, v, scale)
            known = view.rows(row_lse, chunk).unsqueeze(-1)
            known = known.masked_fill(~chunk.query_exists[:, None, None, :, None], torch.inf)
            weights.sub_(torch.where(known == -torch.inf, 0, known)).exp_()
            douts = view.rows(grad_out, chunk).to(dtype)
            slope = torch.bmm(_flat(douts), values.flatten(0, 1).mT).view_as(weights)
            slope.sub_(view.rows(delta, chunk).unsqueeze(-1)).mul_(weights)
            keys = view.keys(k, chunk).to(dtype)
            queries = view.rows(q, chunk).to(dtype)
            dq_chunk = torch.bmm(_flat(slope), keys.flatten(0, 1)).view_as(queries)
            tokens = chunk.query_tokens[chunk.query_exists]
            share = _by_token(dq_chunk, chunk).mul_(scale)
            view.put(dq, tokens, share.add_(view.take(dq, tokens)))
            dv_chunk = torch.bmm(_flat(weights).mT, _flat(douts)).view_as(values)
            dk_chunk = torch.bmm(_flat(slope).mT, _flat(queries)).view_as(keys).mul_(scale)
            view.add_keys(dk, dk_chunk, chunk)
            view.add_keys(dv, dv_chunk, chunk)
            if dbias is not None and chunk.takes_key_bias:
                by_key = slope.sum((1, 2, 3)).flatten()
                dbias[view.sample].index_add_(0, chunk.key_tokens.flatten(), by_key)
            if dslopes is not None:
                distance = _distance(chunk, layout, dtype)
                by_head = torch.einsum("rhgmn,rmn->hg", slope, distance)
                dslopes[view.query_heads] -= by_head.flatten()
            if dblocks is not None and chunk.bias is not None:
                by_entry = slope.unflatten(4, (chunk.bias.shape[1], -1)).sum((2, 3, 5))
                view.add_biases(dblocks, by_entry, chunk.bias)
    return Gradients(
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if dbias is None or key_bias is None else dbias.to(key_bias.dtype),
        None if dslopes is None or alibi_slopes is None else dslopes.to(alibi_slopes.dtype),
        None if dblocks is None or block_bias is None else dblocks.to(block_bias.dtype),
    )


@dataclass(frozen=True)
class _Chunk:
    """Some query blocks of one part, each with the same number of key blocks.

    The first `num_masked` keys of each row need `mask`; `absent` marks padding of the list. `bias`
    names each key block's number in `block_bias`, if the part's entries take one.
    """

    query_tokens: Int[Tensor, "R M"]
    query_exists: Bool[Tensor, "R M"]
    key_tokens: Int[Tensor, "R N"]
    num_masked: int
    mask: Bool[Tensor, "R M Nmasked"] | None
    absent: Bool[Tensor, "R N"] | None
    bias: Int[Tensor, "R C"] | None
    takes_key_bias: bool


@dataclass(frozen=True)
class _View:
    """The key heads of one sample that share a group of lists, and their query heads."""

    sample: int
    group: int
    key_heads: Int[Tensor, "K"] | None
    query_heads: Int[Tensor, "K*G"]
    num_key_heads: int
    num_shared: int
    key_bias: Float[Tensor, "Tk"] | None
    slopes: Float[Tensor, "K G"] | None
    block_bias: Float[Tensor, "K N"] | None

    def take(self, x: Float[Tensor, "B Tq H ..."], tokens: Int[Tensor, "N"]) -> Tensor:
        """Read [N, K*G, ...] of these queries."""
        taken = x[self.sample].index_select(0, tokens)
        return taken if self.key_heads is None else taken[:, self.query_heads]

    def put(self, x: Float[Tensor, "B Tq H ..."], tokens: Int[Tensor, "N"], new: Tensor) -> None:
        """Write [N, K*G, ...] of these queries, each named once."""
        if self.key_heads is None:
            x[self.sample].index_copy_(0, tokens, new)
        else:
            x[self.sample][tokens[:, None], self.query_heads] = new

    def rows(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Gather [B, Tq, H, ...] to [R, K, G, M, ...]."""
        taken = x[self.sample].index_select(0, chunk.query_tokens.flatten())
        if self.key_heads is not None:
            taken = taken[:, self.query_heads]
        shape = (*chunk.query_tokens.shape, self.num_key_heads, self.num_shared)
        return taken.view(*shape, *x.shape[3:]).movedim(1, 3)

    def keys(self, x: Float[Tensor, "B Tk Hkv D"], chunk: _Chunk) -> Float[Tensor, "R K N D"]:
        """Gather the chunk's keys."""
        taken = x[self.sample].index_select(0, chunk.key_tokens.flatten())
        if self.key_heads is not None:
            taken = taken[:, self.key_heads]
        return taken.view(*chunk.key_tokens.shape, self.num_key_heads, -1).transpose(1, 2)

    def add_keys(
        self, total: Float[Tensor, "B Tk Hkv D"], part: Float[Tensor, "R K N D"], chunk: _Chunk
    ) -> None:
        """Add the chunk's share to each key."""
        share = part.transpose(1, 2).flatten(0, 1)
        target, tokens = total[self.sample], chunk.key_tokens.flatten()
        if self.key_heads is None:
            target.index_add_(0, tokens, share)
        else:
            target.index_put_((tokens[:, None], self.key_heads), share, accumulate=True)

    def add_biases(
        self,
        total: Float[Tensor, "B Hkv N"],
        part: Float[Tensor, "R K C"],
        bias: Int[Tensor, "R C"],
    ) -> None:
        """Add the chunk's share to the number of each pair of blocks."""
        share, target = part.transpose(0, 1).flatten(1), total[self.sample]
        if self.key_heads is None:
            target.index_add_(1, bias.flatten(), share)
        else:
            target.index_put_((self.key_heads[:, None], bias.flatten()), share, accumulate=True)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _views(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    key_bias: Tensor | None,
    slopes: Tensor | None,
    block_bias: Tensor | None,
) -> Iterator[_View]:
    num_samples, num_key_heads = k.shape[0], k.shape[2]
    shared = q.shape[2] // num_key_heads
    dtype = _accumulator(q.dtype)
    all_heads = torch.arange(num_key_heads, device=q.device)
    for sample in range(num_samples):
        group_of = layout.group_of[sample] if layout.group_of.numel() else None
        for group in [0] if group_of is None else group_of.unique().tolist():
            heads = all_heads if group_of is None else all_heads[group_of == group]
            of_query = (heads[:, None] * shared + torch.arange(shared, device=q.device)).flatten()
            yield _View(
                sample,
                group,
                None if len(heads) == num_key_heads else heads,
                of_query,
                len(heads),
                shared,
                None if key_bias is None else key_bias[sample].to(dtype),
                None if slopes is None else slopes[of_query].to(dtype).view(-1, shared),
                None if block_bias is None else block_bias[sample, heads].to(dtype),
            )


def _chunks(view: _View, layout: BlockLayout) -> Iterator[_Chunk]:
    num_heads = view.num_key_heads * view.num_shared
    for part in layout.parts:
        query_tokens, query_exists = part.queries.tokens()
        key_tokens, key_exists = part.keys.tokens()
        pair_scores = part.queries.size * part.keys.size * num_heads
        limit = max(1, CHUNK_SCORES // pair_scores)
        for items in _items(part.rows, view.group, limit):
            rows = torch.tensor([row for row, *_ in items], device=layout.device)
            begin = torch.tensor([first for _, first, *_ in items], device=layout.device)
            length = torch.tensor([count for _, _, count, _ in items], device=layout.device)
            widest, masked = max(i[2] for i in items), max(i[3] for i in items)
            inner = torch.arange(widest, device=layout.device)
            inside = inner < length[:, None]
            entry = begin[:, None] + torch.where(inside, inner, 0)
            columns = part.rows.index[entry].long()
            queries = query_tokens[rows]
            keys = key_tokens[columns].flatten(1)
            mask = None
            if masked:
                mask = _mask(
                    layout, part, queries, key_tokens[columns[:, :masked]], entry[:, :masked]
                )
                mask = mask & key_exists[columns[:, :masked]].flatten(1)[:, None, :]
            absent = None
            if not bool(inside.all()):
                absent = (~inside).repeat_interleave(part.keys.size, dim=1)
            yield _Chunk(
                queries,
                query_exists[rows],
                keys,
                masked * part.keys.size,
                mask,
                absent,
                None if part.rows.bias is None else part.rows.bias[entry].long(),
                part.takes_key_bias,
            )


_Item = tuple[int, int, int, int]
"""Row, first entry, number of entries, number of entries that need a mask."""


def _items(lists: Lists, group: int, limit: int) -> Iterator[list[_Item]]:
    """Cut rows into pieces of at most `limit` entries; batch pieces of about equal length.

    A batch holds a row at most once, and at most `limit` entries in all.
    """
    ptr, full = lists.ends(group)
    items: list[tuple[tuple[int, int, int], _Item]] = []
    for row in range(len(full)):
        for piece, begin in enumerate(range(ptr[row], ptr[row + 1], limit)):
            count = min(limit, ptr[row + 1] - begin)
            masked = min(max(full[row] - begin, 0), count)
            shape = (piece, _round_up(count), min(_round_up(masked), _round_up(count)))
            items.append((shape, (row, begin, count, masked)))
    items.sort(key=lambda item: item[0])
    for shape, members in groupby(items, key=lambda item: item[0]):
        batch = [item for _, item in members]
        step = max(1, limit // shape[1])
        for start in range(0, len(batch), step):
            yield batch[start : start + step]


def _round_up(count: int) -> int:
    """Next of 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ..."""
    step = max(1, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def _mask(
    layout: BlockLayout,
    part: Part,
    queries: Int[Tensor, "R M"],
    keys: Int[Tensor, "R C N"],
    entries: Int[Tensor, "R C"],
) -> Bool[Tensor, "R M C*N"]:
    if not part.program:
        bits = part.tiles[part.rows.tile[entries].long()]
        return unpack_bits(bits, part.keys.size).transpose(1, 2).flatten(2)
    flat = keys.flatten(1)
    if part.program == KEEP_ALL:
        return torch.ones((), dtype=torch.bool, device=flat.device).expand(
            *queries.shape, flat.shape[1]
        )
    return evaluate(
        part.program,
        layout.query_coords[queries],
        layout.key_coords[flat],
        layout.query_flags[queries],
        layout.key_flags[flat],
    )


def _scores(
    view: _View, chunk: _Chunk, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Float[Tensor, "R K G M N"], Float[Tensor, "R K N D"]]:
    """Masked, biased, scaled scores of a chunk, and its values."""
    dtype = _accumulator(q.dtype)
    queries = view.rows(q, chunk).to(dtype)
    keys, values = view.keys(k, chunk).to(dtype), view.keys(v, chunk).to(dtype)
    flat = torch.bmm(_flat(queries), keys.flatten(0, 1).mT).mul_(scale)
    scores = flat.view(*queries.shape[:4], -1)
    if view.key_bias is not None and chunk.takes_key_bias:
        scores += view.key_bias[chunk.key_tokens][:, None, None, None, :]
    if view.block_bias is not None and chunk.bias is not None:
        by_entry = view.block_bias[:, chunk.bias].transpose(0, 1)
        scores.unflatten(4, (chunk.bias.shape[1], -1)).add_(by_entry[:, :, None, None, :, None])
    if view.slopes is not None:
        distance = _distance(chunk, layout, dtype)
        scores -= view.slopes[..., None, None] * distance[:, None, None]
    if chunk.mask is not None:
        masked = scores[..., : chunk.num_masked]
        masked.masked_fill_(~chunk.mask[:, None, None], -torch.inf)
    if chunk.absent is not None:
        scores.masked_fill_(chunk.absent[:, None, None, None, :], -torch.inf)
    return scores, values.contiguous()


def _distance(chunk: _Chunk, layout: BlockLayout, dtype: torch.dtype) -> Float[Tensor, "R M N"]:
    query, key = layout.query_coords[chunk.query_tokens], layout.key_coords[chunk.key_tokens]
    return coordinate_distance(query, key, dtype)


def _flat(x: Float[Tensor, "R K G M X"]) -> Float[Tensor, "R*K G*M X"]:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x.shape[4])


def _by_token(x: Float[Tensor, "R K G M X"], chunk: _Chunk) -> Float[Tensor, "N K*G X"]:
    """Order by token and head, leaving out the padding of short blocks."""
    rows = x.movedim(3, 1).flatten(2, 3)
    return rows.flatten(0, 1) if bool(chunk.query_exists.all()) else rows[chunk.query_exists]


def _merge_pair(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial results of the same queries."""
    joined = torch.logaddexp(lse, more_lse)
    safe = joined.clamp(min=torch.finfo(lse.dtype).min)
    old, new = (lse - safe).exp_(), (more_lse - safe).exp_()
    return out * old[..., None] + more * new[..., None], joined
