"""Figures of predictions: ROC, precision and recall, confusion, calibration, Kaplan-Meier.

Each takes models' folds, and returns a matplotlib figure that nothing else holds on to. Curves of
folds are averaged, never pooled: thin lines are folds, thick ones their mean.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import CensoredData, logrank
from sklearn.metrics import precision_recall_curve, roc_curve

from pipelines.shared.calibration import reliability
from pipelines.shared.evaluation import Fold
from pipelines.shared.metrics import (
    ClassPredictions,
    JointPredictions,
    RiskPredictions,
    ValuePredictions,
)
from pipelines.shared.stretches import StretchPredictions

COLOURS = ("#0b5fa5", "#c8511b", "#2b8a57", "#7b4ea3", "#8a6d1f", "#b3396b", "#4d4d4d", "#159a9c")
_GRID = np.linspace(0, 1, 201)
_SIZE = (4.6, 4.2)
_SHORT_NAME, _LINE = 24, 0.21
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "gigasparse",  # the same figure gives the same file
}

Floats = NDArray[np.float64]
Models = Mapping[str, Sequence[Fold]]
Place = Literal["lower right", "lower left", "upper left", "upper right"]


def to_svg(figure: Figure) -> bytes:
    """Draw a figure as SVG; equal figures give equal bytes."""
    file = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()


def data_uri(svg: bytes) -> str:
    """Address that holds a picture itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def draw_roc(models: Models) -> Figure:
    """Draw ROC curves; of more than two classes the mean over classes, each against the rest."""
    figure, axes = _square("1 - specificity", "sensitivity")
    axes.plot([0, 1], [0, 1], color="#b0b0b0", linewidth=1, linestyle=":")
    for colour, (name, folds) in zip(_colours(), models.items(), strict=False):
        _draw_mean(axes, name, [_roc(fold) for fold in folds], colour)
    return _legend(figure, axes, "lower right")


def draw_precision_recall(models: Models) -> Figure:
    """Draw precision against recall; of more than two classes the mean over classes."""
    figure, axes = _square("recall", "precision")
    for colour, (name, folds) in zip(_colours(), models.items(), strict=False):
        _draw_mean(axes, name, [_precision(fold) for fold in folds], colour)
    return _legend(figure, axes, "lower left")


def draw_confusion(folds: Sequence[Fold]) -> Figure:
    """Draw how many of each true class were given each class, summed over the folds."""
    given = [fold.predictions for fold in folds]
    classes = next(item.classes for item in given if isinstance(item, ClassPredictions))
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for item in given:
        assert isinstance(item, ClassPredictions)
        np.add.at(table, (item.targets, item.chosen), 1)
    side = max(3.2, 1.6 + 0.62 * len(classes))
    figure, axes = _axes((side, side))
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*table.shape):
        shade = "white" if shares[row, column] > 0.55 else "#222222"
        axes.text(column, row, f"{table[row, column]:,}", ha="center", va="center", color=shade)
    slanted = max(map(len, classes)) > 4
    axes.set_xticks(range(len(classes)), classes, rotation=40 if slanted else 0,
                    ha="right" if slanted else "center")  # fmt: skip
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    return figure


