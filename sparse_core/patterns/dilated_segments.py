"""Segments with gaps, the branches of LongNet."""

from dataclasses import dataclass, replace

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause, InSegment


@dataclass(frozen=True, repr=False)
class DilatedSegments(Pattern):
    """Cut each sequence into segments; every `dilation`-th token of one sees all the others.

    Dilated attention (LongNet, Ding et al. 2023). Which tokens take part is said by `offset`, or,
    without one, by the head: head h takes those h modulo `dilation` places from the segment's start
    (its multi-head form), so that heads together reach all tokens. Positions count in each
    sequence. Branches add up to LongNet: `DilatedSegments(1024) + DilatedSegments(4096, 4)` is one
    softmax, in which a pair counts once for each branch (its mixture by the softmax's sums).

    ::

        #.#...
        ......
        #.#...
        ...#.#
        ......
        ...#.#
    """

    segment: int
    dilation: int = 1
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.segment < 1 or self.dilation < 1:
            raise ValueError(f"needs segment >= 1 and dilation >= 1; got {self!r}")
        if self.offset is not None and not 0 <= self.offset < self.dilation:
            raise ValueError(f"offset lies between 0 and dilation - 1; got {self!r}")

    def of_head(self, head: int) -> Pattern:
        """Fix the offset of a head."""
        return self if self.offset is not None else replace(self, offset=head % self.dilation)

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """One term: both tokens take part in one segment."""
        by_head = self.offset is None and self.dilation > 1
        offset = None if by_head else self.offset or 0
        return ((InSegment(self.segment, self.dilation, offset),),)
