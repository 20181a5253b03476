"""Near tokens one by one, far ones by the average of larger and larger cells."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause


@dataclass(frozen=True, repr=False)
class Hierarchical(Pattern):
    """Let a query see its cell and the `near` next ones token by token, the rest in pooled cells.

    Coordinates are cut into cells of `cell` positions along every axis, those into groups of
    `factor` (a quadtree in two dimensions), and so on for `levels` levels, or as many as the
    sequence needs. At each level a query sees the cells whose parents are at most `near` parents
    away from its own, but for those that are at most `near` cells away: these it sees more finely.
    So every token stands in exactly one place, up to a reach of at least
    `near * cell * factor**levels` positions (the interaction lists of fast multipole methods,
    Greengard and Rokhlin 1987; as attention, Zhu and Soricut 2021, H-transformer-1D).

    Pooled keys are keys of their own: `build_pooled_layout` takes this pattern, joined with
    `| GlobalTokens(...)` and `& Causal()` if wanted, and `pooled_attention` runs it; encoders do
    both. With `& Causal()` only cells that lie whole before a query count.

    ::

        ##..::
        ##..::
        ..##..
        ..##..
        ::..##
        ::..##
    """

    cell: int
    near: int = 1
    factor: int = 4
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.cell < 1 or self.near < 1 or self.factor < 2:
            raise ValueError(f"needs cell >= 1, near >= 1 and factor >= 2; got {self!r}")
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"needs levels >= 1, or None for as many as it takes; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Refuse: pooled keys are no tokens."""
        raise ValueError(f"{self!r} pools keys: build it with build_pooled_layout")
