"""Blocks that the tokens themselves choose."""

from dataclasses import dataclass

from sparse_core.patterns.base import Pattern
from sparse_core.patterns.terms import Clause


@dataclass(frozen=True, repr=False)
class Routed(Pattern):
    """Let each block of queries see its neighbours and the `top` blocks that score highest.

    Tokens are cut into blocks of `block` in their order. A block sees itself and the `near` blocks
    to each side; of the other blocks of its sequence it sees those whose average key has the
    largest product with its own average query, ties going to the block that comes first. Each
    key/value head chooses for itself (Lu et al. 2025, MoBA, arXiv 2502.13189, where each token
    chooses; Zhang et al. 2025, VSA, arXiv 2505.13389, where blocks do). The product is also added
    to the scores of all pairs in a chosen block, so that the choice learns: see
    `sparse_core.routing`.

    What is seen depends on queries and keys: `build_routed_layout` takes this pattern, joined with
    `| GlobalTokens(...)` and `& Causal()` if wanted, and `routed_attention` runs it; encoders do
    both. Global tokens belong to no block. With `& Causal()` only blocks that lie whole before a
    query's are chosen from, by queries that are not later than the first of its block.

    ::

        ##..##
        ##..##
        ..##..
        ..##..
        ..####
        ..####
    """

    block: int = 64
    top: int = 16
    near: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.top < 1 or self.near < 0:
            raise ValueError(f"needs block >= 1, top >= 1 and near >= 0; got {self!r}")

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Refuse: without queries and keys nothing is chosen."""
        raise ValueError(f"{self!r} looks at queries and keys: build it with build_routed_layout")
