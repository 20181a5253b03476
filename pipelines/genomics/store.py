"""A Zarr store of sequences: one flat axis of bases, records as offsets and lengths into it."""

import hashlib
import os
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Int64, UInt8
from numpy import ndarray
from tqdm import tqdm

from pipelines.genomics.alphabet import LETTERS, NUM_BASES
from pipelines.genomics.genome import Record, read_fasta
from pipelines.shared.errors import InputError

SCHEMA = "gigasparse-sequences/1"

_CHUNK_BASES = 1 << 20
_SHARD_BASES = 64 << 20
_CACHED_CHUNKS = 256
"""Decoded chunks kept for a store too large to hold in memory: 256 MiB."""


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

    def add(self, record: Record) -> None:
        """Count one more record."""
        self.records += 1
        self.bases += record.tokens.size
        self.n += int(np.count_nonzero(record.tokens == NUM_BASES + 1))
        self.iupac += int(np.count_nonzero(record.tokens > NUM_BASES + 1))
        self.lower += record.lower
        self.uracil += record.uracil

    def __str__(self) -> str:
        parts = [f"{self.records:,} records", f"{self.bases:,} bases"]
        noted = {"N": self.n, "IUPAC": self.iupac, "lower case": self.lower, "U": self.uracil}
        parts += [f"{count:,} {name}" for name, count in noted.items() if count]
        return ", ".join(parts)


