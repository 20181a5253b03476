"""Loaders that know which batch comes next, so that a run goes on in the middle of an epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader

from pipelines.shared.batch import Example, Examples, PackedBatch, TokenBudgetBatches

Packs = tuple[PackedBatch, ...]


class BatchStream(Protocol):
    """The batches of one epoch, for one rank."""

    def __len__(self) -> int:
        """Count all of them."""

    def loader(self, num_workers: int) -> Iterable[Packs]:
        """Make a loader with `state_dict` and `load_state_dict`, which carry its position."""


@runtime_checkable
class MakesBatches(Protocol):
    """Data that pack their own batches, in an order that depends on their seed and the epoch."""

    def batches(
        self,
        *,
        epoch: int,
        max_tokens: int,
        max_sequences: int | None,
        weights: Sequence[float] | None,
        rank: int,
        num_ranks: int,
    ) -> BatchStream:
        """Make an epoch's batches; with `weights`, windows are drawn in their proportion."""


class ExampleLoader(DataLoader[Example]):
    """Read examples, put them together, and count the batches that were taken."""

    def __init__(
        self,
        examples: Examples,
        batches: TokenBudgetBatches,
        *,
        collate: Callable[[list[Example]], Packs],
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(
            cast(Any, examples),
            batch_sampler=batches,
            collate_fn=cast(Any, collate),
            num_workers=num_workers,
            # its own: the loader's draws must not move the stream that dropout draws from
            generator=torch.Generator().manual_seed(seed),
        )
        self._batches = batches
        self._taken = 0

    def __iter__(self) -> Iterator[Packs]:  # type: ignore[override]
        self._batches.skip(self._taken)
        for packs in super().__iter__():
            self._taken += 1
            yield cast(Packs, packs)

    def state_dict(self) -> dict[str, int]:
        """Return the position: how many batches were taken."""
        return {"batch": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many batches."""
        self._taken = state["batch"]
