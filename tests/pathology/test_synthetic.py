import hashlib

import numpy as np
import pandas as pd
import pytest

from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.slides import find_slides, open_slide
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.synthetic import (
    BAG_MARKERS,
    FAR_ISLAND,
    FAR_SHIFT,
    GLASS,
    LYMPHOCYTES,
    NEAR_APART,
    NEAR_MARKERS,
    NEST,
    TILE_PX,
    TILES_PER_KIND,
    arrange_pair,
    make_cohort,
)
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.errors import InputError

SIZES = {"num_pairs": 4, "test_pairs": 1, "val_pairs": 1, "workers": 1, "progress": False}
VARIANTS = pytest.mark.parametrize("variant", ["near", "far"])


def kinds(tiles):
    return tiles // TILES_PER_KIND


def distances(one, other):
    """Chebyshev distance of each cell of `one` to the nearest of `other`."""
    return np.abs(one[:, None] - other[None]).max(axis=-1).min(axis=1)


def neighbourhoods(tiles, reach):
    """What each tissue tile sees around it, as a sorted list."""
    padded = np.pad(tiles, reach, constant_values=-1)
    padded[kinds(padded) <= GLASS] = -1
    seen = []
    for row, col in np.argwhere(padded >= 0):
        window = padded[row - reach : row + reach + 1, col - reach : col + reach + 1]
        seen.append(window.tobytes())
    return sorted(seen)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@VARIANTS
@pytest.mark.parametrize("pair", range(10))
def test_a_pair_holds_the_same_tiles_in_another_order(variant, pair):
    one, two = arrange_pair(variant, seed=3, pair=pair)
    assert np.array_equal(np.sort(one, axis=None), np.sort(two, axis=None))
    assert np.array_equal(kinds(one) > GLASS, kinds(two) > GLASS)
    assert not np.array_equal(one, two)
    edge = np.ones(one.shape, dtype=bool)
    edge[1:-1, 1:-1] = False
    assert (kinds(one)[edge] == GLASS).all()


@pytest.mark.parametrize("pair", range(10))
def test_near_classes_differ_in_what_lies_beside_a_nest(pair):
    apart, touching = (kinds(tiles) for tiles in arrange_pair("near", seed=0, pair=pair))
    for tiles in (apart, touching):
        assert (tiles == NEST).sum() == (tiles == LYMPHOCYTES).sum() == NEAR_MARKERS
    assert np.array_equal(apart == NEST, touching == NEST)
    nests = np.argwhere(touching == NEST)
    beside = np.abs(nests[:, None] - np.argwhere(touching == LYMPHOCYTES)).sum(axis=-1)
    assert (beside.min(axis=1) == 1).all()
    assert distances(nests, np.argwhere(apart == LYMPHOCYTES)).min() > NEAR_APART


def test_lymphocytes_lie_alike_in_both_near_classes():
    """They are as far from the glass, and from one another, in one class as in the other."""
    differences = []
    for pair in range(400):
        measures = []
        for tiles in arrange_pair("near", seed=1, pair=pair):
            cells = np.argwhere(kinds(tiles) == LYMPHOCYTES)
            glass = np.argwhere(kinds(tiles) == GLASS)
            spread = np.abs(cells[:, None] - cells[None]).max(axis=-1).mean()
            measures.append((distances(cells, glass).mean(), spread))
        differences.append(np.subtract(*measures))
    error = np.std(differences, axis=0) / np.sqrt(len(differences))
    assert (np.abs(np.mean(differences, axis=0)) < 4 * error).all()


@pytest.mark.parametrize("pair", range(10))
def test_far_classes_look_alike_through_any_local_window(pair):
    right, left = arrange_pair("far", seed=0, pair=pair)
    assert neighbourhoods(right, reach=6) == neighbourhoods(left, reach=6)
    middle = left.shape[1] // 2
    for tiles, side in ((left, np.less), (right, np.greater)):
        assert side(np.argwhere(kinds(tiles) == NEST)[:, 1], middle).all()
        assert not side(np.argwhere(kinds(tiles) == LYMPHOCYTES)[:, 1], middle).any()
    assert FAR_SHIFT - FAR_ISLAND[1] > 6


