"""Cases to predictions, one group after another, while the next one is read."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipelines.pathology.data import SlideDataset
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.shared.batch import Example, ExampleList
from pipelines.shared.errors import InputError
from pipelines.shared.inference import Prediction, predict
from pipelines.shared.tables import Failure

Case = tuple[str, tuple[str, ...]]
"""Its name, and the ids of its slides."""


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What a network says of a case; tiles are those of its slides, one after another."""

    name: str
    slides: tuple[str, ...]
    lengths: tuple[int, ...]
    prediction: Prediction

    def of_slides(self, values: np.ndarray) -> list[np.ndarray]:
        """Cut values of the case's tiles [T, ...] into those of its slides."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True, slots=True)
class _Read:
    case: Case
    lengths: tuple[int, ...]
    example: Example


def predict_cases(
    network: nn.Module,
    cases: Iterable[Case],
    store: Path,
    *,
    by_patient: bool,
    ahead: bool,
    explain: bool,
    max_tokens: int,
    encoder: str | None = None,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> Iterator[Predicted | Failure]:
    """Yield the result of each case, in their order; one that fails is yielded as a failure.

    `explain` adds the tiles' contributions, for the time and memory of a training step.

    With `ahead`, for cases whose features are there, the next one is read while one is computed,
    and without `explain` those that come to no more than `max_tokens` tiles together are computed
    together. Without `ahead` a case is asked for when the one before it is done. `encoder` (its
    name or fingerprint) says whose features, where slides have those of several.
    """
    network.to(device).eval()
    reads = (
        _read_ahead(cases, store, by_patient, encoder)
        if ahead
        else (_read(case, store, by_patient, encoder) for case in cases)
    )

    def compute(group: Sequence[_Read]) -> list[Predicted] | Failure:
        examples = ExampleList([read.example for read in group])
        try:
            made = list(
                predict(
                    network,
                    examples,
                    max_tokens=max_tokens,
                    device=device,
                    explain=explain,
                    autocast=autocast,
                )
            )
        except torch.OutOfMemoryError as error:
            return _too_large(group[0], store, error)
        pairs = zip(group, made, strict=True)
        return [Predicted(*read.case, read.lengths, found) for read, found in pairs]

    for group in _group(reads, max_tokens if ahead and not explain else 0):
        found = group if isinstance(group, Failure) else compute(group)
        if isinstance(found, list):
            yield from found
        elif isinstance(group, Failure) or len(group) == 1:
            yield found
        else:
            for read in group:
                alone = compute([read])
                yield alone if isinstance(alone, Failure) else alone[0]


def _group(reads: Iterable[_Read | Failure], max_tokens: int) -> Iterator[list[_Read] | Failure]:
    """Put together what follows each other and has at most `max_tokens` tiles in all."""
    group: list[_Read] = []
    size = 0
    for read in reads:
        tiles = 0 if isinstance(read, Failure) else sum(read.lengths)
        if group and (isinstance(read, Failure) or size + tiles > max_tokens):
            yield group
            group, size = [], 0
        if isinstance(read, Failure):
            yield read
        elif tiles >= max_tokens:
            yield [read]
        else:
            group.append(read)
            size += tiles
    if group:
        yield group


def _too_large(read: _Read, store: Path, error: torch.OutOfMemoryError) -> Failure:
    reason = f"{sum(read.lengths):,} tiles do not fit the memory ({_first_line(error)})"
    remedy = "use a GPU with more memory, precision=bf16-mixed, or device=cpu"
    return Failure(read.case[0], str(store), "memory", reason, remedy)


def _read_ahead(
    cases: Iterable[Case], store: Path, by_patient: bool, encoder: str | None
) -> Iterator[_Read | Failure]:
    """Read each case in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[_Read | Failure] | None = None
        for case in cases:
            coming = thread.submit(_read, case, store, by_patient, encoder)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _read(case: Case, store: Path, by_patient: bool, encoder: str | None) -> _Read | Failure:
    name, slides = case
    cases: Sequence[tuple[str, ...]] | Sequence[str] = [slides] if by_patient else [slides[0]]
    try:
        data = SlideDataset(store, cases, memory_bytes=0, encoder=encoder)
        lengths = tuple(len(read_slide(slide_folder(store, slide))) for slide in slides)
        return _Read(case, lengths, data[0])
    except (InputError, OSError, ValueError) as error:
        remedy = "delete its stored features and make them again"
        return Failure(name, str(store), "damaged", str(error), remedy)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
