"""Rotary positions from integer coordinates of any number of axes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Rotation = tuple[Float[Tensor, "T D/2"], Float[Tensor, "T D/2"]]
"""Cosine and sine of each token's angles."""


class RotaryEmbedding(nn.Module):
    """Rotate pairs of channels by an angle proportional to a coordinate (Su et al. 2021, eq. 34).

    With several axes each takes an equal share of the channel pairs (axial rotary); pairs left over
    are not rotated. Angles are computed in float64 and kept as float32 cosines and sines: in
    float32 they would be off by up to 0.04 at coordinate 1,000,000.
    """

    def __init__(self, head_dim: int, *, coord_dims: int = 1, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2 or head_dim // 2 < coord_dims:
            raise ValueError(
                f"head_dim must be even and hold a pair of channels for each axis; "
                f"got {head_dim=}, {coord_dims=}"
            )
        if not base > 1:
            raise ValueError(f"the base of rotary positions must exceed 1; got {base}")
        self.head_dim, self.coord_dims, self.base = head_dim, coord_dims, base

    def forward(self, coords: Int[Tensor, "T P"]) -> Rotation:
        """Compute the rotation of each token."""
        per_axis = self.head_dim // 2 // self.coord_dims
        step = torch.arange(per_axis, device=coords.device, dtype=torch.float64)
        frequency = self.base ** (-step / per_axis)
        angle = (coords[:, : self.coord_dims, None].double() * frequency).flatten(1)
        rest = self.head_dim // 2 - angle.shape[1]
        angle = torch.nn.functional.pad(angle, (0, rest))
        return angle.cos().float(), angle.sin().float()


def rotate(x: Float[Tensor, "B T H D"], rotation: Rotation) -> Float[Tensor, "B T H D"]:
    """Turn the channel pairs (i, i + D/2) of each head."""
    cos, sin = (table[:, None, :].to(x.dtype) for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
