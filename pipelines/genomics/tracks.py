"""Scores along the sequences: bedGraph and bigWig, sorted, one value a base.

Formats: UCSC bedGraph (0-based, half-open) and bigWig (Kent et al. 2010), the latter by pyBigWig.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from pipelines.shared.errors import InputError

_DECIMALS = 6
_ENTRIES = 1 << 20
"""Written to a bigWig at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Stretches of the records in order, without overlap, each with a value."""

    records: Int64[ndarray, "S"]
    starts: Int64[ndarray, "S"]
    ends: Int64[ndarray, "S"]
    values: Float[ndarray, "S"]

    def __len__(self) -> int:
        return self.records.size

    @classmethod
    def of(cls, tracks: Sequence["Track"]) -> "Track":
        """Put tracks of records in order into one."""
        if not tracks:
            empty = np.empty(0, dtype=np.int64)
            return cls(empty, empty, empty, np.empty(0))
        return cls(
            *(
                np.concatenate([getattr(track, name) for track in tracks])
                for name in ("records", "starts", "ends", "values")
            )
        )


def blend(
    records: Int64[ndarray, "W"],
    starts: Int64[ndarray, "W"],
    ends: Int64[ndarray, "W"],
    values: Float[ndarray, "W"],
) -> Track:
    """Give each base the mean of the windows that cover it; what none covers is left out.

    Windows come in any order and may overlap; each is half-open on its record and not empty.
    """
    if (starts >= ends).any():
        raise ValueError("every window holds at least one base")
    tracks = [
        _blend_record(int(record), starts[mine], ends[mine], values[mine])
        for record in np.unique(records)
        for mine in [records == record]
    ]
    return Track.of(tracks)


def join_equal(record: int, bases: Int64[ndarray, "N"], values: Float[ndarray, "N"]) -> Track:
    """Give each base of a record the mean of its values; neighbours of one value become a stretch.

    Bases come in any order, some of them several times.
    """
    places, of = np.unique(bases, return_inverse=True)
    mean = (np.bincount(of, values) / np.bincount(of)).round(_DECIMALS)
    opens = np.ones(places.size, dtype=bool)
    opens[1:] = (places[1:] != places[:-1] + 1) | (mean[1:] != mean[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], places.size)[: first.size] - 1
    records = np.full(first.size, record, dtype=np.int64)
    return Track(records, places[first], places[last] + 1, mean[first])


def write_bedgraph(path: Path, track: Track, ids: Sequence[str], *, name: str) -> None:
    """Write a bedGraph file, aside and renamed."""
    aside = _aside(path)
    label = name.replace('"', "'")
    with aside.open("w", encoding="utf-8") as file:
        file.write(f'track type=bedGraph name="{label}"\n')
        rows = zip(
            track.records.tolist(),
            track.starts.tolist(),
            track.ends.tolist(),
            track.values.round(_DECIMALS).tolist(),
            strict=True,
        )
        file.writelines(f"{ids[row]}\t{start}\t{end}\t{value}\n" for row, start, end, value in rows)
    os.replace(aside, path)


def write_bigwig(path: Path, track: Track, sizes: Mapping[str, int]) -> None:
    """Write a bigWig file, aside and renamed; `sizes` are all records, in their order."""
    library = require_bigwig()
    ids = list(sizes)
    aside = _aside(path)
    file = library.open(str(aside), "w")
    try:
        file.addHeader([(name, int(length)) for name, length in sizes.items()])
        for first in range(0, len(track), _ENTRIES):
            here = slice(first, first + _ENTRIES)
            file.addEntries(
                [ids[row] for row in track.records[here]],
                track.starts[here].tolist(),
                ends=track.ends[here].tolist(),
                values=track.values[here].round(_DECIMALS).tolist(),
            )
    finally:
        file.close()
    os.replace(aside, path)


def require_bigwig() -> ModuleType:
    """Return the library that writes bigWig; raises InputError where it is not installed."""
    try:
        import pyBigWig
    except ImportError:
        raise InputError(
            "bigwig needs the package pyBigWig: pip install 'gigasparse[tracks]'"
        ) from None
    return pyBigWig


def _blend_record(
    record: int,
    starts: Int64[ndarray, "W"],
    ends: Int64[ndarray, "W"],
    values: Float[ndarray, "W"],
) -> Track:
    edges = np.unique(np.concatenate([starts, ends]))
    first, last = np.searchsorted(edges, starts), np.searchsorted(edges, ends)
    count = np.zeros(edges.size, dtype=np.int64)
    np.add.at(count, first, 1)
    np.subtract.at(count, last, 1)
    # sums of millionths are exact: adding and taking away again leaves nothing behind
    millionths = np.rint(values.astype(np.float64) * 10**_DECIMALS).astype(np.int64)
    total = np.zeros(edges.size, dtype=np.int64)
    np.add.at(total, first, millionths)
    np.subtract.at(total, last, millionths)
    count, total = count.cumsum()[:-1], total.cumsum()[:-1]
    covered = count > 0
    means = total[covered] / count[covered] / 10**_DECIMALS
    places = np.full(means.size, record, dtype=np.int64)
    return Track(places, edges[:-1][covered], edges[1:][covered], means)


def _aside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")
