"""What a report says: scores, differences, subgroups, thresholds, calibration, an external test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pipelines.shared.calibration import apply_temperature, choose_threshold, fit_temperature
from pipelines.shared.errors import InputError
from pipelines.shared.evaluation import (
    RESAMPLES,
    Estimate,
    Fold,
    compare,
    ensemble,
    estimate,
)
from pipelines.shared.metrics import (
    ClassPredictions,
    JointPredictions,
    OneTarget,
    Predictions,
    RiskPredictions,
    Score,
)
from pipelines.shared.saved_predictions import Parts
from pipelines.shared.splits import EXTERNAL

Task = Literal["classification", "multilabel", "regression", "tracks", "survival"]
HEADLINES: dict[Task, tuple[str, ...]] = {
    "classification": ("auroc", "auprc", "balanced_accuracy", "f1", "mcc"),
    "multilabel": ("auroc", "auprc", "f1", "mcc", "exact_match"),
    "regression": ("r2", "pearson", "spearman", "mae"),
    "tracks": ("r2", "pearson", "spearman"),
    "survival": ("c_index",),
}
"""Scores that a terminal has room for."""

Scores = dict[str, Score]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures fitted on each fold's validation rows, and the error before and after."""

    temperatures: list[float]
    before: Score
    after: Score


@dataclass(frozen=True, slots=True)
class Subgroup:
    """Test rows with one value of a column: how many, and each model's scores of them."""

    count: int
    scores: dict[str, Scores]


