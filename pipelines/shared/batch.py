"""Examples, their packing into one batch without padding, and batches by token budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, overload

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.utils.data import Sampler

Target = int | float | tuple[float, ...]
"""A class, a number, or several: which labels are there (1 or 0); or a time and whether the event
was seen then (1) or not by then (0)."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence of tokens, with the coordinates that patterns speak of.

    `inputs` are features or token numbers, `target` is one of the sequence, or numbers of each
    token; `group` is what must stay in one split (a patient), `record` the row of the table that
    the sequence comes from (a slide, a DNA record).
    """

    inputs: Shaped[Tensor, "T ..."]
    coords: Int64[Tensor, "T P"]
    target: Target | Float[Tensor, "T K"] | None
    id: str
    group: str
    record: int


class Examples(Protocol):
    """A map-style data set that knows the length of every example without reading it."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class ExampleList(Sequence[Example]):
    """Hold examples in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)
        self.lengths = [len(example.inputs) for example in self._examples]
        self.targets = [example.target for example in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "ExampleList": ...

    def __getitem__(self, index: int | slice) -> "Example | ExampleList":
        if isinstance(index, slice):
            return ExampleList(self._examples[index])
        return self._examples[index]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Sequences laid end to end; `lengths` says where each one stops.

    `targets` are int64 classes, float32 numbers, or float32 rows of several, of each sequence; or
    rows of numbers of each token.
    """

    inputs: Shaped[Tensor, "T ..."]
    coords: Int64[Tensor, "T P"]
    lengths: Int64[Tensor, " S"]
    targets: Shaped[Tensor, "S ..."] | Float[Tensor, "T K"] | None
    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Move inputs, coordinates and targets; layouts need `lengths` on the host."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            coords=self.coords.to(device),
            targets=None if self.targets is None else self.targets.to(device),
        )


def pack(examples: list[Example]) -> PackedBatch:
    """Concatenate examples along the token axis.

    Raises ValueError for no examples, an example without tokens, or targets on some only.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    for example in examples:
        if len(example.inputs) == 0 or len(example.inputs) != len(example.coords):
            raise ValueError(
                f"an example needs tokens, each with coordinates; {example.id!r} has "
                f"{len(example.inputs)} tokens and {len(example.coords)} coordinates"
            )
    targets = [example.target for example in examples if example.target is not None]
    if targets and len(targets) != len(examples):
        raise ValueError(f"{len(examples) - len(targets)} of {len(examples)} targets are missing")
    return PackedBatch(
        inputs=torch.cat([example.inputs for example in examples]),
        coords=torch.cat([example.coords for example in examples]),
        lengths=torch.tensor([len(example.inputs) for example in examples]),
        targets=_join_targets(targets) if targets else None,
        ids=tuple(example.id for example in examples),
    )


def _join_targets(targets: Sequence[Target | Tensor]) -> Tensor:
    """Put targets of sequences into one tensor; those of tokens end to end."""
    tokens = [target for target in targets if isinstance(target, Tensor)]
    return torch.cat(tokens) if tokens else torch.tensor(targets)


def pack_within(examples: list[Example], max_tokens: int) -> tuple[PackedBatch, ...]:
    """Pack examples, in their order, into as many batches as a number of tokens asks for."""
    lengths = [len(example.inputs) for example in examples]
    parts = _fill(list(range(len(examples))), lengths, max_tokens, len(examples))
    return tuple(pack([examples[index] for index in part]) for part in parts)


class TokenBudgetBatches(Sampler[list[int]]):
    """Fill batches up to a number of tokens; every example comes exactly once per epoch.

    `max_sequences` bounds the examples of a batch as well. Examples come in order, or shuffled by
    `seed` and epoch. One that is longer than the budget is a batch of its own. With `num_ranks` > 1
    each rank gets every num_ranks-th batch and the first batches come again at the end, so that all
    ranks take the same number of steps.

    With `weights` an epoch draws as many examples as there are, each in proportion to its weight,
    so that some come several times. `suffices` says of the examples of a batch whether a loss can
    be computed of them; batches are joined until it can, above any other bound, and what is left
    at the end joins the last one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        max_sequences: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        weights: Sequence[float] | None = None,
        suffices: Callable[[list[int]], bool] | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in [0, num_ranks); got {rank=}, {num_ranks=}")
        self._lengths = list(lengths)
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences or len(self._lengths)
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._suffices = suffices
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order (without shuffling all epochs are equal)."""
        order = list(range(len(self._lengths)))
        if self._shuffle:
            order = self._shuffled(torch.Generator().manual_seed((self._seed << 20) + epoch))
        batches = _fill(order, self._lengths, self._max_tokens, self._max_sequences)
        if self._suffices is not None:
            batches = _join(batches, self._suffices)
        missing = -len(batches) % self._num_ranks
        batches += [batches[index % len(batches)] for index in range(missing)]
        self._batches = batches[self._rank :: self._num_ranks]
        self._skipped = 0

    def skip(self, count: int) -> None:
        """Leave out the first batches of the epoch, which were taken before; they still count."""
        self._skipped = count

    def _shuffled(self, generator: torch.Generator) -> list[int]:
        count = len(self._lengths)
        if self._weights is None:
            return torch.randperm(count, generator=generator).tolist()
        drawn = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        return drawn.tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches[self._skipped :])

    def __len__(self) -> int:
        return len(self._batches)


def _fill(
    order: list[int], lengths: list[int], max_tokens: int, max_sequences: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or lengths[index] > room or len(batches[-1]) == max_sequences:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _join(batches: list[list[int]], suffices: Callable[[list[int]], bool]) -> list[list[int]]:
    joined: list[list[int]] = [[]]
    for batch in batches:
        if suffices(joined[-1]):
            joined.append([])
        joined[-1] += batch
    if len(joined) > 1 and not suffices(joined[-1]):
        rest = joined.pop()
        joined[-1] += rest
    return joined
