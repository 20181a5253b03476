"""What patterns share that know their blocks and are never refined."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Boxes, Clause, Tokens


class ListedBlocks(Pattern):
    """A pattern made of whole blocks of `block` tokens, counted in each sequence from its start."""

    block: int

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """One term that stands for the list."""
        return ((Listed(self),),)

    def lists(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Tell for each pair of tokens whether its pair of blocks is listed."""
        raise NotImplementedError

    def block_pairs(
        self, row: Int[Tensor, "R"], num_columns: Int[Tensor, "R"]
    ) -> tuple[Int[Tensor, "Z"], Int[Tensor, "Z"]]:
        """Enumerate (which of the given rows, key block), given each row's number of columns."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Listed:
    """The pair of blocks is on the pattern's list."""

    pattern: ListedBlocks

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Look the pair of blocks up."""
        return self.pattern.lists(query, key)

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Exact where both boxes lie in one block; otherwise assume so."""
        single, listed = self._look_up(query, key)
        return ~single | listed

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Exact where both boxes lie in one block; otherwise deny."""
        single, listed = self._look_up(query, key)
        return single & listed

    def _look_up(self, query: Boxes, key: Boxes) -> tuple[Tensor, Tensor]:
        grain = self.pattern.block
        query_single = query.index_low // grain == query.index_high // grain
        key_single = key.index_low // grain == key.index_high // grain
        one_sequence = (query.group_low == query.group_high) & (key.group_low == key.group_high)
        corner_q = Tokens(query.low, query.index_low, query.length_low)
        corner_k = Tokens(key.low, key.index_low, key.length_low)
        listed = self.pattern.lists(corner_q, corner_k)
        return query_single & key_single & one_sequence, listed


def expand_blocks(
    which: Int[Tensor, "Z"], factor: int
) -> tuple[Int[Tensor, "Z*F"], Int[Tensor, "Z*F"]]:
    """Cut each of Z blocks into `factor` smaller ones: (its old place, its new number)."""
    place = torch.arange(which.numel(), device=which.device)
    if factor == 1:
        return place, which
    place = place.repeat_interleave(factor)
    inner = torch.arange(factor, device=which.device).repeat(which.numel())
    return place, which[place] * factor + inner
