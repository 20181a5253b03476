"""Modules that hold weights and call the op."""

from sparse_core.nn.attention import SparseSelfAttention
from sparse_core.nn.encoder import SparseEncoder, compiled_layers
from sparse_core.nn.rotary import RotaryEmbedding

__all__ = ["RotaryEmbedding", "SparseEncoder", "SparseSelfAttention", "compiled_layers"]
