"""Scores of many bootstrap resamples at once: a resample is how often it holds each row.

`weighted_scores` gives for weights of one what `metrics.measure` gives, which tests hold it to; a
thousand resamples of all scores take about the time in which a library computes twenty.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.shared.calibration import confidence_bins
from pipelines.shared.metrics import (
    ClassPredictions,
    Floats,
    JointPredictions,
    Predictions,
    RiskPredictions,
    ValuePredictions,
)
from pipelines.shared.stretches import StretchPredictions, stretch_scores

Weights = NDArray[np.float64]  # [R, N]: how often each of R resamples holds each of N rows
Values = NDArray[np.float64]  # [R], NaN where undefined
Table = NDArray[np.float64]  # [R, true class, predicted class]
Compute = Callable[[], Values]

_CHUNK_VALUES = 4_000_000  # weights held at once: 32 MB
_PAIR_ROWS = 512  # rows of the table of pairs held at once


def draw_counts(num_groups: int, *, resamples: int, seed: int, width: int) -> Iterator[Weights]:
    """Yield how often each resample holds each group [R, G], in chunks that `width` rows allow.

    Groups are drawn with replacement, as many as there are. A seed repeats the draws.
    """
    generator = np.random.default_rng(seed)
    share = np.full(num_groups, 1 / num_groups)
    chunk = max(1, _CHUNK_VALUES // max(width, num_groups))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield generator.multinomial(num_groups, share, size=size).astype(np.float64)


def weighted_scores(
    predictions: Predictions, weights: Weights, names: Sequence[str] | None = None
) -> dict[str, Values]:
    """Return the scores that `metrics.measure` names, per resample; NaN where undefined.

    Only those in `names`, if given. Means over classes run over the classes that a resample holds.
    """
    if isinstance(predictions, JointPredictions):
        return _joint_scores(predictions, weights, names)
    if isinstance(predictions, ClassPredictions):
        functions = _class_functions(predictions, weights)
    elif isinstance(predictions, StretchPredictions):
        functions = stretch_scores(predictions, weights)
    elif isinstance(predictions, ValuePredictions):
        functions = _value_functions(predictions.targets, predictions.values, weights)
    else:
        risks = predictions
        functions = {"c_index": lambda: _c_index(risks, weights)}
    return {
        name: function() for name, function in functions.items() if names is None or name in names
    }


def group_index(groups: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Place of each row's group among sorted distinct names."""
    return np.searchsorted(np.asarray(names, dtype=str), np.asarray(groups, dtype=str))


def _joint_scores(
    given: JointPredictions, weights: Weights, names: Sequence[str] | None
) -> dict[str, Values]:
    each = [weighted_scores(part, weights, names) for part in given.parts.values()]
    found = {
        name: _mean([scores[name] for scores in each]) for name in each[0] if name in given.means
    }
    exact = given.exact
    if exact is not None and (names is None or "exact_match" in names):
        found["exact_match"] = _divide(weights @ exact.astype(np.float64), weights.sum(axis=1))
    return found


def _class_functions(given: ClassPredictions, weights: Weights) -> dict[str, Compute]:
    labels, outputs = given.targets, given.probabilities
    num_classes = len(given.classes)
    scored = [1] if num_classes == 2 else list(range(num_classes))
    table = _confusion(labels, given.chosen, num_classes, weights)
    functions: dict[str, Compute] = {
        "auroc": lambda: _mean([_auroc(labels == c, outputs[:, c], weights) for c in scored]),
        "auprc": lambda: _mean([_precision(labels == c, outputs[:, c], weights) for c in scored]),
        "accuracy": lambda: _divide(np.einsum("rcc->r", table), table.sum(axis=(1, 2))),
        "balanced_accuracy": lambda: _mean(list(_divide(*_hits(table)).T)),
        "f1": lambda: _f1(table),
        "mcc": lambda: _matthews(table),
    }
    ranks = given.ranks
    if ranks is not None:
        functions["qwk"] = lambda: _kappa(table, ranks)
    functions["brier"] = lambda: _brier(labels, outputs, weights)
    functions["ece"] = lambda: _calibration_error(labels, outputs, weights)
    return functions


def _confusion(
    labels: NDArray[np.int64], chosen: NDArray[np.int64], num_classes: int, weights: Weights
) -> Table:
    """Weighted counts of true and predicted classes."""
    cells = labels * num_classes + chosen
    table = np.zeros((len(weights), num_classes * num_classes))
    held, sums = _sum_by(cells, weights)
    table[:, held] = sums
    return table.reshape(-1, num_classes, num_classes)


def _sum_by(keys: NDArray[np.int64], weights: Weights) -> tuple[NDArray[np.int64], Weights]:
    """Sum the weights of rows with equal keys: distinct keys [K] and sums [R, K]."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return distinct, np.add.reduceat(weights[:, order], starts, axis=1)


def _hits(table: Table) -> tuple[Weights, Weights]:
    return np.einsum("rcc->rc", table), table.sum(axis=2)


def _f1(table: Table) -> Values:
    """Of the second of two classes (0 where nobody has or gets it), else the mean over classes."""
    each = _divide(2 * np.einsum("rcc->rc", table), table.sum(axis=2) + table.sum(axis=1))
    return np.nan_to_num(each[:, 1]) if table.shape[1] == 2 else _mean(list(each.T))


def _matthews(table: Table) -> Values:
    """Multi-class form of Gorodkin 2004; 0 where one side does not vary."""
    hits, true = _hits(table)
    found, total = table.sum(axis=1), table.sum(axis=(1, 2))
    covariance = hits.sum(axis=1) * total - (true * found).sum(axis=1)
    spread = (total**2 - (true**2).sum(axis=1)) * (total**2 - (found**2).sum(axis=1))
    return np.where(total > 0, np.nan_to_num(_divide(covariance, np.sqrt(spread))), np.nan)


def _kappa(table: Table, ranks: NDArray[np.int64]) -> Values:
    """Cohen's kappa with quadratic weights."""
    cost = (ranks[:, None] - ranks[None, :]).astype(np.float64) ** 2
    expected = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    total = table.sum(axis=(1, 2))
    return 1 - _divide((table * cost).sum(axis=(1, 2)) * total, (expected * cost).sum(axis=(1, 2)))


