"""Attention written out in full: the definition of correct. Memory is Tq x Tk."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def reference_attention(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    counts: Int[Tensor, "*G Tq Tk"] | Bool[Tensor, "*G Tq Tk"] | Float[Tensor, "*G Tq Tk"],
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "B Tk"] | None = None,
    alibi: Float[Tensor, "H Tq Tk"] | None = None,
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B H Tq"]]:
    """Compute softmax attention in the inputs' own precision, differentiable by autograd.

    `counts` says how often each pair is kept (a mask, if Boolean), or how much it weighs; it
    broadcasts to [B, H, Tq, Tk].
    `alibi` is added to the scaled scores. A query without keys gives 0 and log-sum-exp -inf.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if key_bias is not None:
        scores = scores + key_bias[:, None, None, :]
    if alibi is not None:
        scores = scores + alibi
    weights = counts.to(scores.dtype)
    scores = scores + torch.where(weights > 0, weights, 1).log()
    scores = scores.masked_fill(weights == 0, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    some = total > 0
    safe = torch.where(some, total, 1)
    out = torch.einsum("bhqk,bkhd->bqhd", exponentials / safe, v)
    lse = torch.where(some, safe.log() + largest, -torch.inf)
    return out, lse[..., 0]


def coordinate_distance(
    query: Int[Tensor, "*S M P"], key: Int[Tensor, "*S N P"], dtype: torch.dtype
) -> Float[Tensor, "*S M N"]:
    """Euclidean distance of every pair; in one dimension the absolute difference."""
    difference = query[..., :, None, :] - key[..., None, :, :]
    if difference.shape[-1] == 1:
        return difference[..., 0].abs().to(dtype)
    return difference.to(dtype).square().sum(-1).sqrt()
