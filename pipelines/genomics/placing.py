"""Intervals on the records of a store: which record, what lies beyond its ends, and the bases."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES, reverse_complement
from pipelines.genomics.contigs import ContigMatch, compare_lengths, match_contigs
from pipelines.genomics.intervals import Interval, IntervalFile, Part
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

PastEnd = Literal["drop", "error", "shift", "pad_n"]
PAST_END = get_args(PastEnd)

_N = NUM_BASES + 1


@dataclass(frozen=True, slots=True)
class Placed:
    """An interval on a record: `parts` in reading order; what lies beyond the record reads as N."""

    interval: Interval
    record: int
    parts: tuple[Part, ...]
    flags: tuple[str, ...] = ()
    """What was done to it: shifted, padded, wrapped around a circular origin."""

    @property
    def length(self) -> int:
        """Bases of all parts."""
        return sum(part.end - part.start for part in self.parts)

    def cut(self, start: int, end: int) -> list[Part]:
        """Where the bases [start, end) of the interval, as it is read, lie on the record."""
        found, before = [], 0
        for part in self.parts:
            size = part.end - part.start
            low, high = max(start - before, 0), min(end - before, size)
            before += size
            if low < high and part.strand == "-":
                found.append(Part(part.end - high, part.end - low, part.strand))
            elif low < high:
                found.append(Part(part.start + low, part.start + high, part.strand))
        return found


@dataclass(frozen=True, slots=True)
class Placement:
    """What became of the intervals of a file."""

    placed: tuple[Placed, ...]
    failures: tuple[Failure, ...]
    contigs: ContigMatch
    suspicions: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Say in a line each what was renamed, changed and left out."""
        counts = Counter(flag for item in self.placed for flag in item.flags)
        statuses = Counter(failure.status for failure in self.failures)
        return [
            *self.suspicions,
            *self.contigs.notes(),
            *(f"intervals {flag}: {count:,}" for flag, count in counts.items()),
            *(f"intervals left out ({status}): {count:,}" for status, count in statuses.items()),
        ]


def whole_records(store: SequenceStore) -> tuple[Placed, ...]:
    """Every record of a store as an interval, in its order."""
    return tuple(
        Placed(
            Interval(name, 0, int(length), ".", name, str(store.path)),
            record,
            (Part(0, int(length), "."),),
        )
        for record, (name, length) in enumerate(zip(store.ids, store.lengths, strict=True))
    )


def place(
    file: IntervalFile,
    store: SequenceStore,
    *,
    past_end: PastEnd = "drop",
    width: int | None = None,
) -> Placement:
    """Place the intervals of a file on the records of a store.

    `past_end` says what becomes of one that reaches beyond an end of its record: left out and
    listed, an error, moved inwards by as much as needed, or filled with N. On a circular record it
    goes on at the other end. With `width` each interval becomes so many bases around its summit or
    centre: [c - width // 2, ...) with c the summit, or (start + end) // 2. Features on contigs that
    the store lacks are listed. Raises InputError for contigs that cannot be told apart, and when no
    interval is left.
    """
    if past_end not in PAST_END:
        raise InputError(f"past_end is {', '.join(PAST_END)}; got {past_end!r}")
    if width is not None and width < 1:
        raise InputError(f"width is at least 1 base; got {width}")
    contigs = match_contigs(
        (interval.contig for interval in file),
        store.ids,
        aliases=file.aliases,
        where=str(file.path),
    )
    circular = _circular(file, store, contigs)
    lengths = compare_lengths(contigs, file.lengths, store.lengths.tolist(), where=str(file.path))
    suspicions = (*file.notes, *lengths)
    placed: list[Placed] = []
    failures = list(file.skipped)
    for interval in file:
        record = contigs.record_of.get(interval.contig)
        if record is None:
            failures.append(_unknown(interval))
            continue
        wanted = _recentred(interval, width) if width else Placed(interval, record, interval.parts)
        wanted = replace(wanted, record=record)
        length = int(store.lengths[record])
        inside = _inside(wanted, length, past_end, circular=record in circular)
        if inside is None:
            failures.append(_beyond(interval, wanted, store.ids[record], length))
        else:
            placed.append(inside)
    if past_end == "error" and len(failures) > len(file.skipped):
        first = failures[len(file.skipped)]
        raise InputError(f"{first.path}: {first.reason}; {first.remedy}")
    if not placed:
        raise InputError(f"{file.path}: no interval is left: {failures[-1].reason}")
    return Placement(tuple(placed), tuple(failures), contigs, suspicions)


