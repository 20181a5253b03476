"""Variants of a VCF: split, trimmed, left-aligned, and REF held to the sequences."""

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.genomics.alphabet import decode
from pipelines.genomics.variants import (
    Variant,
    allele_windows,
    check_reference,
    left_align,
    read_vcf,
    trim,
)
from pipelines.shared.errors import InputError

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n"
TEXT = "GGGCACACACAGGGT"


@pytest.fixture
def vcf(tmp_path):
    def make(
        *lines: str, header: str = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n"
    ) -> Path:
        path = tmp_path / "calls.vcf"
        path.write_text(header + "".join(f"{line}\n" for line in lines))
        return path

    return make


@pytest.fixture
def store(memory_store):
    return memory_store({"1": TEXT})


def variant(position, ref, alt):
    return Variant("1", position, ref, alt, "v", "calls.vcf: line 1")


def test_alleles_of_a_line_are_variants_of_their_own(vcf):
    file = read_vcf(vcf("1\t4\trs1\tC\tG,CA\t.\t.\t.", "1\t5\t.\ta\tt"))
    assert [(v.position, v.ref, v.alt, v.id) for v in file.variants] == [
        (4, "C", "G", "rs1"),
        (4, "C", "CA", "rs1"),
        (5, "A", "T", "1:5:A:T"),
    ]
    assert [line.ref for line in file.lines] == ["C", "A"]
    assert file.variants[2].source.endswith("line 4")


def test_alleles_that_are_no_sequence_are_listed(vcf):
    line = "1\t4\trs1\tC\t<DEL>,*,G[1:9[,.A,T\t.\t.\t."
    file = read_vcf(vcf(line, "1\t5\t.\tA\t."))
    assert [v.alt for v in file.variants] == ["T"]
    reasons = [failure.reason for failure in file.skipped]
    for reason, allele in zip(reasons, ["(<DEL>)", "(*)", "(G[1:9[)", "(.A)", "(.)"], strict=True):
        assert allele in reason


BAD = {
    "no header": (["1\t4\t.\tC\tG"], "", "line is '1\\t4"),
    "by spaces": (["1 4 . C G"], None, "line 3: 1 columns by tabs"),
    "a position in words": (["1\tfour\t.\tC\tG"], None, "line 3: POS is 'four'"),
    "below 0": (["1\t-4\t.\tC\tG"], None, "line 3: CHROM is empty, or POS below 0"),
    "REF of a gap": (["1\t4\t.\t-\tG"], None, "line 3: REF is '-'"),
    "ALT of a gap": (["1\t4\t.\tC\tG", "1\t4\t.\tC\t-"], None, "line 4: ALT is '-'"),
    "ALT is REF": (["1\t4\t.\tC\tc"], None, "line 3: ALT is REF"),
    "an empty REF": (["1\t4\t.\t\tG"], None, "line 3: REF is empty"),
    "no lines": ([], None, "no variants"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(case, vcf):
    lines, header, words = BAD[case]
    path = vcf(*lines) if header is None else vcf(*lines, header=header)
    with pytest.raises(InputError) as caught:
        read_vcf(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ((4, "C", "G"), (4, "C", "G")),
        ((10, "CA", "C"), (10, "CA", "C")),
        ((8, "CAC", "C"), (3, "GCA", "G")),
        ((11, "A", "ACA"), (3, "G", "GCA")),
        ((3, "GCACA", "GCA"), (3, "GCA", "G")),
        ((12, "GG", "G"), (11, "AG", "A")),
        ((2, "GG", "G"), (1, "GG", "G")),
        ((1, "GG", "G"), (1, "GG", "G")),
        ((1, "G", "GG"), (1, "G", "GG")),
        ((14, "GT", "G"), (14, "GT", "G")),
        ((4, "CAC", "CTC"), (5, "A", "T")),
        ((4, "CAC", "GAT"), (4, "CAC", "GAT")),
    ],
)
def test_indels_go_as_far_left_as_they_can(written, normal, store):
    before = variant(*written)
    after = left_align(before, store, 0)
    assert (after.position, after.ref, after.alt) == normal
    assert apply(after) == apply(before)


def apply(v, text=TEXT):
    assert text[v.start : v.end] == v.ref
    return text[: v.start] + v.alt + text[v.end :]


repeats = st.lists(st.sampled_from(["A", "AC", "ACG", "T", "TT"]), min_size=2, max_size=12)


@settings(deadline=None)
@given(repeats.map("".join), st.data())
def test_the_same_change_has_one_name_and_no_other_stands_further_left(memory_store, text, data):
    store = memory_store({"1": text})
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, min(len(text), start + 6)))
    alt = data.draw(st.text(alphabet="ACT", min_size=1, max_size=6))
    assume(text[start:end] != alt)
    before = Variant("1", start + 1, text[start:end], alt, "v", "x")
    after = left_align(before, store, 0)
    changed = apply(before, text)
    assert apply(after, text) == changed
    assert apply(trim(before), text) == changed
    assert after.ref
    assert after.alt
    shrink = len(text) - len(changed)
    if shrink and 1 in (len(after.ref), len(after.alt)):
        assert after.start <= max(leftmost(text, changed) - 1, 0)


