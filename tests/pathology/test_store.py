import dataclasses

import numpy as np
import pytest
import zarr

from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import Provenance, is_current, read_slide, slide_folder, write_slide
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
    assert group.attrs["mpp_source"] == "openslide"
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
    (tmp_path / "store" / "tissue [1].zarr.tmp-1").mkdir(parents=True)  # of a killed run
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