def draw_calibration(before: Sequence[Fold], after: Sequence[Fold] = ()) -> Figure:
    """Draw accuracy against confidence over all folds' rows, before and after scaling."""
    figure, axes = _square("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color="#b0b0b0", linewidth=1, linestyle=":")
    for colour, (name, folds) in zip(
        COLOURS, {"as predicted": before, "after temperature": after}.items(), strict=False
    ):
        given = [f.predictions for f in folds if isinstance(f.predictions, ClassPredictions)]
        if not given:
            continue
        found = reliability(
            np.concatenate([item.targets for item in given]),
            np.concatenate([item.probabilities for item in given]),
        )
        axes.plot(found.confidence, found.accuracy, color=colour, linewidth=1.2, label=name)
        sizes = 12 + 160 * found.count / found.count.sum()
        axes.scatter(found.confidence, found.accuracy, sizes, color=colour, alpha=0.75)
    return _legend(figure, axes, "upper left")


def draw_kaplan_meier(folds: Sequence[Fold]) -> Figure:
    """Draw the survival of high and low risk, each row grouped by its own fold's cut.

    Kaplan-Meier estimates with their 95 % intervals by lifelines and the log-rank test by SciPy. A
    row that several folds tested counts once, in the first of them.
    """
    from lifelines import KaplanMeierFitter

    times, events, high = _grouped_risks(folds)
    figure, axes = _axes(_SIZE)
    for colour, (name, rows) in zip(
        (COLOURS[1], COLOURS[0]), {"high risk": high, "low risk": ~high}.items(), strict=True
    ):
        if not rows.any():
            continue
        fitted = KaplanMeierFitter().fit(times[rows], events[rows])
        curve = fitted.survival_function_.iloc[:, 0]
        band = fitted.confidence_interval_survival_function_
        axes.step(curve.index, curve, where="post", color=colour, label=f"{name} (n={rows.sum()})")
        axes.fill_between(
            curve.index, band.iloc[:, 0], band.iloc[:, 1], step="post", color=colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    if high.any() and not high.all():
        test = logrank(*(_censored(times[rows], events[rows]) for rows in (high, ~high)))
        axes.set_title(f"log-rank p = {test.pvalue:.2g}", fontsize=10)
    axes.set(xlabel="time", ylabel="survival", ylim=(0, 1.02), xlim=(0, None))
    return _legend(figure, axes, "upper right")


def draw_values(folds: Sequence[Fold], target: str | None = None) -> Figure:
    """Draw predicted against true numbers, of several targets those of `target`."""
    figure, axes = _axes(_SIZE)
    for fold in folds:
        given = fold.predictions
        if isinstance(given, JointPredictions):
            given = given.parts[str(target)]
        assert isinstance(given, ValuePredictions | StretchPredictions)
        axes.scatter(given.targets, given.values, s=14, alpha=0.6, linewidth=0, color=COLOURS[0])
    low, high = (f(axes.get_xlim()[i], axes.get_ylim()[i]) for i, f in ((0, min), (1, max)))
    axes.plot([low, high], [low, high], color="#b0b0b0", linewidth=1, linestyle=":")
    axes.set(xlabel="true", ylabel="predicted")
    return figure


def _grouped_risks(folds: Sequence[Fold]) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    seen: set[str] = set()
    parts = []
    for fold in folds:
        given = fold.predictions
        assert isinstance(given, RiskPredictions)
        high = given.high if given.high is not None else given.risks > np.median(given.risks)
        new = np.array([name not in seen for name in fold.ids], dtype=bool)
        seen.update(fold.ids)
        parts.append((given.times[new], given.events[new], high[new]))
    times, events, high = (np.concatenate(column) for column in zip(*parts, strict=True))
    return times, events, high


def _censored(times: Floats, events: NDArray[np.bool_]) -> CensoredData:
    return CensoredData(uncensored=times[events], right=times[~events])


def _roc(fold: Fold) -> Floats:
    """Sensitivity on a grid of 1 - specificity; NaN where a class is absent."""

    def curve(positive: NDArray[np.bool_], scores: Floats) -> Floats:
        false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
        values = np.interp(_GRID, false_rate, true_rate)
        values[0] = 0.0
        return values

    return _over_classes(fold, curve)


def _precision(fold: Fold) -> Floats:
    """Precision on a grid of recall: of each step the value that holds up to its recall."""

    def curve(positive: NDArray[np.bool_], scores: Floats) -> Floats:
        precision, recall, _ = precision_recall_curve(positive, scores)
        rising = recall[::-1]
        places = np.searchsorted(rising, _GRID, side="left")
        values = precision[::-1][np.minimum(places, len(rising) - 1)]
        values[0] = values[1]  # a recall of 0 is no row at all
        return np.asarray(values)

    return _over_classes(fold, curve)


def _over_classes(fold: Fold, curve: Callable[[NDArray[np.bool_], Floats], Floats]) -> Floats:
    given = fold.predictions
    if isinstance(given, JointPredictions):
        parts = [_over_classes(replace(fold, predictions=p), curve) for p in given.parts.values()]
        known = [part for part in parts if not np.isnan(part).any()]
        return np.asarray(np.mean(known, axis=0)) if known else parts[0]
    assert isinstance(given, ClassPredictions)
    if len(np.unique(given.targets)) < len(given.classes):
        return np.full(len(_GRID), np.nan)
    scored = [1] if len(given.classes) == 2 else range(len(given.classes))
    each = [curve(given.targets == label, given.probabilities[:, label]) for label in scored]
    return np.asarray(np.mean(each, axis=0))


def _draw_mean(axes: Axes, name: str, curves: list[Floats], colour: str) -> None:
    whole = [curve for curve in curves if not np.isnan(curve).any()]
    for curve in whole if len(whole) > 1 else []:
        axes.plot(_GRID, curve, color=colour, linewidth=0.6, alpha=0.35)
    if whole:
        axes.plot(_GRID, np.mean(whole, axis=0), color=colour, linewidth=2, label=name)


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def _square(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = _axes(_SIZE)
    axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    return figure, axes


def _legend(figure: Figure, axes: Axes, place: Place) -> Figure:
    names = axes.get_legend_handles_labels()[1]
    with rc_context(_STYLE):
        if max(map(len, names), default=0) > _SHORT_NAME:  # would hide what is drawn
            figure.set_figheight(figure.get_figheight() + _LINE * len(names))
            figure.legend(loc="outside lower left")
        elif names:
            axes.legend(loc=place)
    return figure


def _colours() -> list[str]:
    return [*COLOURS] * 4
