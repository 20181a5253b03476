"""Bits per base of order-k Markov models: what the last k bases alone tell of the next one."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES, PADDING, reverse_complement
from pipelines.genomics.baseline import words_of

MAX_ORDER = 12
_PSEUDOCOUNT = 0.5
_STRETCH = 1 << 20


class MarkovModel:
    """The share of each base after each word of `order` bases, from counts.

    A word's counts are smoothed towards what the model of the next lower order says, as much as
    half a count per base; that of order -1 says a quarter. So a word that was never seen is read
    without its first base (back-off, Witten and Bell 1991, in its simplest form).
    """

    def __init__(self, counts: list[Int64[ndarray, "W 4"]]) -> None:
        said = np.full((1, NUM_BASES), 1 / NUM_BASES, dtype=np.float32)
        for table in counts:
            weighted = table.reshape(-1, *said.shape).astype(
                np.float32
            )  # words by their last bases
            weighted += _PSEUDOCOUNT * NUM_BASES * said
            weighted /= weighted.sum(axis=2, keepdims=True)
            said = weighted.reshape(-1, NUM_BASES)
        self.order = len(counts) - 1
        self.bits: Float[ndarray, "W 4"] = -np.log2(said, out=said)

    def measure(self, tokens: UInt8[ndarray, "T"]) -> tuple[float, int]:
        """Bits of the bases that have `order` bases before them, and how many they are."""
        total, number = 0.0, 0
        for start in range(0, max(tokens.size - self.order, 0), _STRETCH):
            words = words_of(tokens[start : start + _STRETCH + self.order], self.order + 1)
            total += float(self.bits.reshape(-1)[words].sum(dtype=np.float64))
            number += words.size
        return total, number


def count_words(
    records: Iterable[UInt8[ndarray, "T"]], max_order: int, *, both_strands: bool
) -> list[Int64[ndarray, "W 4"]]:
    """Count each base after each word, for the orders 0 to `max_order`."""
    counts = [np.zeros(NUM_BASES ** (order + 1), dtype=np.int64) for order in range(max_order + 1)]
    for tokens in _laid_end_to_end(records):
        for strand in (tokens, reverse_complement(tokens))[: 1 + both_strands]:
            for order, table in enumerate(counts):
                np.add.at(table, words_of(strand, order + 1), 1)
    return [table.reshape(-1, NUM_BASES) for table in counts]


def _laid_end_to_end(records: Iterable[UInt8[ndarray, "T"]]) -> Iterator[UInt8[ndarray, "T"]]:
    """Put many short records into one, with a place between them that no word spans."""
    waiting: list[ndarray] = []
    between = np.array([PADDING], dtype=np.uint8)
    size = 0
    for tokens in records:
        waiting += [tokens, between]
        size += tokens.size
        if size >= _STRETCH:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)
