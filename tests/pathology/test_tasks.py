"""Every task through the command line, on drawn slides whose tumour burden decides."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.survival import CoxSurvival
from pipelines.shared.checkpoint import load_model
from pipelines.shared.cli import main

QUICK = [
    "logger=none", "trainer.progress=false", "heatmaps=0", "batch_size=16", "epochs=8",
    "optim.lr=0.01",
]  # fmt: skip
NUM_PATIENTS = 90


def run(*arguments: object) -> int:
    return main("pathology", VERBS, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cohort(draw_slides: Callable[..., list[str]], tmp_path_factory) -> Path:
    """Patients with two slides each of equal burden; a hazard of exp(10 burden - 5)."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    burden = rng.random(NUM_PATIENTS)
    names = [f"p{number:02d}_{side}" for number in range(NUM_PATIENTS) for side in "ab"]
    draw_slides(folder / "store", np.repeat(burden, 2).tolist(), names=names)
    onset = rng.exponential(np.exp(5 - 10 * burden))
    lost = rng.exponential(3 * np.median(onset), NUM_PATIENTS)
    table = pd.DataFrame({"patient_id": [f"p{number:02d}" for number in range(NUM_PATIENTS)]})
    table["burden"] = burden
    table["kind"] = np.where(burden > 0.5, "much", "little")
    table["months"] = np.minimum(onset, lost)
    table["dead"] = (onset <= lost).astype(int)
    table["zero"] = 0
    table["split"] = np.where(rng.random(NUM_PATIENTS) < 0.2, "val", "train")
    table.loc[rng.permutation(NUM_PATIENTS)[:24], "split"] = "test"
    slides = table.loc[table.index.repeat(2)].assign(slide_id=names)
    slides.to_csv(folder / "labels.csv", index=False)
    return folder


def train(cohort: Path, out: Path, *more: str) -> pd.DataFrame:
    given = [f"features={cohort / 'store'}", f"labels={cohort / 'labels.csv'}", f"out={out}"]
    assert run("train", *given, *QUICK, *more) == 0
    return pd.read_csv(out / "predictions.csv")


SURVIVAL = ["columns.time=months", "columns.event=dead", "unit=patient", "baselines=[]"]


@pytest.mark.parametrize(
    ("task", "model"), [("survival_cox", "abmil"), ("survival_discrete", "mean")]
)
def test_survival_finds_the_known_hazard(
    cohort: Path, tmp_path: Path, task: str, model: str
) -> None:
    pack = "max_tokens=300"  # fewer than 32 patients fill: several packs share Cox's loss
    table = train(cohort, tmp_path, f"task={task}", f"model={model}", *SURVIVAL, pack, "epochs=20")
    test = table[table["split"] == "test"]
    assert len(test) == 24
    assert test["slide_id"].iloc[0].count(";") == 1
    known = pd.read_csv(cohort / "labels.csv").groupby("patient_id")["burden"].first()
    burden = known.loc[test["patient_id"]].to_numpy()
    best = concordance_index(test["time"], -burden, test["event"])
    assert concordance_index(test["time"], -test["risk"], test["event"]) > best - 0.12 > 0.7
    edges = [name for name in table if name.startswith("survival_")]
    assert len(edges) == 4
    assert (np.diff(table[edges], axis=1) <= 0).all()
    metadata = load_model(tmp_path / "model.ckpt", task="pathology").metadata
    high = test["risk"] > metadata["task"]["cut"]
    assert (high == (test["group"] == "high")).all()
    assert test.loc[high, "time"].median() < test.loc[~high, "time"].median()


