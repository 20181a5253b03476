"""Sums over stretches against the libraries on all places."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pipelines.shared.metrics import JointPredictions, measure
from pipelines.shared.resampling import weighted_scores
from pipelines.shared.stretches import Floats, StretchPredictions, sum_up


def _track(seed: int = 0, *, far: float = 300.0) -> tuple[list[Floats], list[Floats]]:
    """Stretches of 1 to 60 places, a tenth of them unknown, a whole stretch too; with ties."""
    rng = np.random.default_rng(seed)
    targets = [np.round(rng.normal(far, 2, size), 1) for size in (1, 60, 7, 33, 20, 50)]
    predictions = [np.round(part + rng.normal(0, 1, part.size), 1) for part in targets]
    for part in targets:
        part[rng.random(part.size) < 0.1] = np.nan
    targets[4][:] = np.nan
    return targets, predictions


def _expected(targets: list[Floats], predictions: list[Floats]) -> dict[str, float]:
    true, given = np.concatenate(targets), np.concatenate(predictions)
    true, given = true[(known := ~np.isnan(true))], given[known]
    return {
        "r2": metrics.r2_score(true, given),
        "mae": metrics.mean_absolute_error(true, given),
        "rmse": metrics.root_mean_squared_error(true, given),
        "pearson": stats.pearsonr(true, given).statistic,
        "spearman": stats.spearmanr(true, given).statistic,
    }


@pytest.mark.parametrize("far", [0.0, 300.0, 1e5])
def test_scores_over_all_places_are_those_of_the_libraries(far: float) -> None:
    targets, predictions = _track(far=far)
    found = measure(sum_up(targets, predictions))
    assert {name: score.value for name, score in found.items()} == pytest.approx(
        _expected(targets, predictions), rel=1e-6
    )


def test_a_choice_of_stretches_scores_as_its_places_do() -> None:
    targets, predictions = _track()
    given = sum_up(targets, predictions)
    rows = [1, 3, 3, 5, 4]
    weights = np.bincount(rows, minlength=len(targets)).astype(float)[None]
    expected = _expected([targets[row] for row in rows], [predictions[row] for row in rows])
    found = weighted_scores(given, weights)
    taken = measure(given.take(np.array(rows)))
    for name in ("r2", "mae", "rmse", "pearson"):
        assert found[name][0] == pytest.approx(expected[name])
        assert taken[name].value == pytest.approx(expected[name])
    assert found["spearman"][0] == pytest.approx(expected["spearman"], abs=0.02)


def test_what_says_nothing_is_undefined() -> None:
    flat = sum_up([np.full(5, 2.0)], [np.arange(5.0)])
    assert measure(flat)["r2"].reason == "no variation"
    assert measure(flat)["mae"].value == pytest.approx(np.abs(2 - np.arange(5)).mean())
    nothing = sum_up([np.full(5, np.nan)], [np.arange(5.0)])
    assert measure(nothing)["mae"].reason == "no place that is known"
    joint = JointPredictions({"a": sum_up(*_track()), "b": sum_up(*_track(far=0.0))})
    assert joint.exact is None
    each = [measure(part)["pearson"].value or 0 for part in joint.parts.values()]
    assert measure(joint)["pearson"].value == pytest.approx(np.mean(each))
    part = joint.take(np.array([1, 2])).parts["a"]
    assert isinstance(part, StretchPredictions)
    assert part.counts.tolist() == [np.isfinite(item).sum() for item in _track()[0][1:3]]
