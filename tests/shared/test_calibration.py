import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import balanced_accuracy_score

from pipelines.shared.calibration import (
    apply_temperature,
    calibration_error,
    choose_threshold,
    fit_temperature,
    reliability,
)


def test_calibration_error_by_hand() -> None:
    # bins of a fifteenth: 0.95 and 0.97 share the last one, 0.60 and 0.62 one further down
    first = np.array([0.95, 0.97, 0.60, 0.62, 0.62])
    targets = np.array([0, 1, 0, 1, 0])
    probabilities = np.stack([first, 1 - first], axis=1)

    last = abs(0.96 - 1 / 2) * 2 / 5
    other = abs((0.60 + 0.62 + 0.62) / 3 - 2 / 3)
    split = 0.60  # (0.6, 0.667] begins above 0.6, which belongs to the bin before
    apart = abs(split - 1.0) * 1 / 5 + abs(0.62 - 1 / 2) * 2 / 5

    assert calibration_error(targets, probabilities) == pytest.approx(last + apart)
    assert other > 0


def test_reliability_counts_every_row_once() -> None:
    shares = softmax(np.random.default_rng(0).normal(size=(200, 4)), axis=1)

    found = reliability(np.zeros(200, dtype=np.int64), shares)

    assert found.count.sum() == 200
    assert ((found.accuracy >= 0) & (found.accuracy <= 1)).all()


def test_a_threshold_lies_between_the_rows_it_parts() -> None:
    assert choose_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9])) == 0.25


def test_a_threshold_has_the_largest_balanced_accuracy() -> None:
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, 80)
    scores = np.round(expit(generator.normal(size=80) + targets - 2), 2)

    chosen = choose_threshold(targets, scores)

    reached = balanced_accuracy_score(targets, scores >= chosen)
    others = [balanced_accuracy_score(targets, scores >= cut) for cut in np.linspace(0, 1, 41)]
    assert reached == pytest.approx(max(others))
    assert chosen not in scores


def test_rows_of_one_class_leave_the_threshold_at_a_half() -> None:
    assert choose_threshold(np.array([1, 1]), np.array([0.8, 0.9])) == 0.5


def test_equal_probabilities_have_no_better_threshold_than_any() -> None:
    chosen = choose_threshold(np.array([0, 1, 0, 1]), np.full(4, 0.4))

    assert 0 <= chosen <= 0.4


def test_temperature_undoes_a_known_overconfidence() -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(4000, 3)) * 2
    targets = np.array([generator.choice(3, p=row) for row in softmax(logits, axis=1)])
    confident = softmax(logits * 3, axis=1)

    found = fit_temperature(targets, confident)

    assert found == pytest.approx(3.0, rel=0.1)
    before = calibration_error(targets, confident)
    after = calibration_error(targets, apply_temperature(confident, found))
    assert after < before / 4
    assert after < 0.03


def test_rows_told_apart_without_error_leave_the_temperature_at_its_bound() -> None:
    found = fit_temperature(np.array([0, 1]), np.array([[0.7, 0.3], [0.4, 0.6]]))

    assert found == pytest.approx(0.1, rel=1e-3)


def test_temperature_keeps_the_ranks_and_without_rows_is_one() -> None:
    shares = softmax(np.random.default_rng(3).normal(size=(20, 2)), axis=1)

    scaled = apply_temperature(shares, 4.0)

    assert (np.argsort(scaled[:, 1]) == np.argsort(shares[:, 1])).all()
    assert fit_temperature(np.zeros(0, dtype=np.int64), np.zeros((0, 2))) == 1.0
