"""Everyone sees everyone."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause


@dataclass(frozen=True, repr=False)
class Dense(Pattern):
    """Let every query see every key of its sequence.

    ::

        ######
        ######
        ######
        ######
        ######
        ######
    """

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """No condition at all."""
        return ((),)
