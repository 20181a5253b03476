"""Predictions beside the truth, and their scores by scikit-learn, SciPy and lifelines."""

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

from pipelines.shared.calibration import calibration_error
from pipelines.shared.stretches import StretchPredictions, stretch_scores
from pipelines.shared.tables import align

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Score:
    """A value with its 95 % interval; None where undefined, and then `reason` says why."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None

    def plain(self) -> dict[str, float | str | None]:
        """Return what `metrics.json` holds."""
        return {"value": self.value, "low": self.low, "high": self.high, "reason": self.reason}


@dataclass(frozen=True, slots=True, eq=False)
class ClassPredictions:
    """True classes [N] and probabilities [N, C].

    Of two classes the second is predicted from `threshold` on; without one, and of more classes,
    the most probable. `order` names the classes from low to high where they have an order.
    """

    classes: tuple[str, ...]
    targets: Rows
    probabilities: Floats
    threshold: float | None = None
    order: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Rows) -> "ClassPredictions":
        """Keep some rows."""
        return replace(self, targets=self.targets[rows], probabilities=self.probabilities[rows])

    @property
    def chosen(self) -> Rows:
        """Predicted classes [N]."""
        if self.threshold is not None and len(self.classes) == 2:
            return (self.probabilities[:, 1] >= self.threshold).astype(np.int64)
        return self.probabilities.argmax(axis=1)

    @property
    def ranks(self) -> Rows | None:
        """Place of each class in the order [C]."""
        if self.order is None:
            return None
        return np.array([self.order.index(name) for name in self.classes], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ValuePredictions:
    """True and predicted numbers [N]."""

    targets: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Rows) -> "ValuePredictions":
        """Keep some rows."""
        return ValuePredictions(self.targets[rows], self.values[rows])


@dataclass(frozen=True, slots=True, eq=False)
class RiskPredictions:
    """Times [N], whether the event was seen at them [N], and predicted risks [N].

    A higher risk means an earlier event; the sign is the model's and never chosen by the data.
    `high` says which risks lie above the cut of the training rows, where that is known [N].
    """

    times: Floats
    events: NDArray[np.bool_]
    risks: Floats
    high: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.times)

    def take(self, rows: Rows) -> "RiskPredictions":
        """Keep some rows."""
        high = None if self.high is None else self.high[rows]
        return RiskPredictions(self.times[rows], self.events[rows], self.risks[rows], high)


@dataclass(frozen=True, slots=True, eq=False)
class JointPredictions:
    """Several targets of the same rows, by name: labels that are there or not, or tracks."""

    parts: Mapping[str, "OneTarget"]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def take(self, rows: Rows) -> "JointPredictions":
        """Keep some rows."""
        return JointPredictions({name: part.take(rows) for name, part in self.parts.items()})

    @property
    def means(self) -> Container[str]:
        """Scores that can be averaged: errors of several tracks may be in several units."""
        units = [part for part in self.parts.values() if not isinstance(part, ClassPredictions)]
        return frozenset(TITLES) - (_WITH_UNIT if len(units) > 1 else frozenset())

    @property
    def exact(self) -> NDArray[np.bool_] | None:
        """Rows of which every label is right [N]; None where targets are no labels."""
        labels = [part for part in self.parts.values() if isinstance(part, ClassPredictions)]
        if not labels:
            return None
        return np.all([part.chosen == part.targets for part in labels], axis=0)


OneTarget: TypeAlias = ClassPredictions | ValuePredictions | StretchPredictions
Predictions: TypeAlias = OneTarget | RiskPredictions | JointPredictions

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "mcc": "MCC",
    "exact_match": "exact match",
    "qwk": "QWK",
    "brier": "Brier",
    "ece": "ECE",
    "r2": "R2",
    "mae": "MAE",
    "rmse": "RMSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "c_index": "c-index",
}
"""How a score is called where people read it."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "mae", "rmse"})
_WITH_UNIT = frozenset({"mae", "rmse"})