@dataclass(frozen=True, slots=True)
class External:
    """The ensemble of each model's folds on rows that no fold trained on or chose by."""

    count: int
    scores: dict[str, Scores]
    differences: dict[str, Scores]


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """All models' scores on the same folds.

    `tested` holds the test rows that were scored, with the threshold that their validation rows
    chose; `calibrated` the same after temperature scaling. Of several targets `by_target` has each
    one's scores by model.
    """

    task: Task
    tested: dict[str, list[Fold]]
    scores: dict[str, Scores]
    by_fold: dict[str, dict[str, list[float | None]]]
    reference: str | None
    differences: dict[str, Scores]
    thresholds: dict[str, list[float]] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    calibrated: dict[str, list[Fold]] = field(default_factory=dict)
    subgroups: dict[str, dict[str, Subgroup]] = field(default_factory=dict)
    external: External | None = None
    by_target: dict[str, dict[str, Scores]] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none but in classification."""
        given = next(iter(self.tested.values()))[0].predictions
        return given.classes if isinstance(given, ClassPredictions) else ()

    @property
    def num_rows(self) -> int:
        """Distinct test rows over the folds."""
        return len({name for fold in next(iter(self.tested.values())) for name in fold.ids})

    @property
    def num_groups(self) -> int:
        """Distinct groups over the folds."""
        return len({name for fold in next(iter(self.tested.values())) for name in fold.groups})

    def plain(self) -> dict[str, object]:
        """Return what `metrics.json` holds."""
        return {
            "task": self.task,
            "classes": list(self.classes),
            "folds": len(next(iter(self.tested.values()))),
            "rows": self.num_rows,
            "groups": self.num_groups,
            "scores": _plain(self.scores),
            "scores_by_fold": self.by_fold,
            "scores_by_target": {name: _plain(scores) for name, scores in self.by_target.items()},
            "reference": self.reference,
            "differences": _plain(self.differences),
            "thresholds": self.thresholds,
            "calibration": {
                name: {
                    "temperatures": item.temperatures,
                    "ece_before": item.before.plain(),
                    "ece_after": item.after.plain(),
                }
                for name, item in self.calibration.items()
            },
            "subgroups": {
                column: {
                    value: {"rows": item.count, "scores": _plain(item.scores)}
                    for value, item in values.items()
                }
                for column, values in self.subgroups.items()
            },
            "external": None
            if self.external is None
            else {
                "rows": self.external.count,
                "scores": _plain(self.external.scores),
                "differences": _plain(self.external.differences),
            },
        }


def assess(
    models: Mapping[str, Sequence[Parts]],
    *,
    threshold: float | None = None,
    reference: str | None = None,
    attributes: Mapping[str, Mapping[str, str]] | None = None,
    developed: Sequence[frozenset[str]] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Assessment:
    """Score models, a sequence of folds each, on the same test rows.

    `threshold` of two classes: None takes what each fold's validation rows choose (Youden's J; 0.5
    without any). Differences are to the model `reference`. `attributes` maps a column (site, sex)
    to the value of each row's id. `developed` names the groups that each fold trained on: an
    ensemble's rows must be of none of them, nor of those that a fold chose by or tested. Raises
    InputError where models were not tested on the same rows, and for an unknown reference.
    """
    if reference is not None and reference not in models:
        raise InputError(f"reference={reference} is none of {', '.join(models)}")
    require_same_rows(models)
    settled = {
        name: [_settle(parts, threshold) for parts in folds] for name, folds in models.items()
    }
    tested = {name: [parts["test"] for parts in folds] for name, folds in settled.items()}
    found = {
        name: estimate(folds, resamples=resamples, seed=seed) for name, folds in tested.items()
    }
    first = next(iter(tested.values()))[0].predictions
    calibrated, calibration = _calibrate(settled, found, resamples, seed)
    return Assessment(
        task=_task(first),
        tested=tested,
        scores=_scores(found),
        by_fold={
            name: {score: _finite(item.folds) for score, item in items.items()}
            for name, items in found.items()
        },
        reference=reference,
        differences=_differences(found, reference),
        thresholds=_thresholds(tested),
        calibration=calibration,
        calibrated=calibrated,
        subgroups=_subgroups(tested, attributes or {}, resamples, seed),
        external=_external(settled, reference, developed, resamples, seed),
        by_target=_by_target(tested, resamples, seed),
    )


def require_same_rows(models: Mapping[str, Sequence[Parts]]) -> None:
    """Raise InputError unless all models were tested on the same rows, fold by fold."""
    (first, folds), *others = models.items()
    for name, other in others:
        if len(other) != len(folds):
            raise InputError(f"{name} has {len(other)} folds and {first} {len(folds)}")
        for number, (one, two) in enumerate(zip(folds, other, strict=True)):
            apart = set(one["test"].ids) ^ set(two["test"].ids)
            if apart:
                raise InputError(
                    f"fold {number}: {first} and {name} were tested on other rows "
                    f"({', '.join(sorted(apart)[:5])}); differences need the same folds"
                )


def _task(given: Predictions) -> Task:
    if isinstance(given, ClassPredictions):
        return "classification"
    if isinstance(given, JointPredictions):
        return "tracks" if given.exact is None else "multilabel"
    return "survival" if isinstance(given, RiskPredictions) else "regression"


def _of_target(folds: Parts, name: str) -> Parts:
    """Take one of several targets out of the rows of each split."""
    found = {}
    for split, fold in folds.items():
        assert isinstance(fold.predictions, JointPredictions), "rows have several targets"
        found[split] = replace(fold, predictions=fold.predictions.parts[name])
    return found


def _by_target(
    tested: Mapping[str, Sequence[Fold]], resamples: int, seed: int
) -> dict[str, dict[str, Scores]]:
    """Scores of each of several targets, by model; none where there is one target."""
    first = next(iter(tested.values()))[0].predictions
    names = first.parts if isinstance(first, JointPredictions) else ()
    found: dict[str, dict[str, Scores]] = {}
    for name in names:
        each = {
            model: estimate(
                [_of_target({"test": fold}, name)["test"] for fold in folds],
                resamples=resamples,
                seed=seed,
            )
            for model, folds in tested.items()
        }
        found[name] = _scores(each)
    return found


def _settle(parts: Parts, threshold: float | None) -> Parts:
    """Give the rows of two classes their threshold, and those of labels one for each."""
    given = parts["test"].predictions
    if isinstance(given, JointPredictions):
        each = {name: _settle(_of_target(parts, name), threshold) for name in given.parts}
        return {
            split: replace(
                part, predictions=JointPredictions({n: _one(s[split]) for n, s in each.items()})
            )
            for split, part in parts.items()
        }
    if not isinstance(given, ClassPredictions) or len(given.classes) != 2:
        return parts
    chosen = threshold
    if chosen is None:
        chosen = 0.5
        validation = parts["val"].predictions if "val" in parts else None
        if isinstance(validation, ClassPredictions):
            chosen = choose_threshold(validation.targets, validation.probabilities[:, 1])
    settled = {}
    for split, part in parts.items():
        assert isinstance(part.predictions, ClassPredictions)
        settled[split] = replace(part, predictions=replace(part.predictions, threshold=chosen))
    return settled


def _one(fold: Fold) -> OneTarget:
    assert not isinstance(fold.predictions, JointPredictions | RiskPredictions), "a single target"
    return fold.predictions


def _calibrate(
    models: Mapping[str, Sequence[Parts]],
    found: Mapping[str, Mapping[str, Estimate]],
    resamples: int,
    seed: int,
) -> tuple[dict[str, list[Fold]], dict[str, Calibration]]:
    """Scale each fold's test rows by the temperature of its validation rows, where it has any."""
    folds: dict[str, list[Fold]] = {}
    errors: dict[str, Calibration] = {}
    for name, parts in models.items():
        scaled, temperatures = [], []
        for part in parts:
            given = part["test"].predictions
            validation = part["val"].predictions if "val" in part else None
            if not isinstance(given, ClassPredictions) or not isinstance(
                validation, ClassPredictions
            ):
                break
            temperature = fit_temperature(validation.targets, validation.probabilities)
            shares = apply_temperature(given.probabilities, temperature)
            temperatures.append(temperature)
            scaled.append(replace(part["test"], predictions=replace(given, probabilities=shares)))
        if len(scaled) < len(parts):
            continue
        after = estimate(scaled, resamples=resamples, seed=seed, names=["ece"])["ece"]
        folds[name] = scaled
        errors[name] = Calibration(temperatures, found[name]["ece"].score(), after.score())
    return folds, errors


