"""Training and prediction on the tiles that `tile` found, with outlines edited there."""

import json
from pathlib import Path

import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.store import list_slides, read_slide, slide_folder
from pipelines.pathology.synthetic import make_cohort
from pipelines.shared.cli import main


def run(*arguments: str) -> int:
    return main("pathology", VERBS, list(arguments))


def test_train_and_predict_choose_from_the_surveys_of_tile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, tiled = tmp_path / "cohort", tmp_path / "tiled"
    make_cohort(cohort, variant="near", num_pairs=3, test_pairs=1, val_pairs=1, seed=0)
    slides = f"slides={cohort / 'slides'}"
    plan = ["tile_px=64", "mpp=0.5", "min_tissue=0.25", "leave_out=[]"]
    edited = tmp_path / "edited"
    edited.mkdir()
    names = sorted(path.stem for path in (cohort / "slides").iterdir())
    square = [[0, 0], [640, 0], [640, 640], [0, 640], [0, 0]]
    drawn = {"geometry": {"type": "Polygon", "coordinates": [square]}}
    for name in names:
        (edited / f"{name}.geojson").write_text(json.dumps([drawn]))
    given = ["tile", slides, f"outlines={edited}", f"out={tiled}", "preview=false"]
    assert run(*given, *plan, "progress=false") == 0
    quick = ["baselines=[]", "epochs=1", "heatmaps=0", "trainer.progress=false", "num_workers=1"]
    out, labels = tmp_path / "trained", f"labels={cohort / 'labels.csv'}"
    train = ["train", slides, labels, f"out={out}", *plan, *quick]
    assert run(*train, f"tiles={tmp_path / 'nowhere'}") == 2
    assert "holds no surveys" in capsys.readouterr().err
    assert run(*train, f"tiles={tiled}") == 0
    store = out / "features"
    assert list_slides(store) == names
    assert {len(read_slide(slide_folder(store, name))) for name in names} == {100}
    given = ["predict", slides, f"features={store}", f"ckpt={out / 'model.ckpt'}", "heatmaps=false"]
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert run(*given, f"out={tmp_path / 'p'}") == 2
    assert "chosen from another survey (tiles=)" in capsys.readouterr().err
    assert run(*given, f"tiles={tiled}", f"out={tmp_path / 'p'}") == 0
    assert before == {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
