"""Words shared on either strand, clusters, and what leaks between splits."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.collection import Collection
from pipelines.genomics.ingest import ingest
from pipelines.genomics.leaks import find_leaks, overlaps
from pipelines.genomics.similarity import (
    choose_sampling,
    cluster_records,
    collect_words,
    hash_words,
    shared_words,
)

LETTERS = st.text(alphabet="ACGTNR", min_size=0, max_size=300)


def canonical_words(text, k):
    words = [text[at : at + k] for at in range(len(text) - k + 1)]
    words = [word for word in words if set(word) <= set("ACGT")]
    return [min(word, decode(reverse_complement(encode(word)))) for word in words]


@settings(max_examples=60, deadline=None)
@given(LETTERS, st.sampled_from([1, 2, 5, 21, 31, 32, 50, 62]))
def test_words_are_numbered_alike_where_they_are_equal(text, k):
    hashes = hash_words(encode(text), k).tolist()
    words = canonical_words(text, k)
    assert len(hashes) == len(words)
    assert len(set(zip(hashes, words, strict=True))) == len(set(hashes)) == len(set(words))
    assert hash_words(reverse_complement(encode(text)), k).tolist() == hashes[::-1]


def test_words_of_a_long_record_are_those_of_its_pieces():
    tokens = np.random.default_rng(0).integers(1, 5, 400_000).astype(np.uint8)
    whole = hash_words(tokens, 50)
    assert len(np.unique(whole)) == len(whole) == 399_951
    assert np.array_equal(whole[200_000:200_100], hash_words(tokens[200_000:200_149], 50))


@pytest.mark.parametrize("k", [0, 63])
def test_words_too_long_are_refused(k):
    with pytest.raises(ValueError, match="k lies in"):
        hash_words(encode("ACGT"), k)


def write(folder, sequences):
    path = folder / "x.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in sequences.items()))
    return ingest(path, folder / "store", progress=False)


def random_text(seed, length=400):
    return decode(np.random.default_rng(seed).integers(1, 5, length).astype(np.uint8))


def opposite(text):
    return decode(reverse_complement(encode(text)))


@pytest.fixture
def store(tmp_path):
    a, b, c, d = (random_text(seed) for seed in range(4))
    return write(
        tmp_path,
        {
            "a": a,
            "half_a": opposite(a[200:]) + b[:200],  # half of a, of the other strand
            "c": c,
            "like_c": c[:350] + random_text(9, 50),
            "d": d,
            "short": "ACGT",
            "short_copy": "acgu",
            "link": c[:200] + d[:200],  # joins c and d
        },
    )


def test_similar_records_are_one_cluster(store):
    clusters = cluster_records(store, np.arange(8))
    a, half, c, like, d, short, copy, link = clusters.tolist()
    assert a == half
    assert c == like == link == d
    assert short == copy
    assert len({a, c, short}) == 3
    strict = cluster_records(store, np.arange(8), share=0.8).tolist()
    assert strict[2] == strict[3]
    assert len(set(strict)) == 6


def test_shared_words_are_counted(store):
    known = collect_words(store, [0], 50).hashes
    known.sort()
    words, shared = shared_words(store, [0, 1, 2, 5], known, 50)
    assert words.tolist() == [351, 351, 351, 0]
    assert shared.tolist() == [351, 151, 0, 0]


def test_a_sample_keeps_shares(tmp_path):
    text = random_text(1, 60_000)
    store = write(tmp_path, {"a": text, "b": opposite(text[:30_000]) + random_text(2, 30_000)})
    known = collect_words(store, [0], 50, sampled=8)
    assert len(known.hashes) == pytest.approx(60_000 / 8, rel=0.1)
    known.hashes.sort()
    words, shared = shared_words(store, [1], known.hashes, 50, sampled=8)
    assert shared[0] / words[0] == pytest.approx(0.5, abs=0.03)


def test_sampling_spares_short_records():
    assert choose_sampling(np.full(10, 1_000), most=1_000_000) == 1
    assert choose_sampling(np.full(1_000, 100_000), most=1_000_000) == 100
    assert choose_sampling(np.full(1_000_000, 300), most=1_000_000) == 1


INTERVALS = st.lists(
    st.tuples(st.sampled_from("xy"), st.integers(0, 60), st.integers(1, 25)), max_size=25
)


@settings(max_examples=80, deadline=None)
@given(INTERVALS, INTERVALS)
def test_overlaps_are_those_of_all_pairs(first, second):
    one, two = (
        pd.DataFrame(
            [(contig, start, start + size) for contig, start, size in rows],
            columns=["contig", "start", "end"],
        )
        for rows in (first, second)
    )
    found = overlaps(one, two, np.arange(len(two)) + 100)
    for row, hit in zip(one.itertuples(), found.tolist(), strict=True):
        same = two[two["contig"] == row.contig]
        touching = set(same.index[(same["start"] < row.end) & (same["end"] > row.start)] + 100)
        assert (hit in touching) if touching else hit == -1


def collection_of(store, splits, **columns):
    table = pd.DataFrame({"id": list(store.ids), "group": list(store.ids), "split": splits})
    return Collection("mine", table.assign(**columns), store, np.arange(len(store)))


def test_leaks_name_what_they_were_found_by(tmp_path):
    a, b, c, d = (random_text(seed, 300) for seed in range(4))
    long = random_text(7, 4_000)
    store = write(
        tmp_path,
        {
            "a": a, "b": b, "c": c, "long": long,
            "same": a.lower(), "turned": opposite(b), "piece": c[100:160] + d[:200], "new": d,
            "most": long[:3_800], "some": long[:1_600] + random_text(8, 2_400),
            "little": long[:400] + random_text(9, 3_600),
        },
    )  # fmt: skip
    leaks = find_leaks(collection_of(store, ["train"] * 4 + ["test"] * 7))
    items = leaks.items.set_index("id")
    assert items.loc["same", "identical_to"] == "a"
    assert items.loc["turned", "reverse_complement_of"] == "b"
    assert set(items.index) == {"same", "turned", "piece", "most", "some", "little"}
    assert items.index[items["leaks"]].tolist() == ["same", "turned", "piece", "most", "some"]
    assert items.loc["some", "shared_50mers"] == pytest.approx(1_551 / 3_951, abs=2e-3)
    found = leaks.counts.set_index("criterion")["found"].to_dict()
    assert found == {
        "identical": 1, "reverse complement": 1, "share a 50-mer": 6,
        "90% of 50-mers shared": 1, "30% of 50-mers shared": 2, "any of these": 5,
    }  # fmt: skip
    assert "2 remain  fewer than 30: too few" in leaks.text()


@pytest.mark.parametrize("strand", ["+", "-"])
@pytest.mark.parametrize(
    ("kept", "found"),
    [(1_230, []), (1_240, ["30%"]), (3_600, ["30%"]), (3_610, ["30%", "90%"])],
)
def test_long_records_leak_by_share_on_either_strand(tmp_path, kept, found, strand):
    long, other = random_text(7, 4_000), random_text(8, 4_000)
    text = long[:kept] + other[kept:]  # shares kept - 49 of 3,951 words
    later = {"later": text if strand == "+" else opposite(text)}
    store = write(tmp_path, {"long": long, "pad": random_text(9)} | later)
    leaks = find_leaks(collection_of(store, ["train", "train", "test"]))
    assert leaks.items["shared_50mers"].tolist() == [pytest.approx((kept - 49) / 3_951, abs=6e-4)]
    assert leaks.items["leaks"].tolist() == [bool(found)]
    counted = leaks.counts.set_index("criterion")["found"].to_dict()
    for share in ("30%", "90%"):
        assert counted[f"{share} of 50-mers shared"] == (share in found)


def test_without_splits_nothing_is_held_against_anything(store):
    collection = collection_of(store, ["train"] * 8)
    assert not find_leaks(collection)
    bare = Collection("x", collection.table.drop(columns="split"), store, np.arange(8))
    assert "needs splits" in find_leaks(bare).text()


def test_intervals_are_compared_by_place_alone():
    rows = [
        ("a", "chr1", 10, 20, "+", "train", "p"), ("b", "chr1", 50, 60, "+", "train", "p"),
        ("c", "chr1", 10, 20, "+", "test", "p"), ("d", "chr1", 19, 30, "-", "test", "n"),
        ("e", "chr1", 20, 50, "+", "test", "n"), ("f", "chr2", 10, 20, "+", "val", "n"),
    ]  # fmt: skip
    columns = ["id", "contig", "start", "end", "strand", "split", "label"]
    table = pd.DataFrame(rows, columns=columns)
    table["group"] = table["id"]
    leaks = find_leaks(Collection("intervals", table, None, np.full(6, -1)))
    test = leaks.counts.query("split == 'test' and against == 'train' and label == ''")
    assert dict(zip(test["criterion"], test["found"], strict=True)) == {
        "identical": 1, "overlapping": 2, "any of these": 2,
    }  # fmt: skip
    assert leaks.items["overlaps"].tolist() == ["a", "a"]