def measure(predictions: Predictions) -> dict[str, Score]:
    """Return the scores of one set of predictions, without intervals.

    Classes: AUROC and average precision of the second of two classes, else the mean over classes,
    each against the rest; accuracy, balanced accuracy (mean recall), F1 (of the second of two
    classes, else the mean over classes), Matthews' correlation; with an order, the quadratic
    weighted kappa; the Brier score (0 to 1 for two classes, 0 to 2 for more) and the expected
    calibration error. Numbers: R2, MAE, RMSE, Pearson's and Spearman's correlation. Risks:
    Harrell's c-index. Several targets: means over those that define a score (but no errors of
    several tracks, whose units differ), and of labels the share of rows with all of them right. A
    score that the rows do not define is None, with the
    reason.
    """
    if isinstance(predictions, JointPredictions):
        return _measure_jointly(predictions)
    if len(predictions) == 0:
        return {name: Score(None, None, None, "no predictions") for name in _functions(predictions)}
    found: dict[str, Score] = {}
    for name, function in _functions(predictions).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is undefined, and said so below
            value = function()
        if np.isfinite(value):
            found[name] = Score(float(value), None, None)
        else:
            found[name] = Score(None, None, None, _why_undefined(predictions))
    return found


def auroc(
    targets: Sequence[int] | Rows, logits: Sequence[Sequence[float]] | Floats
) -> float | None:
    """Return the AUROC as `measure` defines it, of logits [N, C]; None where it is undefined."""
    labels, outputs = np.asarray(targets, np.int64), np.asarray(logits, np.float64)
    if outputs.shape[1] == 2:
        difference = outputs[:, 1] - outputs[:, 0]
        outputs = np.stack([-difference, difference], axis=1)
    else:
        outputs = softmax(outputs, axis=1)  # logits of a class compare between rows only after it
    value = _mean_over_classes(labels, outputs, sklearn_metrics.roc_auc_score)
    return float(value) if np.isfinite(value) else None


def as_probabilities(outputs: Sequence[Sequence[float]] | Floats) -> Floats:
    """Return probabilities [N, C] as they are, and the softmax of anything else."""
    table = np.asarray(outputs, dtype=np.float64)
    if (table >= 0).all() and np.allclose(table.sum(axis=1), 1.0, atol=1e-4):
        return table
    return np.asarray(softmax(table, axis=1))


def format_table(
    rows: Mapping[str, Mapping[str, Score]],
    *,
    names: Sequence[str] | None = None,
    what: str = "model",
) -> str:
    """Return aligned lines: a row per `what`, a column per score (of `names`, if given)."""
    every = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    shown = every if names is None else [name for name in names if name in every]
    header = [what, *(TITLES.get(name, name) for name in shown)]
    body = [
        [model, *(format_score(scores[name]) if name in scores else "-" for name in shown)]
        for model, scores in rows.items()
    ]
    return align([header, *body])


def format_score(score: Score, *, signed: bool = False) -> str:
    """Return `0.912 [0.850, 0.960]`, or why there is none."""
    if score.value is None:
        return f"- ({score.reason})"
    sign = "+" if signed else ""
    if score.low is None or score.high is None:
        return f"{score.value:{sign}.3f}"
    return f"{score.value:{sign}.3f} [{score.low:{sign}.3f}, {score.high:{sign}.3f}]"


def _measure_jointly(given: JointPredictions) -> dict[str, Score]:
    each = {name: measure(part) for name, part in given.parts.items()}
    names = [name for name in next(iter(each.values())) if name in given.means]
    found = {
        score: _mean_score({name: row[score] for name, row in each.items()}) for score in names
    }
    exact = given.exact
    if exact is not None:
        value = float(exact.mean()) if len(exact) else None
        found["exact_match"] = Score(value, None, None, None if len(exact) else "no predictions")
    return found


def _mean_score(scores: Mapping[str, Score]) -> Score:
    """Mean over the targets that define a score; the reason names the others."""
    values = [item.value for item in scores.values() if item.value is not None]
    missing = [name for name, item in scores.items() if item.value is None]
    reason = f"undefined of {', '.join(missing)}" if missing else None
    return Score(float(np.mean(values)) if values else None, None, None, reason)


