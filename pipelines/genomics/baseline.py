"""A baseline without arrangement: counts of short words, and regression on them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES, reverse_complement

AROUND = 10
"""Bases to each side that the linear model of tracks sees."""
_PENALTIES = np.logspace(-2, 5, 15)
_STRETCH = 1 << 20
"""Bases counted at a time: bounds the memory on whole chromosomes."""


@dataclass(frozen=True, slots=True)
class KmerPrediction:
    """Class probabilities of the test records."""

    classes: tuple[int, ...]
    probabilities: Float[ndarray, "R C"]

    @property
    def predicted(self) -> Int64[ndarray, "R"]:
        """The most probable class of each record."""
        return np.take(np.array(self.classes), self.probabilities.argmax(axis=1))


def fit_kmer_baseline(
    train: Iterable[UInt8[ndarray, "T"]],
    targets: Sequence[int] | Int64[ndarray, "R"],
    test: Iterable[UInt8[ndarray, "T"]],
    *,
    k: int = 4,
    both_strands: bool = True,
) -> KmerPrediction:
    """Fit logistic regression on scaled k-mer frequencies and predict the test records.

    Records may be generators: one is held at a time.
    """
    from sklearn.linear_model import LogisticRegression

    known, asked = (kmer_frequencies(of, k=k, both_strands=both_strands) for of in (train, test))
    model = _scaled(LogisticRegression(max_iter=2000)).fit(known, np.asarray(targets))
    return KmerPrediction(tuple(int(c) for c in model.classes_), model.predict_proba(asked))


def fit_kmer_labels(
    train: Iterable[UInt8[ndarray, "T"]],
    targets: Float[ndarray, "R L"],
    test: Iterable[UInt8[ndarray, "T"]],
    *,
    k: int = 4,
    both_strands: bool = True,
) -> Float[ndarray, "R L"]:
    """Fit a logistic regression for each label on k-mer frequencies; log odds of test records."""
    from sklearn.linear_model import LogisticRegression

    known, asked = (kmer_frequencies(of, k=k, both_strands=both_strands) for of in (train, test))
    columns = [
        _scaled(LogisticRegression(max_iter=2000)).fit(known, column).decision_function(asked)
        for column in targets.T
    ]
    return np.stack(columns, axis=1)


def fit_kmer_ridge(
    train: Iterable[UInt8[ndarray, "T"]],
    targets: Float[ndarray, "R"],
    test: Iterable[UInt8[ndarray, "T"]],
    *,
    k: int = 4,
    both_strands: bool = True,
) -> Float[ndarray, "R"]:
    """Fit ridge regression on k-mer frequencies, its penalty by leaving one out; predict test."""
    from sklearn.linear_model import RidgeCV

    known, asked = (kmer_frequencies(of, k=k, both_strands=both_strands) for of in (train, test))
    model = _scaled(RidgeCV(alphas=_PENALTIES)).fit(known, np.asarray(targets, dtype=np.float64))
    found: Float[ndarray, " R"] = model.predict(asked)
    return found


def fit_around(
    examples: Iterable[tuple[UInt8[ndarray, "T"], Float[ndarray, "T K"]]],
    *,
    reach: int = AROUND,
    both_strands: bool = True,
) -> "LinearAround":
    """Fit ridge regression of each base's numbers on the bases up to `reach` around it.

    By its normal equations, which sums over items are enough for (Hoerl and Kennard 1970). Numbers
    that are unknown (NaN) are 0 here, which the mean is where they are standardised; bases of which
    none is known are left out. With `both_strands` the other strand counts as well.
    """
    from scipy.linalg import solve

    width = (2 * reach + 1) * NUM_BASES
    products, moments, count = np.zeros((width, width)), np.zeros((width, 1)), 0
    for bases, values in examples:
        for one, numbers in _strands(bases, values, both=both_strands):
            known = ~np.isnan(numbers).all(axis=1)
            seen = _one_hot_around(one, reach)[known]
            products += seen.T @ seen
            moments = moments + seen.T @ np.nan_to_num(numbers[known])
            count += int(known.sum())
    penalty = max(count / 1000, 1.0) * np.eye(width)
    return LinearAround(solve(products + penalty, moments, assume_a="pos"), reach)


@dataclass(frozen=True, slots=True, eq=False)
class LinearAround:
    """Weights of the bases around a base, for each of K numbers."""

    weights: Float[ndarray, "W K"]
    reach: int

    def predict(self, bases: UInt8[ndarray, "T"]) -> Float[ndarray, "T K"]:
        """Numbers of each base."""
        found: Float[ndarray, "T K"] = _one_hot_around(bases, self.reach) @ self.weights
        return found


def _strands(
    bases: UInt8[ndarray, "T"], values: Float[ndarray, "T K"], *, both: bool
) -> Iterator[tuple[UInt8[ndarray, "T"], Float[ndarray, "T K"]]]:
    yield bases, values
    if both:
        yield reverse_complement(bases), values[::-1]


def _one_hot_around(bases: UInt8[ndarray, "T"], reach: int) -> Float[ndarray, "T W"]:
    """Which of A C G T stands at each offset of each base; beyond the ends, and for N, none."""
    beyond = np.zeros(reach, dtype=np.uint8)
    padded = np.concatenate([beyond, bases, beyond])
    seen = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    letters = np.arange(1, NUM_BASES + 1, dtype=np.uint8)
    return (seen[:, :, None] == letters).reshape(bases.size, -1).astype(np.float64)


def _scaled(model: Any) -> Any:
    """A model on features of spread 1."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), model)


