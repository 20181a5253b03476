"""The verb `tile` through the command line."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.surveys import read_survey
from pipelines.shared.cli import main

QUICK = ["tile_px=64", "progress=false", "num_workers=1"]


def tile(*arguments: object) -> int:
    return main("pathology", VERBS, ["tile", *map(str, arguments), *QUICK])


def table_of(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "slides.csv").set_index("slide_id")


class LeftHalf:
    """A tissue model: the left half of the slide."""

    mpp, fingerprint = 4.0, "left-half-1"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        share = np.zeros(image.shape[:2], dtype=bool)
        share[:, : image.shape[1] // 2] = True
        return share


def test_surveys_outlines_previews_and_a_table_are_written(tissue_slide, tmp_path):
    out = tmp_path / "out"
    assert tile(f"slides={tissue_slide.parent}", f"out={out}") == 0
    row = table_of(out).loc["tissue"]
    assert (row["tiles"], row["pen"], row["dark"]) == (24, 0, 0)
    assert row["cells"] > 24
    assert (row["mpp"], row["mpp_source"], row["filter"]) == (0.5, "tiff_resolution", "none")
    assert row["tissue_mm2"] == pytest.approx(384 * 256 * 0.25e-6, rel=0.03)
    with Image.open(out / "previews" / "tissue.png") as image:
        pixels = np.asarray(image)
    assert max(pixels.shape) == 900
    green = (pixels == (46, 160, 67)).all(axis=2)
    assert 1000 < green.sum() < 20_000
    features = json.loads((out / "outlines" / "tissue.geojson").read_text())["features"]
    assert len(features) == 1
    assert (out / "failures.csv").read_text() == "slide_id,path,status,reason,remedy\n"


def test_a_second_run_keeps_surveys_and_thresholds_choose_anew(
    tissue_slide, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = [f"slides={tissue_slide.parent}", f"out={out}"]
    assert tile(*command, "tile_px=96") == 0
    survey = out / "surveys" / "tissue.npz"
    before, tiles = survey.stat().st_mtime_ns, table_of(out).loc["tissue", "tiles"]
    drawn = (out / "outlines" / "tissue.geojson").read_bytes()
    monkeypatch.setattr("pipelines.pathology.tile.find_tissue", None)  # nothing is looked at again
    assert tile(*command, "min_tissue=0") == 0
    assert survey.stat().st_mtime_ns == before
    assert (out / "outlines" / "tissue.geojson").read_bytes() == drawn
    assert "1 surveys were there" in capsys.readouterr().out
    assert table_of(out).loc["tissue", "tiles"] >= tiles


def test_a_damaged_survey_is_made_again_with_the_same_bytes(tissue_slide, tmp_path):
    out = tmp_path / "out"
    command = [f"slides={tissue_slide.parent}", f"out={out}", "preview=false"]
    assert tile(*command) == 0
    survey = out / "surveys" / "tissue.npz"
    whole = survey.read_bytes()
    survey.write_bytes(whole[: len(whole) // 2])
    assert read_survey(survey, {}) is None
    assert tile(*command) == 0
    assert survey.read_bytes() == whole


def test_another_geometry_in_the_folder_is_refused(tissue_slide, tmp_path, capsys):
    command = [f"slides={tissue_slide.parent}", f"out={tmp_path / 'out'}"]
    assert tile(*command) == 0
    assert tile(*command, "mpp=1.0") == 2
    assert "mpp: 0.5 -> 1.0" in capsys.readouterr().err


def test_an_edited_outline_decides_and_editing_it_again_counts(tissue_slide, tmp_path):
    drawn, out = tmp_path / "drawn", tmp_path / "out"
    drawn.mkdir()
    command = [f"slides={tissue_slide.parent}", f"out={out}", f"outlines={drawn}"]

    def draw(side: int) -> None:
        ring = [[0, 0], [side, 0], [side, side], [0, side], [0, 0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        text = json.dumps({"type": "Feature", "geometry": geometry})
        (drawn / "tissue.geojson").write_text(text)

    draw(128)
    assert tile(*command) == 0
    assert table_of(out).loc["tissue", ["tiles", "tissue_source"]].tolist() == [4, "outline"]
    draw(192)
    assert tile(*command) == 0
    assert table_of(out).loc["tissue", "tiles"] == 9


def test_what_was_written_comes_back_as_it_was(tissue_slide, tmp_path):
    slides, first, again = tissue_slide.parent, tmp_path / "a", tmp_path / "b"
    assert tile(f"slides={slides}", f"out={first}") == 0
    assert tile(f"slides={slides}", f"out={again}", f"outlines={first / 'outlines'}") == 0
    one, two = (np.load(out / "surveys" / "tissue.npz") for out in (first, again))
    for name in ("mask", "grid", "tissue"):
        assert np.array_equal(one[name], two[name])


def test_a_model_finds_the_tissue(tissue_slide, tmp_path, monkeypatch):
    module = types.ModuleType("my_tissue")
    module.make = LeftHalf
    monkeypatch.setitem(sys.modules, "my_tissue", module)
    out = tmp_path / "out"
    command = [f"slides={tissue_slide.parent}", f"out={out}"]
    assert tile(*command, "tissue_model=my_tissue:make") == 0
    assert table_of(out).loc["tissue", ["tiles", "tissue_source"]].tolist() == [40, "model"]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tissue_slide, tmp_path, capsys):
    (tissue_slide.parent / "text.svs").write_text("no slide")
    out = tmp_path / "out"
    assert tile(f"slides={tissue_slide.parent}", f"out={out}", "dry_run=true") == 3
    shown = capsys.readouterr().out
    for words in ("640 x 512", "10 x 8", "tiff_resolution", "failed: text: unreadable", "1 slides"):
        assert words in shown
    assert not out.exists()
    (tissue_slide.parent / "text.svs").unlink()
    assert tile(f"slides={tissue_slide.parent}", f"out={out}") == 0
    assert tile(f"slides={tissue_slide.parent}", f"out={out}", "dry_run=true") == 0
    assert "it is current" in capsys.readouterr().out


def test_copies_under_two_names_are_noted(tissue_slide, tmp_path, capsys):
    rows = ["slide_id,path,mpp", f"A,{tissue_slide},", f"B,{tissue_slide},"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert tile(f"slides={tmp_path / 't.csv'}", f"out={tmp_path / 'out'}") == 0
    assert "one file under several ids: A, B" in capsys.readouterr().out


def test_plain_images_are_slides_where_a_table_gives_their_resolution(tmp_path, paint):
    image = Image.fromarray(paint(512, 640, (slice(128, 384), slice(128, 512))))
    for name in ("a.png", "b.jpg", "c.tif"):
        image.save(tmp_path / name)
    rows = ["slide_id,path,mpp", "A,a.png,0.5", "B,b.jpg,0.4", "C,c.tif,0.5"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert tile(f"slides={tmp_path / 't.csv'}", f"out={tmp_path / 'o'}", "mpp=0.5") == 0
    table = table_of(tmp_path / "o")
    assert table["tiles"].tolist() == [24, 12, 24]
    assert set(table["mpp_source"]) == {"given"}


@pytest.mark.real_data
def test_real_slides_are_tiled_and_refused(real_data, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "unreadable.svs"):
        shutil.copy(real_data / "slides" / name, slides)
    shutil.copy(real_data / "slides" / "colorectal" / "crc_H_00.tiff", slides)
    command = [f"slides={slides}", f"out={tmp_path / 'o'}", "blur=true", "tile_px=256"]
    assert main("pathology", VERBS, ["tile", *command, "progress=false"]) == 3
    table = table_of(tmp_path / "o")
    assert 30 <= table.loc["CMU-1-Small-Region", "tiles"] <= 45
    assert table[["pen", "dark", "blur"]].to_numpy().sum() == 0  # clean slides, in focus
    failures = pd.read_csv(tmp_path / "o" / "failures.csv").set_index("slide_id")["status"]
    assert failures.to_dict() == {
        "TCGA-CR-7395-01A-01-TS1": "missing_mpp",
        "unreadable": "unreadable",
    }


def test_a_verb_without_choices_speaks_of_none(capsys):
    assert main("pathology", VERBS, ["tile", "--help"]) == 0
    assert "choice" not in capsys.readouterr().out
    assert main("pathology", VERBS, ["tile", "slidez=x"]) == 2
    assert "choices" not in capsys.readouterr().err
