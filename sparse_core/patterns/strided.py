"""Every n-th block."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause, Congruent


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """Let a query see the blocks of `block` positions that lie a multiple of `stride` blocks away.

    With `block=1` this is the strided head of Sparse Transformers (Child et al. 2019, equation 3)
    without its causal order; `& Causal()` adds that. Blocks count from coordinate 0, along every
    axis.

    ::

        #..#..
        .#..#.
        ..#..#
        #..#..
        .#..#.
        ..#..#
    """

    stride: int
    block: int = 1

    def __post_init__(self) -> None:
        if self.stride < 1 or self.block < 1:
            raise ValueError(f"needs stride >= 1 and block >= 1; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Keep the differences that are multiples of the stride."""
        if self.stride == 1:
            return ((),)
        return (tuple(Congruent(axis, self.block, self.stride) for axis in range(dims)),)
