"""Who may attend to whom: small frozen values, composed with `|` and `&`."""

from sparse_core.patterns.base import Intersection, Pattern, Sum, Union
from sparse_core.patterns.block_list import BlockList
from sparse_core.patterns.causal import Causal
from sparse_core.patterns.dense import Dense
from sparse_core.patterns.dilated_segments import DilatedSegments
from sparse_core.patterns.dilated_window import DilatedWindow
from sparse_core.patterns.global_tokens import GlobalTokens
from sparse_core.patterns.hierarchical import Hierarchical
from sparse_core.patterns.random_blocks import RandomBlocks
from sparse_core.patterns.routed import Routed
from sparse_core.patterns.sliding_window import SlidingWindow
from sparse_core.patterns.strided import Strided

PATTERNS: dict[str, type[Pattern]] = {
    pattern.__name__: pattern
    for pattern in (
        Dense,
        Causal,
        SlidingWindow,
        DilatedWindow,
        DilatedSegments,
        Strided,
        GlobalTokens,
        RandomBlocks,
        BlockList,
        Hierarchical,
        Routed,
    )
}

__all__ = [
    "PATTERNS",
    "BlockList",
    "Causal",
    "Dense",
    "DilatedSegments",
    "DilatedWindow",
    "GlobalTokens",
    "Hierarchical",
    "Intersection",
    "Pattern",
    "RandomBlocks",
    "Routed",
    "SlidingWindow",
    "Strided",
    "Sum",
    "Union",
]