def _subgroups(
    tested: Mapping[str, Sequence[Fold]],
    attributes: Mapping[str, Mapping[str, str]],
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Subgroup]]:
    found: dict[str, dict[str, Subgroup]] = {}
    for column, value_of in attributes.items():
        found[column] = {}
        ids = {name for fold in next(iter(tested.values())) for name in fold.ids}
        for value in sorted({value_of[name] for name in ids}):
            scores, count = {}, 0
            for model, folds in tested.items():
                inside = [_inside(fold, value_of, value) for fold in folds]
                count = len({name for fold in inside for name in fold.ids})
                items = estimate(inside, resamples=resamples, seed=seed)
                scores[model] = {name: item.score() for name, item in items.items()}
            found[column][value] = Subgroup(count, scores)
    return found


def _inside(fold: Fold, value_of: Mapping[str, str], value: str) -> Fold:
    rows = [row for row, name in enumerate(fold.ids) if value_of[name] == value]
    return fold.take(np.array(rows, dtype=np.int64))


def _external(
    models: Mapping[str, Sequence[Parts]],
    reference: str | None,
    developed: Sequence[frozenset[str]],
    resamples: int,
    seed: int,
) -> External | None:
    if not all(EXTERNAL in parts for folds in models.values() for parts in folds):
        return None
    joint = {name: ensemble([parts[EXTERNAL] for parts in folds]) for name, folds in models.items()}
    groups = set(next(iter(joint.values())).groups)
    known = {
        group
        for folds in models.values()
        for parts in folds
        for split, part in parts.items()
        if split != EXTERNAL
        for group in part.groups
    }
    seen = groups & known.union(*developed)
    if seen:
        raise InputError(
            f"{len(seen)} groups of the external test stand in a fold: {', '.join(sorted(seen))}; "
            "an ensemble is scored only on what none of its models has seen"
        )
    found = {name: estimate([fold], resamples=resamples, seed=seed) for name, fold in joint.items()}
    count = len(next(iter(joint.values())))
    return External(count, _scores(found), _differences(found, reference))


def _scores(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Scores]:
    return {
        name: {score: item.score() for score, item in items.items()}
        for name, items in found.items()
    }


def _differences(
    found: Mapping[str, Mapping[str, Estimate]], reference: str | None
) -> dict[str, Scores]:
    if reference is None:
        return {}
    return {
        name: compare(items, found[reference]) for name, items in found.items() if name != reference
    }


def _thresholds(tested: Mapping[str, Sequence[Fold]]) -> dict[str, list[float]]:
    """Thresholds of each model by fold: of two classes one, of labels one for each."""
    found: dict[str, list[float]] = {}
    for name, folds in tested.items():
        given = folds[0].predictions
        if isinstance(given, JointPredictions) and given.exact is not None:
            for label in given.parts:
                parts = [_of_target({"test": fold}, label)["test"] for fold in folds]
                found[f"{name}, {label}"] = [_threshold(part) for part in parts]
        elif len(_classes(folds[0])) == 2:
            found[name] = [_threshold(fold) for fold in folds]
    return found


def _threshold(fold: Fold) -> float:
    assert isinstance(fold.predictions, ClassPredictions)
    return fold.predictions.threshold if fold.predictions.threshold is not None else 0.5


def _classes(fold: Fold) -> tuple[str, ...]:
    return fold.predictions.classes if isinstance(fold.predictions, ClassPredictions) else ()


def _finite(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _plain(scores: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float | str | None]]]:
    return {
        name: {score: item.plain() for score, item in items.items()}
        for name, items in scores.items()
    }
