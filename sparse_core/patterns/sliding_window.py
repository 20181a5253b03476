"""A neighbourhood that moves along."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import UNBOUNDED, Clause, Interval


@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """Let a query see keys at most `radius` away along every axis.

    Give `radius` (one number, or one per axis), or `left` and `right`: how far before and after
    itself a query sees. In two dimensions the window is a square of side `2 * radius + 1`
    (Longformer, Beltagy et al. 2020, section 3.1; NATTEN's neighbourhood without shifted borders).

    ::

        ##....
        ###...
        .###..
        ..###.
        ...###
        ....##
    """

    radius: int | tuple[int, ...] | None = None
    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.radius, list):
            object.__setattr__(self, "radius", tuple(self.radius))
        sides = (self.left, self.right)
        complete = sides == (None, None) if self.radius is not None else None not in sides
        if not complete:
            raise ValueError(f"give radius, or left and right; got {self!r}")
        numbers = [*(self.radius if isinstance(self.radius, tuple) else [self.radius]), *sides]
        if any(n is not None and not 0 <= n < UNBOUNDED for n in numbers):
            raise ValueError(f"a window reaches 0 or more steps; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Bound the difference on every axis."""
        if self.radius is None:
            assert self.left is not None
            assert self.right is not None
            return (tuple(Interval(axis, -self.right, self.left) for axis in range(dims)),)
        radii = self.radius if isinstance(self.radius, tuple) else (self.radius,) * dims
        if len(radii) != dims:
            raise ValueError(f"{self!r} has {len(radii)} radii; coordinates have {dims} axes")
        return (tuple(Interval(axis, -r, r) for axis, r in enumerate(radii)),)
