"""Scores of saved predictions over folds, with bootstrap intervals over groups (such as patients).

The estimator. A score is computed within each fold, on the fold's own test rows and by the fold's
own model, and the values are averaged over the folds: probabilities of different models are never
ranked against each other. An interval comes from resampling groups over all folds: a group that is
drawn twice counts twice in every fold that tests it, each fold is scored anew, and the averages
give the percentiles 2.5 and 97.5, moved so that the resamples' mean is the value: a resample holds
fewer distinct rows, which raises the calibration error and the average precision, while accuracies
and areas stay where they are. Differences of two models use the same draws, so that they are
paired by group. The intervals speak of other groups of the same kind under these trained models;
that another training would give other models is not in them, but shows in the values per fold.
A resample in which a fold has no value (a class is not in it) averages the other folds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shared.errors import InputError
from pipelines.shared.metrics import (
    ClassPredictions,
    Floats,
    JointPredictions,
    Predictions,
    Score,
    ValuePredictions,
    as_probabilities,
    measure,
)
from pipelines.shared.resampling import Values, draw_counts, group_index, weighted_scores

RESAMPLES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Test rows of one trained model: an id and a group each, and what was predicted."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    predictions: Predictions

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> "Fold":
        """Keep some rows."""
        return Fold(
            tuple(self.ids[row] for row in rows),
            tuple(self.groups[row] for row in rows),
            self.predictions.take(rows),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A score in each fold [K], and in each resample of each fold [K, R]; NaN where undefined."""

    folds: Values
    resampled: NDArray[np.float64]
    reasons: tuple[str | None, ...]

    def score(self) -> Score:
        """Mean over the folds with its interval."""
        return _summarise(self.folds, self.resampled, self.reasons)

    def difference(self, other: "Estimate") -> Score:
        """Mean over the folds of this score minus the other one, paired by fold and resample."""
        reasons = tuple(a or b for a, b in zip(self.reasons, other.reasons, strict=True))
        return _summarise(self.folds - other.folds, self.resampled - other.resampled, reasons)


def check_scores(config: Mapping[str, Any], models: Iterable[str]) -> None:
    """Raise InputError for settings of scores that mean nothing."""
    known = tuple(models)
    if config["reference"] is not None and config["reference"] not in known:
        raise InputError(f"reference is one of {', '.join(known)}; got {config['reference']!r}")
    if config["threshold"] is not None and not 0 <= config["threshold"] <= 1:
        raise InputError(f"threshold is a probability; got {config['threshold']}")
    if config["resamples"] < 0:
        raise InputError(f"resamples must not be negative; got {config['resamples']}")


def estimate(
    folds: Sequence[Fold],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Estimate]:
    """Score every fold, and every resample of it; equal groups and seeds give equal resamples.

    Values are computed by `metrics.measure`, resamples by `resampling.weighted_scores`.
    """
    measured = [measure(fold.predictions) for fold in folds]
    scored = [name for name in measured[0] if names is None or name in names]
    drawn = _resample(folds, scored, resamples=resamples, seed=seed)
    return {
        name: Estimate(
            np.array([_or_nan(scores[name].value) for scores in measured]),
            drawn[name],
            tuple(scores[name].reason for scores in measured),
        )
        for name in scored
    }


def score(
    predictions: Predictions,
    *,
    groups: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Score]:
    """Score one set of rows with intervals over groups; only the scores in `names`, if given."""
    if len(predictions) != len(groups):
        raise ValueError(f"got {len(predictions)} predictions and {len(groups)} groups")
    fold = Fold(tuple(map(str, range(len(groups)))), tuple(groups), predictions)
    found = estimate([fold], resamples=resamples, seed=seed, names=names)
    return {name: item.score() for name, item in found.items()}


