"""Shards that are written as files are what Zarr reads, and what it writes itself."""

import numpy as np
import pytest
import zarr

from pipelines.genomics.shards import ShardedBytes

CHUNK, SHARD = 256, 1024


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1023, 1024, 1025, 2304, 3000])
@pytest.mark.parametrize("level", [-5, 1])
def test_files_equal_those_of_zarr(tmp_path, size, level):
    values = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    values[size // 3 : size // 2] = 0
    written = zarr.create_group(tmp_path / "own")
    own = ShardedBytes(written, "x", tmp_path / "own", chunk=CHUNK, shard=SHARD, level=level)
    own.resize(size)
    for number, start in enumerate(range(0, size, SHARD)):
        own.put(number, values[start : start + SHARD])
    zarrs = zarr.create_group(tmp_path / "zarr").create_array(
        "x",
        shape=(size,),
        dtype="uint8",
        chunks=(CHUNK,),
        shards=(SHARD,),
        compressors=zarr.codecs.ZstdCodec(level=level, checksum=True),
        config={"write_empty_chunks": True},
    )
    for start in range(0, size, SHARD):
        zarrs[start : start + SHARD] = values[start : start + SHARD]
    assert np.array_equal(zarr.open_array(tmp_path / "own" / "x", mode="r")[:], values)
    files = sorted((tmp_path / "own" / "x" / "c").iterdir())
    assert len(files) == -(-size // SHARD)
    for file in files:
        assert file.read_bytes() == (tmp_path / "zarr" / "x" / "c" / file.name).read_bytes()
