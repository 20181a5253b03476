"""Batches for training: whole shards read ahead into memory, windows cut from there.

Shards stay packed, four bases to a byte, until their windows are cut: what is moved most is memory.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipelines.genomics.cutting import Stretches, mark, paint, unpack_windows
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.packing import PER_BYTE
from pipelines.shared.batch import PackedBatch

MIX_SHARDS = 4
"""Shards whose windows come mixed: so many are in memory, and one more is read ahead."""

_PREFETCH = 2
_RING = _PREFETCH + 1
"""Places that a worker hands batches over in, used in turn: fresh shared memory costs more than all
else. A worker is asked for one batch for each that was taken, so that at most `_PREFETCH` are under
way and the place of the one being taken is never written."""


@dataclass(frozen=True, slots=True, eq=False)
class WindowBatch:
    """Windows laid end to end, as a worker hands them over: one byte a base (two with the mask).

    Positions would be eight more; `to` counts them where they are needed, on the device.
    """

    inputs: UInt8[Tensor, " T"] | Int64[Tensor, " T"]
    """Bases, or the ids of a tokenizer."""
    lengths: Int64[Tensor, " S"]
    targets: Shaped[Tensor, "S ..."] | None
    ids: tuple[str, ...]
    windows: Int64[Tensor, " S"]
    """Which windows of the data set these are."""
    flipped: Bool[Tensor, " S"]
    """Which of them are read from the other strand."""
    soft_mask: Bool[Tensor, " T"] | None
    """Which bases are soft-masked repeats, where that was asked for."""
    positions: Int64[Tensor, " T"] | None = None
    """Coordinates; None: each window's bases are counted from 0."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move to a device and count the positions there."""
        lengths = self.lengths.to(device)
        positions = self.positions
        if positions is None:
            first = lengths.cumsum(0) - lengths
            total = self.inputs.shape[0]
            positions = torch.arange(total, device=lengths.device)
            positions -= first.repeat_interleave(lengths, output_size=total)
        return PackedBatch(
            inputs=self.inputs.to(device),
            coords=positions.to(device)[:, None],
            lengths=self.lengths,
            targets=None if self.targets is None else self.targets.to(device),
            ids=self.ids,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Parcel:
    """A batch on its way from a worker: small columns, and where its bases lie in shared memory."""

    inputs: UInt8[ndarray, " T"] | Int64[ndarray, " T"] | None
    """None: they are in the ring."""
    place: tuple[int, int]
    """Worker, and place in its ring."""
    lengths: Int64[ndarray, " S"]
    targets: Shaped[ndarray, "S ..."] | None
    ids: tuple[str, ...]
    windows: Int64[ndarray, " S"]
    flipped: Bool[ndarray, " S"]
    positions: Int64[ndarray, " T"] | None


class Position(TypedDict):
    """Where a sampler stands: the epoch, and how many batches of it each rank has taken."""

    epoch: int
    batch: int


class ShardSampler(IterableDataset[_Parcel]):
    """One epoch's batches of a data set's windows, every window once.

    With `weights`, as many windows are drawn as there are, each in proportion to its weight.

    A store that fits its `memory_bytes` is one shard, and its windows come in any order. Of a
    larger one, shards come in random order, the windows of each spread over the time of
    `mix_shards` of them; so many shards are in memory, and a thread reads the next one meanwhile.
    A batch holds at most `max_tokens` bases and `max_sequences` windows; a longer window comes
    alone. Batches depend on (seed, epoch) alone: not on the number of worker processes, and ranks
    take turns (the first batches come again at the end, so that all take equally many). Each worker
    reads every shard and hands over its share.

    Iterate over `loader()`, which runs the workers and counts what it hands over: `state_dict` and
    `load_state_dict` carry that position.
    """

    def __init__(
        self,
        windows: WindowDataset,
        *,
        epoch: int = 0,
        max_tokens: int,
        max_sequences: int | None = None,
        weights: Sequence[float] | None = None,
        soft_mask: bool = False,
        mix_shards: int = MIX_SHARDS,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in [0, num_ranks); got {rank=}, {num_ranks=}")
        if soft_mask and windows.tokenizer is not None:
            raise ValueError("the soft mask is one of bases; a tokenizer's tokens have none")
        self.windows = windows
        self.soft_mask = soft_mask
        self._max_tokens, self._max_sequences = max_tokens, max_sequences
        self._weights = weights
        self._mix_shards = mix_shards
        self._rank, self._num_ranks = rank, num_ranks
        self._epoch = epoch
        self._batch = 0
        self._ring: UInt8[Tensor, "K R T"] | None = None

    def __len__(self) -> int:
        """Count all batches that this rank takes in the epoch, wherever it stands."""
        return -(-self._plan.num_batches // self._num_ranks)

    def state_dict(self) -> Position:
        """Return the position."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: Position) -> None:
        """Go on from a position; raises ValueError for one of another epoch."""
        if state["epoch"] != self._epoch:
            raise ValueError(f"this is epoch {self._epoch}; the position is of {state['epoch']}")
        self._batch = state["batch"]

    def loader(self, num_workers: int = 0) -> "WindowLoader":
        """Make the loader that cuts the batches, in so many processes (0: in this one)."""
        return WindowLoader(self, num_workers)

    def __iter__(self) -> Iterator[_Parcel]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        plan = self._plan
        self.windows.set_epoch(self._epoch)
        turns = range(self._batch + first, len(self), step)
        numbers = [(self._rank + turn * self._num_ranks) % plan.num_batches for turn in turns]
        with _Buffer(self.windows, plan, numbers, soft_mask=self.soft_mask) as buffer:
            for count, number in enumerate(numbers):
                place = (first, count % _RING)
                yield buffer.cut(plan.batch(number), place, self._out(place))

    def prepare(self, num_workers: int) -> None:
        """Lay out the memory that workers hand batches over in."""
        size = self._plan.most_bases * (2 if self.soft_mask else 1)
        shape = (max(num_workers, 1), _RING, size)
        self._ring = torch.empty(shape, dtype=torch.uint8)
        if num_workers:
            self._ring.share_memory_()

    def receive(self, parcel: _Parcel) -> WindowBatch:
        """Take a batch out of the ring, whose place is used again, and count it."""
        self._batch += 1
        mask = None
        if parcel.inputs is not None:
            inputs = torch.from_numpy(parcel.inputs)
        else:
            total = int(parcel.lengths.sum())
            ring = self._out(parcel.place)
            inputs = torch.from_numpy(ring[:total].copy())
            if self.soft_mask:
                mask = torch.from_numpy(ring[total : 2 * total].copy()).view(torch.bool)
        return WindowBatch(
            inputs=inputs,
            lengths=torch.from_numpy(parcel.lengths),
            targets=None if parcel.targets is None else torch.from_numpy(parcel.targets),
            ids=parcel.ids,
            windows=torch.from_numpy(parcel.windows),
            flipped=torch.from_numpy(parcel.flipped),
            soft_mask=mask,
            positions=None if parcel.positions is None else torch.from_numpy(parcel.positions),
        )

    def _out(self, place: tuple[int, int]) -> UInt8[ndarray, " T"]:
        assert self._ring is not None, "a loader has prepared the ring"
        return self._ring[place].numpy()

    @cached_property
    def _plan(self) -> "_Plan":
        return _Plan.draw(
            self.windows,
            epoch=self._epoch,
            weights=self._weights,
            max_tokens=self._max_tokens,
            max_sequences=self._max_sequences,
            mix_shards=self._mix_shards,
        )


class WindowLoader(DataLoader[_Parcel]):
    """Hand over a sampler's batches, each as one pack, and know which one comes next."""

    def __init__(self, sampler: ShardSampler, num_workers: int) -> None:
        super().__init__(
            sampler,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=_PREFETCH if num_workers else None,
            # its own: the loader's draws must not move the stream that dropout draws from
            generator=torch.Generator(),
        )
        self.sampler_of_windows = sampler

    def __iter__(self) -> Iterator[tuple[WindowBatch]]:  # type: ignore[override]
        self.sampler_of_windows.prepare(self.num_workers)
        for parcel in super().__iter__():
            # copied before the worker is asked for another: see _RING
            yield (self.sampler_of_windows.receive(parcel),)

    def __len__(self) -> int:
        return len(self.sampler_of_windows)

    def state_dict(self) -> Position:
        """Return the position: the next batch."""
        return self.sampler_of_windows.state_dict()

    def load_state_dict(self, state: Position) -> None:
        """Go on from a position."""
        self.sampler_of_windows.load_state_dict(state)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """The order of an epoch: which windows each batch holds, and what of the store they need."""

    order: Int64[ndarray, "W"]
    bounds: Int64[ndarray, "N+1"]
    """Batch i holds the windows order[bounds[i]:bounds[i + 1]]."""
    shard: Int64[ndarray, "W"]
    """Which shard each window begins in (numbered among those that are needed)."""
    first: Int64[ndarray, "W"]
    """Where each window begins on the flat axis."""
    spans: Int64[ndarray, "K 2"]
    """The bases of each shard's windows: to be read at once."""

    most_bases: int
    """Of any batch."""

    @property
    def num_batches(self) -> int:
        return self.bounds.size - 1

    def batch(self, number: int) -> Int64[ndarray, "S"]:
        return self.order[self.bounds[number] : self.bounds[number + 1]]

    @classmethod
    def draw(
        cls,
        windows: WindowDataset,
        *,
        epoch: int,
        weights: Sequence[float] | None,
        max_tokens: int,
        max_sequences: int | None,
        mix_shards: int,
    ) -> "_Plan":
        store = windows.store
        first = store.offsets[windows.records] + windows.starts
        end = store.offsets[windows.records] + windows.ends
        shard = np.zeros(first.size, dtype=np.int64)
        if not store.fits_memory:
            begins = np.array([begin for begin, _ in store.shards()])
            place = np.searchsorted(begins, first, side="right") - 1
            shard = np.unique(place, return_inverse=True)[1]
        num_shards = int(shard.max()) + 1
        spans = np.stack(
            [np.full(num_shards, np.iinfo(np.int64).max), np.zeros(num_shards, np.int64)], axis=1
        )
        np.minimum.at(spans[:, 0], shard, first)
        np.maximum.at(spans[:, 1], shard, end)
        generator = np.random.default_rng((windows.seed, epoch, 1))
        turn = generator.permutation(num_shards)
        drawn = np.arange(first.size)
        if weights is not None:
            shares = np.asarray(weights, dtype=np.float64)
            drawn = generator.choice(first.size, first.size, p=shares / shares.sum())
        # A window's time: its shard's turn, and anywhere within the turns of the shards after it.
        time = turn[shard[drawn]] + mix_shards * generator.random(drawn.size)
        order = drawn[np.argsort(time, kind="stable")]
        lengths = (end - first)[order]
        bounds = fill_batches(lengths, max_tokens, max_sequences)
        most_bases = int(np.add.reduceat(lengths, bounds[:-1]).max())
        return cls(order, bounds, shard, first, spans, most_bases)


def fill_batches(
    lengths: Int64[ndarray, "W"], max_tokens: int, max_sequences: int | None = None
) -> Int64[ndarray, "N+1"]:
    """Lay bounds between windows in order, so that each batch is as full as it may be."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    most = lengths.size if max_sequences is None else max_sequences
    bounds = [0]
    while bounds[-1] < lengths.size:
        start = bounds[-1]
        end = int(np.searchsorted(total, total[start] + max_tokens, side="right")) - 1
        bounds.append(max(start + 1, min(end, start + most)))
    return np.array(bounds)


class _Buffer:
    """The shards in memory, in one arena of as many places as are ever in use together."""

    def __init__(
        self, windows: WindowDataset, plan: _Plan, numbers: list[int], *, soft_mask: bool
    ) -> None:
        self._windows, self._plan = windows, plan
        store = windows.store
        self._flips = windows.flips()
        self._ids = np.array(store.ids, dtype=object)
        self._others, self._letters = store.other_runs()
        self._masked = store.soft_runs() if soft_mask else None
        self._visits = _visits(plan, numbers)
        self._bytes = np.stack(
            [plan.spans[:, 0] // PER_BYTE, -(-plan.spans[:, 1] // PER_BYTE)], axis=1
        )
        self._place = np.full(len(plan.spans), -1)
        self._ahead: dict[int, Future[None]] = {}
        self._done = 0
        self._asked = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shard-reader")
        if len(plan.spans) == 1:  # in memory already, or soon: no copy is needed
            self._arena = store.read_packed(*self._bytes[0].tolist())[None]
            self._place[0] = 0
            self._asked = 1
            self._free: list[int] = []
        else:
            places = _count_places(self._visits)
            size = int((self._bytes[:, 1] - self._bytes[:, 0]).max(initial=0))
            self._arena = np.empty((places, size), dtype=np.uint8)
            self._free = list(range(places))

    def __enter__(self) -> "_Buffer":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def cut(
        self, chosen: Int64[ndarray, "S"], place: tuple[int, int], out: UInt8[ndarray, " T"]
    ) -> _Parcel:
        """Cut a batch's windows; wait for shards that are not there yet, ask for the next one."""
        self._fetch(chosen)
        plan, windows = self._plan, self._windows
        shard = plan.shard[chosen]
        place_first = self._place[shard] * self._arena.shape[1] - self._bytes[shard, 0]
        first = plan.first[chosen]
        stretches = Stretches(
            first, windows.ends[chosen] - windows.starts[chosen], self._flips[chosen]
        )
        total = int(stretches.lengths.sum())
        bases = out[:total]
        unpack_windows(self._arena.ravel(), first + place_first * PER_BYTE, stretches, bases)
        paint(bases, stretches, self._others, self._letters)
        if self._masked is not None:
            mark(out[total : 2 * total], stretches, self._masked)
        self._done += 1
        self._release()
        inputs, counts, positions = self._tokenise(chosen, bases, stretches.lengths)
        return _Parcel(
            inputs=inputs,
            place=place,
            lengths=counts,
            targets=None if windows.targets is None else windows.targets[chosen],
            ids=tuple(self._ids[windows.records[chosen]]),
            windows=chosen,
            flipped=stretches.flipped,
            positions=positions,
        )

    def _tokenise(
        self,
        chosen: Int64[ndarray, "S"],
        bases: UInt8[ndarray, " T"],
        lengths: Int64[ndarray, "S"],
    ) -> tuple[Int64[ndarray, " L"] | None, Int64[ndarray, "S"], Int64[ndarray, " L"] | None]:
        """Turn bases into a tokenizer's ids, and coordinates into an order other than theirs."""
        windows = self._windows
        if windows.tokenizer is None and not windows.shuffle_positions:
            return None, lengths, None
        parts = np.split(bases, np.cumsum(lengths)[:-1])
        order = [windows.coords(int(w), part.size) for w, part in zip(chosen, parts, strict=True)]
        if windows.tokenizer is None:
            return None, lengths, np.concatenate(order)
        tokens = [windows.tokenizer.encode(part) for part in parts]
        coords = [places[found.starts] for places, found in zip(order, tokens, strict=True)]
        ids = np.concatenate([found.ids for found in tokens])
        return ids, np.array([len(found) for found in tokens]), np.concatenate(coords)

    def _fetch(self, chosen: Int64[ndarray, "S"]) -> None:
        needed = np.unique(self._plan.shard[chosen])
        last = max((self._turn(int(shard)) for shard in needed), default=-1)
        while self._asked <= min(last + 1, len(self._visits.shards) - 1) and self._free:
            self._ask()
        for shard in needed:
            if (reading := self._ahead.pop(int(shard), None)) is not None:
                reading.result()

    def _ask(self) -> None:
        """Have the next shard read in the background."""
        shard = int(self._visits.shards[self._asked])
        self._place[shard] = self._free.pop()
        self._ahead[shard] = self._reader.submit(self._read, shard)
        self._asked += 1

    def _read(self, shard: int) -> None:
        start, end = self._bytes[shard].tolist()
        packed = self._windows.store.read_packed(start, end)
        self._arena[self._place[shard], : end - start] = packed

    def _release(self) -> None:
        """Give up the places of shards that no later batch needs; ask ahead for the next."""
        for shard in self._visits.leaving.get(self._done - 1, ()):
            self._free.append(int(self._place[shard]))
        if self._free and self._asked < len(self._visits.shards) and not self._ahead:
            self._ask()

    def _turn(self, shard: int) -> int:
        return self._visits.turn[shard]


@dataclass(frozen=True, slots=True)
class _Visits:
    """When a worker's batches need which shards; batches are counted from 0."""

    shards: list[int]
    """In the order in which they are needed first."""
    turn: dict[int, int]
    """Their places in that order."""
    arriving: list[int]
    """The batch that needs each first."""
    leaving: dict[int, list[int]]
    """After which batch which shards are needed no more."""


def _visits(plan: _Plan, numbers: list[int]) -> _Visits:
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for count, number in enumerate(numbers):
        for shard in np.unique(plan.shard[plan.batch(number)]).tolist():
            first.setdefault(shard, count)
            last[shard] = count
    shards = list(first)
    leaving: dict[int, list[int]] = {}
    for shard, count in last.items():
        leaving.setdefault(count, []).append(shard)
    turn = {shard: place for place, shard in enumerate(shards)}
    return _Visits(shards, turn, list(first.values()), leaving)


def _count_places(visits: _Visits) -> int:
    """Count the shards that are ever needed together, and one to read ahead."""
    num_batches = max(visits.leaving, default=-1) + 1
    change = np.zeros(num_batches + 1, dtype=np.int64)
    np.add.at(change, visits.arriving, 1)
    for count, shards in visits.leaving.items():
        change[count + 1] -= len(shards)
    most = int(np.cumsum(change).max(initial=0))
    return min(len(visits.shards), most + 1)
