"""Ids, starts and ends rebuild the text; a tokenizer is known by its digest."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipelines.genomics.alphabet import LETTERS, NUM_TOKENS, decode, encode, reverse_complement
from pipelines.genomics.tokenizers import (
    BaseTokenizer,
    BpeTokenizer,
    KmerTokenizer,
    build_tokenizer,
    digest,
    load_bpe,
    restore_tokenizer,
    train_bpe,
)
from pipelines.shared.errors import InputError


def genome(bases=20_000, seed=0):
    return np.random.default_rng(seed).integers(1, 5, bases).astype(np.uint8)


def gena_file(path: Path, *, gap="N{10,}", letters="ABCGKMNRSTWY") -> Path:
    """A tokenizer.json built as GENA-LM's are: specials, a gap token, BERT's frame, few merges."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "-", *letters, "AA", "TT", "TG", "ATG"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("A", "A"), ("T", "T"), ("T", "G"), ("A", "TG")]
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]"))
    model.add_special_tokens(words[:6])
    model.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace(Regex(gap), "-")]
    )
    model.pre_tokenizer = pre_tokenizers.Split("-", "isolated")
    model.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    model.decoder = decoders.BPEDecoder(" ")
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([genome()], vocab_size=120, max_bases=20_000)


def all_tokenizers(bpe):
    kmers = [KmerTokenizer(k, stride=s) for k in (3, 6, 8) for s in (1, k)]
    return [BaseTokenizer(), *kmers, bpe]


# runs of N and of one base, as genomes have them
texts = st.lists(
    st.one_of(
        st.text(alphabet="ACGT", max_size=40),
        st.text(alphabet=LETTERS, max_size=12),
        st.integers(1, 40).map(lambda n: "N" * n),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_ids_starts_and_ends_rebuild_the_text(bpe, text):
    bases = encode(text)
    for tokenizer in all_tokenizers(bpe):
        tokens = tokenizer.encode(bases)
        assert np.array_equal(tokenizer.decode(tokens), bases)
        assert (tokens.ids < tokenizer.num_tokens).all()
        assert (np.diff(tokens.starts) > 0).all()
        covered = np.zeros(bases.size, dtype=bool)
        for start, end in zip(tokens.starts, tokens.ends, strict=True):
            covered[start:end] = True
        assert covered.all()


@settings(max_examples=60, deadline=None)
@given(texts)
def test_tokens_lie_end_to_end_unless_they_slide(bpe, text):
    for tokenizer in (BaseTokenizer(), KmerTokenizer(4, stride=4), bpe):
        tokens = tokenizer.encode(encode(text))
        assert tokens.starts[1:].tolist() == tokens.ends[:-1].tolist()


def spans(tokens):
    return list(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True))


def test_words_begin_anew_behind_an_n_and_the_tail_is_single_bases():
    tokens = KmerTokenizer(3, stride=3).encode(encode("ACGTANACGAC"))
    assert spans(tokens) == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 9), (9, 10), (10, 11)]
    single = tokens.ends - tokens.starts == 1
    assert decode(tokens.ids[single].astype(np.uint8)) == "TANAC"
    assert (tokens.ids[~single] >= NUM_TOKENS).all()


def test_one_n_leaves_the_words_behind_it_as_they_are_without_it():
    tail = decode(genome(30))
    tokenizer = KmerTokenizer(6, stride=6)
    alone, behind = tokenizer.encode(encode(tail)), tokenizer.encode(encode("ACGN" + tail))
    assert behind.ids[4:].tolist() == alone.ids.tolist()
    assert (behind.starts[4:] - 4).tolist() == alone.starts.tolist()


def test_a_sliding_word_stands_at_every_base():
    tokens = KmerTokenizer(3, stride=1).encode(encode("AACGT"))
    assert spans(tokens) == [(0, 3), (1, 4), (2, 5), (3, 4), (4, 5)]
    assert tokens.ids.tolist() == [NUM_TOKENS + 0 * 16 + 0 * 4 + 1, NUM_TOKENS + 0 * 16 + 1 * 4 + 2,
                                   NUM_TOKENS + 1 * 16 + 2 * 4 + 3, 3, 4]  # fmt: skip


@pytest.mark.parametrize(("k", "stride"), [(2, 1), (9, 1), (4, 2)])
def test_other_words_are_refused(k, stride):
    with pytest.raises(InputError, match="tokenizer"):
        KmerTokenizer(k, stride=stride)


def test_training_learns_both_strands_alike():
    bases = np.tile(encode("AAACCCAAAGGG"), 300)
    forward = train_bpe([bases], vocab_size=60, max_bases=10**6)
    backward = train_bpe([reverse_complement(bases)], vocab_size=60, max_bases=10**6)
    assert set(forward._letters.values()) == set(backward._letters.values())