def leftmost(text, changed):
    """The first place where bases can be taken out of the longer text to leave the shorter one."""
    long, short = sorted((text, changed), key=len, reverse=True)
    size = len(long) - len(short)
    places = (p for p in range(len(short) + 1) if long[:p] + long[p + size :] == short)
    return next(places, len(long))


def test_ref_is_held_to_the_sequences(vcf, store):
    path = vcf("1\t4\ta\tC\tG", "1\t5\tb\tT\tA", "1\t6\tc\tCA\tC")
    with pytest.raises(InputError) as caught:
        check_reference(read_vcf(path), store)
    message = str(caught.value)
    assert "1 of 3 REF alleles do not match" in message
    assert "line 4: 1:5 has REF T, where the sequences have A" in message
    assert "swapped" in message
    checked = check_reference(read_vcf(path), store, policy="warn")
    assert [item.ref_match for item in checked.placed] == [True, False, True]
    assert "2 of 3 REF alleles match the sequences" in checked.notes()


def test_past_the_end_and_unknown_contigs_are_listed(vcf, store):
    path = vcf("chr1\t15\ta\tTA\tT", "chr1\t4\tb\tC\tG", "7\t4\tc\tC\tG")
    checked = check_reference(read_vcf(path), store)
    assert [(f.id, f.status) for f in checked.failures] == [
        ("a", "past_end"), ("c", "unknown_contig")]  # fmt: skip
    assert checked.contigs.renamed == {"chr1": "1"}
    with pytest.raises(InputError, match="no variant is left"):
        check_reference(read_vcf(vcf("1\t15\ta\tTA\tT")), store)


@pytest.mark.parametrize("width", [5, 6, 15, 40])
@pytest.mark.parametrize(
    "change", [(4, "C", "G"), (8, "CAC", "C"), (11, "A", "ATTTT"), (1, "G", "GA"), (15, "T", "A")]
)
def test_windows_hold_both_alleles(width, change, vcf, store):
    line = "\t".join(["1", str(change[0]), ".", change[1], change[2]])
    (item,) = check_reference(read_vcf(vcf(line)), store).placed
    start, ref, alt = allele_windows(store, item, width, policy="error")
    v = item.variant
    changed = TEXT[: v.start] + v.alt + TEXT[v.end :]
    assert decode(ref) == TEXT[start : start + width]
    assert decode(alt) == changed[start : start + width]
    assert ref.size == min(width, len(TEXT))
    assert start <= v.start


def test_a_ref_that_differs_is_written_into_the_sequence_if_so_asked(vcf, store):
    (item,) = check_reference(read_vcf(vcf("1\t5\tb\tT\tG")), store, policy="use_vcf").placed
    kept, written = (allele_windows(store, item, 5, policy=p)[1] for p in ("warn", "use_vcf"))
    assert (decode(kept), decode(written)) == ("GCACA", "GCTCA")


@pytest.mark.parametrize(
    "order", ["ID=1,length=99", "assembly=x,ID=1,length=99", "ID=1,md5=0,length=99"]
)
def test_lengths_of_the_header_are_compared(order, vcf, store):
    path = vcf("1\t4\t.\tC\tG", header=f"##fileformat=VCFv4.2\n##contig=<{order},species=y>\n")
    (note, *_) = check_reference(read_vcf(path), store).notes()
    assert "1 has 99 there and 15 here" in note
