"""Read rows of a stored array straight from the files of its chunks.

The store's arrays are uncompressed, so a row stands in a file as it stands in memory: no decoding,
no copy, and of a chunk only what is asked for. Zarr's own reader takes whole chunks through several
copies. Layout: Zarr core specification, version 3, sections "chunk key encoding" and "bytes", and
its "sharding_indexed" codec (a shard ends in a table of offset and length, uint64, per chunk).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipelines.shared.errors import InputError

_INDEX_CODECS = ("bytes", "crc32c")
_CRC_BYTES = 4


class DamageError(InputError):
    """Chunks of a stored slide are missing, cut short or changed."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where rows are: `chunk_rows` in a chunk, `shard_chunks` chunks in a file (0: no shards)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    shard_chunks: int

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


def read_rows(array: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Read rows `start` to `stop` (before it) of the array [N, ...] in the folder `array`.

    Arrays that are compressed, or cut along another axis than rows, go through Zarr. Raises
    DamageError (an InputError) for a folder without an array, for a chunk missing or cut short.
    """
    layout = _read_layout(array)
    if layout is None:
        return np.asarray(zarr.open_array(array, mode="r")[start:stop])
    start, stop, _ = slice(start, stop).indices(layout.shape[0])
    out = np.empty((max(stop - start, 0), *layout.shape[1:]), dtype=layout.dtype)
    target = out.reshape(-1).view(np.uint8).data
    filled = 0
    for path, offset, size in _spans(array, layout, start, stop):
        _read_into(path, offset, target[filled : filled + size])
        filled += size
    return out


def read_shape(array: Path) -> tuple[int, ...]:
    """Read the shape of the array in the folder `array`; raises InputError where there is none."""
    return tuple(_read_metadata(array)["shape"])


def _read_metadata(array: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((array / "zarr.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_array(array, error) from error
    if not isinstance(metadata, dict) or metadata.get("node_type") != "array":
        raise _no_array(array, "it is a group")
    return metadata


def _no_array(array: Path, reason: object) -> DamageError:
    return DamageError(f"{array} holds no stored array ({reason}); make its features again")


def _read_layout(array: Path) -> _Layout | None:
    """Return the layout of an array of raw rows; None where only Zarr can decode it."""
    metadata = _read_metadata(array)
    shape = tuple(metadata["shape"])
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs, keys = metadata["codecs"], metadata["chunk_key_encoding"]
    inner = outer
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        settings = codecs[0]["configuration"]
        inner, codecs = settings["chunk_shape"], settings["codecs"]
        names = tuple(codec["name"] for codec in settings["index_codecs"])
        if names != _INDEX_CODECS or settings["index_location"] != "end":
            return None
    raw = [codec["name"] for codec in codecs] == ["bytes"]
    little = raw and codecs[0].get("configuration", {}).get("endian", "little") == "little"
    by_rows = tuple(outer[1:]) == tuple(inner[1:]) == shape[1:]
    separator = keys.get("configuration", {}).get("separator", "/")
    if not (little and by_rows and keys["name"] == "default" and separator == "/"):
        return None
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    return _Layout(shape, dtype, inner[0], 0 if inner == outer else outer[0] // inner[0])


def _spans(array: Path, layout: _Layout, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, offset in bytes, bytes) of the rows, in order."""
    tail = [0] * (len(layout.shape) - 1)
    index: tuple[Path, np.ndarray] | None = None
    row = start
    while row < stop:
        chunk, skipped = divmod(row, layout.chunk_rows)
        rows = min(layout.chunk_rows - skipped, stop - row)
        file, within = divmod(chunk, layout.shard_chunks or 1)
        path = array.joinpath("c", str(file), *map(str, tail))
        offset = skipped * layout.row_bytes
        if layout.shard_chunks:
            if index is None or index[0] != path:
                index = path, _read_index(path, layout.shard_chunks)
            offset += int(index[1][within, 0])
        yield path, offset, rows * layout.row_bytes
        row += rows


def _read_index(shard: Path, num_chunks: int) -> np.ndarray:
    """Read a shard's table: offset and length, uint64 [num_chunks, 2]."""
    table = np.empty((num_chunks, 2), dtype="<u8")
    try:
        offset = shard.stat().st_size - table.nbytes - _CRC_BYTES
    except OSError as error:
        raise _damaged(shard, error.strerror or str(error)) from error
    _read_into(shard, max(offset, 0), table.reshape(-1).view(np.uint8).data)
    return table


def _read_into(path: Path, offset: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            filled = 0
            while filled < len(target):
                count = file.readinto(target[filled:])
                if not count:
                    raise _damaged(path, f"it ends {len(target) - filled:,} bytes early")
                filled += count
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _damaged(path: Path, reason: str) -> DamageError:
    return DamageError(
        f"{path}: {reason}; the stored slide is damaged: delete its .zarr folder and run the same "
        "command again"
    )
