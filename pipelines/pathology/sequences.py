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

    With `ahead` the next case is read while one is computed, so that two are held in memory;
    without, a case is asked for when the one before it is done. `encoder` (its name or fingerprint)
    says whose features, where slides have those of several.
    """
    network.to(device).eval()
    reads = (
        _read_ahead(cases, store, by_patient, encoder)
        if ahead
        else (_read(case, store, by_patient, encoder) for case in cases)
    )
    for read in reads:
        if isinstance(read, Failure):
            yield read
            continue
        examples = ExampleList([read.example])
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
            reason = f"{sum(read.lengths):,} tiles do not fit the memory ({_first_line(error)})"
            remedy = "use a GPU with more memory, precision=bf16-mixed, or device=cpu"
            yield Failure(read.case[0], str(store), "memory", reason, remedy)
            continue
        yield Predicted(read.case[0], read.case[1], read.lengths, made[0])


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
