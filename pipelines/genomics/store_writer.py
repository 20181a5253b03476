"""Records into a store: packed by workers, written in order, in whole shards."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.batches import DIGEST_BYTES, NO_RUNS, Batch
from pipelines.genomics.packing import PER_BYTE
from pipelines.genomics.store import CHUNK_BYTES, SCHEMA, SHARD_BYTES


@dataclass(slots=True)
class _Columns:
    """What is known of the records so far; lists run in parallel, some by batch."""

    lengths: list[Int64[ndarray, "R"]] = field(default_factory=list)
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
            compressors=zarr.codecs.ZstdCodec(level=_LEVEL, checksum=True),
            config={"write_empty_chunks": True},  # looking for empty ones takes longer than writing
        )
        for name in ("records", "others"):
            self._group.create_group(name)
        self._workers, self._num_workers = workers, num_workers
        self._writes: list[Future[None]] = []
        self._columns = _Columns()
        self._pending: list[memoryview] = []
        self._num_pending = 0
        self._num_bytes = 0
        self._digest = hashlib.sha256(SCHEMA.encode())

    def append(self, batch: Batch) -> None:
        """Add records behind those that were added before."""
        columns = self._columns
        headers = _lines([(raw.id, raw.description) for raw in batch.raws])
        labels = _lines([(raw.label, raw.group, raw.split) for raw in batch.raws])
        circular = [raw.circular for raw in batch.raws]
        columns.lengths.append(batch.lengths)
        columns.circular += circular
        columns.digests += batch.digests
        columns.headers += headers
        columns.labels += labels
        sizes = -(-batch.lengths // PER_BYTE)
        starts = (self._num_bytes + np.cumsum(sizes) - sizes) * PER_BYTE
        identities = [
            f"{header}{label}{flag:d}".encode() + digest
            for header, label, flag, digest in zip(
                headers, labels, circular, batch.digests, strict=True
            )
        ]
        for place, others in batch.others.items():
            columns.others.append(others + np.array([starts[place], 0, 0]))
        for place, mask in batch.masks.items():
            columns.masks.append(mask + starts[place])
            identities[place] += mask.tobytes()
        self._digest.update(b"".join(identities))
        self._pending += batch.bases
        added = int(sizes.sum())
        self._num_pending += added
        self._num_bytes += added
        if self._num_pending >= SHARD_BYTES:
            self._flush(whole=True)

    def close(self) -> None:
        """Let the workers write what is left, and the columns."""
        self._flush(whole=False)
        self._write_columns()

    def finish(self, attributes: Mapping[str, object]) -> None:
        """Wait until all is written, then write the attributes."""
        for write in self._writes:
            write.result()
        self._group.attrs.update(
            {"schema": SCHEMA, "letters": LETTERS, "digest": self.digest, **attributes}
        )

    @property
    def digest(self) -> str:
        """The content digest of the records so far."""
        return self._digest.hexdigest()

    @property
    def digests(self) -> list[bytes]:
        """The digest of each record so far."""
        return self._columns.digests

    def _flush(self, *, whole: bool) -> None:
        packed = np.frombuffer(b"".join(self._pending), dtype=np.uint8)
        end = packed.size // SHARD_BYTES * SHARD_BYTES if whole else packed.size
        first = self._num_bytes - packed.size
        self._bases.resize((first + end,))
        for start in range(0, end, SHARD_BYTES):
            shard = packed[start : min(start + SHARD_BYTES, end)]
            self._write_shard(first + start, shard)
        self._pending = [memoryview(packed[end:].tobytes())]
        self._num_pending = packed.size - end

    def _write_shard(self, start: int, shard: UInt8[ndarray, "S"]) -> None:
        while len(self._writes) > self._num_workers:
            self._writes.pop(0).result()
        self._writes.append(self._workers.submit(self._put, start, shard))

    def _put(self, start: int, shard: UInt8[ndarray, "S"]) -> None:
        self._bases[start : start + shard.size] = shard

    def _write_columns(self) -> None:
        columns = self._columns
        lengths = np.concatenate([_NO_LENGTHS, *columns.lengths])
        places = np.cumsum(-(-lengths // PER_BYTE) * PER_BYTE)
        digests = np.frombuffer(b"".join(columns.digests), dtype=np.uint8)
        is_labelled = any(label != _NO_LABEL for label in columns.labels)
        runs = np.concatenate([NO_RUNS, *columns.others])
        bounds = np.concatenate([np.empty((0, 2), dtype=np.int64), *columns.masks]).reshape(-1)
        found = {
            "records/offset": np.append(0, places)[:-1],
            "records/length": lengths,
            "records/circular": np.array(columns.circular, dtype=np.bool_),
            "records/digest": digests.reshape(-1, DIGEST_BYTES),
            # blobs, as Zarr v3 has no settled type for strings
            "records/header": _blob(columns.headers),
            "records/label": _blob(columns.labels if is_labelled else []),
            "others/start": runs[:, 0].copy(),
            "others/length": runs[:, 1].copy(),
            "others/token": runs[:, 2].astype(np.uint8),
            # as steps from bound to bound: small numbers, which compress well
            "soft_mask": np.diff(bounds, prepend=0).astype(np.int64),
        }
        for name, values in found.items():
            self._writes.append(self._workers.submit(self._put_column, name, values))

    def _put_column(self, name: str, values: ndarray) -> None:
        self._group.create_array(name, data=values)


_LEVEL = -5
"""Four bases a byte hardly compress, but runs of N do, at any level."""
_NO_LABEL = "\t\t\n"
_NO_LENGTHS = np.empty(0, dtype=np.int64)


def _lines(rows: list[tuple[str | None, ...]]) -> list[str]:
    """One line of a text column for each row; blanks that would break one are read as a space."""
    lines = ["\t".join([value or "" for value in row]) + "\n" for row in rows]
    text = "".join(lines)
    tabs = sum(len(row) - 1 for row in rows)
    if text.count("\t") == tabs and text.count("\n") == len(rows) and "\r" not in text:
        return lines
    return [_unbroken(line, row) for line, row in zip(lines, rows, strict=True)]


def _unbroken(line: str, row: tuple[str | None, ...]) -> str:
    if line.count("\t") == len(row) - 1 and line.count("\n") == 1 and "\r" not in line:
        return line
    return "\t".join([" ".join((value or "").split()) for value in row]) + "\n"


def _blob(lines: list[str]) -> UInt8[ndarray, "B"]:
    return np.frombuffer("".join(lines).encode("utf-8"), dtype=np.uint8)