@VARIANTS
def test_the_whole_road_gives_a_pair_equal_features(variant, tmp_path):
    table = make_cohort(tmp_path / "cohort", variant=variant, seed=5, **SIZES)
    report = extract_features(
        find_slides(tmp_path / "cohort" / "slides"),
        store=tmp_path / "store",
        plan=TilePlan(TILE_PX, 0.5),
        encoder=StatsEncoder(),
        workers=1,
        progress=False,
    )
    assert report.failures == []
    slides = {s: read_slide(slide_folder(tmp_path / "store", s)) for s in report.done}
    for number, (_, pair) in enumerate(table.groupby("pair")):
        rows = []
        for slide_id, label in zip(pair["slide_id"], pair["label"].astype(int), strict=True):
            slide = slides[slide_id]
            tiles = arrange_pair(variant, seed=5, pair=number)[label]
            cells = np.argwhere(kinds(tiles) > GLASS)[:, ::-1]
            assert set(map(tuple, slide.grid.tolist())) == set(map(tuple, cells.tolist()))
            assert slide.tissue.min() > 0.7
            features = slide.features()
            rows.append(features[np.lexsort(features.T)])
        assert np.array_equal(rows[0], rows[1])


def test_slides_are_real_pyramids_with_a_resolution(tmp_path):
    table = make_cohort(tmp_path, variant="near", **SIZES)
    with open_slide(tmp_path / "slides" / f"{table['slide_id'][0]}.tiff") as reader:
        assert (reader.mpp, reader.vendor) == (0.5, "generic-tiff")
        assert reader.level_downsamples == (1.0, 2.0, 4.0)
        glass = reader.read_region(0, 0, 64, 64, 0)
    assert glass.mean() > 235


def test_table_keeps_pairs_in_one_split_and_patients_apart(tmp_path):
    table = make_cohort(tmp_path, variant="near", **SIZES)
    assert list(table.columns) == ["slide_id", "patient_id", "label", "pair", "split"]
    assert pd.read_csv(tmp_path / "labels.csv", dtype=str).equals(table.astype(str))
    assert table["patient_id"].is_unique
    assert (table.groupby("pair")["split"].nunique() == 1).all()
    assert (table.groupby("pair")["label"].apply(sorted).map(tuple) == ("0", "1")).all()
    assert table["split"].value_counts().to_dict() == {"train": 4, "test": 2, "val": 2}


def test_files_follow_from_the_seed_alone(tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        options = SIZES | {"num_pairs": 16 if seed == 0 else 3, "workers": workers}
        make_cohort(tmp_path / name, variant="near", seed=seed, **options)
    one, two, other = (digests(tmp_path / name) for name in "abc")
    assert len(one) == 2 + 32
    assert one == two
    assert one["near_0000.tiff"] != other["near_0000.tiff"]


def test_a_complete_cohort_is_kept_and_another_is_refused(tmp_path):
    first = make_cohort(tmp_path / "cohort", variant="near", **SIZES)
    before = (tmp_path / "cohort" / "labels.csv").stat().st_mtime_ns
    assert make_cohort(tmp_path / "cohort", variant="near", **SIZES).equals(first)
    assert (tmp_path / "cohort" / "labels.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="other parameters"):
        make_cohort(tmp_path / "cohort", variant="far", **SIZES)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "labels.csv").touch()
    with pytest.raises(InputError, match="holds other files"):
        make_cohort(tmp_path / "own", variant="near", **SIZES)


@pytest.mark.parametrize("wrong", [{"variant": "mid"}, {"num_pairs": 2}])
def test_impossible_cohorts_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=r"near, far|pairs leave"):
        make_cohort(tmp_path, **({"variant": "near"} | SIZES | wrong))


def test_bag_slides_differ_in_the_number_of_one_kind_alone():
    few, many, places = [], [], []
    for pair in range(200):
        for label, tiles in enumerate(arrange_pair("bag", seed=5, pair=pair)):
            found = np.argwhere(kinds(tiles) == LYMPHOCYTES)
            (few, many)[label].append(len(found))
            if len(found):
                places.append((label, found.mean(axis=0)))
    assert np.mean(few) == pytest.approx(BAG_MARKERS[0], abs=0.5)
    assert np.mean(many) == pytest.approx(BAG_MARKERS[1], abs=0.8)
    centres = [np.mean([where for of, where in places if of == label], axis=0) for label in (0, 1)]
    assert centres[0] == pytest.approx(centres[1], abs=0.6)
