"""Modules that hold weights and call the op."""

from sparse_core.nn.attention import SparseSelfAttention
from sparse_core.nn.encoder import SparseEncoder
from sparse_core.nn.rotary import RotaryEmbedding

__all__ = ["RotaryEmbedding", "SparseEncoder", "SparseSelfAttention"]
