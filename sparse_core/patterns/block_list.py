"""The user's own blocks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.listed import ListedBlocks
from sparse_core.patterns.terms import Tokens


@dataclass(frozen=True, repr=False)
class BlockList(ListedBlocks):
    """Let the listed pairs (query block, key block) of `block` tokens see each other.

    Blocks are counted in each sequence from its start; pairs beyond a sequence's end are ignored.
    `BlockList.from_mask` reads a boolean matrix of blocks.

    ::

        ##..##
        ##..##
        ......
        ......
        ..##..
        ..##..
    """

    pairs: tuple[tuple[int, int], ...]
    block: int = 64

    def __post_init__(self) -> None:
        pairs = tuple(sorted({(int(row), int(column)) for row, column in self.pairs}))
        object.__setattr__(self, "pairs", pairs)
        if self.block < 1 or any(row < 0 or column < 0 for row, column in pairs):
            raise ValueError("blocks count from 0 and hold at least one token")

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "R C"], *, block: int = 64) -> "BlockList":
        """List the true entries of a matrix of blocks."""
        return cls(tuple((int(r), int(c)) for r, c in mask.nonzero().tolist()), block)

    def lists(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Tell for each pair of tokens whether its pair of blocks is listed."""
        row, column = query.index.long() // self.block, key.index.long() // self.block
        listed = self._keys(row.device)
        key_of_pair = (row << 32) + column
        return torch.isin(key_of_pair, listed)

    def block_pairs(
        self, row: Int[Tensor, "R"], num_columns: Int[Tensor, "R"]
    ) -> tuple[Int[Tensor, "Z"], Int[Tensor, "Z"]]:
        """Enumerate (which of the given rows, key block)."""
        listed = self._keys(row.device)
        listed_row, listed_column = listed >> 32, listed & 0xFFFFFFFF
        first = torch.searchsorted(listed_row, row.long())
        count = torch.searchsorted(listed_row, row.long(), right=True) - first
        which = torch.arange(row.numel(), device=row.device).repeat_interleave(count)
        offset = torch.arange(which.numel(), device=row.device) - (count.cumsum(0) - count)[which]
        column = listed_column[first[which] + offset]
        exists = column < num_columns[which]
        return which[exists], column[exists]

    def _keys(self, device: torch.device) -> Int[Tensor, "Z"]:
        pairs = torch.tensor(self.pairs, dtype=torch.int64, device=device).reshape(-1, 2)
        return (pairs[:, 0] << 32) + pairs[:, 1]