def test_training_is_the_same_in_another_process(bpe):
    code = (
        "import numpy as np; from pipelines.genomics.tokenizers import *; "
        "bases = np.random.default_rng(0).integers(1, 5, 20_000).astype(np.uint8); "
        "print(digest(train_bpe([bases], vocab_size=120, max_bases=20_000)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(bpe)


def test_training_stops_at_its_number_of_bases():
    one = train_bpe([genome(5_000)], vocab_size=100, max_bases=5_000)
    two = train_bpe([genome(5_000), genome(9_000, seed=1)], vocab_size=100, max_bases=5_000)
    assert digest(one) == digest(two)
    assert one.num_tokens == 100


def test_nothing_to_train_on_is_said():
    with pytest.raises(InputError, match="no unambiguous bases"):
        train_bpe([encode("NNNN")], vocab_size=100, max_bases=100)


def test_a_file_of_gena_lm_keeps_the_offsets_of_its_gap(tmp_path):
    tokenizer = load_bpe(gena_file(tmp_path / "tokenizer.json"))
    text = "ATG" + "N" * 25 + "TTNNNA"
    tokens = tokenizer.encode(encode(text))
    gap = tokens.ids == 5
    assert spans(tokens)[:2] == [(0, 3), (3, 28)]
    assert gap.tolist() == [False, True, *[False] * (len(tokens) - 2)]
    assert tokens.ends[-1] == len(text)
    assert np.array_equal(tokenizer.decode(tokens), encode(text))
    assert tokenizer.num_tokens == 22


@settings(max_examples=60, deadline=None)
@given(texts)
def test_offsets_are_exact_for_any_rule_of_gaps(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("gena")
    bases = encode(text)
    for gap in ("N+", "N{10,}"):
        tokenizer = load_bpe(gena_file(folder / f"{len(gap)}.json", gap=gap, letters=LETTERS))
        tokens = tokenizer.encode(bases)
        assert np.array_equal(tokenizer.decode(tokens), bases)
        for number, (start, end) in zip(tokens.ids, spans(tokens), strict=True):
            if number == 5:
                assert set(text[start:end]) == {"N"}


def test_a_letter_that_the_vocabulary_lacks_is_unknown_and_keeps_its_place(tmp_path):
    tokenizer = load_bpe(gena_file(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode(encode("ACHGT"))
    assert tokens.ids[2] == 0
    assert spans(tokens)[2] == (2, 3)
    assert decode(tokenizer.decode(tokens)) == "ACNGT"


BAD_FILES = {
    "missing": (None, "no such file"),
    "no JSON": ("{", "no JSON"),
    "another model": (json.dumps({"model": {"type": "WordPiece"}}), "'WordPiece'"),
    "damaged": (json.dumps({"model": {"type": "BPE", "vocab": 3}}), "damaged"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_none_is_named(case, tmp_path):
    content, words = BAD_FILES[case]
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_bpe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_tokenizer_of_words_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"[UNK]": 0, "the": 1}, [], unk_token="[UNK]")).save(str(path))
    with pytest.raises(InputError, match="no tokens for A, C, G and T"):
        load_bpe(path)


def test_a_tokenizer_that_changes_its_letters_is_refused(tmp_path):
    path = gena_file(tmp_path / "tokenizer.json")
    model = Tokenizer.from_file(str(path))
    model.normalizer = normalizers.Sequence([normalizers.Replace("GAT", "G")])
    model.save(str(path))
    with pytest.raises(InputError, match="does not keep the letters"):
        load_bpe(path)


def test_config_and_digest_come_back_from_plain_values(bpe):
    for tokenizer in all_tokenizers(bpe):
        again = restore_tokenizer(json.loads(json.dumps(tokenizer.config)))
        assert digest(again) == digest(tokenizer)
        assert again.num_tokens == tokenizer.num_tokens
    assert len({digest(tokenizer) for tokenizer in all_tokenizers(bpe)}) == 8


def test_another_alphabet_is_refused():
    config = {**BaseTokenizer().config, "letters": "ACGT"}
    with pytest.raises(InputError, match="'ACGT'"):
        restore_tokenizer(config)


def test_a_tokenizer_goes_to_worker_processes(bpe):
    bases = genome(200)
    again = pickle.loads(pickle.dumps(bpe))
    assert again.encode(bases).ids.tolist() == bpe.encode(bases).ids.tolist()


def test_a_saved_tokenizer_loads_again(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    settings = {"kind": "bpe", "file": str(tmp_path / "tokenizer.json")}
    loaded = build_tokenizer(settings, lambda: ())
    assert isinstance(loaded, BpeTokenizer)
    assert digest(loaded) == digest(bpe)


WRONG = [
    {"kind": "words"},
    {"kind": "kmer", "k": "six", "stride": "k"},
    {"kind": "kmer", "k": 6, "stride": 0},
    {"kind": "bpe", "file": None, "vocab_size": 20, "train_bases": 100},
]


@pytest.mark.parametrize("chosen", WRONG, ids=str)
def test_settings_that_make_none_are_named(chosen):
    with pytest.raises(InputError, match="tokenizer"):
        build_tokenizer(chosen, lambda: ())


@pytest.mark.real_data
def test_real_dna_with_runs_of_n_is_rebuilt(real_data, bpe, tmp_path):
    from pipelines.genomics.ingest import ingest

    store = ingest(real_data / "genomes" / "human_hg38_1m.fa.gz", tmp_path / "store")
    bases = store.read(0, 0, 40_000)
    assert (bases == 5).sum() == 10_000
    for tokenizer in (KmerTokenizer(6, stride=6), bpe):
        assert np.array_equal(tokenizer.decode(tokenizer.encode(bases)), bases)
