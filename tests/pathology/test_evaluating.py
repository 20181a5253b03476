"""The verb evaluate, through the command line, on tables made here."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.shared.cli import main
from tests.shared.tables_of_predictions import write_classes


def run(*arguments: object) -> int:
    return main("pathology", VERBS, ["evaluate", "resamples=50", *map(str, arguments)])


@pytest.fixture
def folds(tmp_path: Path) -> Path:
    """A run of two folds with two models."""
    folder = tmp_path / "ours"
    for fold in (0, 1):
        write_classes(
            folder / f"fold_{fold}" / "predictions.csv", seed=fold, start=30 * fold, strength=3.0
        )
        write_classes(
            folder / f"fold_{fold}" / "models" / "abmil" / "predictions.csv",
            seed=9 + fold, start=30 * fold, strength=0.5,
        )  # fmt: skip
    (folder / "config.yaml").write_text("pattern: {expression: Dense()}\nmodel: {dim: 64}\n")
    return folder


def _labels(path: Path) -> Path:
    rows = [(f"s{row}.svs", f"p{row // 2}", f"h{row // 2 % 2}", row % 2) for row in range(60)]
    columns = ["slide_id", "patient_id", "hospital", "side"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def test_a_run_is_scored_by_patient_with_subgroups(
    folds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, out = _labels(tmp_path / "labels.csv"), tmp_path / "out"

    assert run(f"run={folds}", f"labels={labels}", "subgroups=[hospital]", f"out={out}") == 0

    shown = capsys.readouterr().out
    assert "20 patients in 2 folds" in shown
    assert "sparse transformer" in shown
    assert "difference to attention pooling (ABMIL), paired" in shown
    assert "AUROC by hospital" in shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["rows"], metrics["groups"], metrics["reference"]) == (20, 20, "abmil")
    assert metrics["differences"]["model"]["auroc"]["low"] is not None
    assert set(metrics["subgroups"]["hospital"]) == {"h0", "h1"}
    assert metrics["summary"]["auroc"] == metrics["scores"]["model"]["auroc"]["value"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "mean over the patient" in page
    assert "expression Dense()" in page
    assert run(f"run={folds}", f"labels={labels}", "subgroups=[hospital]", f"out={out}") == 0
    assert "holds this finished evaluation" in capsys.readouterr().out


def test_a_report_says_how_a_patients_slides_were_joined(folds: Path, tmp_path: Path) -> None:
    (folds / "config.yaml").write_text("unit: patient\n")
    assert run(f"run={folds}", f"out={tmp_path / 'out'}") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "slides are one sequence" in page
    assert "mean over the patient" not in page


def test_slides_are_scored_with_intervals_over_patients(folds: Path, tmp_path: Path) -> None:
    labels, out = _labels(tmp_path / "labels.csv"), tmp_path / "out"

    code = run(
        f"run={folds}", "score_by=slide", f"labels={labels}", "subgroups=[side]", f"out={out}"
    )

    assert code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["rows"], metrics["groups"]) == (40, 20)
    assert metrics["subgroups"]["side"]["1"]["rows"] == 20


def test_another_run_of_the_same_folds_is_compared(folds: Path, tmp_path: Path) -> None:
    for fold in (0, 1):
        write_classes(
            tmp_path / "theirs" / f"fold_{fold}" / "predictions.csv",
            seed=20 + fold, start=30 * fold, strength=1.0,
        )  # fmt: skip
    out = tmp_path / "out"

    assert run(f"run={folds}", f"against={tmp_path / 'theirs'}", f"out={out}") == 0

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["reference"] == "theirs/model"
    assert set(metrics["differences"]) == {"model", "abmil"}


def test_a_table_of_ones_own_is_scored(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "mine.csv", classes=("low", "mid", "high"))
    out = tmp_path / "out"

    assert run(f"run={path}", "class_order=[low,mid,high]", f"out={out}") == 0

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["reference"] is None
    assert metrics["scores"]["mine"]["qwk"]["value"] is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["subgroups=[hospital]"], "subgroups= needs labels="),
        (["subgroups=[city]", "labels={labels}"], "no column 'city' for subgroups="),
        (["subgroups=[side]", "labels={labels}"], "use score_by=slide"),
        (["score_by=tile"], "score_by is slide or patient"),
        (["reference=abmli"], "reference is one of model, mean"),
        (["threshold=1.4"], "threshold is a probability; got 1.4"),
        (["resamples=-1"], "resamples must not be negative; got -1"),
        (["against={folds}/fold_0"], "has 1 folds and model 2"),
        (["class_order=[a,c]"], "class_order must name each of a, b"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    folds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    words: str,
) -> None:  # fmt: skip
    labels = _labels(tmp_path / "labels.csv")
    given = [argument.format(labels=labels, folds=folds) for argument in arguments]

    assert run(f"run={folds}", *given, f"out={tmp_path / 'out'}") == 2

    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
