"""A transformer encoder whose layers attend over layouts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_core.building import build_layout
from sparse_core.nn.attention import AnyLayout, Pooling, SparseSelfAttention
from sparse_core.nn.rotary import RotaryEmbedding, Rotation
from sparse_core.ops import Backend
from sparse_core.patterns import Pattern
from sparse_core.patterns.joined import is_pooled, is_routed
from sparse_core.pooling import build_pooled_layout
from sparse_core.routing import build_routed_layout


class SparseEncoder(nn.Module):
    """Pre-norm transformer layers (Xiong et al. 2020) with rotary positions from coordinates.

    `pattern` is one for all layers or a sequence with one for each; None leaves attention out of a
    layer, so that only the feed-forward part is left (an ablation). Layouts are built once for a
    batch by `build_layouts`, outside any compiled region, and serve all layers with their pattern.

    `rotary_axes` is how many of the leading axes turn the channels (all `coord_dims` if not given,
    none if 0). `checkpointing` recomputes each layer in backward, so that memory holds one layer's
    activations and the layers' inputs. `compiled` runs what surrounds attention through
    torch.compile, once for all layers and lengths: norms, products, rotation and residuals in few
    kernels. `pooling` says what stands for cells where a pattern pools keys, and for blocks where
    it routes.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        pattern: Pattern | Sequence[Pattern | None] | None,
        *,
        coord_dims: int = 1,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        rotary_axes: int | None = None,
        rotary_base: float = 10_000.0,
        checkpointing: bool = False,
        compiled: bool = False,
        pooling: Pooling = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        each = list(pattern) if isinstance(pattern, Sequence) else [pattern] * depth
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got {dim=}, {num_heads=}")
        if len(each) != depth:
            raise ValueError(f"give one pattern, or one for each layer; got {len(each)}, {depth=}")
        self.patterns = tuple(dict.fromkeys(p for p in each if p is not None))
        self.layout_of_layer = [None if p is None else self.patterns.index(p) for p in each]
        self.checkpointing = checkpointing
        self.num_kv_heads = num_kv_heads or num_heads
        axes = coord_dims if rotary_axes is None else rotary_axes
        self.rotary = (
            RotaryEmbedding(dim // num_heads, coord_dims=axes, base=rotary_base) if axes else None
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim,
                None
                if p is None
                else SparseSelfAttention(
                    dim, num_heads, num_kv_heads=num_kv_heads, pooling=pooling, backend=backend
                ),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                compiled=compiled,
            )
            for p in each
        )
        self.norm = nn.LayerNorm(dim)

    def build_layouts(
        self,
        coords: Int[Tensor, "T P"] | int,
        *,
        segments: Int[Tensor, "S"] | list[int] | None = None,
    ) -> tuple[AnyLayout, ...]:
        """Build the layout of each distinct pattern; see `build_layout` for the arguments."""
        device = next(self.parameters()).device

        def build(pattern: Pattern) -> AnyLayout:
            if is_pooled(pattern):
                return build_pooled_layout(pattern, coords, segments=segments, device=device)
            if is_routed(pattern):
                return build_routed_layout(pattern, coords, segments=segments, device=device)
            return build_layout(
                pattern, coords, segments=segments, num_kv_heads=self.num_kv_heads, device=device
            )

        return tuple(map(build, self.patterns))

    def forward(
        self, x: Float[Tensor, "B T E"], layouts: tuple[AnyLayout, ...]
    ) -> Float[Tensor, "B T E"]:
        """Encode the tokens; `layouts` are those of `build_layouts`, with their coordinates."""
        if len(layouts) != len(self.patterns):
            raise ValueError(f"needs {len(self.patterns)} layouts; got {len(layouts)}")
        rotation = None
        if self.rotary is not None and layouts:
            rotation = self.rotary(layouts[0].query_coords)
        for layer, which in zip(self.layers, self.layout_of_layer, strict=True):
            layout = None if which is None else layouts[which]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, layout, rotation, use_reentrant=False)
            else:
                x = layer(x, layout, rotation)
        return self.norm(x)


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward part, each on the normalised residual stream."""

    def __init__(
        self,
        dim: int,
        attention: SparseSelfAttention | None,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.compiled = compiled
        hidden = int(dim * mlp_ratio)
        self.attention = attention
        self.norm_attention = None if attention is None else nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B T E"], layout: AnyLayout | None, rotation: Rotation | None
    ) -> Float[Tensor, "B T E"]:
        """Mix between tokens, then within each."""
        before, after = _compiled() if self.compiled else (EncoderLayer.before, EncoderLayer.after)
        mixed = None
        if self.attention is not None and layout is not None:
            q, k, v = before(self, x, rotation)
            mixed = self.attention.attend(q, k, v, layout)
        result: Tensor = after(self, x, mixed)
        return result

    def before(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: norm, projections, rotation."""
        assert self.attention is not None
        assert self.norm_attention is not None
        return self.attention.project(self.norm_attention(x), rotation)

    def after(self, x: Tensor, mixed: Tensor | None) -> Tensor:
        """What comes after: back to the residual stream, and the feed-forward part."""
        if self.attention is not None and mixed is not None:
            x = x + self.dropout(self.attention.join(mixed))
        fed: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return fed


@contextmanager
def compiled_layers(network: nn.Module) -> Iterator[None]:
    """Run what surrounds attention in all layers of a network through torch.compile meanwhile."""
    before = [(x, x.compiled) for x in network.modules() if isinstance(x, EncoderLayer)]
    try:
        for layer, _ in before:
            layer.compiled = True
        yield
    finally:
        for layer, compiled in before:
            layer.compiled = compiled


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile both parts of a layer, for all layers of this process."""
    parts = EncoderLayer.before, EncoderLayer.after
    before, after = (torch.compile(part, dynamic=True, fullgraph=True) for part in parts)
    return before, after
