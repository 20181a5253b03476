"""Scores of saved predictions, each with a bootstrap interval over groups (patients)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Weights = NDArray[np.float64]  # [R, N]: how often each of R resamples holds each of N rows
Values = NDArray[np.float64]  # [R], NaN where undefined


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


def evaluate(
    targets: Sequence[int] | NDArray[np.int64],
    logits: Sequence[Sequence[float]] | NDArray[np.float64],
    *,
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Return `auroc`, `accuracy` and `balanced_accuracy` of predictions [N, C].

    AUROC is that of class 1 for two classes, else the mean over classes, each against the rest.
    Intervals are percentiles (2.5, 97.5) of resamples of whole groups: rows of one patient are not
    independent. Resamples in which a score is undefined are left out of its interval. Logits or
    probabilities may be given.
    """
    labels = np.asarray(targets, dtype=np.int64)
    outputs = np.asarray(logits, dtype=np.float64)
    if not (len(labels) == len(outputs) == len(groups)):
        raise ValueError(f"got {len(labels)} targets, {len(outputs)} rows, {len(groups)} groups")
    if len(labels) == 0:
        empty = Score(None, None, None, "no predictions")
        return {"auroc": empty, "accuracy": empty, "balanced_accuracy": empty}
    values = np.concatenate(
        [
            np.stack([measure(labels, outputs, weights) for measure in _MEASURES.values()])
            for weights in _group_weights(groups, resamples=resamples, seed=seed)
        ],
        axis=1,
    )
    absent = sorted(set(range(outputs.shape[1])) - set(labels.tolist()))
    reason = f"no example of class {', '.join(map(str, absent))}" if absent else "undefined"
    return {name: _score(row, reason) for name, row in zip(_MEASURES, values, strict=True)}


def auroc(
    targets: Sequence[int] | NDArray[np.int64],
    logits: Sequence[Sequence[float]] | NDArray[np.float64],
) -> float | None:
    """Return the AUROC as `evaluate` defines it, without an interval; None where undefined."""
    labels = np.asarray(targets, dtype=np.int64)
    value = float(
        _macro_auroc(labels, np.asarray(logits, np.float64), np.ones((1, len(labels))))[0]
    )
    return None if np.isnan(value) else value


def format_table(rows: Mapping[str, Mapping[str, Score]]) -> str:
    """Return aligned lines: a row per model, a column per score."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    header = ["model", *(_TITLES.get(name, name) for name in names)]
    body = [
        [model, *(format_score(scores[name]) if name in scores else "-" for name in names)]
        for model, scores in rows.items()
    ]
    return align([header, *body])


def format_score(score: Score) -> str:
    """Return `0.912 [0.850, 0.960]`, or why there is none."""
    if score.value is None:
        return f"- ({score.reason})"
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Pad the cells of each column to one width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


_CHUNK_VALUES = 4_000_000  # weights held at once: 32 MB
_TITLES = {"auroc": "AUROC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}


def _group_weights(groups: Sequence[str], *, resamples: int, seed: int) -> Iterator[Weights]:
    """Yield the weights of the sample itself, then of its resamples, in bounded chunks."""
    names, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    generator = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    yield np.ones((1, len(group_of)))
    chunk = max(1, _CHUNK_VALUES // len(group_of))
    for start in range(0, resamples, chunk):
        counts = generator.multinomial(len(names), share, size=min(chunk, resamples - start))
        yield counts.astype(np.float64)[:, group_of]


def _score(values: Values, reason: str) -> Score:
    if np.isnan(values[0]):
        return Score(None, None, None, reason)
    defined = values[1:][~np.isnan(values[1:])]
    if len(defined) == 0:
        return Score(float(values[0]), None, None, "no resample defines an interval")
    low, high = np.percentile(defined, [2.5, 97.5])
    return Score(float(values[0]), float(low), float(high))


def _accuracy(labels: NDArray[np.int64], outputs: Weights, weights: Weights) -> Values:
    hits = (outputs.argmax(axis=1) == labels).astype(np.float64)
    return np.asarray(weights @ hits / weights.sum(axis=1))


def _balanced_accuracy(labels: NDArray[np.int64], outputs: Weights, weights: Weights) -> Values:
    """Return the mean recall of the classes that a resample holds."""
    recalls = []
    for label in np.unique(labels):
        rows = labels == label
        recalls.append(_divide(*_hits(outputs[rows], label, weights[:, rows])))
    table = np.stack(recalls)
    present = ~np.isnan(table)
    return np.asarray(np.where(present, table, 0.0).sum(axis=0) / present.sum(axis=0))


def _hits(outputs: Weights, label: int, weights: Weights) -> tuple[Values, Values]:
    return weights @ (outputs.argmax(axis=1) == label).astype(np.float64), weights.sum(axis=1)


def _macro_auroc(labels: NDArray[np.int64], outputs: Weights, weights: Weights) -> Values:
    num_classes = outputs.shape[1]
    probable = _are_probabilities(outputs)
    if num_classes == 2:
        scores = outputs[:, 1] if probable else outputs[:, 1] - outputs[:, 0]
        return _binary_auroc(labels == 1, scores, weights)
    # logits of one class compare between rows only after the softmax
    shares = outputs if probable else np.asarray(softmax(outputs, axis=1))
    each = [_binary_auroc(labels == c, shares[:, c], weights) for c in range(num_classes)]
    return np.asarray(np.mean(each, axis=0))


def _are_probabilities(outputs: Weights) -> bool:
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-4))


def _binary_auroc(positive: NDArray[np.bool_], scores: Values, weights: Weights) -> Values:
    """Return P(score of a positive > of a negative) + P(equal) / 2, weighted, per resample."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    weighted = weights[:, order]
    pos = np.add.reduceat(weighted * positive[order], starts, axis=1)  # [R, distinct scores]
    neg = np.add.reduceat(weighted * ~positive[order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    return _divide((pos * (below + 0.5 * neg)).sum(axis=1), pos.sum(axis=1) * neg.sum(axis=1))


def _divide(numerator: Values, denominator: Values) -> Values:
    """Divide, with NaN for x / 0."""
    out = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


_MEASURES = {
    "auroc": _macro_auroc,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
}
