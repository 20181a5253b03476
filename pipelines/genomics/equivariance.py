"""Networks that read both strands alike.

The reverse complement of some bases turns their tokens around and swaps two halves of the channels;
what the head reads stays as it is. Every product commutes with the swap S: W = S W S, half as many
free weights, as in the convolutions of Shrikumar et al. 2017 and in Caduceus-PS (Schiff et al.
2024). For attention: rotary positions turn channel i of a head with channel i + D/2, by an angle
that grows with the coordinate; with these two swapped they turn the other way, which is what
counting the coordinates backwards does.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from pipelines.genomics.alphabet import COMPLEMENT
from pipelines.shared.errors import InputError
from pipelines.shared.network import ConvolutionStem, SequenceClassifier, read_patterns
from sparse_core.nn import SparseSelfAttention
from sparse_core.patterns import (
    Causal,
    Dense,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
)

_WHY = {
    Causal: "it looks to one side only",
    GlobalTokens: "its registers stand before the first base, and none behind the last",
    RandomBlocks: "its blocks are drawn anew for every place",
}


def refuse_asymmetric(pattern: str | list[str] | None, depth: int) -> None:
    """Raise InputError for a pattern that changes when the bases are read backwards."""
    for whole in read_patterns(pattern, depth):
        for part in _leaves(whole):
            if not _is_symmetric(part):
                why = _WHY.get(type(part), "it counts from the first base on")
                raise InputError(
                    f"rc=equivariant needs a pattern that is the same backwards, and {part!r} is "
                    f"not: {why}; use pattern=sliding_window, dilated_window or dense, or "
                    "rc=average, which any pattern can have"
                )


def share_between_strands(network: SequenceClassifier) -> None:
    """Tie the weights of a network on bases, so that it reads both strands alike."""
    dim = network.registers.shape[1]
    swap = _swap(dim)
    _tie_stem(network.stem, swap)
    for module in network.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            _tie(module, swap)
        elif isinstance(module, SparseSelfAttention):
            width = module.head_dim
            _tie(module.qkv, _swap(width, module.qkv.out_features // width), swap)
            _tie(module.out, swap, _swap(width, dim // width))
        elif isinstance(module, nn.Sequential):
            hidden = _swap(module[0].out_features)
            _tie(module[0], hidden, swap)
            _tie(module[2], swap, hidden)
    for name, module in network.pool.named_modules():
        if isinstance(module, nn.Linear):
            out = torch.arange(1) if name.endswith("score") else swap
            _tie(module, out, swap)
    network.head = nn.Sequential(EvenOut(dim), *network.head)


def _tie_stem(stem: nn.Module, swap: Int64[Tensor, " E"]) -> None:
    complement = torch.from_numpy(COMPLEMENT.astype("int64"))
    if isinstance(stem, ConvolutionStem):
        turned = torch.arange(stem.convolution.kernel_size[0] - 1, -1, -1)
        _tie(stem.convolution, swap, complement, turned)
        _tie(stem.project[1], swap, swap)
        return
    embedding, norm = stem.get_submodule("embedding"), stem.get_submodule("norm")
    _tie(embedding, complement, swap)
    _tie(norm, swap)


class EvenOut(nn.Module):
    """Give both halves of each `dim` channels their mean: the same for both strands."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Float[Tensor, "S F"]) -> Float[Tensor, "S F"]:
        """Average the halves."""
        halves = x.unflatten(1, (-1, 2, self.dim // 2))
        return ((halves + halves.flip(2)) / 2).flatten(1)


class Tied(nn.Module):
    """A weight and itself with its places exchanged, added: W[i, j, ...] + W[p(i), q(j), ...].

    Divided by the root of 2, so that random weights keep their spread; vectors by 2.
    """

    def __init__(self, *places: Int64[Tensor, " N"]) -> None:
        super().__init__()
        for axis, place in enumerate(places):
            self.register_buffer(f"place{axis}", place, persistent=False)
        self.num_axes = len(places)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Add both."""
        other = weight
        for axis in range(self.num_axes):
            other = other.index_select(axis, getattr(self, f"place{axis}"))
        return (weight + other) / (2 if weight.ndim == 1 else 2**0.5)


def _tie(module: nn.Module, *places: Int64[Tensor, " N"]) -> None:
    """Tie a module's weight by its places along each axis, and its bias along the first."""
    register_parametrization(module, "weight", Tied(*places), unsafe=True)
    if getattr(module, "bias", None) is not None:
        register_parametrization(module, "bias", Tied(places[0]), unsafe=True)


def _swap(size: int, blocks: int = 1) -> Int64[Tensor, " N"]:
    """Places of channels once both halves of each block of `size` are swapped."""
    half = size // 2
    one = torch.cat([torch.arange(half, size), torch.arange(half)])
    return (torch.arange(blocks)[:, None] * size + one).flatten()


def _leaves(pattern: Pattern | None) -> Iterator[Pattern]:
    if pattern is None:
        return
    parts = getattr(pattern, "parts", None)
    if parts is None:
        yield pattern
        return
    for part in parts:
        yield from _leaves(part)


def _is_symmetric(pattern: Pattern) -> bool:
    if isinstance(pattern, SlidingWindow):
        return pattern.left == pattern.right
    return isinstance(pattern, Dense | DilatedWindow)