def evaluate(
    targets: Sequence[int] | NDArray[np.int64],
    logits: Sequence[Sequence[float]] | Floats,
    *,
    groups: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Score]:
    """Return `auroc`, `accuracy` and `balanced_accuracy` of logits or probabilities [N, C]."""
    labels, outputs = np.asarray(targets, np.int64), np.asarray(logits, np.float64)
    if len(labels) != len(outputs):
        raise ValueError(f"got {len(labels)} targets and {len(outputs)} rows of predictions")
    classes = tuple(map(str, range(outputs.shape[1])))
    predictions = ClassPredictions(classes, labels, as_probabilities(outputs))
    names = ("auroc", "accuracy", "balanced_accuracy")
    return score(predictions, groups=groups, resamples=resamples, seed=seed, names=names)


def ensemble(folds: Sequence[Fold]) -> Fold:
    """Average the folds' predictions of the same rows: probabilities, numbers or risks.

    Only for rows that no fold trained on or chose its epoch by, which the caller sees to. Raises
    ValueError where the folds do not hold the same rows in the same order.
    """
    first = folds[0]
    if any(fold.ids != first.ids for fold in folds):
        raise ValueError("an ensemble needs predictions of the same rows by every fold")
    parts = [fold.predictions for fold in folds]
    given = parts[0]
    if isinstance(given, ClassPredictions):
        outputs = np.mean([_as(part, given).probabilities for part in parts], axis=0)
        cuts = [_as(part, given).threshold for part in parts]
        known = [cut for cut in cuts if cut is not None]
        cut = float(np.mean(known)) if known else None
        return replace(first, predictions=replace(given, probabilities=outputs, threshold=cut))
    if isinstance(given, JointPredictions):
        raise ValueError("an ensemble is one of a single target")
    field = "values" if isinstance(given, ValuePredictions) else "risks"
    average = np.mean([getattr(part, field) for part in parts], axis=0)
    return replace(first, predictions=replace(given, **{field: average}))


def compare(found: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> dict[str, Score]:
    """Differences of the scores that two models have in common, paired by fold and resample."""
    return {name: found[name].difference(other[name]) for name in found if name in other}


def _as(part: Predictions, given: ClassPredictions) -> ClassPredictions:
    if not isinstance(part, ClassPredictions) or part.classes != given.classes:
        raise ValueError("an ensemble needs folds of the same classes")
    return part


def _resample(
    folds: Sequence[Fold], scored: Sequence[str], *, resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Scores of each fold in each resample of the groups of all folds: [K, R] for each score."""
    names = sorted({group for fold in folds for group in fold.groups})
    if not names or resamples == 0:
        return {name: np.full((len(folds), 0), np.nan) for name in scored}
    places = [group_index(fold.groups, names) for fold in folds]
    width = max(len(fold) for fold in folds)
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in scored}
    for counts in draw_counts(len(names), resamples=resamples, seed=seed, width=width):
        rows = [
            weighted_scores(fold.predictions, counts[:, place], scored) if len(fold) else {}
            for fold, place in zip(folds, places, strict=True)
        ]
        nothing = np.full(len(counts), np.nan)
        for name in scored:
            parts[name].append(np.stack([row.get(name, nothing) for row in rows]))
    return {name: np.concatenate(chunks, axis=1) for name, chunks in parts.items()}


def _summarise(
    values: Values, resampled: NDArray[np.float64], reasons: Sequence[str | None]
) -> Score:
    defined = ~np.isnan(values)
    if not defined.any():
        return Score(None, None, None, next((reason for reason in reasons if reason), "undefined"))
    left_out = [
        f"fold {fold}: {reasons[fold] or 'undefined'}" for fold in np.flatnonzero(~defined).tolist()
    ]
    reason = f"mean of {defined.sum()} folds ({'; '.join(left_out)})" if left_out else None
    value = float(values[defined].mean())
    draws = resampled[defined]
    held = ~np.isnan(draws)
    drawn = np.where(held, draws, 0.0).sum(axis=0) / np.maximum(held.sum(axis=0), 1)
    drawn = drawn[held.any(axis=0)]
    if len(drawn) == 0:
        return Score(value, None, None, reason or "no resample defines an interval")
    low, high = np.percentile(drawn, [2.5, 97.5]) + value - drawn.mean()
    bounds = np.clip([low, high], min(drawn.min(), value), max(drawn.max(), value))
    return Score(value, float(bounds[0]), float(bounds[1]), reason)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
