"""The few conditions that every pattern is made of.

A pattern lowers to alternatives of terms: `(a and b) or (c and d) or ...`. A term is evaluated in
three ways: on single tokens (`allows`, exact), on boxes of tokens (`may_touch`, never wrongly
False; `covers`, never wrongly True) and, if it has a code, inside a kernel.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

UNBOUNDED = 2**31 - 1
"""Infinity in an interval; coordinates stay below 2**30, so that differences fit int32."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a pattern may know of some tokens; the three tensors broadcast together.

    `coords` are global coordinates, `index` the position in the token's own sequence and `length`
    the number of tokens of that sequence.
    """

    coords: Int[Tensor, "*S P"]
    index: Int[Tensor, "*S"]
    length: Int[Tensor, "*S"]

    def __getitem__(self, item: Int[Tensor, "..."] | slice | None) -> "Tokens":
        """Select tokens along the leading axes."""
        return Tokens(self.coords[item], self.index[item], self.length[item])

    def as_rows(self) -> "Tokens":
        """Shape [..., M] to [..., M, 1]: the query side of a table of pairs."""
        return Tokens(self.coords[..., :, None, :], self.index[..., None], self.length[..., None])

    def as_columns(self) -> "Tokens":
        """Shape [..., N] to [..., 1, N]: the key side of a table of pairs."""
        return Tokens(
            self.coords[..., None, :, :], self.index[..., None, :], self.length[..., None, :]
        )


@dataclass(frozen=True)
class Boxes:
    """Bounds of blocks of tokens: inclusive, per axis, and of the index in the own sequence.

    `bounds` holds the lower ones, then the upper ones: of the P axes, of the index, of the length
    (tokens of the sequence) and of the number of the group that the block was cut from. A box that
    spans several sequences or groups has the smallest and the largest.
    """

    bounds: Int[Tensor, "2 P+3 S"]

    def __len__(self) -> int:
        return self.bounds.shape[2]

    def __getitem__(self, item: Int[Tensor, "N"]) -> "Boxes":
        """Select boxes."""
        return Boxes(self.bounds.index_select(2, item))

    def joined(self) -> "Boxes":
        """Join neighbours two by two."""
        lower, upper = self.bounds.unbind(0)
        if len(self) % 2:
            lower, upper = (torch.cat([x, x[:, -1:]], 1) for x in (lower, upper))
        lower = torch.minimum(lower[:, ::2], lower[:, 1::2])
        return Boxes(torch.stack([lower, torch.maximum(upper[:, ::2], upper[:, 1::2])]))

    def on_axis(self, axis: int) -> tuple[Int[Tensor, "S"], Int[Tensor, "S"]]:
        """Smallest and largest coordinate of each box."""
        return self._rows[axis], self._rows[self.bounds.shape[1] + axis]

    @property
    def low(self) -> Int[Tensor, "S P"]:
        """Smallest coordinates."""
        return self.bounds[0, :-3].T

    @property
    def high(self) -> Int[Tensor, "S P"]:
        """Largest coordinates."""
        return self.bounds[1, :-3].T

    @property
    def index_low(self) -> Int[Tensor, "S"]:
        """Smallest index in the own sequence."""
        return self.on_axis(self.bounds.shape[1] - 3)[0]

    @property
    def index_high(self) -> Int[Tensor, "S"]:
        """Largest index in the own sequence."""
        return self.on_axis(self.bounds.shape[1] - 3)[1]

    @property
    def length_low(self) -> Int[Tensor, "S"]:
        """Length of the shortest sequence."""
        return self.on_axis(self.bounds.shape[1] - 2)[0]

    @property
    def length_high(self) -> Int[Tensor, "S"]:
        """Length of the longest sequence."""
        return self.on_axis(self.bounds.shape[1] - 2)[1]

    @property
    def group_low(self) -> Int[Tensor, "S"]:
        """Smallest group."""
        return self.on_axis(self.bounds.shape[1] - 1)[0]

    @property
    def group_high(self) -> Int[Tensor, "S"]:
        """Largest group."""
        return self.on_axis(self.bounds.shape[1] - 1)[1]

    @cached_property
    def _rows(self) -> tuple[Int[Tensor, "S"], ...]:
        return self.bounds.flatten(0, 1).unbind(0)


class Term(Protocol):
    """One condition on a pair of tokens."""

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Tell for each pair whether the condition holds."""
        ...

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Tell for each pair of boxes whether it may hold for some pair in them."""
        ...

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Tell for each pair of boxes whether it surely holds for all pairs in them."""
        ...


Clause = tuple[Term, ...]
"""All of its terms hold; the empty clause is always true."""


