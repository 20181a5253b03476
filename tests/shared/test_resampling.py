"""The fast scores of resamples against the libraries, on the rows that the weights stand for."""

import numpy as np
import pytest
from scipy.special import softmax

from pipelines.shared.metrics import (
    ClassPredictions,
    JointPredictions,
    Predictions,
    RiskPredictions,
    ValuePredictions,
    measure,
)
from pipelines.shared.resampling import draw_counts, weighted_scores


def _classes(num_classes: int) -> ClassPredictions:
    generator = np.random.default_rng(num_classes)
    targets = generator.integers(0, num_classes, 60)
    logits = np.round(generator.normal(size=(60, num_classes)) + np.eye(num_classes)[targets], 1)
    names = tuple(f"class {label}" for label in range(num_classes))
    threshold = 0.35 if num_classes == 2 else None
    order = names[::-1] if num_classes == 4 else None
    return ClassPredictions(names, targets, softmax(logits, axis=1), threshold, order)


def _numbers() -> ValuePredictions:
    generator = np.random.default_rng(3)
    targets = np.round(generator.normal(size=50) + 400, 1)
    return ValuePredictions(targets, np.round(targets + generator.normal(size=50), 1))


def _risks() -> RiskPredictions:
    generator = np.random.default_rng(4)
    risks = np.round(generator.normal(size=70), 1)
    times = np.ceil(generator.exponential(np.exp(-risks)) * 5)  # with ties
    return RiskPredictions(times, generator.random(70) < 0.6, risks)


def _labels() -> JointPredictions:
    generator = np.random.default_rng(5)
    parts = {}
    for name, threshold in (("x", 0.3), ("y", 0.6), ("z", 0.5)):
        there = generator.integers(0, 2, 40)
        share = np.round(np.clip(there * 0.3 + 0.7 * generator.random(40), 0, 1), 2)
        parts[name] = ClassPredictions(
            ("0", "1"), there, np.stack([1 - share, share], 1), threshold
        )
    return JointPredictions(parts)


@pytest.mark.parametrize(
    "given", [_classes(2), _classes(3), _classes(4), _numbers(), _risks(), _labels()],
    ids=["2 classes", "3 classes", "4 ordered classes", "numbers", "risks", "labels"],
)  # fmt: skip
def test_a_resample_scores_as_the_libraries_score_its_rows(given: Predictions) -> None:
    generator = np.random.default_rng(0)
    drawn = [np.arange(len(given)), *(generator.integers(0, len(given), (5, len(given))))]
    weights = np.stack([np.bincount(rows, minlength=len(given)) for rows in drawn]).astype(float)

    found = weighted_scores(given, weights)

    for resample, rows in enumerate(drawn):
        expected = {name: score.value for name, score in measure(given.take(rows)).items()}
        assert {name: found[name][resample] for name in found} == pytest.approx(expected)
        assert list(found) == list(expected)


def test_a_resample_without_a_class_averages_the_others() -> None:
    given = _classes(3)
    weights = (given.targets != 2).astype(float)[None]

    found = weighted_scores(given, weights)

    kept = given.take(np.flatnonzero(given.targets != 2))
    alone = [
        ClassPredictions(
            ("rest", "one"),
            (kept.targets == label).astype(np.int64),
            np.stack([1 - kept.probabilities[:, label], kept.probabilities[:, label]], axis=1),
        )
        for label in (0, 1)
    ]
    expected = [measure(item)["auroc"].value for item in alone]
    assert found["auroc"][0] == pytest.approx(np.mean(expected))


def test_resamples_that_define_nothing_are_nan() -> None:
    given = _classes(2)
    weights = (given.targets == 0).astype(float)[None]

    found = weighted_scores(given, weights)

    assert np.isnan(found["auroc"][0])
    assert not np.isnan(found["accuracy"][0])


def test_draws_are_the_same_for_a_seed_and_stay_in_bounded_chunks() -> None:
    first = list(draw_counts(40, resamples=250, seed=1, width=100_000))
    again = np.concatenate(list(draw_counts(40, resamples=250, seed=1, width=100_000)))

    assert max(len(chunk) for chunk in first) == 40
    assert (np.concatenate(first) == again).all()
    assert (again.sum(axis=1) == 40).all()