def test_groups_and_curves_are_those_of_the_training_slides_as_they_are(
    cohort: Path, tmp_path: Path
) -> None:
    """Augmentation is for learning: it has no part in the median risk or the baseline hazard."""
    options = ["task=survival_cox", "model=mean", *SURVIVAL, "epochs=2", "augment.drop_tiles=0.7"]
    table = train(cohort, tmp_path, *options)
    command = ["predict", f"features={cohort / 'store'}", f"ckpt={tmp_path / 'model.ckpt'}"]
    out = tmp_path / "again"
    no_pictures = ["geojson=false", "tile_scores=false", "heatmaps=false"]
    assert run(*command, f"out={out}", f"patients={cohort / 'labels.csv'}", *no_pictures) == 0
    again = pd.read_csv(out / "predictions.csv").set_index("patient_id")
    held = set(table["patient_id"])
    labels = pd.read_csv(cohort / "labels.csv").groupby("patient_id").first()
    trained = again.loc[[name for name in again.index if name not in held]]
    task = load_model(tmp_path / "model.ckpt", task="pathology").metadata["task"]
    assert task["cut"] == pytest.approx(trained["risk"].median(), abs=1e-5)
    targets = labels.loc[trained.index, ["months", "dead"]].to_numpy()
    expected = CoxSurvival().settle(trained[["risk"]].to_numpy(), targets.tolist())
    np.testing.assert_allclose(task["hazards"], expected.hazards, rtol=1e-4)
    curves = pd.read_parquet(out / "survival.parquet")
    assert list(curves) == ["slide_id", "patient_id", "time", "survival"]
    assert len(curves) == len(again) * len(task["times"])
    one = curves[curves["patient_id"] == again.index[3]]
    assert one["time"].tolist() == task["times"]
    shown = [name for name in again if name.startswith("survival_")]
    assert one["survival"].iloc[-1] == again[shown[-1]].iloc[3]
    assert "hazards" not in (tmp_path / "metrics.json").read_text()


def test_patients_are_predicted_as_they_were_in_training(cohort: Path, tmp_path: Path) -> None:
    table = train(
        cohort, tmp_path, "columns.label=kind", "unit=patient", "epochs=1", "baselines=[]"
    )
    out = tmp_path / "again"
    command = ["predict", f"features={cohort / 'store'}", f"ckpt={tmp_path / 'model.ckpt'}"]
    assert run(*command, f"out={out}") == 2  # whose are the slides?
    patients = f"patients={cohort / 'labels.csv'}"
    assert (
        run(
            *command, f"out={out}", patients, "geojson=false", "tile_scores=false", "heatmaps=false"
        )
        == 0
    )
    again = pd.read_csv(out / "predictions.csv").set_index("patient_id")
    ours = table.set_index("patient_id")
    found = again.loc[ours.index, "probability_much"]
    assert np.allclose(found, ours["probability_much"], atol=1e-5)


def test_regression_finds_the_burden(cohort: Path, tmp_path: Path) -> None:
    table = train(
        cohort, tmp_path, "task=regression", "task.loss=huber", "columns.label=burden",
        "baselines=[]", "callbacks.select=r2",
    )  # fmt: skip
    test = table[table["split"] == "test"]
    assert np.corrcoef(test["target"], test["prediction"])[0, 1] > 0.85


def test_augmented_balanced_training_and_explained_predictions(
    cohort: Path, tmp_path: Path
) -> None:
    table = train(
        cohort, tmp_path, "columns.label=kind", "baselines=[clam_sb,gated_abmil]",
        "task.sampling=balanced", "task.class_weights=balanced", "trainer.accumulate=2",
        "augment.dihedral=true", "augment.translate=3", "augment.drop_tiles=0.2",
    )  # fmt: skip
    test = table[table["split"] == "test"]
    assert (test["label"] == test["prediction"]).mean() > 0.75
    out = tmp_path / "predicted"
    assert run(
        "predict", f"features={cohort / 'store'}", f"ckpt={tmp_path / 'model.ckpt'}", f"out={out}",
    ) == 0  # fmt: skip
    found = pd.read_csv(out / "predictions.csv")
    assert pd.read_parquet(out / "predictions.parquet").shape == found.shape
    embeddings = pd.read_parquet(out / "embeddings.parquet")
    assert embeddings["slide_id"].tolist() == found["slide_id"].tolist()
    assert {len(vector) for vector in embeddings["embedding"]} == {64}


