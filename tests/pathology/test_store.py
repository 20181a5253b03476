import dataclasses
import platform

import numpy as np
import pytest
import zarr

from pipelines.pathology import store as store_module
from pipelines.pathology.chunk_files import read_rows
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.scale import make_bag
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import (
    Provenance,
    check_content,
    content_digest,
    is_current,
    read_index,
    read_slide,
    slide_folder,
    write_group,
)
from pipelines.pathology.store_writer import write_slide
from pipelines.pathology.tiling import TilePlan, plan_tiles
from pipelines.shared.errors import InputError

PLAN = TilePlan(64)
ENCODER = StatsEncoder(grey=True)
PROVENANCE = Provenance("abc", None, PLAN.hash, ENCODER.name, ENCODER.fingerprint)


def store_slide(slide, folder, features=None):
    with open_slide(slide) as reader:
        tiles = plan_tiles(reader, PLAN)
        if features is None:
            features = np.random.default_rng(0).normal(size=(len(tiles), ENCODER.dim))
        write_slide(
            folder,
            "tissue [1]",
            reader,
            tiles,
            features.astype(np.float32),
            plan=PLAN,
            encoder=ENCODER,
            provenance=PROVENANCE,
        )
    return tiles, features.astype(np.float32)


def test_what_is_written_is_read_back(tissue_slide, tmp_path):
    folder = slide_folder(tmp_path / "store", "tissue [1]")
    tiles, features = store_slide(tissue_slide, folder)
    slide = read_slide(folder)
    assert slide.slide_id == "tissue [1]"
    for name in ("grid", "xy0", "tissue"):
        assert np.array_equal(getattr(slide, name), getattr(tiles, name))
        assert getattr(slide, name).dtype == getattr(tiles, name).dtype
    assert np.array_equal(slide.features(), features)
    assert (slide.dimensions, slide.mpp, slide.pitch0) == ((640, 512), 0.5, 64.0)
    assert np.array_equal(slide.overview(), tiles.mask.overview)
    assert np.array_equal(slide.tissue_mask(), tiles.mask.mask)


def test_group_is_uncompressed_zarr_3_that_says_where_it_comes_from(tissue_slide, tmp_path):
    folder = slide_folder(tmp_path, "tissue")
    store_slide(tissue_slide, folder)
    group = zarr.open_group(folder, mode="r")
    features = group["features/stats_grey"]
    assert group.metadata.zarr_format == 3
    assert features.chunks == features.shape
    assert not features.compressors
    with open_slide(tissue_slide) as reader:
        assert group.attrs["mpp_source"] == reader.mpp_source
    assert group.attrs["plan"]["tile_px"] == 64
    assert group.attrs["slide_bytes"] == tissue_slide.stat().st_size


def test_only_equal_provenance_is_current(tissue_slide, tmp_path):
    folder = slide_folder(tmp_path, "tissue")
    assert not is_current(folder, PROVENANCE)
    store_slide(tissue_slide, folder)
    assert is_current(folder, PROVENANCE)
    for change in (
        {"slide_fingerprint": "other"},
        {"given_mpp": 0.5},
        {"plan_hash": TilePlan(128).hash},
        {"encoder_fingerprint": "other"},
    ):
        assert not is_current(folder, dataclasses.replace(PROVENANCE, **change))


def test_writing_again_replaces_and_leaves_nothing_beside(tissue_slide, tmp_path):
    folder = slide_folder(tmp_path / "store", "tissue [1]")
    leftover = (
        slide_folder(tmp_path / "store", "tissue [1]").name + f".tmp-{platform.node()}-999999999"
    )
    (tmp_path / "store" / leftover).mkdir(parents=True)  # of a killed run
    _, first = store_slide(tissue_slide, folder)
    store_slide(tissue_slide, folder, first + 1)
    assert np.array_equal(read_slide(folder).features(), first + 1)
    assert [path.name for path in folder.parent.iterdir()] == ["tissue [1].zarr"]


def test_features_that_are_not_finite_or_do_not_match_are_refused(tissue_slide, tmp_path):
    folder = slide_folder(tmp_path, "tissue")
    _, good = store_slide(tissue_slide, folder)
    bad = good.copy()
    bad[7, 3] = np.nan
    with pytest.raises(ValueError, match="row 7"):
        store_slide(tissue_slide, folder, bad)
    with pytest.raises(ValueError, match="must be"):
        store_slide(tissue_slide, folder, good[1:])
    assert np.array_equal(read_slide(folder).features(), good)


