"""Shards of a Zarr array of bytes, written as whole files: in half the time of `array[a:b] = ...`.

A file as the sharding codec of Zarr v3 describes it, its index at the end: compressed chunks one
after the other, then offset and size of each as little-endian uint64 (all ones for a chunk that is
not there), then the CRC32C of this index. Zarr reads it as what it would have written itself.
"""

from pathlib import Path

import numpy as np
import zarr
from google_crc32c import extend as crc32c
from jaxtyping import UInt8
from numcodecs.zstd import Zstd
from numpy import ndarray

_INTEGER = np.dtype("<u8")
_ABSENT = np.iinfo(_INTEGER).max


class ShardedBytes:
    """An array of bytes on disk that grows by whole shards; the last one may be shorter."""

    def __init__(
        self, group: zarr.Group, name: str, folder: Path, *, chunk: int, shard: int, level: int
    ) -> None:
        self._array = group.create_array(
            name,
            shape=(0,),
            dtype="uint8",
            chunks=(chunk,),
            shards=(shard,),
            compressors=zarr.codecs.ZstdCodec(level=level, checksum=True),
        )
        self._codec = Zstd(level=level, checksum=True)
        self._chunk, self._shard = chunk, shard
        self._folder = folder / name / "c"
        self._folder.mkdir()

    def resize(self, size: int) -> None:
        """Say how many bytes there are."""
        self._array.resize((size,))

    def put(self, number: int, values: UInt8[ndarray, "S"]) -> None:
        """Write one shard, from several threads if need be."""
        chunks = [
            self._codec.encode(self._filled(values[start : start + self._chunk]))
            for start in range(0, values.size, self._chunk)
        ]
        sizes = np.array([len(chunk) for chunk in chunks], dtype=_INTEGER)
        index = np.full((self._shard // self._chunk, 2), _ABSENT, dtype=_INTEGER)
        index[: sizes.size] = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
        end = index.tobytes()
        with (self._folder / str(number)).open("wb") as file:
            file.writelines([*chunks, end, crc32c(0, end).to_bytes(4, "little")])

    def _filled(self, values: UInt8[ndarray, "S"]) -> UInt8[ndarray, "C"]:
        """A chunk is always whole: the last one is filled up with zeros."""
        missing = self._chunk - values.size
        return np.pad(values, (0, missing)) if missing else values
