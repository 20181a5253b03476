"""Nobody sees what comes later."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import UNBOUNDED, Clause, Interval


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """Let a query see the keys whose coordinate along `axis` is not larger than its own.

    ::

        #.....
        ##....
        ###...
        ####..
        #####.
        ######
    """

    axis: int = 0

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Bound the difference from below by zero."""
        if not 0 <= self.axis < dims:
            raise ValueError(f"{self!r} needs axis {self.axis}; coordinates have {dims} axes")
        return ((Interval(self.axis, 0, UNBOUNDED),),)
