"""The convolutional network that Genomic Benchmarks measures against (Grešová et al. 2023)."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipelines.genomics.alphabet import NUM_TOKENS, PADDING
from pipelines.shared.batch import PackedBatch
from pipelines.shared.errors import InputError
from pipelines.shared.network import NetworkOutput

_CHANNELS = (100, 16, 8, 4)
_KERNEL = 8
_HIDDEN = 512
_SHORTEST = 57
"""Bases that three convolutions and poolings leave a value of."""
_LONGEST = 1 << 17


class BenchmarkCnn(nn.Module):
    """Three convolutions of 8 bases, halved by pooling each, and two products.

    Bases are embedded in 100 channels, which become 16, 8 and 4; each convolution is normalised
    over the batch, rectified, and halved by its larger neighbours; 512 hidden channels are read
    linearly. Sequences have up to `num_bases`, to which shorter ones are filled up, but to 57 at
    least. It knows nothing of coordinates. Layers and sizes are those of the network that Grešová
    et al. (Genomic benchmarks, BMC Genomic Data 2023, table 2) publish as
    `genomic_benchmarks.models.torch.CNN`, with the embedding of their experiments (100); theirs
    has one number for two classes, with a sigmoid, where this has two and takes more classes.
    """

    def __init__(self, num_bases: int, num_classes: int) -> None:
        super().__init__()
        self.num_bases = max(num_bases, _SHORTEST)
        self.embedding = nn.Embedding(NUM_TOKENS, _CHANNELS[0])
        length, layers = self.num_bases, []
        for inside, outside in pairwise(_CHANNELS):
            layers += [
                nn.Conv1d(inside, outside, _KERNEL), nn.BatchNorm1d(outside), nn.ReLU(),
                nn.MaxPool1d(2),
            ]  # fmt: skip
            length = (length - _KERNEL + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(length * _CHANNELS[-1], _HIDDEN)
        self.head = nn.Linear(_HIDDEN, num_classes)

    def forward(self, batch: PackedBatch, *, explain: bool = False) -> NetworkOutput:
        """Score every sequence of the batch; all its bases count alike."""
        lengths = batch.lengths.to(batch.inputs.device)
        seen = self.convolutions(self.embedding(self._filled(batch)).transpose(1, 2))
        vector = self.hidden(seen.flatten(1))
        share = (1 / lengths).repeat_interleave(lengths).to(vector.dtype)
        return NetworkOutput(self.head(vector), share, vector)

    def _filled(self, batch: PackedBatch) -> Int64[Tensor, "S T"]:
        parts = batch.inputs.long().split(batch.lengths.tolist())
        filled = torch.full(
            (len(parts), self.num_bases), PADDING, dtype=torch.int64, device=batch.inputs.device
        )
        for row, part in zip(filled, parts, strict=True):
            row[: part.numel()] = part
        return filled


def refuse_long(num_bases: int) -> None:
    """Raise InputError for sequences that the network would have too many weights for."""
    if num_bases > _LONGEST:
        weights = num_bases // 2 * _HIDDEN
        raise InputError(
            f"baselines: cnn has weights for each place; of {num_bases:,} bases they would be "
            f"{weights / 1e6:,.0f} million. Leave it out (baselines=[majority,kmer]), or give a "
            f"context of {_LONGEST:,} at most"
        )


def majority_logits(counts: Int64[Tensor, " C"], num_rows: int) -> Float[Tensor, "N C"]:
    """What is said without looking: the logarithms of the classes' shares in training."""
    shares = counts.double() / counts.sum()
    return shares.log().expand(num_rows, -1)
