from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from pipelines.shared.assessment import Assessment, assess
from pipelines.shared.errors import InputError
from pipelines.shared.metrics import ClassPredictions
from pipelines.shared.saved_predictions import Parts, read_parts
from tests.shared.tables_of_predictions import write_classes, write_risks, write_values


def _folds(
    folder: Path, name: str, strength: float, *, classes: tuple[str, ...] = ("a", "b"),
    external: int = 0,
) -> list[Parts]:  # fmt: skip
    return [
        read_parts(
            write_classes(
                folder / name / f"{fold}.csv", seed=fold, start=30 * fold, classes=classes,
                strength=strength, external=external,
            ),
            group_column="patient_id",
        )
        for fold in range(3)
    ]  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> dict[str, list[Parts]]:
    return {"model": _folds(tmp_path, "model", 3.0), "abmil": _folds(tmp_path, "abmil", 1.0)}


def _given(parts: Parts, split: str) -> ClassPredictions:
    given = parts[split].predictions
    assert isinstance(given, ClassPredictions)
    return given


def test_scores_are_means_over_folds_and_differences_are_paired(
    models: dict[str, list[Parts]],
) -> None:
    found = assess(models, reference="abmil", resamples=200)

    each = {
        name: [
            roc_auc_score(_given(parts, "test").targets, _given(parts, "test").probabilities[:, 1])
            for parts in folds
        ]
        for name, folds in models.items()
    }
    assert found.by_fold["model"]["auroc"] == pytest.approx(each["model"])
    assert found.scores["model"]["auroc"].value == pytest.approx(np.mean(each["model"]))
    apart = found.differences["model"]["auroc"]
    assert apart.value == pytest.approx(np.mean(each["model"]) - np.mean(each["abmil"]))
    assert list(found.differences) == ["model"]
    assert (found.num_rows, found.num_groups) == (60, 30)


def test_thresholds_come_from_validation_and_decide_on_test(
    models: dict[str, list[Parts]],
) -> None:
    found = assess(models, resamples=0)

    for fold, parts in enumerate(models["abmil"]):
        cut = found.thresholds["abmil"][fold]
        validation, test = _given(parts, "val"), _given(parts, "test")
        best = max(
            balanced_accuracy_score(validation.targets, validation.probabilities[:, 1] >= level)
            for level in np.linspace(0, 1, 21)
        )
        reached = balanced_accuracy_score(validation.targets, validation.probabilities[:, 1] >= cut)
        assert reached >= best
        assert found.by_fold["abmil"]["balanced_accuracy"][fold] == pytest.approx(
            balanced_accuracy_score(test.targets, test.probabilities[:, 1] >= cut)
        )
    assert assess(models, threshold=0.3, resamples=0).thresholds["model"] == [0.3] * 3


def test_calibration_is_told_before_and_after(models: dict[str, list[Parts]]) -> None:
    found = assess(models, resamples=20)

    item = found.calibration["abmil"]
    assert len(item.temperatures) == 3
    assert item.before == found.scores["abmil"]["ece"]
    assert item.after.value is not None
    for fold, scaled in zip(found.tested["abmil"], found.calibrated["abmil"], strict=True):
        order = np.argsort(_given({"test": fold}, "test").probabilities[:, 1])
        after = _given({"test": scaled}, "test").probabilities[order, 1]
        assert (np.diff(after) >= 0).all()  # a temperature keeps the ranks


def test_subgroups_are_scored_apart(models: dict[str, list[Parts]]) -> None:
    ids = {name for parts in models["model"] for name in parts["test"].ids}
    site = {name: "north" if int(name[1:]) % 30 < 20 else "south" for name in ids}

    found = assess(models, attributes={"site": site}, resamples=50).subgroups["site"]

    assert {value: group.count for value, group in found.items()} == {"north": 30, "south": 30}
    parts = models["model"][0]
    inside = [row for row, name in enumerate(parts["test"].ids) if site[name] == "north"]
    given = _given(parts, "test")
    first = roc_auc_score(given.targets[inside], given.probabilities[inside, 1])
    assert 0 <= first <= 1
    assert found["north"].scores["model"]["auroc"].value is not None
    assert set(found["north"].scores) == {"model", "abmil"}


def test_an_ensemble_is_scored_on_external_rows_alone(tmp_path: Path) -> None:
    folds = {"model": _folds(tmp_path, "model", 2.0, external=12)}
    developed = [frozenset(f"p{group}" for group in range(45))] * 3

    found = assess(folds, developed=developed, resamples=50).external

    assert found is not None
    assert found.count == 12
    shares = np.mean([_given(parts, "external").probabilities for parts in folds["model"]], axis=0)
    labels = _given(folds["model"][0], "external").targets
    assert found.scores["model"]["auroc"].value == pytest.approx(
        roc_auc_score(labels, shares[:, 1])
    )
    assert assess(folds, resamples=0).external is not None
    seen = [*developed[:2], developed[2] | {"q1"}]
    with pytest.raises(InputError, match="1 groups of the external test stand in a fold: q1"):
        assess(folds, developed=seen, resamples=0)


def test_models_of_other_folds_cannot_be_compared(
    models: dict[str, list[Parts]], tmp_path: Path
) -> None:
    other = {**models, "late": _folds(tmp_path, "late", 1.0)[::-1]}

    with pytest.raises(InputError, match="fold 0: model and late were tested on other rows"):
        assess(other, resamples=0)
    with pytest.raises(InputError, match="late has 2 folds and model 3"):
        assess({**models, "late": other["late"][:2]}, resamples=0)
    with pytest.raises(InputError, match="reference=clam is none of model, abmil"):
        assess(models, reference="clam", resamples=0)


def test_survival_and_numbers_are_known_by_their_tables(tmp_path: Path) -> None:
    survival = assess({"model": [read_parts(write_risks(tmp_path / "r.csv"))]}, resamples=20)
    numbers = assess({"model": [read_parts(write_values(tmp_path / "v.csv"))]}, resamples=20)

    assert (survival.task, numbers.task) == ("survival", "regression")
    assert survival.scores["model"]["c_index"].value > 0.6  # type: ignore[operator]
    assert survival.thresholds == numbers.thresholds == {}
    assert survival.calibration == {}


def test_what_is_written_is_plain(models: dict[str, list[Parts]]) -> None:
    found: Assessment = assess(models, reference="abmil", resamples=20)

    plain = found.plain()

    assert plain["folds"] == 3
    assert plain["classes"] == ["a", "b"]
    assert set(plain["scores"]) == {"model", "abmil"}  # type: ignore[arg-type]
