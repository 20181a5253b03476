import numpy as np
import pytest
from PIL import Image

from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.heatmap import render_heatmap
from pipelines.pathology.slides import find_slides
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.tiling import TilePlan


@pytest.fixture
def stored_slide(tissue_slide, tmp_path):
    extract_features(
        find_slides(tissue_slide.parent),
        store=tmp_path,
        plan=TilePlan(64),
        encoder=StatsEncoder(grey=True),
        workers=1,
        progress=False,
    )
    return read_slide(slide_folder(tmp_path, "tissue"))


def colourful(path):
    """Share of strongly coloured pixels in the middle of the right half."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    half = pixels[:, pixels.shape[1] // 2 : pixels.shape[1] * 85 // 100]
    return (half.max(axis=2) - half.min(axis=2) > 60).mean()


def test_scores_are_drawn_over_the_slide(stored_slide, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    scores = np.arange(len(stored_slide), dtype=float)
    render_heatmap(folder / "a.png", stored_slide, scores, title="a_b $c", unit="share")
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    assert colourful(folder / "a.png") > 0.1


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_constant_or_partly_missing_scores_are_drawn(stored_slide, tmp_path, value):
    scores = np.zeros(len(stored_slide))
    scores[0] = value
    render_heatmap(tmp_path / "a.png", stored_slide, scores, title="constant")
    assert (tmp_path / "a.png").exists()


def test_scores_that_do_not_match_the_tiles_are_refused(stored_slide, tmp_path):
    with pytest.raises(ValueError, match="scores must be"):
        render_heatmap(tmp_path / "a.png", stored_slide, np.zeros(3), title="wrong")