def kmer_frequencies(
    records: Iterable[UInt8[ndarray, "T"]], *, k: int = 4, both_strands: bool = False
) -> Float[ndarray, "R W"]:
    """Stack each record's k-mer counts, divided by their sum (a record without any gives 0)."""
    counts = np.stack([kmer_counts(tokens, k, both_strands=both_strands) for tokens in records])
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def kmer_counts(
    tokens: UInt8[ndarray, "T"], k: int = 4, *, both_strands: bool = False
) -> Int64[ndarray, "W"]:
    """Count the 4**k words of k bases, overlapping; words with N or another code do not count.

    Words stand in alphabetical order (A C G T). With `both_strands` the words of the other
    strand are counted too, so that a record and its reverse complement give the same.
    """
    if not 1 <= k <= 12:
        raise ValueError(f"k lies in 1..12; got {k=}")
    counts = np.zeros(NUM_BASES**k, dtype=np.int64)
    for start in range(0, max(tokens.size - k + 1, 0), _STRETCH):
        words = words_of(tokens[start : start + _STRETCH + k - 1], k)
        counts += np.bincount(words, minlength=counts.size)
    return counts + counts[_opposite_words(k)] if both_strands else counts


def words_of(tokens: UInt8[ndarray, "T"], k: int) -> Int32[ndarray, "V"]:
    """Number the words of up to 15 bases, but for those with N or another code."""
    num_words = max(tokens.size - k + 1, 0)
    bases = tokens - np.uint8(1)  # padding wraps to 255: ambiguous too
    ambiguous = bases >= NUM_BASES
    words = np.zeros(num_words, dtype=np.int32)
    for offset in range(k):
        words *= NUM_BASES
        words += bases[offset : offset + num_words]
    if not num_words or not ambiguous.any():
        return words
    seen = np.concatenate([[0], np.cumsum(ambiguous)])
    return words[seen[k:] == seen[:-k]]


def _opposite_words(k: int) -> Int64[ndarray, "W"]:
    """Index of each word's reverse complement."""
    words = np.arange(NUM_BASES**k)
    opposite = np.zeros_like(words)
    for _ in range(k):
        opposite = opposite * NUM_BASES + (NUM_BASES - 1 - words % NUM_BASES)
        words //= NUM_BASES
    return opposite
