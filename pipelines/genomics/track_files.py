"""Values along sequences, read: bigWig in pieces, bedGraph at once; what is unknown is NaN.

Formats: UCSC bedGraph (0-based, half-open, four columns) and bigWig (Kent et al. 2010), the latter
by pyBigWig. Coordinates become those of items as they are read: of an item on the minus strand the
values are turned around, as its bases are.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64
from numpy import ndarray

from pipelines.genomics.contigs import match_contigs
from pipelines.genomics.lines import bad_line, read_lines, whole_number
from pipelines.genomics.tracks import require_bigwig
from pipelines.shared.errors import InputError

Missing = Literal["skip", "zero"]
MISSING = ("skip", "zero")

_BIGWIG = (b"\x26\xfc\x8f\x88", b"\x88\x8f\xfc\x26")
_ENDINGS = (".gz", ".bgz", ".bw", ".bigwig", ".bedgraph", ".bdg", ".bg")


class TrackFile(Protocol):
    """Values of contigs, under the names that the file has for them."""

    contigs: Mapping[str, int | None]
    """Their lengths, where the file knows them."""

    def read(self, contig: str, start: int, end: int) -> Float[ndarray, " T"]:
        """Values of the bases [start, end), NaN where there is none."""


class BigWig:
    """A bigWig file; each process opens it for itself: they would move each other's place in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._owner = path, None, -1
        file = self._open()
        self.contigs: dict[str, int | None] = dict(file.chroms())

    def read(self, contig: str, start: int, end: int) -> Float[ndarray, " T"]:
        """Values of the bases [start, end), NaN where there is none."""
        values = np.full(end - start, np.nan, dtype=np.float32)
        length = self.contigs[contig] or 0
        low, high = max(start, 0), min(end, length)
        if low < high:
            values[low - start : high - start] = self._open().values(contig, low, high, numpy=True)
        return values

    def _open(self) -> Any:
        if self._file is None or self._owner != os.getpid():
            self._owner = os.getpid()
            library = require_bigwig()
            try:
                self._file = library.open(str(self._path))
            except RuntimeError as error:
                raise InputError(f"{self._path} cannot be read as bigWig: {error}") from None
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}


class BedGraph:
    """A bedGraph file, held in memory: stretches of contigs with a value each."""

    def __init__(self, path: Path) -> None:
        self._rows = _read_bedgraph(path)
        self.contigs: dict[str, int | None] = dict.fromkeys(self._rows)

    def read(self, contig: str, start: int, end: int) -> Float[ndarray, " T"]:
        """Values of the bases [start, end), NaN where there is none."""
        starts, ends, values = self._rows[contig]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left"))
        found = np.full(end - start, np.nan, dtype=np.float32)
        for row in range(first, last):
            found[max(int(starts[row]) - start, 0) : int(ends[row]) - start] = values[row]
        return found


class Signals:
    """Values along items, a column for each track.

    `table` has a row for each item: id, and contig, start, end, strand (0-based, half-open) where
    it is an interval; a record without these is its own contig. `lengths` are their bases. Raises
    InputError for files that are none, two of one name, contigs of another length, and intervals
    that are no single stretch of bases.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        table: pd.DataFrame,
        lengths: Int64[ndarray, " N"],
        *,
        missing: Missing,
    ) -> None:
        self.names = name_tracks(files)
        self.missing = missing
        self.notes: list[str] = []
        self._contigs, self._starts, self._strands = _places(table, lengths)
        self._lengths = lengths
        whole = dict(zip(table["id"], lengths.tolist(), strict=True))
        known = {} if "contig" in table else whole
        self._files = [self._match(Path(path), known) for path in files]

    def read(self, item: int, start: int, end: int) -> Float[ndarray, "T K"]:
        """Values of an item's bases [start, end), in the direction in which it is read."""
        length = int(self._lengths[item])
        backwards = self._strands[item] == "-"
        if backwards:
            start, end = length - end, length - start
        first = int(self._starts[item])
        found = np.full((end - start, len(self._files)), np.nan, dtype=np.float32)
        for column, (file, name_of) in enumerate(self._files):
            contig = name_of.get(self._contigs[item])
            if contig is not None:
                found[:, column] = file.read(contig, first + start, first + end)
        if self.missing == "zero":
            found = np.nan_to_num(found, nan=0.0)
        return found[::-1].copy() if backwards else found

    def locate(self, item: int, start: int, end: int) -> tuple[str, int, int, str]:
        """Contig, start, end and strand of an item's bases [start, end)."""
        first, strand = int(self._starts[item]), self._strands[item]
        if strand == "-":
            length = int(self._lengths[item])
            start, end = length - end, length - start
        return self._contigs[item], first + start, first + end, strand

    def _match(self, path: Path, lengths: Mapping[str, int]) -> tuple[TrackFile, dict[str, str]]:
        """Open a file, and say what it calls each contig of the items."""
        file = open_track(path)
        ids = list(dict.fromkeys(self._contigs))
        match = match_contigs(file.contigs, ids, where=str(path))
        name_of = {ids[row]: name for name, row in match.record_of.items()}
        for contig, name in name_of.items():
            said = file.contigs[name]
            if said is not None and said != lengths.get(contig, said):
                raise InputError(
                    f"{path}: {name!r} has {said:,} bases there and {lengths[contig]:,} in the "
                    "sequences: another assembly; give the track of this one"
                )
        absent = [contig for contig in ids if contig not in name_of]
        if absent:
            shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            self.notes.append(f"{path.name} says nothing of {len(absent):,} contigs: {shown}")
        return file, name_of


