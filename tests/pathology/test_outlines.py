import json

import numpy as np
import pytest
from scipy import ndimage

from pipelines.pathology.outlines import outlined_tissue, write_outline
from pipelines.pathology.slides import SlideError
from pipelines.pathology.tissue import TissueMask

SCALE = (7.3, 9.1)


def mask_of(mask):
    return TissueMask(mask, np.zeros((*mask.shape, 3), np.uint8), SCALE, 0.1, "otsu")


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(name, *rings, kind="Polygon"):
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": list(rings)},
        "properties": {"classification": {"name": name}} if name else {},
    }


@pytest.mark.parametrize("seed", range(20))
def test_an_outline_nobody_touched_gives_the_mask_again(tmp_path, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=rng.integers(1, 40, size=2))
    tissue = mask_of(ndimage.gaussian_filter(noise, rng.uniform(0, 2)) > 0)
    write_outline(tmp_path / "a.geojson", tissue)
    again = outlined_tissue(tmp_path / "a.geojson", mask_of(np.zeros_like(tissue.mask)))
    assert np.array_equal(again.mask, tissue.mask)
    assert again.threshold_source == "outline"


def test_rings_are_closed_and_pieces_are_polygons_with_their_holes(tmp_path):
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3:5, 3:5] = False
    mask[9:11, 9:11] = True
    write_outline(tmp_path / "a.geojson", mask_of(mask))
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    assert [len(f["geometry"]["coordinates"]) for f in content["features"]] == [2, 1]
    for item in content["features"]:
        assert item["geometry"]["type"] == "Polygon"
        assert item["properties"]["objectType"] == "annotation"
        assert item["properties"]["classification"]["name"] == "Tissue"
        assert all(ring[0] == ring[-1] for ring in item["geometry"]["coordinates"])
    edge = np.array(content["features"][0]["geometry"]["coordinates"][0])
    assert edge.min(0) == pytest.approx([SCALE[0], SCALE[1]])
    assert edge.max(0) == pytest.approx([8 * SCALE[0], 8 * SCALE[1]])


def test_regions_drawn_by_hand_include_and_exclude(tmp_path):
    found = mask_of(np.ones((10, 10), bool))
    units = np.array(SCALE)
    path = tmp_path / "a.geojson"

    def masks(*features):
        path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
        return outlined_tissue(path, found).mask

    big = (np.array(square(2, 2, 6)) * units).tolist()
    small = (np.array(square(4, 4, 2)) * units).tolist()
    assert masks(feature("Tumor", big)).sum() == 36
    assert masks(feature(None, big, small)).sum() == 32
    assert masks(feature("Tissue", [big], [small], kind="MultiPolygon")).sum() == 36
    assert masks(feature("Tissue", big), feature("Exclude", small)).sum() == 32
    assert masks(feature("Ignore*", small)).sum() == 96  # nothing drawn: cut out of what was found
    assert masks().sum() == 0  # all regions deleted


BAD = {
    "text": ("hello", "is no JSON text"),
    "number": ("3", "is no GeoJSON FeatureCollection"),
    "line": (json.dumps([feature("x", [0, 0], [1, 1], kind="LineString")]), "feature 1 is no"),
    "open": (json.dumps([feature("x", square(0, 0, 5)[:-1])]), "last point must be its first"),
    "short": (json.dumps([feature("x", square(0, 0, 5)), feature("x", [[0, 0], [0, 0]])]),
              "feature 2 is no polygon"),
    "NaN": (json.dumps([feature("x", [[0, 0], [0, float("nan")], [1, 1], [0, 0]])]),
            "four points"),
    "none": ('[{"geometry": null}]', "feature 1 is no polygon"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_outlines_are_named(tmp_path, case):
    text, words = BAD[case]
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(SlideError) as caught:
        outlined_tissue(path, mask_of(np.ones((10, 10), bool)))
    assert caught.value.status == "bad_outline"
    assert words in caught.value.reason
    assert str(path) in caught.value.reason