def _functions(predictions: OneTarget | RiskPredictions) -> dict[str, Callable[[], float]]:
    if isinstance(predictions, ClassPredictions):
        return _class_functions(predictions)
    if isinstance(predictions, ValuePredictions):
        return _value_functions(predictions.targets, predictions.values)
    if isinstance(predictions, StretchPredictions):
        found = stretch_scores(predictions, np.ones((1, len(predictions))))
        return {name: partial(_only, score) for name, score in found.items()}
    return {"c_index": lambda: _concordance(predictions)}


def _only(score: Callable[[], Floats]) -> float:
    return float(score()[0])


def _class_functions(given: ClassPredictions) -> dict[str, Callable[[], float]]:
    labels, outputs, chosen = given.targets, given.probabilities, given.chosen
    two = len(given.classes) == 2
    ranks = given.ranks
    functions: dict[str, Callable[[], float]] = {
        "auroc": lambda: _mean_over_classes(labels, outputs, sklearn_metrics.roc_auc_score),
        "auprc": lambda: _mean_over_classes(
            labels, outputs, sklearn_metrics.average_precision_score
        ),
        "accuracy": lambda: sklearn_metrics.accuracy_score(labels, chosen),
        "balanced_accuracy": lambda: sklearn_metrics.balanced_accuracy_score(labels, chosen),
        "f1": lambda: sklearn_metrics.f1_score(
            labels, chosen, average="binary" if two else "macro", zero_division=0.0
        ),
        "mcc": lambda: sklearn_metrics.matthews_corrcoef(labels, chosen),
    }
    if ranks is not None:
        functions["qwk"] = lambda: sklearn_metrics.cohen_kappa_score(
            ranks[labels], ranks[chosen], labels=range(len(ranks)), weights="quadratic"
        )
    functions["brier"] = lambda: sklearn_metrics.brier_score_loss(
        labels,
        outputs[:, 1] if two else outputs / outputs.sum(axis=1, keepdims=True),
        labels=range(len(given.classes)),
    )
    functions["ece"] = lambda: calibration_error(labels, outputs)
    return functions


def _concordance(given: RiskPredictions) -> float:
    from lifelines.utils import concordance_index  # half a second that only survival needs

    if not _has_known_pair(given):
        return np.nan
    return float(concordance_index(given.times, -given.risks, given.events))


def _has_known_pair(given: RiskPredictions) -> bool:
    """Tell whether some event comes before another row's time, or with a censored one's."""
    if not given.events.any():
        return False
    first = given.times[given.events].min()
    return bool(((given.times > first) | ((given.times == first) & ~given.events)).any())


def _value_functions(targets: Floats, values: Floats) -> dict[str, Callable[[], float]]:
    return {
        "r2": lambda: sklearn_metrics.r2_score(targets, values),
        "mae": lambda: sklearn_metrics.mean_absolute_error(targets, values),
        "rmse": lambda: sklearn_metrics.root_mean_squared_error(targets, values),
        "pearson": lambda: (
            stats.pearsonr(targets, values).statistic if len(targets) > 1 else np.nan
        ),
        "spearman": lambda: stats.spearmanr(targets, values).statistic,
    }


def _mean_over_classes(
    labels: Rows, outputs: Floats, function: Callable[[NDArray[np.bool_], Floats], float]
) -> float:
    """Score the second of two classes, else the mean over all; NaN if one is absent or alone."""
    num_classes = outputs.shape[1]
    if len(np.unique(labels)) < num_classes:
        return np.nan
    scored = [1] if num_classes == 2 else range(num_classes)
    return float(np.mean([function(labels == label, outputs[:, label]) for label in scored]))


def _why_undefined(predictions: OneTarget | RiskPredictions) -> str:
    if isinstance(predictions, RiskPredictions):
        return "no two comparable times" if predictions.events.any() else "no event"
    if isinstance(predictions, ValuePredictions):
        return "a single row" if len(predictions) == 1 else "no variation"
    if isinstance(predictions, StretchPredictions):
        return "no variation" if predictions.counts.any() else "no place that is known"
    held = set(predictions.targets.tolist())
    absent = [name for label, name in enumerate(predictions.classes) if label not in held]
    return f"no example of class {', '.join(absent)}" if absent else "undefined"
