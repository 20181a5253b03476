import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics import packing
from pipelines.genomics.alphabet import decode, encode
from pipelines.genomics.packing import (
    count_bases,
    find_runs,
    find_runs_of,
    pack,
    pack_plain,
    unpack,
)


def ascii_codes(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


@given(st.text("ACGT", max_size=100))
def test_unpacking_undoes_packing(text):
    packed = pack(ascii_codes(text))
    assert packed.size == -(-len(text) // 4)
    assert decode(unpack(packed)[: len(text)]) == text


def test_first_base_stands_in_the_lowest_bits():
    assert pack(ascii_codes("CGTA")).tolist() == [0b00_11_10_01]
    assert pack(ascii_codes("T")).tolist() == [0b11]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 129, 1000])
def test_pieces_do_not_matter(monkeypatch, size):
    letters = np.random.default_rng(size).choice(ascii_codes("ACGT"), size)
    whole = pack(letters)
    monkeypatch.setattr(packing, "_PIECE", 64)
    assert np.array_equal(pack(letters), whole)
    assert np.array_equal(unpack(whole)[:size], encode(letters.tobytes()))


@given(st.lists(st.text("ACGT", min_size=1, max_size=99), min_size=1))
def test_letters_are_counted_by_stretch(texts):
    padded = [text + "A" * (-len(text) % 32) for text in texts]
    starts = np.cumsum([0] + [len(text) // 32 for text in padded[:-1]])
    packed, lengths = pack(ascii_codes("".join(padded))), np.array([len(text) for text in texts])
    counted = count_bases(packed, starts, lengths)
    assert counted.tolist() == [[text.count(letter) for letter in "ACGT"] for text in texts]


@pytest.mark.parametrize("size", [0, 4, 64, 132, 1000])
def test_plain_letters_pack_as_any(monkeypatch, size):
    letters = np.random.default_rng(size).choice(ascii_codes("ACGT"), size)
    assert np.array_equal(pack_plain(letters), pack(letters))
    monkeypatch.setattr(packing, "_PIECE", 64)
    assert np.array_equal(pack_plain(letters), pack(letters))


@pytest.mark.parametrize("sign", sorted(set(range(256)) - set(b"ACGT")))
def test_every_other_sign_is_noticed(sign):
    for place in range(4):
        letters = ascii_codes("ACGTTGCA").copy()
        letters[4 + place] = sign
        assert pack_plain(letters) is None


@given(st.lists(st.integers(0, 2), max_size=30))
def test_runs_cover_all_and_hold_one_value_each(values):
    values = np.array(values, dtype=np.uint8)
    runs = find_runs(values)
    assert [*runs[:, 0], values.size] == [0, *runs[:, 1]]
    assert all(len(set(values[start:end])) == 1 for start, end in runs)
    assert all(values[end - 1] != values[end] for end in runs[:-1, 1])


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@given(values=st.lists(st.integers(0, 2), max_size=30))
def test_runs_do_not_depend_on_the_pieces(piece, values):
    letters = np.array(values, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_RUNS_PIECE", piece)
        runs, found = find_runs_of(letters, lambda piece: piece)
    whole = find_runs(letters)
    kept = letters[whole[:, 0]] if letters.size else letters
    assert runs.tolist() == whole[kept > 0].tolist()
    assert found.tolist() == kept[kept > 0].tolist()
