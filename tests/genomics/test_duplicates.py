import numpy as np
import pytest

from pipelines.genomics.alphabet import encode, reverse_complement
from pipelines.genomics.duplicates import (
    Chosen,
    digest_either_strand,
    find_copies,
    settle_copies,
)
from pipelines.genomics.ingest import ingest
from pipelines.shared.errors import InputError

SEQUENCES = {
    "a": "ACGTTTGC",
    "b": "GATTACA",
    "c": "acgttugc",  # a, in lower case and as RNA
    "d": "TGTAATC",  # b from the other strand
    "e": "ACGTTTGA",  # as long as a
    "f": "ACGTTTGC",
}


@pytest.fixture
def store(tmp_path):
    fasta = tmp_path / "x.fa"
    fasta.write_text("".join(f">{k}\n{v}\n" for k, v in SEQUENCES.items()))
    return ingest(fasta, tmp_path / "store")


def choose(ids="abcdef", labels="xyxyxx", groups=None, given=None):
    return Chosen(list(ids), list(labels), list(groups or ids), given)


COPIES = [[0, 2, 5], [1, 3]]


def test_copies_are_found_on_either_strand_and_in_any_case(store):
    assert find_copies(store, range(6)) == COPIES


def test_only_the_chosen_records_count(store):
    assert find_copies(store, [5, 4, 3, 1]) == [[2, 3]]
    assert find_copies(store, [0, 1, 4]) == []


def test_a_digest_is_that_of_the_reverse_complement():
    tokens = encode("ACCGTNRYT")
    assert digest_either_strand(tokens) == digest_either_strand(reverse_complement(tokens))
    assert digest_either_strand(tokens) != digest_either_strand(tokens[::-1].copy())


def test_the_first_of_copies_with_one_label_stays():
    settled = settle_copies(COPIES, choose(), "remove")
    assert settled.kept.tolist() == [0, 1, 4]
    assert settled.groups == ["a", "b", "e"]
    assert settled.table["id"].tolist() == ["c", "f", "d"]
    assert settled.table["copy_of"].tolist() == ["a", "a", "b"]
    assert set(settled.table["status"]) == {"duplicate"}
    assert settled.notes == [
        "3 records removed as copies of others, 0 of them with contradicting labels"
    ]


def test_copies_that_contradict_each_other_all_go():
    settled = settle_copies(COPIES, choose(labels="xyxyxy"), "remove")
    assert settled.kept.tolist() == [1, 4]
    reasons = settled.table.set_index("id")["reason"]
    assert reasons["a"] == "the same sequence as 'f', which has the label 'y'"
    assert reasons["f"] == "the same sequence as 'a', which has the label 'x'"
    assert "3 of them with contradicting labels" in settled.notes[0]


def test_given_test_records_stay_and_their_copies_leave_training():
    given = ["train", "val", "test", "train", "train", "test"]
    settled = settle_copies(COPIES, choose(given=given), "remove")
    assert settled.kept.tolist() == [1, 2, 4, 5]
    assert settled.table["id"].tolist() == ["a", "d"]
    assert settled.table["reason"].tolist() == [
        "the same sequence as 'c' in test",
        "the same sequence as 'b' in val",
    ]
    assert settled.notes[1] == "2 of these leaked from a given test or val split"


def test_copies_of_a_given_test_record_leave_whatever_their_labels():
    given = ["train", "train", "test", "val", "train", "val"]
    settled = settle_copies(COPIES, choose(labels="xyyxxy", given=given), "remove")
    assert settled.kept.tolist() == [2, 4]
    assert "4 of them with contradicting labels" in settled.notes[0]


def test_copies_come_into_one_split_where_none_are_given():
    settled = settle_copies([[0, 2], [3, 5]], choose(groups="pqrrst"), "error")
    assert settled.kept.tolist() == [0, 1, 2, 3, 4, 5]
    united = [settled.groups[place] for place in (0, 2, 3, 5)]
    assert len(set(united)) == 1
    assert len(set(settled.groups)) == 3
    assert settled.table["status"].tolist() == ["grouped", "grouped"]


def test_given_splits_that_tear_copies_apart_are_refused_with_their_ids():
    given = ["train", "val", "train", "val", "train", "test"]
    with pytest.raises(
        InputError, match=r"1 pairs.*\n  'a' \(train\) and 'f' \(test\)\nuse overlap="
    ):
        settle_copies(COPIES, choose(given=given), "error")
    whole = ["train", "val", "train", "val", "train", "train"]
    assert settle_copies(COPIES, choose(given=whole), "error").kept.size == 6


def test_labels_that_contradict_each_other_are_counted():
    settled = settle_copies(COPIES, choose(labels="xyxxyy"), "allow")
    assert settled.notes[1] == "2 sequences stand under more than one label"


def test_keeping_reports_and_changes_nothing():
    settled = settle_copies(COPIES, choose(groups="pqrrst"), "allow")
    assert settled.kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert settled.groups == list("pqrrst")
    assert settled.table["status"].tolist() == ["kept"] * 3
    assert settled.notes == ["3 records are copies of others (kept)"]


@pytest.mark.parametrize("policy", ["error", "remove", "allow"])
def test_without_copies_nothing_is_said(policy):
    settled = settle_copies([], choose(), policy)
    assert settled.kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert settled.kept.dtype == np.int64
    assert settled.table.empty
    assert settled.notes == []
