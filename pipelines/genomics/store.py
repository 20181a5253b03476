"""A Zarr store of sequences: one flat axis of bases, records as offsets and lengths into it.

    bases             four bases to a byte (`packing`), records beginning at whole bytes
    others/           start, length and token of the runs of letters that are not A C G T
    soft_mask         where letters stood in lower case: gaps and runs in turn, as lengths
    records/          offset, length, circular, digest, and as text: header, label (id, description;
                      label, group, split: tabs between, a line each)
    ingest_report.json, failures.csv   what was read, and what could not be

Positions are bases on the flat axis, counted from 0. The content digest depends on the records
alone: on their ids, descriptions, letters, soft mask, labels, groups and splits, in their order.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Bool, Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS, PADDING
from pipelines.genomics.packing import PER_BYTE, unpack
from pipelines.shared.errors import InputError

SCHEMA = "gigasparse-sequences/2"
CHUNK_BYTES = 1 << 20
"""Four million bases: what a read from a large store decodes at once."""
SHARD_BYTES = 1 << 24
"""64 million bases: what a sampler reads at once."""

_CACHED_CHUNKS = 256
"""Decoded chunks kept for a store too large to hold in memory: 256 MiB."""
_SHORT_RUN = 32


@dataclass(slots=True)
class LetterCounts:
    """What the letters of a file were, for the report."""

    records: int = 0
    bases: int = 0
    n: int = 0
    iupac: int = 0
    """Ambiguity codes other than N."""
    lower: int = 0
    uracil: int = 0

    def __str__(self) -> str:
        parts = [f"{self.records:,} records", f"{self.bases:,} bases"]
        noted = {"N": self.n, "IUPAC": self.iupac, "lower case": self.lower, "U": self.uracil}
        parts += [f"{count:,} {name}" for name, count in noted.items() if count]
        return ", ".join(parts)


class SequenceStore:
    """Read records, or stretches of them, from a store that `ingest` wrote.

    All is read on first use. A store of up to `memory_bytes` is then kept whole (a human genome
    takes 0.8 GB); of a larger one, decoded chunks are kept. An instance may be sent to worker
    processes: each opens the store itself.
    """

    def __init__(self, path: str | Path, *, memory_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self.memory_bytes = memory_bytes
        attributes = open_group(self.path).attrs
        self.counts = LetterCounts(**attributes["counts"])
        self.fingerprint = str(attributes["digest"])
        self._forget()

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of the records, in their order."""
        return self._headers[0]

    @cached_property
    def descriptions(self) -> tuple[str, ...]:
        """What stood behind the ids."""
        return self._headers[1]

    @cached_property
    def offsets(self) -> Int64[ndarray, "R"]:
        """Where each record begins on the flat axis: multiples of 4."""
        return self._column("records/offset")

    @cached_property
    def lengths(self) -> Int64[ndarray, "R"]:
        """How many bases each record has."""
        return self._column("records/length")

    @cached_property
    def circular(self) -> Bool[ndarray, "R"]:
        """Which records end where they begin."""
        return self._column("records/circular")

    @cached_property
    def digests(self) -> UInt8[ndarray, "R 16"]:
        """Equal for records of equal letters, read on this strand; case and U do not matter."""
        return self._column("records/digest")

    @property
    def labels(self) -> tuple[str | None, ...]:
        """Labels that stood beside the records in their table or folder."""
        return self._beside[0]

    @property
    def groups(self) -> tuple[str | None, ...]:
        """Groups that stood there."""
        return self._beside[1]

    @property
    def splits(self) -> tuple[str | None, ...]:
        """Splits that stood there."""
        return self._beside[2]

    def __len__(self) -> int:
        return self.counts.records

    def read(self, record: int, start: int = 0, end: int | None = None) -> UInt8[ndarray, "T"]:
        """Copy the tokens [start, end) of one record; all of it by default."""
        first, last = self._range(record, start, end)
        if self._num_bytes <= self.memory_bytes:
            packed = self._read_whole()[first // PER_BYTE : -(-last // PER_BYTE)]
        else:
            packed = self._read_chunks(first // PER_BYTE, -(-last // PER_BYTE))
        return self._decode(packed, first, last)

    def mask(self, record: int, start: int = 0, end: int | None = None) -> Bool[ndarray, "T"]:
        """Tell which of the letters [start, end) of one record stood in lower case."""
        first, last = self._range(record, start, end)
        mask = np.zeros(last - first, dtype=np.bool_)
        runs = self._soft_mask()
        low, high = np.searchsorted(runs[:, 1], first, "right"), np.searchsorted(runs[:, 0], last)
        for run_start, run_end in runs[low:high] - first:
            mask[max(run_start, 0) : run_end] = True
        return mask

    def read_flat(self, start: int, end: int) -> UInt8[ndarray, "T"]:
        """Read the tokens [start, end) of the flat axis at once, without keeping anything.

        Between records, up to three positions are padding. Raises ValueError outside the axis.
        """
        if not 0 <= start <= end <= self.num_positions:
            raise ValueError(f"0 <= start <= end <= {self.num_positions}; got {start=}, {end=}")
        packed = self._stored(start // PER_BYTE, -(-end // PER_BYTE))
        tokens = self._decode(packed, start, end)
        low, high = np.searchsorted(self.offsets, [start, end])
        ends = self.offsets[max(low - 1, 0) : high] + self.lengths[max(low - 1, 0) : high]
        _fill(tokens, ends - start, -ends % PER_BYTE, np.full(ends.size, PADDING, np.uint8))
        return tokens

    def read_packed(self, start: int, end: int) -> UInt8[ndarray, "P"]:
        """Read bytes of the flat axis, four bases each, for who unpacks them himself.

        The whole of a store that fits `memory_bytes` is kept; nothing of a larger one.
        """
        if self.fits_memory:
            return self._read_whole()[start:end]
        return self._stored(start, end)

    @property
    def fits_memory(self) -> bool:
        """Tell whether the store is held in memory as a whole."""
        return self._num_bytes <= self.memory_bytes

    def other_runs(self) -> tuple[Int64[ndarray, "K 2"], UInt8[ndarray, "K"]]:
        """The runs of letters other than A C G T, half-open on the flat axis, and their tokens."""
        starts, lengths, tokens = self._others
        return np.stack([starts, starts + lengths], axis=1), tokens

    def soft_runs(self) -> Int64[ndarray, "K 2"]:
        """The runs of soft-masked bases, half-open, ascending, on the flat axis."""
        return self._soft_mask()

    @property
    def num_positions(self) -> int:
        """Length of the flat axis: all bases, and what pads records to whole bytes."""
        return self._num_bytes * PER_BYTE

    def shards(self) -> list[tuple[int, int]]:
        """List the half-open ranges of the flat axis that are stored in one file each."""
        step = SHARD_BYTES * PER_BYTE
        return [
            (start, min(start + step, self.num_positions))
            for start in range(0, self.num_positions, step)
        ]

    def n_runs(self) -> Int64[ndarray, "K 2"]:
        """The runs of N, half-open, on the flat axis."""
        starts, lengths, tokens = self._others
        is_n = tokens == LETTERS.index("N") + 1
        return np.stack([starts[is_n], starts[is_n] + lengths[is_n]], axis=1)

    def label_table(self) -> pd.DataFrame:
        """Labels that came with the records, in the columns id, label, group, maybe split.

        Records without a label are left out. Raises InputError where none came.
        """
        if not any(self.labels):
            raise InputError(
                f"{self.path} holds no labels: give labels=TABLE (columns id and label)"
            )
        columns = {"id": self.ids, "label": self.labels, "split": self.splits}
        table = pd.DataFrame({name: list(column) for name, column in columns.items()}, dtype=object)
        groups = [group or name for group, name in zip(self.groups, self.ids, strict=True)]
        table.insert(2, "group", groups)
        if not any(self.splits):
            table = table.drop(columns="split")
        return table[table["label"].notna()].reset_index(drop=True).fillna("")

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        state |= {"_bases": None, "_whole": None, "_masked": None, "_chunks": OrderedDict()}
        return state

    def _column(self, name: str) -> ndarray:
        with _naming_damage(self.path):
            return np.asarray(open_group(self.path)[name][:])

    @cached_property
    def _headers(self) -> tuple[tuple[str, ...], ...]:
        return tuple(zip(*_read_text(self._column("records/header"), 2), strict=True))

    @cached_property
    def _beside(self) -> tuple[tuple[str | None, ...], ...]:
        rows = _read_text(self._column("records/label"), 3) or [("", "", "")] * len(self)
        return tuple(tuple(value or None for value in column) for column in zip(*rows, strict=True))

    @cached_property
    def _others(self) -> tuple[Int64[ndarray, "K"], Int64[ndarray, "K"], UInt8[ndarray, "K"]]:
        names = ("start", "length", "token")
        start, length, token = (self._column(f"others/{name}") for name in names)
        return start, length, token

    @cached_property
    def _num_bytes(self) -> int:
        with _naming_damage(self.path):
            return int(self._array().shape[0])

    def _forget(self) -> None:
        self._bases: zarr.Array | None = None
        self._whole: ndarray | None = None
        self._masked: ndarray | None = None
        self._chunks: OrderedDict[int, ndarray] = OrderedDict()

    def _range(self, record: int, start: int, end: int | None) -> tuple[int, int]:
        length = int(self.lengths[record])
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise ValueError(f"0 <= start <= end <= {length} must hold; got {start=}, {end=}")
        offset = int(self.offsets[record])
        return offset + start, offset + end

    def _decode(self, packed: UInt8[ndarray, "P"], first: int, last: int) -> UInt8[ndarray, "T"]:
        lead = first % PER_BYTE
        tokens = unpack(packed)[lead : lead + last - first]
        starts, lengths, others = self._others
        if starts.size:
            low = int(np.searchsorted(starts, first, "right"))
            low -= int(low > 0 and starts[low - 1] + lengths[low - 1] > first)
            high = int(np.searchsorted(starts, last))
            _fill(tokens, starts[low:high] - first, lengths[low:high], others[low:high])
        return tokens

    def _soft_mask(self) -> Int64[ndarray, "K 2"]:
        if self._masked is None:
            self._masked = np.cumsum(self._column("soft_mask")).reshape(-1, 2)
        return self._masked

    def _read_whole(self) -> UInt8[ndarray, "P"]:
        if self._whole is None:
            self._whole = self._stored(0, self._num_bytes)
        return self._whole

    def _read_chunks(self, start: int, end: int) -> UInt8[ndarray, "P"]:
        packed = np.empty(end - start, dtype=np.uint8)
        for number in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            first = number * CHUNK_BYTES
            low, high = max(start, first), min(end, first + CHUNK_BYTES)
            packed[low - start : high - start] = self._chunk(number)[low - first : high - first]
        return packed

    def _chunk(self, number: int) -> UInt8[ndarray, "M"]:
        if number not in self._chunks:
            first = number * CHUNK_BYTES
            self._chunks[number] = self._stored(first, first + CHUNK_BYTES)
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(number)
        return self._chunks[number]

    def _stored(self, start: int, end: int) -> UInt8[ndarray, "P"]:
        with _naming_damage(self.path):
            return np.asarray(self._array()[start:end])

    def _array(self) -> zarr.Array:
        if self._bases is None:
            bases = open_group(self.path)["bases"]
            for number in range(-(-bases.shape[0] // bases.shards[0])):
                shard = self.path / "bases" / "c" / str(number)
                if not shard.exists():  # Zarr would read zeros, which are A
                    raise InputError(f"{self.path} is damaged ({shard} is missing); {_AGAIN}")
            self._bases = bases
        return self._bases


_AGAIN = "remove it and ingest again"


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); {_AGAIN}") from error


def open_group(path: Path) -> zarr.Group:
    """Open a store's group; raises InputError for what is no sequence store of this version."""
    schema = read_schema(path)
    if schema is None:
        raise InputError(f"{path} is no sequence store; make one with the verb ingest")
    if schema != SCHEMA:
        raise InputError(f"{path} is a store of another version ({schema}); ingest it again")
    return zarr.open_group(path, mode="r")


def read_schema(path: Path) -> str | None:
    """Name the schema of a store of any version; None for what is no store."""
    try:
        schema = zarr.open_group(path, mode="r").attrs.get("schema")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    is_ours = isinstance(schema, str) and schema.startswith(SCHEMA.split("/")[0])
    return schema if is_ours else None


def _read_text(text: UInt8[ndarray, "B"], num_columns: int) -> list[tuple[str, ...]]:
    lines = text.tobytes().decode("utf-8").split("\n")[:-1]
    return [tuple(line.split("\t", num_columns - 1)) for line in lines]


def _fill(
    tokens: UInt8[ndarray, "T"],
    starts: Int64[ndarray, "K"],
    lengths: Int64[ndarray, "K"],
    values: UInt8[ndarray, "K"],
) -> None:
    """Write runs over tokens; parts of them that lie outside are left out."""
    ends = np.minimum(starts + lengths, tokens.size)
    starts = np.maximum(starts, 0)
    lengths = np.maximum(ends - starts, 0)
    long = lengths > _SHORT_RUN
    for start, end, value in zip(starts[long], ends[long], values[long], strict=True):
        tokens[start:end] = value
    lengths = np.where(long, 0, lengths)
    before = np.cumsum(lengths) - lengths
    steps = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
    tokens[np.repeat(starts, lengths) + steps] = np.repeat(values, lengths)
