"""Learning from bases without labels: guess bases that were hidden, or the next one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from pipelines.genomics.alphabet import LETTERS, NUM_BASES
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.model import DnaClassifier
from pipelines.shared.batch import Example, PackedBatch, Target
from pipelines.shared.errors import InputError
from pipelines.shared.metrics import Predictions
from pipelines.shared.network import NetworkOutput, read_patterns
from pipelines.shared.objective import Outputs
from sparse_core.patterns import Causal, Intersection, Pattern

Guess = Literal["masked", "causal"]
GUESSES = get_args(Guess)

HIDDEN = LETTERS.index("N") + 1
"""What stands for a hidden base: N, which is any base."""

_RANDOM, _KEPT = 0.1, 0.1
_TOKEN, _TARGET, _WEIGHT = range(3)
_FULL_WEIGHT = 200
"""The weight of an upper-case base, as a whole number: 1 in steps of 0.005."""


@dataclass(frozen=True, slots=True)
class Hiding:
    """Which bases are to be guessed, and how much each one counts.

    `rate` of the bases is hidden, in runs of `span` bases: 80 of 100 of them as N, 10 as another
    base at random, 10 left as they are (Devlin et al. 2019, section 3.1). Soft-masked bases count
    `soft_weight` in the loss (as in Evo 2, Brixi et al. 2025, repeats by 0.1). Raises InputError
    for numbers without sense.
    """

    guess: Guess = "masked"
    rate: float = 0.15
    span: int = 1
    soft_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.guess not in GUESSES:
            raise InputError(f"guess is {' or '.join(GUESSES)}; got {self.guess!r}")
        if not 0 < self.rate < 1:
            raise InputError(f"mask_rate lies between 0 and 1; got {self.rate}")
        if self.span < 1:
            raise InputError(f"mask_span is a number of bases, 1 or more; got {self.span}")
        if not 0 <= self.soft_weight <= 1:
            raise InputError(f"soft_mask_weight lies from 0 to 1; got {self.soft_weight}")


class HiddenBases(Dataset[Example]):
    """Windows with some of their bases hidden; inputs are token, base to guess, and weight [T, 3].

    The base to guess is 1 to 4 (A C G T) or 0 where nothing is asked; ambiguous letters are never
    asked. What is hidden depends on (seed, epoch, index) alone.
    """

    def __init__(self, windows: WindowDataset, hiding: Hiding) -> None:
        self.windows, self.hiding = windows, hiding
        self.lengths = windows.lengths

    def set_epoch(self, epoch: int) -> None:
        """Hide other bases from now on."""
        self.windows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.windows)

    def asks(self) -> bool:
        """Whether any base is to be guessed."""
        return any(bool((self[row].inputs[:, _TARGET] > 0).any()) for row in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        window = self.windows[index]
        bases = window.inputs.numpy().astype(np.uint8)
        soft = self._soft(index)
        rng = np.random.default_rng((self.windows.seed, self.windows.epoch, index, 1))
        tokens, targets = (
            hide(bases, self.hiding, rng) if self.hiding.guess == "masked" else next_bases(bases)
        )
        if self.hiding.guess == "causal":  # the weight is that of the base to guess
            soft = np.append(soft[1:], False)
        weights = np.where(soft, round(self.hiding.soft_weight * _FULL_WEIGHT), _FULL_WEIGHT)
        columns = np.stack([tokens, targets, weights.astype(np.uint8)], axis=1)
        return Example(
            torch.from_numpy(columns), window.coords, 0, window.id, window.group, window.record
        )

    def _soft(self, index: int) -> Bool[ndarray, "T"]:
        windows = self.windows
        span = int(windows.starts[index]), int(windows.ends[index])
        mask = windows.store.mask(int(windows.records[index]), *span)
        return mask[::-1] if windows.flips()[index] else mask


def hide(
    bases: UInt8[ndarray, "T"], hiding: Hiding, rng: np.random.Generator
) -> tuple[UInt8[ndarray, "T"], UInt8[ndarray, "T"]]:
    """Hide runs of bases: tokens, and the base to guess at each place (0: none)."""
    share = 1 - (1 - hiding.rate) ** (1 / hiding.span)  # of places where a run begins
    starts = rng.random(bases.size + hiding.span - 1) < share
    covered = np.convolve(starts, np.ones(hiding.span, dtype=np.int64), mode="valid") > 0
    asked = covered & (bases >= 1) & (bases <= NUM_BASES)
    coins = rng.random(bases.size)
    others = rng.integers(1, NUM_BASES + 1, bases.size, dtype=np.uint8)
    tokens = np.where(asked & (coins >= _RANDOM + _KEPT), np.uint8(HIDDEN), bases)
    tokens = np.where(asked & (coins < _RANDOM), others, tokens)
    return tokens, np.where(asked, bases, np.uint8(0))


def next_bases(bases: UInt8[ndarray, "T"]) -> tuple[UInt8[ndarray, "T"], UInt8[ndarray, "T"]]:
    """Ask at each place for the base behind it."""
    following = np.append(bases[1:], np.uint8(0))
    return bases, np.where(following <= NUM_BASES, following, np.uint8(0))


class BaseGuesser(nn.Module):
    """A network that guesses bases; its numbers of a sequence are bits lost, weight and count.

    `network` is a classifier of which stem, registers and encoder are used. For guesses of the next
    base its pattern must look back only, and its stem at one base alone. Raises InputError where
    these, or the tokens, do not fit.
    """

    def __init__(self, network: DnaClassifier, guess: Guess) -> None:
        super().__init__()
        refuse_sight(network, guess)
        self.network = network
        dim = network.config["dim"]
        assert isinstance(dim, int), "a network has a number of channels"
        self.read = nn.Linear(dim, NUM_BASES)

    def forward(self, batch: PackedBatch, *, explain: bool = False) -> NetworkOutput:
        """Measure how well the hidden bases of each sequence are guessed."""
        logits = self.guesses(batch)
        inputs = batch.inputs.long()
        asked = inputs[:, _TARGET] > 0
        lost = cross_entropy(
            logits.float(), (inputs[:, _TARGET] - 1).clamp(min=0), reduction="none"
        )
        bits = torch.where(asked, lost / math.log(2), 0.0)
        weight = torch.where(asked, inputs[:, _WEIGHT] / _FULL_WEIGHT, 0.0).to(bits.dtype)
        lengths = batch.lengths.to(bits.device)
        sequence = torch.arange(lengths.numel(), device=bits.device).repeat_interleave(lengths)
        columns = torch.stack([bits * weight, weight, bits, asked.to(bits.dtype)], 1)
        totals = bits.new_zeros(lengths.numel(), 4).index_add(0, sequence, columns)
        share = (1 / lengths).repeat_interleave(lengths)
        return NetworkOutput(totals, share, totals)

    def guesses(self, batch: PackedBatch) -> Float[Tensor, "T 4"]:
        """Logits of A C G T at each place."""
        tokens = PackedBatch(batch.inputs[:, _TOKEN], batch.coords, batch.lengths, None, batch.ids)
        guessed: Tensor = self.read(self.network.encode(tokens))
        return guessed


@dataclass(frozen=True, slots=True)
class BitsPerBase:
    """Mean bits lost per guessed base; the loss is weighted, the score is not (and less is better,
    so that its negative is what a run may select by)."""

    @property
    def num_outputs(self) -> int:
        """Bits times weight, weight, bits, and how many were asked."""
        return 4

    @property
    def score(self) -> str:
        """Negative bits per base."""
        return "minus_bits_per_base"

    @property
    def joint(self) -> bool:
        """No: a mean over what was asked."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "S 4"], targets: Shaped[Tensor, "S"]) -> Tensor:
        """Weighted mean, in bits."""
        return outputs[:, 0].sum() / outputs[:, 1].sum().clamp(min=1e-6)

    def evaluate(self, outputs: Outputs, targets: ndarray) -> float | None:
        """Unweighted mean of what was asked; None where nothing was."""
        asked = outputs[:, 3].sum()
        return float(-outputs[:, 2].sum() / asked) if asked else None

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> Predictions:
        """There are none."""
        raise TypeError("bases that are guessed have no table of predictions")

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """Nothing."""
        return pd.DataFrame(index=range(len(targets)))

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """Bits per base of each sequence."""
        return pd.DataFrame({"bits_per_base": outputs[:, 2] / np.maximum(outputs[:, 3], 1)})

    def plain(self) -> dict[str, object]:
        """Return the name."""
        return {"name": "bits_per_base"}


