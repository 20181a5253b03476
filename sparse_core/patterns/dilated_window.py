"""A window with gaps."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause, Congruent, Interval


@dataclass(frozen=True, repr=False)
class DilatedWindow(Pattern):
    """Let a query see every `dilation`-th key, `steps` of them to each side, along every axis.

    The reach is `steps * dilation` (Longformer, Beltagy et al. 2020, section 3.1). Tokens of one
    residue class form their own short sequence, so dilation costs what its kept pairs cost.

    ::

        #.#...
        .#.#..
        #.#.#.
        .#.#.#
        ..#.#.
        ...#.#
    """

    steps: int
    dilation: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.dilation < 1:
            raise ValueError(f"needs steps >= 0 and dilation >= 1; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Bound the difference, and keep the multiples of the dilation."""
        reach = self.steps * self.dilation
        window: Clause = tuple(Interval(axis, -reach, reach) for axis in range(dims))
        if self.dilation == 1:
            return (window,)
        return (window + tuple(Congruent(axis, 1, self.dilation) for axis in range(dims)),)