def test_absent_group_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no stored slide features"):
        read_slide(tmp_path / "absent.zarr")


def test_half_precision_is_kept_and_double_is_not(tissue_slide, tmp_path):
    with open_slide(tissue_slide) as reader:
        tiles = plan_tiles(reader, PLAN)
        for dtype, kept in (("float16", "float16"), ("float64", "float32")):
            features = np.ones((len(tiles), ENCODER.dim), dtype=dtype)
            write_slide(
                slide_folder(tmp_path, dtype), dtype, reader, tiles, features,
                plan=PLAN, encoder=ENCODER, provenance=PROVENANCE,
            )  # fmt: skip
            assert read_slide(slide_folder(tmp_path, dtype)).features().dtype == kept


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_rows_read_from_chunk_files_are_those_that_zarr_reads(tmp_path, monkeypatch, rows, sharded):
    monkeypatch.setattr(store_module, "_ROWS_PER_CHUNK", 64)
    monkeypatch.setattr(store_module, "_ROWS_PER_SHARD", 256)
    monkeypatch.setattr(store_module, "_ROWS_WITHOUT_SHARDS", 64 if sharded else 1 << 30)
    rng = np.random.default_rng(rows)
    arrays = {
        "a": rng.standard_normal((rows, 5)).astype(np.float16),
        "b": np.zeros((rows, 2), dtype=np.int64),
    }
    write_group(tmp_path / "x.zarr", {}, arrays)
    group = zarr.open_group(tmp_path / "x.zarr", mode="r")
    assert (group["a"].shards is not None) == (sharded and rows >= 64)
    for name, array in arrays.items():
        spans = [(0, None), (0, 0), *np.sort(rng.integers(0, rows + 1, (20, 2)), axis=1).tolist()]
        for start, stop in spans:
            found = read_rows(tmp_path / "x.zarr" / name, start, stop)
            assert found.dtype == array.dtype
            assert np.array_equal(found, array[start:stop])
            assert np.array_equal(found, group[name][start:stop])


def test_arrays_that_only_zarr_can_decode_are_read_through_it(tmp_path):
    array = np.arange(12.0).reshape(4, 3)
    group = zarr.create_group(tmp_path / "x.zarr")
    group.create_array("packed", data=array)
    group.create_array("columns", data=array, chunks=(4, 1), compressors=None)
    for name in ("packed", "columns"):
        assert np.array_equal(read_rows(tmp_path / "x.zarr" / name, 1, 3), array[1:3])


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_damaged_content_is_named(tmp_path, damage):
    folder = slide_folder(tmp_path, make_bag(tmp_path, 50, num_features=3, seed=0))
    check_content(folder)
    chunk = folder / "features" / "normal" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[17] ^= 1
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "changed" else content[:-8])
    with pytest.raises(InputError, match="damaged"):
        check_content(folder)


def test_digest_is_of_content_alone():
    a, b = np.arange(6.0), np.arange(6).reshape(2, 3)
    digest = content_digest({"a": a, "b": b})
    assert content_digest({"b": np.asfortranarray(b), "a": a.astype(">f8")}) == digest
    assert content_digest({"a": a, "b": b.reshape(3, 2)}) != digest
    assert content_digest({"a": b, "b": a}) != digest
    assert content_digest({"a": np.where(a == 0, -0.0, a), "b": b}) != digest


def test_index_follows_the_store(tmp_path):
    with pytest.raises(InputError, match="no stored slides"):
        read_index(tmp_path)
    first = make_bag(tmp_path, 30, num_features=3, seed=0)
    make_bag(tmp_path / "deeper", 40, num_features=3, seed=0)
    table = read_index(tmp_path)
    assert (tmp_path / "index.csv").exists()
    assert table["slide_id"].tolist() == ["deeper/tissue_40", first]
    assert table.iloc[1][["num_tiles", "num_features", "encoder"]].tolist() == ["30", "3", "normal"]
    second = make_bag(tmp_path, 20, num_features=4, seed=0)
    assert read_index(tmp_path)["slide_id"].tolist() == ["deeper/tissue_40", second, first]
    before = (tmp_path / "index.csv").stat().st_mtime_ns
    assert read_index(tmp_path)["num_features"].tolist() == ["3", "4", "3"]
    assert (tmp_path / "index.csv").stat().st_mtime_ns == before