def refuse_sight(network: DnaClassifier, guess: Guess) -> None:
    """Raise InputError where a network would see what it is to guess, or has no token for it."""
    if network.config["stem_stride"] != 1:
        raise InputError("pretrain guesses single bases: it needs stem_stride=1")
    if network.config["rc"] == "average":
        raise InputError("rc=average averages classes; pretrain with rc=augment or equivariant")
    if guess == "masked":
        return
    depth = network.config["depth"]
    assert isinstance(depth, int), "a network has a number of layers"
    pattern: Any = network.config["pattern"]
    for whole in read_patterns(pattern, depth):
        if not _looks_back(whole):
            raise InputError(
                f"guess=causal needs patterns that look back only, and {whole!r} does not: add "
                "'& Causal()', pattern.expression='SlidingWindow(radius=64) & Causal()'"
            )
    if network.config["stem"] == "convolution" and network.config["kernel"] != 1:
        raise InputError(
            f"guess=causal with kernel={network.config['kernel']}: the stem would see the next "
            "bases; use stem=none or kernel=1"
        )


def _looks_back(pattern: Pattern | None) -> bool:
    if isinstance(pattern, Intersection):
        return any(_looks_back(part) for part in pattern.parts)
    parts = getattr(pattern, "parts", None)
    if parts is not None:
        return all(_looks_back(part) for part in parts)
    return pattern is None or isinstance(pattern, Causal)
