"""What the validation rows decide about probabilities: a threshold, and a temperature."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_curve

NUM_BINS = 15
"""Bins of equal width of the calibration error, as of Guo et al. 2017."""

_SMALLEST = 5e-7  # half the last decimal that is kept of a probability
TEMPERATURES = (0.1, 10.0)
"""Bounds: rows that a model tells apart without error would put the temperature at 0."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence against accuracy, a value per bin that holds rows."""

    confidence: Floats
    accuracy: Floats
    count: NDArray[np.int64]


def reliability(targets: NDArray[np.int64], probabilities: Floats) -> Reliability:
    """Bin the rows by the probability of their most probable class.

    Bins have equal width, (k/15, (k+1)/15]. Source: Guo et al., On calibration of modern neural
    networks, ICML 2017, equations 1 and 2.
    """
    bins, confidence, correct = confidence_bins(targets, probabilities)
    count = np.bincount(bins, minlength=NUM_BINS)
    held = count > 0
    return Reliability(
        np.bincount(bins, confidence, NUM_BINS)[held] / count[held],
        np.bincount(bins, correct, NUM_BINS)[held] / count[held],
        count[held],
    )


def confidence_bins(
    targets: NDArray[np.int64], probabilities: Floats
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return bin, probability of the most probable class, and whether that is right, per row."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == targets).astype(np.float64)
    bins = np.clip(np.ceil(confidence * NUM_BINS - 1e-9) - 1, 0, NUM_BINS - 1)
    return bins.astype(np.int64), confidence, correct


def calibration_error(targets: NDArray[np.int64], probabilities: Floats) -> float:
    """Expected calibration error: |accuracy - confidence|, averaged over the rows by bin.

    Source: Guo et al., ICML 2017, equation 3, with 15 bins.
    """
    found = reliability(targets, probabilities)
    gaps = np.abs(found.accuracy - found.confidence)
    return float((found.count * gaps).sum() / found.count.sum())


def choose_threshold(targets: NDArray[np.int64], probabilities: Floats) -> float:
    """Threshold on the probability of the second of two classes [N], from validation rows.

    Youden's J = sensitivity + specificity - 1 is largest there, and so is the balanced accuracy,
    (J + 1) / 2. The threshold lies half way to the next lower probability, so that it does not
    stand on a row; among equally good ones the nearest to 0.5 is taken. 0.5 where the rows are all
    of one class. Source: Youden, Index for rating diagnostic tests, Cancer 1950.
    """
    labels = np.asarray(targets, np.int64)
    scores = np.asarray(probabilities, np.float64)
    if len(np.unique(labels)) < 2:
        return 0.5
    false_rate, true_rate, cuts = roc_curve(labels, scores, drop_intermediate=False)
    distinct = np.unique(scores)
    gain = true_rate[1:] - false_rate[1:]  # the first stands for "none is positive"
    places = np.searchsorted(distinct, cuts[1:])
    below = np.where(places > 0, distinct[np.maximum(places - 1, 0)], 0.0)
    middles = (cuts[1:] + below) / 2
    best = np.flatnonzero(np.isclose(gain, gain.max(), atol=1e-12))
    return float(middles[best[np.abs(middles[best] - 0.5).argmin()]])


def fit_temperature(targets: NDArray[np.int64], probabilities: Floats) -> float:
    """Temperature T that minimises the negative log-likelihood of validation rows [N, C].

    T divides the logits: above 1 it takes confidence back. It lies between 0.1 and 10; 1 where
    there are no rows. Source: Guo et al., ICML 2017, section 4.2.
    """
    if len(targets) == 0:
        return 1.0
    logits = _logits(probabilities)
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[rows, targets].mean())

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def apply_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities [N, C] of the logits divided by a temperature."""
    return np.asarray(softmax(_logits(probabilities) / temperature, axis=1))


def _logits(probabilities: Floats) -> Floats:
    return np.log(np.maximum(np.asarray(probabilities, np.float64), _SMALLEST))
