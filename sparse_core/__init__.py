"""Sparse attention: patterns, layouts, engines and the modules that use them."""

from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout, concat, merge, stack, with_block_biases
from sparse_core.ops import merge_attention, sparse_attention

__all__ = [
    "BlockLayout",
    "build_layout",
    "concat",
    "merge",
    "merge_attention",
    "sparse_attention",
    "stack",
    "with_block_biases",
]