def test_bfloat16_and_patience_are_settings_of_train(cohort: Path, tmp_path: Path) -> None:
    table = train(
        cohort, tmp_path, "columns.label=kind", "baselines=[]", "trainer.precision=bf16-mixed",
        "callbacks.patience=1", "callbacks.select=auroc", "epochs=60",
    )  # fmt: skip
    report = json.loads((tmp_path / "metrics.json").read_text())["training"]["model"]
    assert report["epochs"] < 60
    assert report["epochs"] == report["best_epoch"] + 2
    test = table[table["split"] == "test"]
    assert (test["label"] == test["prediction"]).mean() > 0.75


def test_splits_of_a_table_are_kept(cohort: Path, tmp_path: Path, capsys) -> None:
    table = pd.read_csv(cohort / "labels.csv", dtype=str).drop_duplicates("patient_id")
    fold = (
        table[["patient_id"]]
        .iloc[:50]
        .assign(split=["train", "train", "val", "test"] * 12 + ["test", "external"])
    )
    fold.to_csv(tmp_path / "fold.csv", index=False)
    found = train(
        cohort, tmp_path / "run", "columns.label=kind", f"splits={tmp_path / 'fold.csv'}",
        "model=abmil", "baselines=[]", "epochs=1",
    )  # fmt: skip
    assert "80 slides are not in" in capsys.readouterr().out
    known = fold.set_index("patient_id")["split"]
    assert set(found["split"]) == {"val", "test", "external"}
    assert (found["split"] == known.loc[found["patient_id"]].to_numpy()).all()


def test_baselines_that_know_classes_only_are_left_out_of_other_tasks(
    cohort: Path, tmp_path: Path, capsys
) -> None:
    """So that no task needs other baselines= than the default, nor the README's line."""
    train(
        cohort, tmp_path, "task=regression", "columns.label=burden", "model=mean",
        "baselines=[abmil,clam_sb,colour]", "epochs=1",
    )  # fmt: skip
    assert "note: baseline clam_sb knows classes only" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["abmil", "model"]


BAD = {
    "event": (["task=survival_cox", "columns.time=months", "columns.event=burden"], "event is 1"),
    "time": (
        ["task=survival_cox", "columns.time=zero", "columns.event=dead"],
        "time must be above",
    ),
    "words": (["task=regression", "columns.label=kind"], "row 2: kind must be a number"),
    "few": (["task=survival_cox", "task.patients=500", *SURVIVAL[:3]], "500 or more"),
    "clam": (["task=regression", "columns.label=burden", "model=clam_sb"], "classes only"),
    "pooling": (["columns.label=kind", "model=abmil", "baselines=[window]"], "window changes"),
    "one column": (
        ["task=survival_cox", "columns.time=months", "columns.event=months"],
        "columns.time and columns.event are both 'months'",
    ),
    "unit": (["columns.label=kind", "unit=person"], "slide or patient"),
    "score": (["columns.label=kind", "callbacks.select=r2"], "score is auroc"),
    "heatmaps": (["columns.label=kind", "heatmaps=-1"], "heatmaps must not be negative"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_makes_no_task_is_refused(case: str, cohort: Path, tmp_path: Path, capsys) -> None:
    settings, words = BAD[case]
    given = [f"features={cohort / 'store'}", f"labels={cohort / 'labels.csv'}"]
    assert run("train", *given, f"out={tmp_path / 'out'}", "baselines=[]", *QUICK, *settings) == 2
    assert words in capsys.readouterr().err


def test_slides_of_a_patient_must_agree(cohort: Path, tmp_path: Path, capsys) -> None:
    table = pd.read_csv(cohort / "labels.csv", dtype=str)
    table.loc[3, "kind"] = {"much": "little", "little": "much"}[table.loc[3, "kind"]]
    table.to_csv(tmp_path / "labels.csv", index=False)
    given = [f"features={cohort / 'store'}", f"labels={tmp_path / 'labels.csv'}", "unit=patient"]
    assert run("train", *given, f"out={tmp_path / 'out'}", "columns.label=kind", *QUICK) == 2
    error = capsys.readouterr().err
    assert "patient 'p01' differ in label" in error
    assert "unit=slide" in error
