"""Tracks hold one value a base, sorted, and read back as they were written."""

import numpy as np
import pyBigWig
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.genomics.tracks import blend, write_bedgraph, write_bigwig


def track_of(windows):
    records, starts, ends, values = (np.array(column) for column in zip(*windows, strict=True))
    return blend(records, starts, ends, values.astype(float))


windows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 20), st.integers(0, 1000)).map(
        lambda w: (w[0], w[1], w[1] + w[2], w[3] / 1000)
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(windows)
def test_a_base_has_the_mean_of_the_windows_over_it(found):
    track = track_of(found)
    for record in range(3):
        for base in range(52):
            over = [v for r, start, end, v in found if r == record and start <= base < end]
            here = (track.records == record) & (track.starts <= base) & (track.ends > base)
            assert here.sum() == bool(over)
            if over:
                assert track.values[here][0] == pytest.approx(np.mean(over), abs=1e-6)


@settings(deadline=None)
@given(windows)
def test_stretches_are_sorted_and_apart(found):
    track = track_of(found)
    same = track.records[1:] == track.records[:-1]
    assert (track.starts[1:] >= track.ends[:-1])[same].all()
    assert (np.diff(track.records) >= 0).all()


def test_windows_without_bases_are_refused():
    with pytest.raises(ValueError, match="at least one base"):
        track_of([(0, 5, 5, 0.5)])


def test_no_windows_are_an_empty_track():
    empty = np.empty(0, dtype=np.int64)
    assert len(blend(empty, empty, empty, np.empty(0))) == 0


def test_bedgraph_and_bigwig_read_back(tmp_path):
    track = track_of([(0, 0, 10, 0.25), (0, 5, 15, 0.75), (1, 3, 4, 1.0)])
    write_bedgraph(tmp_path / "t.bedgraph", track, ["chr2", "chr1"], name='a "b"')
    header, *rows = (tmp_path / "t.bedgraph").read_text().splitlines()
    assert header == "track type=bedGraph name=\"a 'b'\""
    assert rows == ["chr2\t0\t5\t0.25", "chr2\t5\t10\t0.5", "chr2\t10\t15\t0.75", "chr1\t3\t4\t1.0"]
    write_bigwig(tmp_path / "t.bw", track, {"chr2": 20, "chr1": 9})
    with pyBigWig.open(str(tmp_path / "t.bw")) as file:
        assert file.chroms() == {"chr2": 20, "chr1": 9}
        assert file.intervals("chr2") == ((0, 5, 0.25), (5, 10, 0.5), (10, 15, 0.75))
        assert file.intervals("chr1") == ((3, 4, 1.0),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bedgraph", "t.bw"]
