"""A few tokens that connect all."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause, KeyIn, Members, QueryIn


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    """Let some tokens of each sequence see all its tokens, and all see them.

    They are the `first` tokens of the sequence, the given `positions` in it, or both (Longformer's
    global attention, Beltagy et al. 2020; BigBird's global tokens, Zaheer et al. 2020).

    ::

        ######
        #.....
        #.....
        #.....
        #.....
        #.....
    """

    first: int = 0
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(sorted(set(self.positions))))
        if self.first < 0 or any(p < 0 for p in self.positions):
            raise ValueError(f"positions count from 0; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Either side may be global."""
        if not self.first and not self.positions:
            return ()
        members = Members(self.first, self.positions)
        return ((KeyIn(members),), (QueryIn(members),))
