"""Long shots, the same on every machine."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.listed import ListedBlocks
from sparse_core.patterns.terms import Tokens


@dataclass(frozen=True, repr=False)
class RandomBlocks(ListedBlocks):
    """Let each block of queries see `num_blocks` random blocks of keys of its sequence.

    BigBird's random attention (Zaheer et al. 2020, section 2). The sequence is cut into
    `num_blocks` equal stretches and one block is drawn in each by hashing (seed, query block,
    stretch): no two draws coincide, no generator state, the same result on any device.

    ::

        ..#..#
        #...#.
        .#.#..
        ..##..
        #....#
        .#..#.
    """

    num_blocks: int = 3
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block < 1:
            raise ValueError(f"needs num_blocks >= 1 and block >= 1; got {self!r}")

    def draws(
        self, row: Int[Tensor, "..."], num_columns: Int[Tensor, "..."]
    ) -> tuple[Int[Tensor, "... N"], Bool[Tensor, "... N"]]:
        """Draw the key blocks of each query block, and tell which draws exist."""
        stretch = torch.arange(self.num_blocks, device=row.device)
        edges = torch.arange(self.num_blocks + 1, device=row.device)
        edges = num_columns[..., None] * edges // self.num_blocks
        first, width = edges[..., :-1], edges.diff()
        mixed = _hash32(row.long()[..., None] * self.num_blocks + stretch, self.seed)
        return first + mixed % width.clamp(min=1), width > 0

    def lists(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Tell for each pair of tokens whether its pair of blocks is drawn."""
        num_columns = (key.length.long() + self.block - 1) // self.block
        row, column = query.index.long() // self.block, key.index.long() // self.block
        row, column, num_columns = torch.broadcast_tensors(row, column, num_columns)
        drawn, exists = self.draws(row, num_columns)
        return ((drawn == column[..., None]) & exists).any(-1)

    def block_pairs(
        self,
        row: Int[Tensor, "R"],
        num_columns: Int[Tensor, "R"],
    ) -> tuple[Int[Tensor, "Z"], Int[Tensor, "Z"]]:
        """Enumerate (which of the given rows, key block)."""
        drawn, exists = self.draws(row, num_columns)
        which, stretch = exists.nonzero(as_tuple=True)
        return which, drawn[which, stretch]


def _hash32(values: Int[Tensor, "..."], seed: int) -> Int[Tensor, "..."]:
    # murmur3's finalizer on 32 bits held in int64: the products wrap, the low 32 bits stay right
    mask = 0xFFFFFFFF
    mixed = (values * 0x9E3779B1 + (seed * 0x7F4A7C15 + 0x2545F491) % 2**32) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return mixed ^ (mixed >> 16)
