"""Intervals on records: past the end as the configuration says, spliced, on their strand."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.intervals import Interval, IntervalFile, Part
from pipelines.genomics.placing import PAST_END, fetch, fetch_mask, place, whole_records
from pipelines.shared.errors import InputError

TEXT = "ACGTTGCAACGGTCATTAGC"


def interval(start, end, strand="+", *, contig="chr1", parts=(), summit=None):
    return Interval(contig, start, end, strand, "x", "file.bed: line 1", parts=parts, summit=summit)


def file(*intervals, circular=()):
    return IntervalFile(Path("file.bed"), "BED", intervals, circular=frozenset(circular))


@pytest.fixture
def store(memory_store):
    return memory_store({"chr1": TEXT, "chr2": "ACgtN"})


def cut(store, placement):
    return [decode(fetch(store, item)) for item in placement.placed]


def test_bases_are_cut_on_their_strand(store):
    forward, backward = interval(2, 7), interval(2, 7, "-")
    assert cut(store, place(file(forward, backward), store)) == ["GTTGC", "GCAAC"]


def test_parts_are_spliced_in_reading_order(store):
    parts = (Part(10, 13, "-"), Part(0, 4, "+"))
    (text,) = cut(store, place(file(interval(0, 13, parts=parts)), store))
    assert text == decode(reverse_complement(encode(TEXT[10:13]))) + TEXT[:4]


@settings(deadline=None)
@given(st.data())
def test_pieces_join_to_the_whole(memory_store, data):
    store = memory_store({"chr1": TEXT})
    ends = st.tuples(st.integers(-5, 25), st.integers(1, 12), st.sampled_from("+-."))
    parts = tuple(Part(s, s + n, strand) for s, n, strand in data.draw(st.lists(ends, min_size=1)))
    (item,) = whole_records(store)
    item = type(item)(item.interval, 0, parts)
    whole = fetch(store, item)
    cuts = sorted(data.draw(st.lists(st.integers(0, item.length), max_size=4)))
    edges = [0, *cuts, item.length]
    pieces = [fetch(store, item, a, b) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert whole.size == item.length
    for a, b in pairwise(edges):
        assert sum(part.end - part.start for part in item.cut(a, b)) == b - a


@settings(deadline=None)
@given(st.integers(-30, 30), st.integers(1, 25), st.sampled_from(PAST_END))
def test_windows_past_the_end_do_what_the_configuration_says(memory_store, start, size, past_end):
    store = memory_store({"chr1": TEXT, "chr2": "ACGT"})
    end, length = start + size, len(TEXT)
    inside = start >= 0 and end <= length
    given_ = file(interval(start, end), interval(0, 4, contig="chr2"))
    if past_end == "error" and not inside:
        with pytest.raises(InputError, match="reaches beyond 'chr1', which has 20 bases"):
            place(given_, store, past_end=past_end)
        return
    placement = place(given_, store, past_end=past_end)
    texts = cut(store, placement)
    assert texts[-1] == "ACGT"
    kept = (
        inside
        or (past_end == "shift" and size <= length)
        or (past_end == "pad_n" and start < length and end > 0)
    )
    assert len(texts) == 1 + kept
    assert [failure.status for failure in placement.failures] == ["past_end"] * (not kept)
    if not kept:
        return
    assert len(texts[0]) == size
    if inside:
        assert texts[0] == TEXT[start:end]
    elif past_end == "shift":
        assert texts[0] == (TEXT[:size] if start < 0 else TEXT[-size:])
    else:
        padded = "N" * 40 + TEXT + "N" * 40
        assert texts[0] == padded[start + 40 : end + 40]


def test_what_was_done_is_counted(store):
    given_ = file(interval(-2, 3), interval(15, 24), interval(2, 5))
    notes = place(given_, store, past_end="shift").notes()
    assert notes == ["intervals shifted inwards: 2"]
    assert place(given_, store).notes() == ["intervals left out (past_end): 2"]


@pytest.mark.parametrize("strand", "+-")
def test_a_circular_record_goes_on_at_its_origin(strand, memory_store):
    store = memory_store({"chr1": TEXT}, circular=("chr1",))
    placement = place(file(interval(17, 23, strand)), store, past_end="error")
    around = TEXT[17:] + TEXT[:3]
    wanted = around if strand == "+" else decode(reverse_complement(encode(around)))
    assert cut(store, placement) == [wanted]
    assert placement.placed[0].flags == ("across the origin",)


def test_the_file_of_intervals_may_call_a_record_circular(store):
    placement = place(file(interval(17, 23), circular=["chr1"]), store, past_end="error")
    assert cut(store, placement) == [TEXT[17:] + TEXT[:3]]


def test_a_width_is_taken_around_centre_or_summit(store):
    odd, even = interval(5, 10), interval(5, 9)
    summit = interval(0, 20, summit=11)
    placement = place(file(odd, even, summit), store, width=4)
    starts = [item.parts[0].start for item in placement.placed]
    assert starts == [7 - 2, 7 - 2, 11 - 2]
    placement = place(file(odd), store, width=5)
    assert placement.placed[0].parts == (Part(5, 10, "+"),)


def test_unknown_contigs_are_listed_and_all_unknown_is_an_error(store):
    placement = place(file(interval(0, 4), interval(0, 4, contig="chrUn")), store)
    (failure,) = placement.failures
    assert (failure.status, failure.path) == ("unknown_contig", "file.bed: line 1")
    with pytest.raises(InputError, match="none of its contigs"):
        place(file(interval(0, 4, contig="chrUn")), store)
    with pytest.raises(InputError, match="'chrUn' is not in the sequences"):
        place(file(interval(0, 4), interval(0, 4, contig="chrUn")), store, past_end="error")


def test_no_interval_left_is_an_error(store):
    with pytest.raises(InputError, match=r"file.bed: no interval is left.*20 bases"):
        place(file(interval(15, 25)), store)


def test_the_soft_mask_goes_with_the_bases(store):
    (text,) = cut(store, place(file(interval(1, 4, "-", contig="chr2")), store))
    placement = place(file(interval(1, 4, "-", contig="chr2")), store)
    assert text == "ACG"
    assert fetch_mask(store, placement.placed[0]).tolist() == [True, True, False]


def test_whole_records_are_intervals(store):
    assert [decode(fetch(store, item)) for item in whole_records(store)] == [TEXT, "ACGTN"]