def open_track(path: Path) -> TrackFile:
    """Open a bigWig or bedGraph file, told apart by content."""
    if not path.is_file():
        raise InputError(f"task.files: {path}: no such file; check the path")
    with path.open("rb") as file:
        start = file.read(4)
    return BigWig(path) if start in _BIGWIG else BedGraph(path)


def name_tracks(files: Iterable[str | Path]) -> tuple[str, ...]:
    """Name each track by its file; raises InputError for two of one name, and for none."""
    names = []
    for path in files:
        name = Path(path).name
        while name.lower().endswith(_ENDINGS):
            name = name[: name.rindex(".")]
        names.append(name)
    if not names:
        raise InputError("task=tracks learns bigWig or bedGraph files: task.files=[a.bw,b.bw]")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"task.files: two tracks are called {repeated[0]!r}; rename one file")
    return tuple(names)


def _places(
    table: pd.DataFrame, lengths: Int64[ndarray, " N"]
) -> tuple[list[str], Int64[ndarray, " N"], list[str]]:
    if "contig" not in table:
        return table["id"].tolist(), np.zeros_like(lengths), ["+"] * len(table)
    starts = table["start"].to_numpy(dtype=np.int64)
    odd = np.flatnonzero(table["end"].to_numpy(dtype=np.int64) - starts != lengths)
    if len(odd):
        raise InputError(
            f"task=tracks needs intervals that are one stretch of bases each; "
            f"{table['id'].iloc[odd[0]]!r} is spliced, or runs across an origin; leave it out"
        )
    return table["contig"].tolist(), starts, table["strand"].tolist()


def _read_bedgraph(path: Path) -> dict[str, tuple[ndarray, ndarray, ndarray]]:
    found: dict[str, list[tuple[int, int, float, int]]] = defaultdict(list)
    for number, line in read_lines(path, "bedGraph or bigWig file"):
        fields = line.split()
        if not fields or fields[0].startswith("#") or fields[0] in ("track", "browser"):
            continue
        if fields[0] in ("fixedStep", "variableStep"):
            raise bad_line(path, number, "this is wiggle; convert it with wigToBigWig")
        if len(fields) != 4:
            raise bad_line(
                path, number, f"{len(fields)} columns where bedGraph has 4 (contig, start, end, "
                "value); give bedGraph or bigWig",
            )  # fmt: skip
        start, end = (
            whole_number(path, number, name, text)
            for name, text in (("start", fields[1]), ("end", fields[2]))
        )
        if not 0 <= start < end:
            raise bad_line(path, number, f"{start} to {end} holds no base; start counts from 0")
        found[fields[0]].append((start, end, _value(path, number, fields[3]), number))
    if not found:
        raise InputError(f"{path} holds no values; give a bedGraph or bigWig file with some")
    return {contig: _sorted(path, contig, rows) for contig, rows in found.items()}


def _value(path: Path, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise bad_line(path, number, f"the value is {text!r}, no number; leave the line out")
    return value


def _sorted(
    path: Path, contig: str, rows: list[tuple[int, int, float, int]]
) -> tuple[ndarray, ndarray, ndarray]:
    rows.sort()
    starts = np.array([row[0] for row in rows], dtype=np.int64)
    ends = np.array([row[1] for row in rows], dtype=np.int64)
    twice = np.flatnonzero(starts[1:] < ends[:-1])
    if len(twice):
        one, two = rows[twice[0]], rows[twice[0] + 1]
        raise bad_line(
            path, max(one[3], two[3]), f"{contig}:{two[0]}-{two[1]} overlaps {one[0]}-{one[1]} of "
            f"line {min(one[3], two[3]):,}; a base has one value",
        )  # fmt: skip
    return starts, ends, np.array([row[2] for row in rows], dtype=np.float32)
