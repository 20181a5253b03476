"""What the figures show, read from their lines."""

from pathlib import Path

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from matplotlib.figure import Figure

from pipelines.shared import plots
from pipelines.shared.evaluation import Fold
from pipelines.shared.metrics import ClassPredictions, RiskPredictions
from pipelines.shared.saved_predictions import read_parts
from tests.shared.tables_of_predictions import write_classes, write_risks, write_values


def _fold(targets: list[int], first: list[float]) -> Fold:
    shares = np.array(first)
    ids = tuple(map(str, range(len(targets))))
    given = ClassPredictions(("a", "b"), np.array(targets), np.stack([1 - shares, shares], 1))
    return Fold(ids, ids, given)


def _line(figure: Figure, label: str) -> tuple[np.ndarray, np.ndarray]:
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    x, y = lines[label].get_data()
    return np.asarray(x), np.asarray(y)


def test_roc_of_a_perfect_and_of_a_blind_model() -> None:
    perfect = _fold([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    blind = _fold([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5])

    figure = plots.draw_roc({"perfect": [perfect], "blind": [blind]})

    assert _line(figure, "perfect")[1][1:] == pytest.approx(1.0)
    x, y = _line(figure, "blind")
    assert y == pytest.approx(x)


def test_precision_of_a_blind_model_is_the_share_of_positives() -> None:
    figure = plots.draw_precision_recall({"blind": [_fold([0, 1, 0, 0], [0.5] * 4)]})

    assert _line(figure, "blind")[1] == pytest.approx(0.25)


def test_folds_are_averaged_and_a_fold_without_a_class_is_left_out() -> None:
    good = _fold([0, 1], [0.1, 0.9])
    bad = _fold([0, 1], [0.9, 0.1])
    single = _fold([1, 1], [0.9, 0.1])

    figure = plots.draw_roc({"model": [good, bad, single]})

    assert _line(figure, "model")[1][100] == pytest.approx(0.5)
    thin = [line for line in figure.axes[0].get_lines() if line.get_linewidth() < 0.8]
    assert len(thin) == 2


def test_confusion_counts_all_folds() -> None:
    folds = [_fold([0, 0, 1], [0.1, 0.9, 0.8]), _fold([1], [0.2])]

    texts = [text.get_text() for text in plots.draw_confusion(folds).axes[0].texts]

    assert texts == ["1", "1", "1", "1"]


def test_calibration_lies_where_the_rows_do() -> None:
    fold = _fold([1, 1, 1, 0], [0.75, 0.75, 0.75, 0.75])

    x, y = _line(plots.draw_calibration([fold]), "as predicted")

    assert (x.tolist(), y.tolist()) == ([0.75], [0.75])


def test_kaplan_meier_is_lifelines_by_group(tmp_path: Path) -> None:
    fold = read_parts(write_risks(tmp_path / "r.csv"))["test"]
    given = fold.predictions
    assert isinstance(given, RiskPredictions)
    assert given.high is not None

    figure = plots.draw_kaplan_meier([fold, fold])  # rows that come twice count once

    x, y = _line(figure, f"high risk (n={given.high.sum()})")
    fitted = KaplanMeierFitter().fit(given.times[given.high], given.events[given.high])
    expected = fitted.survival_function_at_times(x).to_numpy()
    assert y == pytest.approx(expected)
    title = figure.axes[0].get_title()
    assert float(title.removeprefix("log-rank p = ")) < 0.01


def test_kaplan_meier_by_hand() -> None:
    # deaths at 1 and 3, censored at 2: 3/4, then 3/4 * 1/2
    given = RiskPredictions(
        np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False]), np.zeros(4),
        np.zeros(4, dtype=bool),
    )  # fmt: skip
    ids = ("a", "b", "c", "d")

    x, y = _line(plots.draw_kaplan_meier([Fold(ids, ids, given)]), "low risk (n=4)")

    assert dict(zip(x.tolist(), y.tolist(), strict=True)) == pytest.approx(
        {0.0: 1.0, 1.0: 0.75, 2.0: 0.75, 3.0: 0.375, 4.0: 0.375}
    )


def test_a_figure_is_drawn_alike_each_time(tmp_path: Path) -> None:
    fold = read_parts(write_values(tmp_path / "v.csv"))["test"]
    other = read_parts(write_classes(tmp_path / "c.csv"))["test"]

    for draw in (lambda: plots.draw_values([fold]), lambda: plots.draw_roc({"model": [other]})):
        first = plots.to_svg(draw())
        assert first == plots.to_svg(draw())
        assert first.startswith(b"<?xml")