@dataclass(frozen=True, slots=True)
class Interval:
    """`low <= query - key <= high` on one axis."""

    axis: int
    low: int
    high: int

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Compare the difference of the coordinates."""
        difference = query.coords[..., self.axis] - key.coords[..., self.axis]
        return (difference >= self.low) & (difference <= self.high)

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Compare the range of differences; exact per axis."""
        smallest, largest = _differences(query, key, self.axis)
        return (largest >= self.low) & (smallest <= self.high)

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Compare the range of differences; exact per axis."""
        smallest, largest = _differences(query, key, self.axis)
        return (smallest >= self.low) & (largest <= self.high)


@dataclass(frozen=True, slots=True)
class Congruent:
    """`query // block` and `key // block` differ by a multiple of `stride` on one axis."""

    axis: int
    block: int
    stride: int

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Compare the residues."""
        return self.residue(query.coords) == self.residue(key.coords)

    def residue(self, coords: Int[Tensor, "*S P"]) -> Int[Tensor, "*S"]:
        """Class of each token: tokens of one class see each other."""
        return (coords[..., self.axis] // self.block) % self.stride

    def classify(self, tokens: Tokens) -> Int[Tensor, "*S"]:
        """Number the class of each token."""
        return self.residue(tokens.coords)

    def num_classes(self, longest: int) -> int:
        """Count the classes of a sequence."""
        return self.stride

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Look for a multiple of the stride in the range of differences."""
        smallest, largest = self._differences(query, key)
        return (largest // self.stride) * self.stride >= smallest

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where all tokens share one class."""
        smallest, largest = self._differences(query, key)
        return (smallest == largest) & (smallest % self.stride == 0)

    def _differences(self, query: Boxes, key: Boxes) -> tuple[Tensor, Tensor]:
        q_low, q_high = query.on_axis(self.axis)
        k_low, k_high = key.on_axis(self.axis)
        smallest = q_low // self.block - k_high // self.block
        return smallest, q_high // self.block - k_low // self.block


@dataclass(frozen=True, slots=True)
class InSegment:
    """Both stand in one segment of `segment` tokens, `offset` plus multiples of `dilation` in it.

    Positions count in each sequence. Without an `offset` the head names it.
    """

    segment: int
    dilation: int
    offset: int | None

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Compare the segments, and look both tokens up."""
        if self.offset is None:
            raise ValueError("this pattern differs from head to head; ask `of_head(number)`")
        same = query.index // self.segment == key.index // self.segment
        query_place, key_place = self.place(query.index), self.place(key.index)
        return same & (query_place == self.offset) & (key_place == self.offset)

    def place(self, index: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """Which offset reaches each position."""
        return index % self.segment % self.dilation

    def classify(self, tokens: Tokens) -> Int[Tensor, "*S"]:
        """Number the segment and offset of each token: those of one class may see each other."""
        return tokens.index // self.segment * self.dilation + self.place(tokens.index)

    def num_classes(self, longest: int) -> int:
        """Count the classes of a sequence."""
        return -(-longest // self.segment) * self.dilation

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where the boxes reach a common segment; offsets are left to blocks of one class."""
        first = torch.maximum(query.index_low // self.segment, key.index_low // self.segment)
        last = torch.minimum(query.index_high // self.segment, key.index_high // self.segment)
        return first <= last

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where nothing is left out: all tokens lie in one segment without gaps."""
        if self.dilation > 1:
            return torch.zeros_like(query.index_low * key.index_low, dtype=torch.bool)
        first = torch.minimum(query.index_low // self.segment, key.index_low // self.segment)
        last = torch.maximum(query.index_high // self.segment, key.index_high // self.segment)
        return first == last


@dataclass(frozen=True, slots=True)
class Members:
    """Tokens of each sequence named by their position: the first `first`, and `positions`."""

    first: int
    positions: tuple[int, ...]

    def contains(self, index: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        """Tell which positions belong."""
        found = index < self.first
        if self.positions:
            listed = torch.tensor(self.positions, device=index.device, dtype=index.dtype)
            found = found | torch.isin(index, listed)
        return found

    def any_between(self, low: Int[Tensor, "*S"], high: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        """Tell whether a member lies in `low..high`, both inclusive."""
        if not self.positions:
            return low < self.first
        return self._count_between(low, high) > 0

    def all_between(self, low: Int[Tensor, "*S"], high: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        """Tell whether all positions in `low..high`, both inclusive, are members."""
        if not self.positions:
            return high < self.first
        return self._count_between(low, high) == high - low + 1

    def _count_between(self, low: Int[Tensor, "*S"], high: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        sorted_members = torch.tensor(
            sorted(set(range(self.first)) | set(self.positions)), device=low.device, dtype=low.dtype
        )
        upper = torch.searchsorted(sorted_members, high.contiguous(), right=True)
        return upper - torch.searchsorted(sorted_members, low.contiguous())


@dataclass(frozen=True, slots=True)
class QueryIn:
    """The query is one of the members."""

    members: Members

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Look the query up."""
        return self.members.contains(query.index) & torch.ones_like(key.index, dtype=torch.bool)

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where a member lies between the bounds."""
        return self.members.any_between(query.index_low, query.index_high)

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where all positions between the bounds are members."""
        return self.members.all_between(query.index_low, query.index_high)


@dataclass(frozen=True, slots=True)
class KeyIn:
    """The key is one of the members."""

    members: Members

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Look the key up."""
        return QueryIn(self.members).allows(key, query)

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where a member lies between the bounds."""
        return QueryIn(self.members).may_touch(key, query)

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """True where all positions between the bounds are members."""
        return QueryIn(self.members).covers(key, query)


def simplify(clause: Clause) -> Clause | None:
    """Merge intervals on one axis and drop repeats; None if nothing can satisfy the clause."""
    intervals: dict[int, Interval] = {}
    others: list[Term] = []
    for term in clause:
        if isinstance(term, Interval):
            known = intervals.get(term.axis, term)
            merged = Interval(term.axis, max(known.low, term.low), min(known.high, term.high))
            intervals[term.axis] = merged
        elif term not in others:
            others.append(term)
    if any(interval.low > interval.high for interval in intervals.values()):
        return None
    bounded = [i for i in intervals.values() if (i.low, i.high) != (-UNBOUNDED, UNBOUNDED)]
    return (*bounded, *others)


def _differences(query: Boxes, key: Boxes, axis: int) -> tuple[Tensor, Tensor]:
    q_low, q_high = query.on_axis(axis)
    k_low, k_high = key.on_axis(axis)
    return q_low - k_high, q_high - k_low
