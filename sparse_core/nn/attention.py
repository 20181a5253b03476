"""Self-attention over a layout."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_core.layout import BlockLayout
from sparse_core.nn.rotary import Rotation, rotate
from sparse_core.ops import Backend, sparse_attention
from sparse_core.pooling import PooledLayout, pooled_attention
from sparse_core.routing import RoutedLayout, routed_attention

AnyLayout = BlockLayout | PooledLayout | RoutedLayout
Pooling = Literal["mean", "learned"]


class SparseSelfAttention(nn.Module):
    """Project to queries, keys and values, attend over a layout, project back.

    `num_kv_heads` key heads are shared by equal groups of query heads (Ainslie et al. 2023). The
    layout says who sees whom; the module holds no pattern of its own. In a pooled layout, cells are
    means of their tokens, or, with `pooling="learned"`, averages by a softmax of learned scores; so
    are the blocks' queries and keys in a routed layout.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        pooling: Pooling = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, and num_heads of num_kv_heads; "
                f"got {dim=}, {num_heads=}, {num_kv_heads=}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.backend: Backend = backend
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.pool_by: nn.Parameter | None = None
        if pooling == "learned":
            self.pool_by = nn.Parameter(torch.zeros(num_kv_heads, self.head_dim))

    def forward(
        self, x: Float[Tensor, "B T E"], layout: AnyLayout, rotation: Rotation | None = None
    ) -> Float[Tensor, "B T E"]:
        """Mix each token with those that the layout lets it see."""
        return self.join(self.attend(*self.project(x, rotation), layout))

    def project(
        self, x: Float[Tensor, "B T E"], rotation: Rotation | None = None
    ) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B T Hkv D"], Float[Tensor, "B T Hkv D"]]:
        """Turn tokens into queries, keys and values."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = heads.split(sizes, dim=2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: AnyLayout) -> Tensor:
        """Mix the values, [B, T, H, D]."""
        mixed: Tensor | tuple[Tensor, Tensor]
        if isinstance(layout, PooledLayout):
            mixed = pooled_attention(
                q, k, v, layout, scores=self._pooling_scores(k), backend=self.backend
            )
        elif isinstance(layout, RoutedLayout):
            mixed = routed_attention(
                q, k, v, layout,
                query_scores=self._pooling_scores(q), key_scores=self._pooling_scores(k),
                backend=self.backend,
            )  # fmt: skip
        else:
            mixed = sparse_attention(q, k, v, layout, backend=self.backend)
        assert isinstance(mixed, Tensor)
        return mixed

    def _pooling_scores(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T Hkv"] | None:
        """How much each token counts in its cell or block; None if all count alike."""
        if self.pool_by is None:
            return None
        by_key_head = x.unflatten(2, (self.num_kv_heads, -1))
        scores: Tensor = torch.einsum("bthgd,hd->bthg", by_key_head, self.pool_by)
        return scores.mean(3)

    def join(self, mixed: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T E"]:
        """Bring the heads together."""
        joined: Tensor = self.out(mixed.flatten(2))
        return joined