def _brier(labels: NDArray[np.int64], outputs: Floats, weights: Weights) -> Values:
    shares = outputs / outputs.sum(axis=1, keepdims=True)
    if outputs.shape[1] == 2:
        losses = (outputs[:, 1] - (labels == 1)) ** 2
    else:
        losses = ((shares - np.eye(outputs.shape[1])[labels]) ** 2).sum(axis=1)
    return _divide(weights @ losses, weights.sum(axis=1))


def _calibration_error(labels: NDArray[np.int64], outputs: Floats, weights: Weights) -> Values:
    bins, confidence, correct = confidence_bins(labels, outputs)
    _, gaps = _sum_by(bins, weights * (confidence - correct))
    return _divide(np.abs(gaps).sum(axis=1), weights.sum(axis=1))


def _auroc(positive: NDArray[np.bool_], scores: Values, weights: Weights) -> Values:
    """Return P(score of a positive > of a negative) + P(equal) / 2, weighted, per resample."""
    pos, neg = _by_score(positive, scores, weights)
    below = np.cumsum(neg, axis=1) - neg
    return _divide((pos * (below + 0.5 * neg)).sum(axis=1), pos.sum(axis=1) * neg.sum(axis=1))


def _precision(positive: NDArray[np.bool_], scores: Values, weights: Weights) -> Values:
    """Sum of precision times gain in recall, from the highest score down."""
    pos, neg = (part[:, ::-1] for part in _by_score(positive, scores, weights))
    taken = np.cumsum(pos, axis=1)
    precision = np.nan_to_num(_divide(taken, taken + np.cumsum(neg, axis=1)))
    return _divide((pos * precision).sum(axis=1), pos.sum(axis=1))


def _by_score(
    positive: NDArray[np.bool_], scores: Values, weights: Weights
) -> tuple[Weights, Weights]:
    """Weights of positives and of negatives [R, distinct scores], from the lowest score up."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    weighted = weights[:, order]
    pos = np.add.reduceat(weighted * positive[order], starts, axis=1)
    return pos, np.add.reduceat(weighted * ~positive[order], starts, axis=1)


def _value_functions(targets: Floats, values: Floats, weights: Weights) -> dict[str, Compute]:
    centre = targets.mean()  # large common parts would cost digits of the spread
    true, given = targets - centre, values - centre
    total = weights.sum(axis=1)
    squares = _divide(weights @ (true - given) ** 2, total)
    return {
        "r2": lambda: _explained(true, squares, weights),
        "mae": lambda: _divide(weights @ np.abs(true - given), total),
        "rmse": lambda: np.sqrt(squares),
        "pearson": lambda: _correlation(true[None], given[None], weights),
        "spearman": lambda: _correlation(_ranks(true, weights), _ranks(given, weights), weights),
    }


def _explained(true: Floats, squares: Values, weights: Weights) -> Values:
    """Share of the variance that the squared errors leave; NaN where the truth does not vary."""
    total = weights.sum(axis=1)
    spread = _divide(weights @ true**2, total) - _divide(weights @ true, total) ** 2
    return 1 - _divide(squares, np.where(spread > 1e-12, spread, 0.0))


def _ranks(values: Values, weights: Weights) -> Weights:
    """Mean ranks of the rows within each resample [R, N]."""
    _, of = np.unique(values, return_inverse=True)
    _, held = _sum_by(of, weights)
    return (np.cumsum(held, axis=1) - held / 2 + 0.5)[:, of]


def _correlation(first: Weights, second: Weights, weights: Weights) -> Values:
    total = weights.sum(axis=1, keepdims=True)
    one = first - (weights * first).sum(axis=1, keepdims=True) / total
    two = second - (weights * second).sum(axis=1, keepdims=True) / total
    spreads = (weights * one**2).sum(axis=1) * (weights * two**2).sum(axis=1)
    return _divide((weights * one * two).sum(axis=1), np.sqrt(spreads))


def _c_index(given: RiskPredictions, weights: Weights) -> Values:
    """Harrell's concordance: of pairs whose order is known, how many the risks put in it.

    i comes before j if its event was seen, and j's time is later, or equal and censored.
    """
    times, events, risks = given.times, given.events, given.risks
    good, known = np.zeros(len(weights)), np.zeros(len(weights))
    rows = np.flatnonzero(events)
    for start in range(0, len(rows), _PAIR_ROWS):
        block = rows[start : start + _PAIR_ROWS]
        later = times[None] > times[block, None]
        pairs = later | ((times[None] == times[block, None]) & ~events[None])
        wins = pairs * (0.5 + 0.5 * np.sign(risks[block, None] - risks[None]))
        known += (weights[:, block] * (weights @ pairs.T.astype(np.float64))).sum(axis=1)
        good += (weights[:, block] * (weights @ wins.T)).sum(axis=1)
    return _divide(good, known)


def _mean(values: Sequence[Values]) -> Values:
    """Mean over the classes that define a value."""
    table = np.stack(values)
    present = ~np.isnan(table)
    return _divide(np.where(present, table, 0.0).sum(axis=0), present.sum(axis=0).astype(float))


def _divide(numerator: Values, denominator: Values) -> Values:
    """Divide, with NaN for x / 0."""
    out = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
