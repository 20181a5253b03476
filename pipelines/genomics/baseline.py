"""A baseline without arrangement: counts of short words, and logistic regression on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES

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
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(kmer_frequencies(train, k=k, both_strands=both_strands), np.asarray(targets))
    probabilities = model.predict_proba(kmer_frequencies(test, k=k, both_strands=both_strands))
    return KmerPrediction(tuple(int(c) for c in model.classes_), probabilities)


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
        words = _words(tokens[start : start + _STRETCH + k - 1], k)
        counts += np.bincount(words, minlength=counts.size)
    return counts + counts[_opposite_words(k)] if both_strands else counts


def _words(tokens: UInt8[ndarray, "T"], k: int) -> Int64[ndarray, "V"]:
    num_words = tokens.size - k + 1
    bases = tokens - np.uint8(1)  # padding wraps to 255: ambiguous too
    ambiguous = bases >= NUM_BASES
    words = np.zeros(num_words, dtype=np.int32)
    for offset in range(k):
        words *= NUM_BASES
        words += bases[offset : offset + num_words]
    if not ambiguous.any():
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
