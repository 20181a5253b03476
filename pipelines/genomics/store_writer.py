"""Records into a store: packed by workers, written in order, in whole shards."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.batches import DIGEST_BYTES, NO_RUNS, Packed
from pipelines.genomics.genome import RawRecord
from pipelines.genomics.packing import PER_BYTE
from pipelines.genomics.store import CHUNK_BYTES, SCHEMA, SHARD_BYTES


@dataclass(slots=True)
class _Columns:
    """What is known of the records so far; lists run in parallel."""

    lengths: list[int] = field(default_factory=list)
    circular: list[bool] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    others: list[ndarray] = field(default_factory=list)
    masks: list[ndarray] = field(default_factory=list)


class StoreWriter:
    """Write one store, record by record; workers compress and write its shards meanwhile."""

    def __init__(self, path: Path, workers: Executor, *, num_workers: int) -> None:
        self._group = zarr.create_group(path)
        self._bases = self._group.create_array(
            "bases",
            shape=(0,),
            dtype="uint8",
            chunks=(CHUNK_BYTES,),
            shards=(SHARD_BYTES,),
            compressors=zarr.codecs.ZstdCodec(level=-1, checksum=True),
            config={"write_empty_chunks": True},  # looking for empty ones takes longer than writing
        )
        self._workers, self._num_workers = workers, num_workers
        self._writes: list[Future[None]] = []
        self._columns = _Columns()
        self._pending: list[ndarray] = []
        self._num_pending = 0
        self._num_bytes = 0
        self._digest = hashlib.sha256(SCHEMA.encode())

    def append(self, raw: RawRecord, packed: Packed) -> None:
        """Add a record behind those that were added before."""
        columns = self._columns
        columns.lengths.append(packed.length)
        columns.circular.append(raw.circular)
        columns.digests.append(packed.digest)
        columns.headers.append(header := _line(raw.id, raw.description))
        label = _NO_LABEL
        if raw.label is not None or raw.group is not None or raw.split is not None:
            label = _line(raw.label, raw.group, raw.split)
        columns.labels.append(label)
        self._digest.update(f"{header}{label}{raw.circular:d}".encode() + packed.digest)
        if packed.others.size:
            columns.others.append(packed.others + np.array([self._num_bytes * PER_BYTE, 0, 0]))
        if packed.mask.size:
            columns.masks.append(packed.mask + self._num_bytes * PER_BYTE)
            self._digest.update(packed.mask.tobytes())
        self._pending.append(packed.bases)
        self._num_pending += packed.bases.size
        self._num_bytes += packed.bases.size
        if self._num_pending >= SHARD_BYTES:
            self._flush(whole=True)

    def finish(self, attributes: Mapping[str, object]) -> str:
        """Write what is left, the columns and the attributes; returns the content digest."""
        self._flush(whole=False)
        self._write_columns()  # while the last shards are written
        for write in self._writes:
            write.result()
        digest = self._digest.hexdigest()
        self._group.attrs.update(
            {"schema": SCHEMA, "letters": LETTERS, "digest": digest, **attributes}
        )
        return digest

    @property
    def digests(self) -> list[bytes]:
        """The digest of each record so far."""
        return self._columns.digests

    def _flush(self, *, whole: bool) -> None:
        packed = self._pending[0] if len(self._pending) == 1 else _joined(self._pending)
        end = packed.size // SHARD_BYTES * SHARD_BYTES if whole else packed.size
        first = self._num_bytes - packed.size
        self._bases.resize((first + end,))
        for start in range(0, end, SHARD_BYTES):
            shard = packed[start : min(start + SHARD_BYTES, end)]
            self._write_shard(first + start, shard)
        self._pending = [packed[end:].copy()]
        self._num_pending = packed.size - end

    def _write_shard(self, start: int, shard: UInt8[ndarray, "S"]) -> None:
        while len(self._writes) > self._num_workers:
            self._writes.pop(0).result()
        self._writes.append(self._workers.submit(self._put, start, shard))

    def _put(self, start: int, shard: UInt8[ndarray, "S"]) -> None:
        self._bases[start : start + shard.size] = shard

    def _write_columns(self) -> None:
        columns = self._columns
        records = self._group.create_group("records")
        lengths = np.array(columns.lengths, dtype=np.int64)
        places = np.cumsum(-(-lengths // PER_BYTE) * PER_BYTE)
        records.create_array("offset", data=np.append(0, places)[:-1])
        records.create_array("length", data=lengths)
        records.create_array("circular", data=np.array(columns.circular, dtype=np.bool_))
        digests = np.frombuffer(b"".join(columns.digests), dtype=np.uint8)
        records.create_array("digest", data=digests.reshape(-1, DIGEST_BYTES))
        # blobs, as Zarr v3 has no settled type for strings
        records.create_array("header", data=_blob(columns.headers))
        is_labelled = any(label != _NO_LABEL for label in columns.labels)
        records.create_array("label", data=_blob(columns.labels if is_labelled else []))
        runs = _joined(columns.others, NO_RUNS)
        others = self._group.create_group("others")
        others.create_array("start", data=runs[:, 0].copy())
        others.create_array("length", data=runs[:, 1].copy())
        others.create_array("token", data=runs[:, 2].astype(np.uint8))
        bounds = _joined(columns.masks, np.empty((0, 2), dtype=np.int64)).reshape(-1)
        # as steps from bound to bound: small numbers, which compress well
        self._group.create_array("soft_mask", data=np.diff(bounds, prepend=0).astype(np.int64))


_NO_LABEL = "\t\t\n"


def _line(*values: str | None) -> str:
    """One line of a text column; blanks that would break it are read as a space."""
    line = "\t".join([value or "" for value in values])
    if line.count("\t") >= len(values) or "\n" in line or "\r" in line:
        line = "\t".join([" ".join((value or "").split()) for value in values])
    return f"{line}\n"


def _blob(lines: list[str]) -> UInt8[ndarray, "B"]:
    return np.frombuffer("".join(lines).encode("utf-8"), dtype=np.uint8)


def _joined(arrays: list[ndarray], empty: ndarray | None = None) -> ndarray:
    if arrays:
        return np.concatenate(arrays)
    return np.empty(0, dtype=np.uint8) if empty is None else empty
