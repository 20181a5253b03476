"""Scores of a network for windows, kept in parts: an interrupted run goes on where it was."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import nn

from pipelines.genomics.data import average_windows
from pipelines.genomics.progress import track
from pipelines.genomics.selection import Windows
from pipelines.shared.batch import Example
from pipelines.shared.inference import Prediction, predict

_PART_BATCHES = 32
"""Batches whose results are kept together: an interrupted run loses no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What a network says of each window: its numbers, and the vector that its head reads.

    Numbers are those of windows [W, C], or of all their bases, window after window.
    """

    logits: Float[ndarray, "W C"]
    embeddings: Float[ndarray, "W E"] | None

    def by_sequence(
        self, records: Int64[ndarray, "W"], lengths: Int64[ndarray, "W"] | None = None
    ) -> Float[ndarray, "R C"]:
        """Return the means of each sequence's windows; of bases, `lengths` a window, all bases'."""
        owners = records if lengths is None else np.repeat(records, lengths)
        _, logits = average_windows(torch.from_numpy(self.logits), torch.from_numpy(owners))
        return logits.double().numpy()

    def embeddings_by_sequence(self, records: Int64[ndarray, "W"]) -> Float[ndarray, "R E"]:
        """Return the mean of the vectors of each sequence's windows."""
        assert self.embeddings is not None, "embeddings were not asked for"
        _, vectors = average_windows(torch.from_numpy(self.embeddings), torch.from_numpy(records))
        return vectors.numpy()


def score_windows(
    network: nn.Module,
    windows: Windows,
    *,
    parts: Path,
    max_tokens: int,
    device: str,
    embeddings: bool = False,
) -> Scores:
    """Score every window, in order, leaving out what the folder `parts` holds already.

    The folder must be of this network and these windows.
    """
    parts.mkdir(parents=True, exist_ok=True)
    ranges = list(_ranges(windows.lengths, _PART_BATCHES * max_tokens))
    files = [parts / f"{first}-{last}.npz" for first, last in ranges]

    def score() -> Iterator[None]:
        for (first, last), file in zip(ranges, files, strict=True):
            if file.exists():
                yield from [None] * (last - first)
                continue
            found: list[Prediction] = []
            piece = _Slice(windows, first, last)
            for prediction in predict(
                network, piece, max_tokens=max_tokens, device=device, explain=embeddings
            ):
                found.append(prediction)
                yield None
            _keep(file, found)

    for _ in track(score(), total=len(windows), label="predict", unit="windows"):
        pass
    loaded = [dict(np.load(file, allow_pickle=False)) for file in files]
    logits = np.concatenate([part["logits"] for part in loaded])
    vectors = np.concatenate([part["embeddings"] for part in loaded]) if embeddings else None
    return Scores(logits, vectors)


class _Slice:
    """Some windows, one after the other."""

    def __init__(self, windows: Windows, first: int, last: int) -> None:
        self._windows, self._first = windows, first
        self.lengths = windows.lengths[first:last]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return self._windows[self._first + index]


def _ranges(lengths: list[int], bases: int) -> Iterator[tuple[int, int]]:
    """Cut windows into ranges of at least so many bases."""
    first, held = 0, 0
    for index, length in enumerate(lengths):
        held += length
        if held >= bases or index == len(lengths) - 1:
            yield first, index + 1
            first, held = index + 1, 0


def _keep(file: Path, found: list[Prediction]) -> None:
    logits = [item.logits if item.logits.ndim > 1 else item.logits[None] for item in found]
    arrays = {"logits": torch.cat(logits).numpy()}
    vectors = [item.embedding for item in found if item.embedding is not None]
    if vectors:
        arrays["embeddings"] = torch.stack(vectors).numpy()
    aside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    with aside.open("wb") as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]
    os.replace(aside, file)