def fetch(
    store: SequenceStore, placed: Placed, start: int = 0, end: int | None = None
) -> UInt8[ndarray, "T"]:
    """Cut an interval, or its bases [start, end): spliced in reading order, each part by strand."""
    end = placed.length if end is None else end
    if not 0 <= start <= end <= placed.length:
        raise ValueError(f"0 <= start <= end <= {placed.length} must hold; got {start=}, {end=}")
    pieces = [np.empty(0, dtype=np.uint8)]
    for part in placed.cut(start, end):
        bases = _read(store, placed.record, part.start, part.end)
        pieces.append(reverse_complement(bases) if part.strand == "-" else bases)
    return np.concatenate(pieces)


def fetch_mask(
    store: SequenceStore, placed: Placed, start: int = 0, end: int | None = None
) -> Bool[ndarray, "T"]:
    """Say which of the bases that `fetch` cuts are soft-masked."""
    end = placed.length if end is None else end
    pieces = [np.empty(0, dtype=bool)]
    for part in placed.cut(start, end):
        length = int(store.lengths[placed.record])
        low, high = min(max(part.start, 0), length), max(min(part.end, length), 0)
        mask = np.zeros(part.end - part.start, dtype=bool)
        if low < high:
            mask[low - part.start : high - part.start] = store.mask(placed.record, low, high)
        pieces.append(mask[::-1] if part.strand == "-" else mask)
    return np.concatenate(pieces)


def _read(store: SequenceStore, record: int, start: int, end: int) -> UInt8[ndarray, "T"]:
    """Read bases of a record, N where there is none."""
    length = int(store.lengths[record])
    low, high = min(max(start, 0), length), max(min(end, length), 0)
    bases = np.full(end - start, _N, dtype=np.uint8)
    if low < high:
        bases[low - start : high - start] = store.read(record, low, high)
    return bases


def _circular(file: IntervalFile, store: SequenceStore, contigs: ContigMatch) -> set[int]:
    """Records that are circular, by the store or by the intervals' file."""
    known = {contigs.record_of[name] for name in file.circular if name in contigs.record_of}
    return known | {row for row in contigs.record_of.values() if store.circular[row]}


def _recentred(interval: Interval, width: int) -> Placed:
    centre = (interval.start + interval.end) // 2 if interval.summit is None else interval.summit
    start = centre - width // 2
    return Placed(interval, -1, (Part(start, start + width, interval.strand),))


def _inside(wanted: Placed, length: int, past_end: str, *, circular: bool) -> Placed | None:
    low, high = (f(side) for f, side in zip((min, max), _ends(wanted), strict=True))
    if low >= 0 and high <= length:
        return wanted
    if circular and wanted.length <= length:
        parts = tuple(piece for part in wanted.parts for piece in _wrap(part, length))
        return replace(wanted, parts=parts, flags=("across the origin",))
    if past_end == "pad_n" and low < length and high > 0:
        return replace(wanted, flags=("padded with N",))
    if past_end == "shift" and len(wanted.parts) == 1 and wanted.length <= length:
        by = -low if low < 0 else length - high
        parts = tuple(Part(p.start + by, p.end + by, p.strand) for p in wanted.parts)
        return replace(wanted, parts=parts, flags=("shifted inwards",))
    return None


def _ends(wanted: Placed) -> tuple[list[int], list[int]]:
    return [part.start for part in wanted.parts], [part.end for part in wanted.parts]


def _wrap(part: Part, length: int) -> list[Part]:
    """Cut a part of a circular record at the origin, in reading order."""
    start, span = part.start % length, part.end - part.start
    if start + span <= length:
        return [Part(start, start + span, part.strand)]
    pieces = [Part(start, length, part.strand), Part(0, start + span - length, part.strand)]
    return pieces[::-1] if part.strand == "-" else pieces


def _unknown(interval: Interval) -> Failure:
    return Failure(
        interval.name,
        interval.source,
        "unknown_contig",
        f"contig {interval.contig!r} is not in the sequences",
        "give the sequences that have it, or remove the interval",
    )


def _beyond(interval: Interval, wanted: Placed, name: str, length: int) -> Failure:
    starts, ends = _ends(wanted)
    movable = len(wanted.parts) == 1 and wanted.length <= length
    return Failure(
        interval.name,
        interval.source,
        "past_end",
        f"{min(starts):,} to {max(ends):,} reaches beyond {name!r}, which has {length:,} bases",
        f"use past_end={'shift or ' * movable}pad_n, or give the sequences that it is of",
    )
