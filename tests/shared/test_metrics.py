import numpy as np
import pytest
from lifelines.datasets import load_rossi
from lifelines.utils import concordance_index
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

from pipelines.shared.metrics import (
    ClassPredictions,
    RiskPredictions,
    Score,
    ValuePredictions,
    auroc,
    format_score,
    format_table,
    measure,
)


def _values(scores: dict[str, Score]) -> dict[str, float | None]:
    return {name: score.value for name, score in scores.items()}


def _draw(count: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_classes, count)
    logits = np.round(generator.normal(size=(count, num_classes)) + np.eye(num_classes)[targets], 1)
    return targets, logits


def test_values_of_two_classes_by_hand() -> None:
    # tp 2, fn 1, fp 1, tn 1 at 0.6
    probabilities = np.array([0.9, 0.6, 0.2, 0.7, 0.1])
    given = ClassPredictions(
        ("no", "yes"),
        np.array([1, 1, 1, 0, 0]),
        np.stack([1 - probabilities, probabilities], axis=1),
        threshold=0.6,
    )

    found = _values(measure(given))

    assert found["auroc"] == pytest.approx(4 / 6)
    assert found["auprc"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["mcc"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.64 + 0.49 + 0.01) / 5)
    assert "qwk" not in found


def test_quadratic_kappa_follows_the_given_order_by_hand() -> None:
    # rows (true, predicted): 3 x low-low, 1 x low-high, 2 x mid-mid, 2 x high-high
    names = ("high", "low", "mid")
    true = np.array([1, 1, 1, 1, 2, 2, 0, 0])
    chosen = np.array([1, 1, 1, 0, 2, 2, 0, 0])
    given = ClassPredictions(names, true, np.eye(3)[chosen], order=("low", "mid", "high"))

    value = measure(given)["qwk"].value

    # observed disagreement 1 * 4; expected sum over (i - j)^2 true_i found_j / 8
    true_counts, found_counts = np.array([4, 2, 2]), np.array([3, 2, 3])
    cost = np.subtract.outer(np.arange(3), np.arange(3)) ** 2
    expected = (np.outer(true_counts, found_counts) * cost).sum() / 8
    assert value == pytest.approx(1 - 4 / expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_auroc_equals_scikit_learns(num_classes: int) -> None:
    targets, logits = _draw(150, num_classes)
    shares = softmax(logits, axis=1)

    expected = (
        sklearn_metrics.roc_auc_score(targets, logits[:, 1] - logits[:, 0])
        if num_classes == 2
        else sklearn_metrics.roc_auc_score(targets, shares, multi_class="ovr", average="macro")
    )
    assert auroc(targets, logits) == pytest.approx(expected)
    classes = tuple(map(str, range(num_classes)))
    found = measure(ClassPredictions(classes, targets, shares))["auroc"].value
    assert found == pytest.approx(expected, abs=1e-3)  # the softmax unties a few rows


def test_saturated_logits_keep_their_ranks() -> None:
    assert auroc([0, 1, 1, 0], [[0, 800.0], [0, 900.0], [0, 950.0], [0, 700.0]]) == 1.0


def test_numbers_by_hand() -> None:
    found = _values(measure(ValuePredictions(np.array([1.0, 2, 3, 6]), np.array([1.0, 3, 2, 6]))))

    assert found["r2"] == pytest.approx(1 - 2 / 14)
    assert found["mae"] == pytest.approx(0.5)
    assert found["rmse"] == pytest.approx(np.sqrt(0.5))
    assert found["spearman"] == pytest.approx(0.8)


def test_c_index_is_lifelines_and_keeps_the_sign_of_the_risk() -> None:
    rossi = load_rossi()
    risks = rossi["prio"].to_numpy(np.float64)
    given = RiskPredictions(
        rossi["week"].to_numpy(np.float64), rossi["arrest"].to_numpy(bool), risks
    )

    value = measure(given)["c_index"].value
    turned = RiskPredictions(given.times, given.events, -risks)

    assert value == concordance_index(rossi["week"], -risks, rossi["arrest"])
    assert value is not None
    assert value > 0.5
    assert measure(turned)["c_index"].value == pytest.approx(1 - value)


@pytest.mark.parametrize(
    ("events", "reason"), [([False, False], "no event"), ([True, True], "no two comparable times")]
)
def test_a_c_index_without_comparable_rows_is_undefined(events: list[bool], reason: str) -> None:
    given = RiskPredictions(np.array([3.0, 3.0]), np.array(events), np.array([1.0, 2.0]))

    assert measure(given)["c_index"] == Score(None, None, None, reason)


def test_a_missing_class_leaves_auroc_undefined_with_its_reason() -> None:
    given = ClassPredictions(("a", "b"), np.array([0, 0]), np.array([[1.0, 0.0], [0.2, 0.8]]))

    scores = measure(given)

    assert scores["auroc"] == Score(None, None, None, "no example of class b")
    assert scores["accuracy"].value == 0.5
    assert "no example of class b" in format_table({"ours": scores}, names=["auroc"])


def test_no_predictions_are_undefined() -> None:
    nothing = ValuePredictions(np.zeros(0), np.zeros(0))

    assert measure(nothing)["mae"] == Score(None, None, None, "no predictions")


def test_table_is_aligned() -> None:
    row = {"auroc": Score(0.9, 0.8, 0.95), "accuracy": Score(0.85, None, None)}

    lines = format_table({"ours": row, "attention pooling": row}).splitlines()

    assert lines[1] == "ours               0.900 [0.800, 0.950]  0.850"
    assert lines[0].index("AUROC") == lines[1].index("0.900") == lines[2].index("0.900")


def test_differences_are_shown_with_their_sign() -> None:
    assert format_score(Score(0.1, -0.05, 0.2), signed=True) == "+0.100 [-0.050, +0.200]"
