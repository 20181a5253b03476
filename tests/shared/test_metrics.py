import time

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

from pipelines.shared.metrics import Score, auroc, evaluate, format_table


def _binary(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, count)
    first = np.round(generator.normal(size=count) + targets, 1)  # with ties
    return targets, np.stack([-first, first], axis=1)


def test_values_equal_those_of_scikit_learn() -> None:
    targets, logits = _binary(200)

    scores = evaluate(targets, logits, groups=[str(i) for i in range(200)], resamples=10)

    predicted = logits.argmax(axis=1)
    expected = {
        "auroc": sklearn_metrics.roc_auc_score(targets, logits[:, 1]),
        "accuracy": sklearn_metrics.accuracy_score(targets, predicted),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(targets, predicted),
    }
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected)


@pytest.mark.parametrize("as_probabilities", [False, True])
def test_macro_auroc_equals_scikit_learns(as_probabilities: bool) -> None:
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 4, 150)
    logits = generator.normal(size=(150, 4)) + np.eye(4)[targets]
    shares = softmax(logits, axis=1)

    found = auroc(targets, shares if as_probabilities else logits)

    expected = sklearn_metrics.roc_auc_score(targets, shares, multi_class="ovr", average="macro")
    assert found == pytest.approx(expected)


def test_interval_equals_a_plain_bootstrap_of_groups() -> None:
    targets, logits = _binary(60, seed=2)
    groups = np.array([f"p{i // 3}" for i in range(60)])

    score = evaluate(targets, logits, groups=groups.tolist(), resamples=3000)["auroc"]

    generator = np.random.default_rng(9)
    values = []
    for _ in range(500):
        drawn = generator.choice(20, 20)
        rows = np.concatenate([np.flatnonzero(groups == f"p{group}") for group in drawn])
        values.append(sklearn_metrics.roc_auc_score(targets[rows], logits[rows, 1]))
    assert (score.low, score.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.03)


def test_equal_predictions_score_exactly_one_half() -> None:
    targets = [0, 1] * 20

    score = evaluate(targets, [[0.5, 0.5]] * 40, groups=[str(i // 2) for i in range(40)])["auroc"]

    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)


def test_a_missing_class_leaves_auroc_undefined_with_its_reason() -> None:
    scores = evaluate([0, 0], [[1.0, 0.0], [0.0, 1.0]], groups=["a", "b"])

    assert scores["auroc"] == Score(None, None, None, "no example of class 1")
    assert scores["accuracy"].value == 0.5
    assert "no example of class 1" in format_table({"ours": scores})


def test_no_predictions_are_undefined() -> None:
    assert evaluate([], np.zeros((0, 2)), groups=[])["accuracy"].value is None


def test_a_seed_repeats_the_interval() -> None:
    targets, logits = _binary(40)
    groups = [str(i) for i in range(40)]

    assert evaluate(targets, logits, groups=groups) == evaluate(targets, logits, groups=groups)


def test_a_thousand_resamples_of_many_groups_are_fast() -> None:
    targets, logits = _binary(5000)

    start = time.perf_counter()
    evaluate(targets, logits, groups=[str(i // 50) for i in range(5000)])

    assert time.perf_counter() - start < 3


def test_many_rows_are_resampled_in_bounded_chunks() -> None:
    targets, logits = _binary(50_000)

    scores = evaluate(targets, logits, groups=[str(i) for i in range(50_000)], resamples=100)

    assert scores["auroc"].low is not None
    assert scores["auroc"].low < scores["auroc"].value  # type: ignore[operator]


def test_table_is_aligned() -> None:
    row = {"auroc": Score(0.9, 0.8, 0.95), "accuracy": Score(0.85, None, None)}

    lines = format_table({"ours": row, "attention pooling": row}).splitlines()

    assert lines[1] == "ours               0.900 [0.800, 0.950]  0.850"
    assert lines[0].index("AUROC") == lines[1].index("0.900") == lines[2].index("0.900")
