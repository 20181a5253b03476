from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.genomics import baseline
from pipelines.genomics.alphabet import encode, reverse_complement
from pipelines.genomics.baseline import fit_kmer_baseline, kmer_counts, kmer_frequencies


def count_by_hand(text, k):
    words = ["".join(word) for word in product("ACGT", repeat=k)]
    return [sum(text[i : i + k] == word for i in range(len(text))) for word in words]


@settings(deadline=None)
@given(st.text("ACGTNR", max_size=60), st.integers(1, 4))
def test_counts_equal_counting_by_hand(text, k):
    assert kmer_counts(encode(text), k).tolist() == count_by_hand(text, k)


@settings(deadline=None)
@given(st.text("ACGTNY", max_size=60), st.integers(1, 4))
def test_both_strands_give_what_the_strands_give_together(text, k):
    tokens = encode(text)
    both = kmer_counts(tokens, k, both_strands=True)
    assert np.array_equal(both, kmer_counts(tokens, k) + kmer_counts(reverse_complement(tokens), k))
    assert np.array_equal(both, kmer_counts(reverse_complement(tokens), k, both_strands=True))


def test_counting_in_stretches_changes_nothing(monkeypatch):
    tokens = np.random.default_rng(0).integers(1, 6, 1000, np.uint8)
    whole = kmer_counts(tokens, 3)
    monkeypatch.setattr(baseline, "_STRETCH", 7)
    assert np.array_equal(kmer_counts(tokens, 3), whole)


def test_word_lengths_outside_the_range_are_refused():
    with pytest.raises(ValueError, match=r"1\.\.12"):
        kmer_counts(encode("ACGT"), 0)


def test_frequencies_do_not_depend_on_length():
    few, many, none = kmer_frequencies([encode("ACGT" * 5), encode("ACGT" * 50), encode("NN")], k=1)
    assert np.allclose(few, many)
    assert few.sum() == pytest.approx(1.0)
    assert not none.any()


def test_composition_is_learned():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 3, 90)
    weights = np.array([[4, 2, 2, 2], [2, 4, 2, 2], [2, 2, 4, 2]]) / 10
    records = [generator.choice(4, 400, p=weights[t]).astype(np.uint8) + 1 for t in targets]
    prediction = fit_kmer_baseline(
        iter(records[:60]), targets[:60], iter(records[60:]), k=2, both_strands=False
    )
    assert prediction.classes == (0, 1, 2)
    assert prediction.probabilities.shape == (30, 3)
    assert np.allclose(prediction.probabilities.sum(axis=1), 1)
    assert (prediction.predicted == targets[60:]).mean() > 0.9
