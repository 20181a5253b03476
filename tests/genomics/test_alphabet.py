import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics.alphabet import (
    COMPLEMENT,
    LETTERS,
    NUM_TOKENS,
    PADDING,
    BadCharacterError,
    decode,
    encode,
    reverse_complement,
)

dna = st.text(LETTERS, max_size=200)


@given(dna)
def test_decoding_undoes_encoding(text):
    assert decode(encode(text)) == text
    assert encode(text).dtype == np.uint8


@given(dna)
def test_reverse_complement_is_an_involution(text):
    tokens = encode(text)
    assert np.array_equal(reverse_complement(reverse_complement(tokens)), tokens)


@given(dna)
def test_reverse_complement_equals_biopython(text):
    assert decode(reverse_complement(encode(text))) == str(Seq(text).reverse_complement())


def test_complement_keeps_padding_and_maps_tokens_onto_themselves():
    assert COMPLEMENT[PADDING] == PADDING
    assert sorted(COMPLEMENT) == list(range(NUM_TOKENS))


@given(dna)
def test_lower_case_and_bytes_are_read_alike(text):
    assert np.array_equal(encode(text.lower()), encode(text))
    assert np.array_equal(encode(text.encode()), encode(text))


def test_uracil_is_read_as_thymine():
    assert decode(encode("ACGUu")) == "ACGTT"


@pytest.mark.parametrize(
    ("text", "character", "position"),
    [("ACG1T", "1", 4), (b"AC-T", "-", 3), ("é", "é", 1), ("AC𝄞T", "𝄞", 3), ("A\0", "\0", 2)],
)
def test_first_bad_character_is_named_with_its_position(text, character, position):
    with pytest.raises(BadCharacterError) as caught:
        encode(text)
    assert (caught.value.character, caught.value.position) == (character, position)


def test_tokens_outside_the_alphabet_are_refused():
    with pytest.raises(ValueError, match="got 16"):
        decode(np.array([1, 16], dtype=np.uint8))


def test_encoded_tokens_may_be_written_to():
    tokens = encode("ACGT")
    tokens[0] = PADDING
    assert decode(tokens) == "-CGT"