class SequenceStore:
    """Read records, or stretches of them, from a store that `ingest` wrote.

    A store of up to `memory_bytes` is read once, whole, on first use; of a larger one, decoded
    chunks are kept. An instance may be sent to worker processes: each opens the store itself.
    """

    offsets: Int64[ndarray, "R"]
    lengths: Int64[ndarray, "R"]
    ids: tuple[str, ...]
    descriptions: tuple[str, ...]

    def __init__(self, path: str | Path, *, memory_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self.memory_bytes = memory_bytes
        group = _open_group(self.path)
        self.counts = LetterCounts(**group.attrs["counts"])
        self.fingerprint = str(group.attrs["source"]["sha256"])
        self.offsets = group["records/offset"][:]
        self.lengths = group["records/length"][:]
        headers = group["records/header"][:].tobytes().decode("utf-8").split("\n")[:-1]
        names = [header.split("\t", 1) for header in headers]
        self.ids = tuple(name for name, _ in names)
        self.descriptions = tuple(description for _, description in names)
        self._bases: zarr.Array | None = None
        self._whole: ndarray | None = None
        self._chunks: OrderedDict[int, ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, record: int, start: int = 0, end: int | None = None) -> UInt8[ndarray, "T"]:
        """Copy the tokens [start, end) of one record; all of it by default."""
        length = int(self.lengths[record])
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise ValueError(f"0 <= start <= end <= {length} must hold; got {start=}, {end=}")
        offset = int(self.offsets[record])
        if self.counts.bases <= self.memory_bytes:
            return self._read_whole()[offset + start : offset + end].copy()
        return self._read_chunks(offset + start, offset + end)

    def label_table(self) -> pd.DataFrame:
        """Labels that came with the records, in the columns id, label, group, maybe split.

        Raises InputError where none came.
        """
        raise InputError(f"{self.path} holds no labels: give labels=TABLE (columns id and label)")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {
            "_bases": None,
            "_whole": None,
            "_chunks": OrderedDict[int, ndarray](),
        }

    def _read_whole(self) -> UInt8[ndarray, "N"]:
        if self._whole is None:
            self._whole = np.asarray(self._array()[:])
        return self._whole

    def _read_chunks(self, start: int, end: int) -> UInt8[ndarray, "T"]:
        tokens = np.empty(end - start, dtype=np.uint8)
        for number in range(start // _CHUNK_BASES, -(-end // _CHUNK_BASES)):
            first = number * _CHUNK_BASES
            low, high = max(start, first), min(end, first + _CHUNK_BASES)
            tokens[low - start : high - start] = self._chunk(number)[low - first : high - first]
        return tokens

    def _chunk(self, number: int) -> UInt8[ndarray, "M"]:
        if number not in self._chunks:
            first = number * _CHUNK_BASES
            self._chunks[number] = np.asarray(self._array()[first : first + _CHUNK_BASES])
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(number)
        return self._chunks[number]

    def _array(self) -> zarr.Array:
        if self._bases is None:
            self._bases = _open_group(self.path)["bases"]
        return self._bases


def ingest(fasta: str | Path, store: str | Path, *, progress: bool = True) -> SequenceStore:
    """Write the records of a FASTA file into a store, or reuse the store made from equal bytes.

    The store appears only when it is complete. Raises InputError for what `read_fasta` refuses,
    and when something else than a sequence store stands in the store's place.
    """
    fasta, store = Path(fasta), Path(store)
    if store.exists() and _schema(store) is None:
        raise InputError(f"{store} exists and is no sequence store; remove it or name another")
    records = read_fasta(fasta)
    first = next(records)  # refuses a file that is missing or none before anything is written
    source: dict[str, str | int] = {
        "name": fasta.name,
        "bytes": fasta.stat().st_size,
        "sha256": _digest(fasta),
    }
    if _is_current(store, source):
        records.close()
        return SequenceStore(store)
    aside = store.with_name(f"{store.name}.tmp-{os.getpid()}")
    try:
        _write(aside, _chain(first, records), source, progress=progress)
        _put_in_place(aside, store)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return SequenceStore(store)


@dataclass(slots=True)
class _Axis:
    """Appends records to the flat axis in whole chunks or shards: none is written twice."""

    array: zarr.Array
    step: int
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    _pending: list[UInt8[ndarray, "T"]] = field(default_factory=list)
    _num_pending: int = 0
    _total: int = 0

    def append(self, record: Record) -> None:
        self.offsets.append(self._total)
        self.lengths.append(record.tokens.size)
        self.headers.append(f"{record.id}\t{record.description}\n")
        self._total += record.tokens.size
        self._pending.append(record.tokens)
        self._num_pending += record.tokens.size
        if self._num_pending >= self.step:
            self.flush(self._num_pending // self.step * self.step)

    def flush(self, num_bases: int | None = None) -> None:
        bases = np.concatenate(self._pending) if self._pending else np.empty(0, np.uint8)
        num_bases = bases.size if num_bases is None else num_bases
        for start in range(0, num_bases, self.step):
            self.array.append(bases[start : min(start + self.step, num_bases)])
        self._pending = [bases[num_bases:].copy()]
        self._num_pending = bases.size - num_bases


def _write(
    path: Path, records: Iterable[Record], source: dict[str, str | int], *, progress: bool
) -> None:
    group = zarr.create_group(path)
    sharded = int(source["bytes"]) >= _SHARD_BASES
    codec = zarr.codecs.ZstdCodec(level=1, checksum=True)
    bases = group.create_array(
        "bases",
        shape=(0,),
        dtype="uint8",
        chunks=(_CHUNK_BASES,),
        shards=(_SHARD_BASES,) if sharded else None,
        compressors=codec,
    )
    axis = _Axis(bases, _SHARD_BASES if sharded else 16 * _CHUNK_BASES)
    counts = LetterCounts()
    with _Progress(str(source["name"]), shown=progress) as bar:
        for record in records:
            axis.append(record)
            counts.add(record)
            bar.update(counts)
    axis.flush()
    columns = group.create_group("records")
    columns.create_array("offset", data=np.array(axis.offsets, dtype=np.int64))
    columns.create_array("length", data=np.array(axis.lengths, dtype=np.int64))
    # One blob, as Zarr v3 has no settled type for strings: "id TAB description NEWLINE" a record.
    headers = "".join(axis.headers).encode("utf-8")
    columns.create_array("header", data=np.frombuffer(headers, dtype=np.uint8))
    group.attrs.update(
        {"schema": SCHEMA, "letters": LETTERS, "source": source, "counts": asdict(counts)}
    )


def _put_in_place(aside: Path, store: Path) -> None:
    """Rename; an outdated store steps aside first, as a folder cannot be replaced in one step."""
    outdated = store.with_name(f"{store.name}.old-{os.getpid()}")
    if store.exists():
        os.replace(store, outdated)
    os.replace(aside, store)
    shutil.rmtree(outdated, ignore_errors=True)


def _open_group(path: Path) -> zarr.Group:
    if _schema(path) != SCHEMA:
        raise InputError(f"{path} is no sequence store of this version; make it again from FASTA")
    return zarr.open_group(path, mode="r")


def _schema(path: Path) -> str | None:
    """Name the schema of a store of any version; None for what is no store."""
    try:
        schema = zarr.open_group(path, mode="r").attrs.get("schema")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    is_ours = isinstance(schema, str) and schema.startswith(SCHEMA.split("/")[0])
    return schema if is_ours else None


def _is_current(store: Path, source: dict[str, str | int]) -> bool:
    if not store.exists() or _schema(store) != SCHEMA:
        return False
    attributes = _open_group(store).attrs
    same_source = attributes["source"]["sha256"] == source["sha256"]
    return bool(same_source and attributes["letters"] == LETTERS)


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _chain(first: Record, rest: Iterable[Record]) -> Iterable[Record]:
    yield first
    yield from rest


class _Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; nothing in the first two."""

    def __init__(self, name: str, *, shown: bool) -> None:
        self._name, self._shown = name, shown
        self._terminal = sys.stderr.isatty()
        self._next_line = time.monotonic() + 10.0
        disable = not (shown and self._terminal)
        self._bar = tqdm(desc=name, unit="bp", unit_scale=True, delay=2.0, disable=disable)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, counts: LetterCounts) -> None:
        self._bar.update(counts.bases - self._bar.n)
        if self._shown and not self._terminal and time.monotonic() >= self._next_line:
            print(f"reading {self._name}: {counts}", file=sys.stderr, flush=True)
            self._next_line += 10.0
