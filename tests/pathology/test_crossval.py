"""The verb crossval, through the command line, on small stored features."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.synthetic import make_cohort
from pipelines.shared.cli import main

QUICK = [
    "epochs=1", "logger=none", "trainer.progress=false", "heatmaps=0", "resamples=30", "folds=2",
    "tile_px=64", "mpp=0.5", "baselines=[abmil]", "score_by=slide", "columns.patient_id=pair",
]  # fmt: skip


def run(*arguments: object) -> int:
    return main("pathology", VERBS, ["crossval", *map(str, arguments)])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 slides of 6 pairs, the last of them from another time, and a site."""
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, num_pairs=7, test_pairs=1, val_pairs=1, workers=1, progress=False)
    labels = pd.read_csv(folder / "labels.csv", dtype=str).drop(columns="split")
    labels["era"] = np.where(labels["pair"] == "pair_0006", "later", "first")
    labels["site"] = np.where(labels["label"] == "1", "north", "south")
    labels.to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds, one after the other as an array of jobs would."""
    out = tmp_path_factory.mktemp("run")
    given = [f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}",
             "external.era=later", f"out={out}"]  # fmt: skip
    assert run(*given, *QUICK, "fold=1") == 0
    assert not (out / "metrics.json").exists()
    assert run(*given, *QUICK, "fold=0") == 0
    return out


def test_every_fold_is_tested_and_compared(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())

    assert (metrics["folds"], metrics["rows"], metrics["groups"]) == (2, 12, 6)
    assert set(metrics["scores"]) == {"model", "abmil"}
    assert metrics["scores"]["abmil"]["auroc"]["value"] == 0.5  # a pair holds the same tiles
    assert set(metrics["differences"]) == {"model"}
    assert len(metrics["thresholds"]["model"]) == 2
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Difference to attention pooling (ABMIL)" in page
    assert "External test: 2 slides" in page
    assert (finished / "fold_0" / "model_card.md").exists()


def test_folds_hold_whole_pairs_and_the_ensemble_sees_external_slides_alone(
    finished: Path,
) -> None:
    gathered = pd.read_csv(finished / "all_predictions.csv", dtype=str)
    tested = gathered[(gathered["split"] == "test") & (gathered["model"] == "model")]
    assert sorted(tested["slide_id"]) == sorted(f"near_{number:04d}" for number in range(12))
    for fold in (0, 1):
        table = pd.read_csv(finished / f"splits_{fold}.csv", dtype=str)
        assert table.groupby("patient_id")["split"].nunique().max() == 1
        assert set(table[table["split"] == "external"]["patient_id"]) == {"pair_0006"}
    external = json.loads((finished / "metrics.json").read_text())["external"]
    outside = gathered[(gathered["split"] == "external") & (gathered["model"] == "model")]
    means = outside.assign(p=outside["probability_1"].astype(float)).groupby("slide_id")["p"].mean()
    labels = outside.drop_duplicates("slide_id").set_index("slide_id")["label"]
    brier = ((means - labels.loc[means.index].astype(float)) ** 2).mean()
    assert external["rows"] == 2
    assert external["scores"]["model"]["brier"]["value"] == pytest.approx(brier)


def test_a_finished_run_is_shown_again_and_evaluated_anew(
    finished: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "fold_0" / "model.ckpt").stat().st_mtime_ns
    same = [f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}",
            "external.era=later", f"out={finished}"]  # fmt: skip

    assert run(*same, *QUICK) == 0

    assert "holds this finished cross-validation" in capsys.readouterr().out
    assert (finished / "fold_0" / "model.ckpt").stat().st_mtime_ns == before
    code = main(
        "pathology", VERBS,
        ["evaluate", f"run={finished}", f"labels={cohort / 'labels.csv'}", "subgroups=[era]",
         "score_by=slide", "resamples=20", f"out={tmp_path / 'scores'}"],
    )  # fmt: skip
    assert code == 0
    ours = json.loads((tmp_path / "scores" / "metrics.json").read_text())["scores"]
    assert ours["model"]["auroc"]["value"] == pytest.approx(
        json.loads((finished / "metrics.json").read_text())["scores"]["model"]["auroc"]["value"]
    )


def test_a_dry_run_shows_the_folds(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}", *QUICK, "dry_run=true",
        f"out={tmp_path / 'out'}",
    )  # fmt: skip

    assert code == 0
    assert "14 slides of 7 patients, stratified by label" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fold=2"], "there are folds 0 to 1"),
        (["folds=9"], "give folds="),
        (["score_by=patient"], "differ in label (0, 1); give score_by=slide"),
        (["score_by=tile"], "score_by is slide or patient"),
        (["subgroups=[city]"], "no column 'city' for subgroups="),
        (["splits={folder}"], "holds no splits_0.csv"),
    ],
)
def test_what_cannot_be_crossed_is_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    words: str,
) -> None:  # fmt: skip
    given = [argument.format(folder=tmp_path) for argument in arguments]

    code = run(
        f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}", *QUICK, *given,
        f"out={tmp_path / 'out'}",
    )  # fmt: skip

    assert code == 2
    assert words in capsys.readouterr().err
