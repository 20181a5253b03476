from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from pipelines.shared.evaluation import (
    Fold,
    compare,
    ensemble,
    estimate,
    evaluate,
    score,
)
from pipelines.shared.metrics import ClassPredictions, RiskPredictions, Score, ValuePredictions


def _fold(seed: int, count: int = 40, strength: float = 1.0, start: int = 0) -> Fold:
    generator = np.random.default_rng(seed)
    targets = np.arange(count) % 2
    first = 1 / (1 + np.exp(-(generator.normal(size=count) + strength * (2 * targets - 1))))
    ids = tuple(f"s{start + row}" for row in range(count))
    groups = tuple(f"p{(start + row) // 2}" for row in range(count))
    return Fold(ids, groups, ClassPredictions(("a", "b"), targets, np.stack([1 - first, first], 1)))


def _binary(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, count)
    first = np.round(generator.normal(size=count) + targets, 1)
    return targets, np.stack([-first, first], axis=1)


def test_evaluate_equals_scikit_learn() -> None:
    targets, logits = _binary(200)

    scores = evaluate(targets, logits, groups=[str(i) for i in range(200)], resamples=10)

    predicted = logits.argmax(axis=1)
    expected = {
        "auroc": sklearn_metrics.roc_auc_score(targets, logits[:, 1]),
        "accuracy": sklearn_metrics.accuracy_score(targets, predicted),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(targets, predicted),
    }
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected)


def test_an_interval_equals_a_plain_bootstrap_of_groups() -> None:
    targets, logits = _binary(60, seed=2)
    groups = np.array([f"p{i // 3}" for i in range(60)])

    found = evaluate(targets, logits, groups=groups.tolist(), resamples=3000)["auroc"]

    generator = np.random.default_rng(9)
    values = []
    for _ in range(250):
        drawn = generator.choice(20, 20)
        rows = np.concatenate([np.flatnonzero(groups == f"p{group}") for group in drawn])
        values.append(sklearn_metrics.roc_auc_score(targets[rows], logits[rows, 1]))
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.03)


def test_equal_predictions_score_exactly_one_half() -> None:
    groups = [str(i // 2) for i in range(40)]

    found = evaluate([0, 1] * 20, [[0.5, 0.5]] * 40, groups=groups)["auroc"]

    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_a_seed_repeats_the_interval() -> None:
    targets, logits = _binary(40)
    groups = [str(i) for i in range(40)]

    assert evaluate(targets, logits, groups=groups) == evaluate(targets, logits, groups=groups)


def test_many_rows_are_resampled_in_bounded_chunks() -> None:
    targets, logits = _binary(30_000)

    found = evaluate(targets, logits, groups=[str(i) for i in range(30_000)], resamples=140)

    low, value = found["auroc"].low, found["auroc"].value
    assert low is not None
    assert value is not None
    assert low < value


def test_folds_are_scored_apart_and_averaged() -> None:
    # fold 1's model gives twice the probabilities: ranked together, its rows would all come first
    good = _fold(0, strength=2.0)
    low = np.clip(good.predictions.probabilities[:, 1] / 10, 0, 1)  # type: ignore[union-attr]
    other = _fold(1, strength=2.0, start=40)
    scaled = replace(
        good,
        predictions=replace(good.predictions, probabilities=np.stack([1 - low, low], axis=1)),  # type: ignore[type-var]
    )

    apart = estimate([scaled, other])["auroc"].score()

    each = [estimate([fold], resamples=0)["auroc"].folds[0] for fold in (good, other)]
    assert apart.value == pytest.approx(np.mean(each))
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low < apart.value < apart.high  # type: ignore[operator]


def test_a_difference_is_paired() -> None:
    # the other model is this one with a little noise: each interval is wide, that between is not
    folds = [_fold(seed, strength=0.5, start=40 * seed) for seed in range(3)]
    near = []
    for seed, fold in enumerate(folds):
        given = fold.predictions
        assert isinstance(given, ClassPredictions)
        noise = np.random.default_rng(seed).normal(scale=0.01, size=len(fold))
        first = np.clip(given.probabilities[:, 1] + noise, 0, 1)
        shares = np.stack([1 - first, first], axis=1)
        near.append(replace(fold, predictions=replace(given, probabilities=shares)))

    ours, theirs = estimate(folds), estimate(near)
    apart = compare(ours, theirs)["auroc"]

    one = ours["auroc"].score()
    assert apart.high - apart.low < 0.25 * (one.high - one.low)  # type: ignore[operator]
    assert apart.low <= apart.value <= apart.high  # type: ignore[operator]
    assert compare(ours, ours)["auroc"].value == 0


def test_a_fold_without_a_class_is_left_out_and_named() -> None:
    whole = _fold(0)
    single = _fold(1, start=40).take(np.arange(0, 40, 2))

    found = estimate([whole, single])["auroc"].score()

    assert found.value == estimate([whole], resamples=0)["auroc"].folds[0]
    assert found.reason == "mean of 1 folds (fold 1: no example of class b)"


def test_an_ensemble_averages_what_the_folds_predicted() -> None:
    first, second = _fold(0), _fold(1)
    together = ensemble([first, second]).predictions
    assert isinstance(together, ClassPredictions)

    shares = [fold.predictions.probabilities for fold in (first, second)]  # type: ignore[union-attr]
    assert together.probabilities == pytest.approx(np.mean(shares, axis=0))

    with pytest.raises(ValueError, match="same rows"):
        ensemble([first, _fold(1, start=2)])


def test_an_ensemble_averages_numbers_and_risks() -> None:
    ids = ("a", "b")
    numbers = [
        Fold(ids, ids, ValuePredictions(np.array([1.0, 2.0]), np.array(values)))
        for values in ([0.0, 4.0], [2.0, 0.0])
    ]
    risks = [
        Fold(ids, ids, RiskPredictions(np.array([1.0, 2.0]), np.array([True, False]), np.array(r)))
        for r in ([0.0, 1.0], [1.0, 3.0])
    ]

    assert ensemble(numbers).predictions.values.tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    assert ensemble(risks).predictions.risks.tolist() == [0.5, 2.0]  # type: ignore[union-attr]


def test_no_rows_are_undefined_and_unequal_lengths_refused() -> None:
    assert evaluate([], np.zeros((0, 2)), groups=[])["accuracy"] == Score(
        None, None, None, "no predictions"
    )
    with pytest.raises(ValueError, match="2 predictions and 1 groups"):
        score(ValuePredictions(np.zeros(2), np.zeros(2)), groups=["a"])
