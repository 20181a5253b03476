"""Numbers along sequences, summed up by stretch: scores over all places without holding them.

A stretch keeps how many of its places count, means, variances and the covariance of true and
predicted values there, and the same of their ranks among all places that were scored together. The
correlation, R2 and errors over any choice of stretches follow exactly; Spearman's correlation of
a part of the stretches is that of their ranks among all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means, variances and covariance of true and predicted values within each stretch [N]."""

    target: Floats
    prediction: Floats
    target_variance: Floats
    prediction_variance: Floats
    covariance: Floats

    def take(self, rows: NDArray[np.int64]) -> "Moments":
        """Keep some stretches."""
        return Moments(*(getattr(self, item.name)[rows] for item in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class StretchPredictions:
    """What is known of one track in each stretch [N]; a stretch without a place counts 0."""

    counts: Floats
    of_values: Moments
    of_ranks: Moments
    errors: Floats
    """Mean absolute error."""

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, rows: NDArray[np.int64]) -> "StretchPredictions":
        """Keep some stretches."""
        values, ranks = self.of_values.take(rows), self.of_ranks.take(rows)
        return StretchPredictions(self.counts[rows], values, ranks, self.errors[rows])

    @property
    def targets(self) -> Floats:
        """True means of the stretches that count."""
        return self.of_values.target[self.counts > 0]

    @property
    def values(self) -> Floats:
        """Predicted means of the stretches that count."""
        return self.of_values.prediction[self.counts > 0]


def sum_up(targets: Sequence[Floats], predictions: Sequence[Floats]) -> StretchPredictions:
    """Sum up a track: true and predicted values of each stretch.

    Places whose true value is NaN are left out. The predictions have as many values as the targets,
    stretch by stretch.
    """
    known = [~np.isnan(target) for target in targets]
    counts = np.array([int(mask.sum()) for mask in known], dtype=np.int64)
    true = _joined([target[mask] for target, mask in zip(targets, known, strict=True)])
    given = _joined([value[mask] for value, mask in zip(predictions, known, strict=True)])
    size = max(true.size, 1)
    errors = _means(np.abs(true - given), counts)
    ranks = (rankdata(true) / size, rankdata(given) / size)
    return StretchPredictions(
        counts.astype(np.float64), _moments(true, given, counts), _moments(*ranks, counts), errors
    )


def stretch_scores(given: StretchPredictions, weights: Floats) -> dict[str, Callable[[], Floats]]:
    """R2, MAE, RMSE and both correlations where each stretch counts `weights` [R, N] times.

    The scores are functions, of [R] values each; NaN where a choice has no place or no variation.
    """
    places = weights * given.counts
    total = places.sum(axis=1)
    values = given.of_values
    apart = (values.target - values.prediction) ** 2
    within = values.target_variance + values.prediction_variance - 2 * values.covariance
    squares = _divide(places @ (within + apart), total)

    def explained() -> Floats:
        return 1 - _divide(squares, _spread(values.target, values.target_variance, places))

    return {
        "r2": explained,
        "mae": lambda: _divide(places @ given.errors, total),
        "rmse": lambda: np.sqrt(squares),
        "pearson": lambda: _correlation(values, places),
        "spearman": lambda: _correlation(given.of_ranks, places),
    }


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate([np.empty(0), *parts]).astype(np.float64)


def _moments(true: Floats, given: Floats, counts: NDArray[np.int64]) -> Moments:
    means = _means(true, counts), _means(given, counts)
    one, two = true - np.repeat(means[0], counts), given - np.repeat(means[1], counts)
    return Moments(
        *means, _means(one**2, counts), _means(two**2, counts), _means(one * two, counts)
    )


def _means(values: Floats, counts: NDArray[np.int64]) -> Floats:
    """Mean of each stretch; 0 where it has no place."""
    stretch = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(stretch, values, minlength=len(counts)) / np.maximum(counts, 1)


def _correlation(given: Moments, places: Floats) -> Floats:
    total = places.sum(axis=1)
    one, two = _centred(given.target, places), _centred(given.prediction, places)
    joint = _divide(places @ (given.covariance + one * two), total)
    joint -= _divide(places @ one, total) * _divide(places @ two, total)
    spreads = _spread(given.target, given.target_variance, places) * _spread(
        given.prediction, given.prediction_variance, places
    )
    return _divide(joint, np.sqrt(spreads))


def _spread(means: Floats, variances: Floats, places: Floats) -> Floats:
    """Variance over all places of each choice [R]; 0 below rounding noise."""
    total = places.sum(axis=1)
    centred = _centred(means, places)
    found = _divide(places @ (variances + centred**2), total)
    found -= _divide(places @ centred, total) ** 2
    return np.where(found > 1e-12 * max(float((means**2).max(initial=0)), 1e-12), found, 0.0)


def _centred(means: Floats, places: Floats) -> Floats:
    """Means less what all have in common, whose square would cost digits."""
    whole = places.sum(axis=0)
    return means - (whole @ means) / max(float(whole.sum()), 1.0)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, with NaN for x / 0."""
    out = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
