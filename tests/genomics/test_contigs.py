"""Contigs under other names are renamed and reported, never guessed."""

import pytest

from pipelines.genomics.contigs import compare_lengths, match_contigs
from pipelines.shared.errors import InputError


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("chr1", "1"),
        ("1", "chr1"),
        ("NC_000001.11", "chr1"),
        ("chr1", "NC_000001.10"),
        ("NC_000023.11", "X"),
        ("chrX", "NC_000086.8"),
        ("NC_000067.7", "chr1"),
        ("MT", "chrM"),
        ("NC_012920.1", "chrM"),
        ("Mito", "chrM"),
        ("CHR1", "chr1"),
        ("chr01", "1"),
        ("Chromosome_2", "2"),
        ("chrII", "II"),
        ("NC_005816.1", "gi|45478711|ref|NC_005816.1|"),
        ("MN908947", "MN908947.3"),
    ],
)
def test_another_name_is_found_and_reported(theirs, ours):
    match = match_contigs([theirs], ["other", ours], where="file.bed")
    assert match.record_of == {theirs: 1}
    assert match.renamed == {theirs: ours}
    assert match.notes() == [f"contigs named otherwise in the sequences (1): {theirs} is {ours}"]


def test_equal_names_need_no_report():
    match = match_contigs(["chr1", "chr1"], ["chr1", "1"], where="file.bed")
    assert match.record_of == {"chr1": 0}
    assert match.notes() == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("chr1", "11"),
        ("chr2", "chrII"),
        ("X", "10"),
        ("NC_000001", "NC_000010"),
        ("NC_000001.10", "NC_000001.11"),
        ("NC_005816.2", "gi|45478711|ref|NC_005816.1|"),
        ("scaffold.2", "scaffold.1"),
        ("ref", "gi|45478711|ref|NC_005816.1|"),
    ],
)
def test_what_is_no_other_name_is_unknown(theirs, ours):
    with pytest.raises(InputError, match="none of its contigs"):
        match_contigs([theirs], [ours], where="file.bed")


def test_the_file_may_say_what_its_contigs_are():
    match = match_contigs(["BK006935.2"], ["I", "II"], aliases={"BK006935.2": ("I",)}, where="x")
    assert match.record_of == {"BK006935.2": 0}


def test_what_may_be_two_records_is_an_error():
    with pytest.raises(InputError, match=r"file.bed: contig 'CHR1' may be any of chr1, 1"):
        match_contigs(["CHR1"], ["chr1", "1"], where="file.bed")


def test_two_names_of_one_record_are_an_error():
    with pytest.raises(InputError, match=r"'chrM' and 'MT' would both be 'Mito'"):
        match_contigs(["chrM", "MT"], ["Mito"], where="file.bed")


def test_unknown_contigs_are_listed_beside_known_ones():
    match = match_contigs(["chr1", "chrUn_7"], ["chr1"], where="file.bed")
    assert match.unknown == ("chrUn_7",)
    assert match.notes() == ["contigs that are not in the sequences (1): chrUn_7"]


def test_other_lengths_are_noted():
    match = match_contigs(["chr1", "chr2"], ["1", "2"], where="x")
    said = {"chr1": 249_250_621, "chr2": 5, "chr3": 7}
    (note,) = compare_lengths(match, said, [248_956_422, 5], where="calls.vcf")
    assert "calls.vcf: lengths of contigs differ (1)" in note
    assert "chr1 has 249,250,621 there and 248,956,422 here" in note
    assert compare_lengths(match, {"chr2": 5}, [1, 5], where="x") == []
