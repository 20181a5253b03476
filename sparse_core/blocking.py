"""Cutting one side of a layout, queries or keys, into blocks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.terms import UNBOUNDED, Boxes, Tokens


@dataclass(frozen=True)
class Blocks:
    """R blocks of at most `size` tokens: block r holds positions `start[r] + stride * i`.

    Here `i` runs from 0 to `count[r] - 1`. A position is a token's place in the packed sequence,
    or, if `order` is not empty, a place in that table of tokens. Blocks never share a token; they
    hold `num_tokens` in all. With `regular`, block r begins at token r * size.
    """

    start: Int[Tensor, "R"]
    count: Int[Tensor, "R"]
    order: Int[Tensor, "N"]
    stride: int
    size: int
    num_tokens: int
    regular: bool

    def __len__(self) -> int:
        return self.start.shape[0]

    def tokens(self) -> tuple[Int[Tensor, "R M"], Bool[Tensor, "R M"]]:
        """List the tokens of all blocks, and which entries exist (others repeat the first)."""
        inner = torch.arange(self.size, device=self.start.device)
        exists = inner < self.count[:, None]
        position = self.start[:, None] + inner * self.stride * exists
        return (self.order[position].long() if self.order.numel() else position), exists

    def places(self) -> Int[Tensor, "R"]:
        """Number the blocks, and skip a number before one that is not where the last ends."""
        gap = self.start.diff() != self.size * self.stride
        return torch.cat([gap.new_zeros(1), 1 + gap]).cumsum(0, dtype=torch.int32)

    def indexed(self) -> "Blocks":
        """Write the same blocks with an explicit table of tokens."""
        if self.order.numel() or not len(self):
            return self
        tokens, exists = self.tokens()
        start = (self.count.cumsum(0) - self.count).to(torch.int32)
        order = tokens[exists].to(torch.int32)
        return Blocks(start, self.count, order, 1, self.size, self.num_tokens, regular=False)


def sequence_tokens(
    coords: Int[Tensor, "T P"] | Int[Tensor, "T"] | int,
    segments: Int[Tensor, "S"] | list[int] | tuple[int, ...] | None,
    device: torch.device | str | None = None,
) -> tuple[Tokens, Int[Tensor, "T"]]:
    """Describe the tokens of packed sequences, and say which sequence each belongs to.

    `coords` may be a number of tokens: their coordinates then count from 0 in each sequence. A
    tensor stays on its device unless `device` is given.
    Raises ValueError for coordinates that are no integers or beyond 2**30, and for lengths that
    do not add up.
    """
    if isinstance(coords, Tensor):
        if coords.is_floating_point() or coords.dtype == torch.bool:
            raise ValueError(f"coordinates are integers; got {coords.dtype}")
        coords = coords.to(device) if device is not None else coords
        coords = coords[:, None] if coords.ndim == 1 else coords
        if coords.ndim != 2:
            raise ValueError(f"coords has shape [T, P]; got {tuple(coords.shape)}")
        if coords.numel() and int(coords.abs().max()) >= 2**30:
            raise ValueError("coordinates lie between -2**30 and 2**30")
        num_tokens, device = coords.shape[0], coords.device
    else:
        num_tokens = coords
    lengths = torch.as_tensor([num_tokens] if segments is None else segments).to(device).long()
    if segments is None:
        index = torch.arange(num_tokens, device=lengths.device, dtype=torch.int32)
        located = coords.to(torch.int32) if isinstance(coords, Tensor) else index[:, None]
        tokens = Tokens(located, index, torch.full_like(index, num_tokens))
        return tokens, torch.zeros_like(index, dtype=torch.int64)
    wrong = (lengths.sum() != num_tokens) | (lengths < 0).any()
    if lengths.ndim != 1 or bool(wrong):
        raise ValueError(
            f"segments are lengths that add up to {num_tokens} tokens; got {lengths.tolist()[:20]}"
        )
    sequence = torch.arange(lengths.numel(), device=lengths.device)
    segment = sequence.repeat_interleave(lengths, output_size=num_tokens)
    first = lengths.cumsum(0) - lengths
    index = (torch.arange(num_tokens, device=lengths.device) - first[segment]).to(torch.int32)
    located = coords.to(torch.int32) if isinstance(coords, Tensor) else index[:, None]
    return Tokens(located, index, lengths[segment].to(torch.int32)), segment


def cut(
    group: Int[Tensor, "T"],
    *,
    size: int,
    members: Bool[Tensor, "T"] | None = None,
    in_order: bool = True,
    is_single: bool = False,
) -> tuple[Blocks, Int[Tensor, "R"]]:
    """Cut the tokens of each group into blocks of `size`; also give each block's group.

    Tokens keep their order within a group. `in_order` says that groups are runs already, so that
    no sorting is needed; `members` leaves out the other tokens; `is_single` says that all tokens
    are of one group.
    """
    if members is None and in_order:
        start, count, owner, num_runs = _pieces(group, size, is_single=is_single)
        none = torch.empty(0, dtype=torch.int32, device=group.device)
        return Blocks(start, count, none, 1, size, group.numel(), regular=num_runs <= 1), owner
    order = torch.arange(group.numel(), device=group.device)
    if members is not None:
        order = order[members]
    if not in_order:
        order = order[torch.sort(group[order], stable=True).indices]
    start, count, owner, _ = _pieces(group[order], size, is_single=is_single)
    return _affine(start, count, order, size), owner


def _pieces(
    group: Int[Tensor, "T"], size: int, *, is_single: bool
) -> tuple[Int[Tensor, "R"], Int[Tensor, "R"], Int[Tensor, "R"], int]:
    """Cut runs of equal groups into pieces of `size`: where each begins, its length, its group.

    Also the number of runs.
    """
    total = group.numel()
    if is_single and total:
        start = torch.arange(0, total, size, device=group.device, dtype=torch.int32)
        return start, (total - start).clamp(max=size), group[:1].repeat(start.numel()), 1
    values, lengths = torch.unique_consecutive(group, return_counts=True)
    num_blocks = (lengths + size - 1) // size
    end = lengths.cumsum(0)
    # a run's first block is not at its number times the size, but so much further on
    shift = end - lengths - (num_blocks.cumsum(0) - num_blocks) * size
    known = torch.stack([shift, end, values]).repeat_interleave(num_blocks, dim=1)
    shift, end, owner = known.unbind(0)
    start = torch.arange(0, owner.numel() * size, size, device=group.device) + shift
    count = (end - start).clamp(max=size)
    return start.to(torch.int32), count.to(torch.int32), owner, values.numel()


def boxes_of(blocks: Blocks, tokens: Tokens, group: Int[Tensor, "R"]) -> Boxes:
    """Bound each block's coordinates, its indices and lengths."""
    members, _ = blocks.tokens()
    known = torch.cat([tokens.coords, tokens.index[:, None], tokens.length[:, None]], 1)
    if not len(blocks):
        return Boxes(group.new_zeros(2, known.shape[1] + 1, 0))
    bounds = torch.stack(torch.aminmax(known[members], dim=1)).transpose(1, 2)
    return Boxes(torch.cat([bounds, group.expand(2, 1, -1)], 1))


def _affine(
    start: Int[Tensor, "R"], count: Int[Tensor, "R"], order: Int[Tensor, "N"], size: int
) -> Blocks:
    """Drop the table of tokens where every block is an arithmetic progression."""
    empty = torch.empty(0, dtype=torch.int32, device=order.device)
    num_tokens = order.numel()
    if not num_tokens:
        return Blocks(start, count, empty, 1, size, num_tokens, regular=False)
    step = order.diff(append=order[-1:])
    is_last = torch.zeros_like(step, dtype=torch.bool)
    is_last[start + count - 1] = True
    known = step.masked_fill(is_last, UNBOUNDED).min(), step.masked_fill(is_last, 0).max()
    smallest, largest = torch.stack(known).tolist()
    if smallest >= largest:  # no block has steps that differ; none has any if the largest is 0
        first = order[start].to(torch.int32)
        stride = max(largest, 1)
        return Blocks(first, count, empty, stride, size, num_tokens, regular=False)
    return Blocks(start, count, order.to(torch.int32), 1, size, num_tokens, regular=False)
