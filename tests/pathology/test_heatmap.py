from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.heatmap import caption, render_heatmap
from pipelines.pathology.slides import find_slides
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.tile_scores import TileScores, write_scores
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.cli import main


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
    render_heatmap(folder / "a.png", stored_slide, scores, title="a_b $c_$", unit="share")
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    assert colourful(folder / "a.png") > 0.1


@pytest.mark.parametrize(
    ("known", "said", "expected"),
    [
        (
            {"label": "b"},
            {"prediction": "c", "probability_a": 0.1, "probability_b": 0.2, "probability_c": 0.7},
            "s: label b, prediction c (0.700)",
        ),
        (None, {"prediction": np.float64(2.34567)}, "s: prediction 2.346"),
        (
            {"time": 27.020000000000003, "event": 1},
            {"risk": 1.103365, "group": "low", "survival_12": 0.615},
            "s: time 27.02, event 1, risk 1.103, group low",
        ),
    ],
    ids=["classes", "number", "survival"],
)
def test_a_picture_says_the_predicted_class_and_its_probability(known, said, expected):
    assert caption("s", said, known) == expected


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_constant_or_partly_missing_scores_are_drawn(stored_slide, tmp_path, value):
    scores = np.zeros(len(stored_slide))
    scores[0] = value
    render_heatmap(tmp_path / "a.png", stored_slide, scores, title="constant")
    assert (tmp_path / "a.png").exists()


def test_scores_that_do_not_match_the_tiles_are_refused(stored_slide, tmp_path):
    with pytest.raises(ValueError, match="scores must be"):
        render_heatmap(tmp_path / "a.png", stored_slide, np.zeros(3), title="wrong")


def run(*arguments):
    return main("pathology", VERBS, [str(argument) for argument in arguments])


@pytest.fixture
def predictions(stored_slide, tmp_path):
    """Kept scores of the stored slide, and of one that has no picture."""
    count = len(stored_slide)
    scores = TileScores(
        np.full(count, 1 / count), {"a": np.arange(count) / count, "b": np.ones(count)}, "a"
    )
    folder = tmp_path / "predictions" / "tile_scores"
    write_scores(folder / "tissue.zarr", stored_slide, scores)
    other = replace(stored_slide, slide_id="other")
    high = TileScores(scores.attention, {**scores.outputs, "a": np.full(count, 9.0)}, "a")
    write_scores(folder / "other.zarr", other, high)
    return tmp_path / "predictions"


def test_kept_scores_are_drawn_again(predictions, stored_slide, tmp_path):
    out = tmp_path / "out"
    given = [f"predictions={predictions}", f"features={tmp_path}", "progress=false", f"out={out}"]
    assert run("heatmap", *given) == 3
    assert sorted(path.name for path in out.glob("*.png")) == [
        "tissue.a.png", "tissue.attention.png", "tissue.b.png",
    ]  # fmt: skip
    failures = (out / "failures.csv").read_text()
    assert "other" in failures
    assert "no_picture" in failures
    assert colourful(out / "tissue.a.png") > 0.1


def test_one_scale_over_slides_makes_low_scores_dark(predictions, tissue_slide, tmp_path):
    """Alone the slide's scores fill the colours; beside one that scores 9 they are all low."""
    given = [f"predictions={predictions}", f"features={tmp_path}", "scores=[a]", "progress=false"]
    yellow = {}
    for same in ("true", "false"):
        out = tmp_path / same
        assert run("heatmap", *given, f"same_scale={same}", f"out={out}") == 3
        with Image.open(out / "tissue.a.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        middle = pixels[:, : pixels.shape[1] * 85 // 100]  # without the colour bar
        yellow[same] = int(((middle[..., 1] - middle[..., 2]) > 60).sum())
    assert yellow["true"] == 0
    assert yellow["false"] > 100


def test_pictures_come_sharper_from_the_slides(predictions, tissue_slide, tmp_path):
    given = [f"predictions={predictions}", "progress=false", "only=[tissue]", "scores=[b]"]
    slides = f"slides={tissue_slide.parent}"
    assert run("heatmap", *given, slides, "mpp=0.5", f"out={tmp_path / 'out'}") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["tissue.b.png"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["scores=[c]"], "attention, a, b"),
        (["only=[nowhere]"], "it has other, tissue"),
        (["predictions={tmp}/empty"], "tile_scores=true"),
        (["features={tmp}/empty"], "no slide could be drawn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_drawn_is_said(predictions, tmp_path, capsys, more, words):
    given = [f"predictions={predictions}", f"features={tmp_path}", f"out={tmp_path / 'out'}"]
    assert run("heatmap", *given, *[part.format(tmp=tmp_path) for part in more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
