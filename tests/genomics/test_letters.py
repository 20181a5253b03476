import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics.alphabet import LETTERS, decode, encode
from pipelines.genomics.letters import LetterError, Reading, read_letters
from pipelines.shared.conf_tree import conf_folder
from pipelines.shared.errors import InputError

LENIENT = Reading(gaps="strip", digits="strip", others="n")


def read(text, **settings):
    found = read_letters(text.encode(), Reading(**settings))
    return found.text.tobytes().decode(), found


@given(st.text(LETTERS + LETTERS.lower() + "Uu", max_size=200))
def test_letters_are_read_in_upper_case_with_u_as_t(text):
    read_text, found = read(text)
    assert read_text == text.upper().replace("U", "T")
    assert np.array_equal(encode(read_text), encode(text))
    assert found.plain == (set(read_text) <= set("ACGT"))
    assert found.counts.get("uracil", 0) == text.upper().count("U")
    assert {k: v for k, v in found.counts.items() if len(k) == 1} == {
        letter: read_text.count(letter) for letter in LETTERS if letter in read_text
    }


@given(st.text("ACGTNacgtn", max_size=200))
def test_the_soft_mask_comes_back(text):
    read_text, found = read(text)
    letters = np.array(list(read_text))
    for start, end in found.mask:
        letters[start:end] = np.char.lower(letters[start:end])
    assert "".join(letters) == text
    assert found.counts.get("lower", 0) == sum(map(str.islower, text))
    assert not read(text, soft_mask=False)[1].mask.size


@given(st.text("ACGTN", max_size=300), st.integers(1, 70), st.sampled_from(["\n", "\r\n"]))
def test_lines_of_any_length_are_joined(text, width, end):
    wrapped = end.join(text[i : i + width] for i in range(0, len(text), width)) + end
    joined, found = read(wrapped)
    assert joined == text
    assert "whitespace" not in found.counts


@given(st.text("ACGTNacgtRYU-.*0123 \t", max_size=100))
def test_what_is_left_out_is_counted(text):
    found = read_letters(text.encode(), LENIENT)
    counts = found.counts
    left_out = sum(counts.get(name, 0) for name in ("gaps", "digits", "whitespace"))
    assert found.text.size + left_out == len(text)
    assert counts.get("gaps", 0) == sum(text.count(sign) for sign in "-.*")


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("ACRYT", {"iupac": "n"}, "ACNNT"),
        ("AC-G..T*", {"gaps": "strip"}, "ACGT"),
        ("1 ACGT\n5 AC", {"digits": "strip"}, "ACGTAC"),
        ("AXxJT", {"others": "n", "protein_fraction": 1.0}, "ANNNT"),
        ("ACGT" * 20 + "EF", {"others": "n"}, "ACGT" * 20 + "NN"),
        ("", {}, ""),
    ],
)
def test_each_choice_of_reading(text, settings, expected):
    assert read(text, **settings)[0] == expected


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("ACU", {"uracil": "error"}, "'U' at position 3"),
        ("AC\nGT-", {}, "'-' at position 5"),
        ("A C1", {}, "'1' at position 3"),
        ("AC>GT", {"others": "n"}, "'>' at position 3"),
        ("ACéGT", {"others": "n"}, "'é' at position 3"),
        ("AC\0GT", {"others": "n"}, "at position 3"),
        ("MKVEFILPQ", {}, "looks like protein"),
        ("MKVEFILPQ", {"others": "n"}, "looks like protein"),
        ("ACXT", {}, ": 'X' at position 3"),
    ],
)
def test_what_the_settings_do_not_allow_is_refused(text, settings, words):
    with pytest.raises(LetterError, match=words.replace("'", ".")) as caught:
        read(text, **settings)
    assert caught.value.remedy


def test_x_alone_is_masked_dna_and_no_protein():
    assert read("ACGTXXXXXXXX", others="n")[0] == "ACGTNNNNNNNN"
    with pytest.raises(LetterError, match="no DNA letter"):
        read("ACGTXXXXXXXX")


def test_defaults_are_those_of_the_configuration():
    strict = yaml.safe_load((conf_folder() / "reading" / "strict.yaml").read_text())
    assert Reading.from_config(strict) == Reading()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gaps": "keep"}, "reading.gaps must be error or strip; got 'keep'"),
        ({"duplicate_ids": "last"}, "error or first or suffix"),
        ({"protein_fraction": 0.0}, "above 0"),
        ({"min_length": 0}, "at least 1"),
        ({"label_pattern": "("}, "no regular expression"),
        ({"label_pattern": "a"}, "no group"),
    ],
)
def test_settings_without_meaning_are_refused(change, words):
    strict = yaml.safe_load((conf_folder() / "reading" / "strict.yaml").read_text())
    with pytest.raises(InputError, match=words):
        Reading.from_config(strict | change)


def test_decoded_tokens_are_what_was_read():
    assert decode(encode(read("acgtnryswkmbdhvu")[0])) == "ACGTNRYSWKMBDHVT"
