"""What each base adds to a score: every base changed in turn, and gradients.

The score is a number made of a network's numbers, such as the log odds of a class. Maps have a
column for each of A C G T.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelines.genomics.alphabet import COMPLEMENT, NUM_BASES
from pipelines.genomics.model import DnaClassifier
from pipelines.shared.batch import Example, pack
from pipelines.shared.inference import predict
from pipelines.shared.network import ConvolutionStem

Map = Float[ndarray, "T 4"]
Score = Callable[[Tensor], Tensor]
"""Of the numbers that a network says of a sequence [C], or of its bases [T, C], one."""


def log_odds(logits: Float[Tensor, "... C"], column: int) -> Float[Tensor, "..."]:
    """Log odds of one class against all others together."""
    others = [place for place in range(logits.shape[-1]) if place != column]
    return logits[..., column] - logits[..., others].logsumexp(-1)


def mutate_in_silico(
    network: nn.Module,
    bases: UInt8[ndarray, "T"],
    score: Score,
    *,
    positions: Int64[ndarray, "K"],
    max_tokens: int,
    device: str = "cpu",
) -> Map:
    """Change of the score where a base is replaced by each other one, all else being as it was.

    Zero for the base itself; NaN at positions not asked for, and at ambiguous letters.
    """
    asked = positions[(bases[positions] >= 1) & (bases[positions] <= NUM_BASES)]
    changes = [
        (int(at), letter)
        for at in asked
        for letter in range(1, NUM_BASES + 1)
        if letter != bases[at]
    ]
    examples = _Changed(bases, changes)
    said = predict(network, examples, max_tokens=max_tokens, device=device)
    found = np.array([float(score(item.logits.double())) for item in said])
    result = np.full((bases.size, NUM_BASES), np.nan)
    result[asked] = 0
    for (at, letter), changed in zip(changes, found[1:], strict=True):
        result[at, letter - 1] = changed - found[0]
    return result


def input_gradient(
    network: DnaClassifier, bases: UInt8[ndarray, "T"], score: Score, *, device: str = "cpu"
) -> Map:
    """Gradient of the score by the one-hot bases, less its mean over the four bases.

    The mean says what would change if a base were partly all four at once, which no DNA is
    (Majdandzic et al. 2023, equation 5). With rc=average it is the mean over both strands.
    """
    network.to(device).eval()
    seen: list[Tensor] = []
    hook = _watch(network.stem, seen)
    try:
        with torch.enable_grad():
            batch = pack([_example(bases)]).to(device)
            logits = network(batch).logits
            slopes = torch.autograd.grad(score(logits if network.per_token else logits[0]), seen)
    finally:
        hook.remove()
    maps = [_by_letter(network.stem, slope, bases.size) for slope in slopes]
    if len(maps) > 1:  # the second is of the other strand
        maps[1] = maps[1][::-1, COMPLEMENT]
    whole = np.sum(maps, axis=0)[:, 1 : NUM_BASES + 1]
    return whole - whole.mean(axis=1, keepdims=True)


def _watch(stem: nn.Module, seen: list[Tensor]) -> RemovableHandle:
    """Keep what the stem is given of each letter, or makes of it, to take gradients by."""

    def keep_letters(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0].detach().requires_grad_())
        return (seen[-1],)

    def keep_vectors(_: nn.Module, __: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
        seen.append(vectors.detach().requires_grad_())
        return seen[-1]

    if isinstance(stem, ConvolutionStem):
        return stem.convolution.register_forward_pre_hook(keep_letters)
    return stem.get_submodule("embedding").register_forward_hook(keep_vectors)


def _by_letter(stem: nn.Module, slope: Tensor, length: int) -> Float[ndarray, "T L"]:
    """Gradient by the one-hot letters; of an embedding, which is linear in them, through it."""
    if isinstance(stem, ConvolutionStem):
        found = slope[0, :, :length].T
    else:
        weight = stem.get_submodule("embedding").weight
        assert isinstance(weight, Tensor), "letters have vectors"
        found = slope @ weight.detach().T
    letters: Float[ndarray, "T L"] = found.double().cpu().numpy()
    return letters


def importance(changes: Map) -> Float[ndarray, "T"]:
    """What a base adds by mutagenesis: minus the mean change of replacing it; NaN if not asked."""
    return -changes.sum(axis=1) / (NUM_BASES - 1)


def own_gradient(gradient: Map, bases: UInt8[ndarray, "T"]) -> Float[ndarray, "T"]:
    """Take each base's own value of a map; NaN for ambiguous letters."""
    known = (bases >= 1) & (bases <= NUM_BASES)
    places = np.where(known, bases - 1, 0)
    return np.where(known, gradient[np.arange(bases.size), places], np.nan)


class _Changed:
    """The bases as they are, and with one of them replaced, each made when it is read."""

    def __init__(self, bases: UInt8[ndarray, "T"], changes: list[tuple[int, int]]) -> None:
        self._bases, self._changes = bases, changes
        self.lengths = [bases.size] * (len(changes) + 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        bases = self._bases.copy()
        if index:
            at, letter = self._changes[index - 1]
            bases[at] = letter
        return _example(bases)


def _example(bases: UInt8[ndarray, "T"]) -> Example:
    coords = torch.arange(bases.size)[:, None]
    return Example(torch.from_numpy(bases), coords, None, "", "", 0)
