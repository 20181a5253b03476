"""Records read and packed many at a time: short ones of plain A C G T as if they were one.

What is found of a record does not depend on the others in its batch, nor on the way it took.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.genome import RawRecord, Record, RecordError, parse_record, to_record
from pipelines.genomics.letters import Letters, Reading, count_letters
from pipelines.genomics.packing import PER_BYTE, count_gc, find_runs, pack

BATCH_BYTES = 4 << 20
DIGEST_BYTES = 16
NO_RUNS = np.empty((0, 3), dtype=np.int64)

_PADS = [b"", b"AAA", b"AA", b"A"]
_LONGEST_LINE = 4096
_ACGT = np.frombuffer(b"ACGT", dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Packed:
    """A record's letters as the store keeps them."""

    length: int
    bases: UInt8[ndarray, "P"]
    others: Int64[ndarray, "K 3"]
    """Start, length and token of each run that is not A C G T, from the record's beginning."""
    gc: int
    """How many are G or C."""
    digest: bytes
    """SHA-256, its first 16 bytes, of bases, length and other runs."""


@dataclass(slots=True)
class Batch:
    """What became of a batch of records, in their order."""

    found: list[tuple[Record, Packed] | RecordError]
    counts: Counter[str] = field(default_factory=Counter)
    """Of `Letters.counts`, over all records that were read."""


def parse_batch(raws: Sequence[RawRecord], reading: Reading) -> Batch:
    """Read the characters of records and pack them; what cannot be read is in its place."""
    batch = Batch([])
    packed = _pack_plain(raws, reading, batch.counts)
    for place, raw in enumerate(raws):
        if place in packed:
            text = np.frombuffer(packed[place].text, dtype=np.uint8)
            record = to_record(raw, Letters(text, True, _NO_MASK))
            batch.found.append((record, packed[place].letters))
        else:
            batch.found.append(_parse_alone(raw, reading, batch.counts))
    return batch


def pack_letters(letters: Letters) -> Packed:
    """Pack the letters of one record."""
    text = letters.text
    others = NO_RUNS if letters.plain else _find_others(text)
    gc = letters.counts.get("G", 0) + letters.counts.get("C", 0)
    return _digested(text.size, pack(text), others, gc)


def _parse_alone(
    raw: RawRecord, reading: Reading, counts: Counter[str]
) -> tuple[Record, Packed] | RecordError:
    try:
        record = parse_record(raw, reading)
    except RecordError as error:
        return error
    counts.update(record.letters.counts)
    return record, pack_letters(record.letters)


@dataclass(frozen=True, slots=True)
class _Plain:
    text: bytes | memoryview
    letters: Packed


def _pack_plain(
    raws: Sequence[RawRecord], reading: Reading, counts: Counter[str]
) -> dict[int, _Plain]:
    """Pack those records that are short, without fault, and A C G T in upper case throughout.

    They are laid out one after the other, each from a whole byte on, counted and packed at once.
    """
    texts = {
        place: raw.letters
        for place, raw in enumerate(raws)
        if reading.min_length <= len(raw.letters) <= BATCH_BYTES and raw.id and not raw.problem
    }
    for attempt in (_as_it_is, _without_breaks, _as_it_is):
        texts = {place: attempt(text) for place, text in texts.items()}
        layout = _Layout(list(texts.values()))
        found = count_letters(layout.text, b"ACGT")
        if sum(found.values()) == layout.text.size:
            counts.update(found)
            counts["A"] -= layout.num_pads
            return dict(zip(texts, layout.pack(), strict=True))
        if attempt is _without_breaks:
            other = set(layout.not_plain())
            texts = {place: text for i, (place, text) in enumerate(texts.items()) if i not in other}
    raise AssertionError("what is not plain was taken out")


def _as_it_is(text: bytes | memoryview) -> bytes | memoryview:
    return text


def _without_breaks(text: bytes | memoryview) -> bytes | memoryview:
    whole = bytes(text)
    return whole.replace(b"\n", b"") if whole.find(b"\n", 0, _LONGEST_LINE) >= 0 else whole


class _Layout:
    """Records one after the other, filled up with A to whole bytes."""

    def __init__(self, texts: Sequence[bytes | memoryview]) -> None:
        self._texts = texts
        lengths = [len(text) for text in texts]
        pads = [_PADS[length % PER_BYTE] for length in lengths]
        joined = b"".join([part for pair in zip(texts, pads, strict=True) for part in pair])
        self.text = np.frombuffer(joined, dtype=np.uint8)
        self.num_pads = len(joined) - sum(lengths)
        self._sizes = np.array([-(-length // PER_BYTE) for length in lengths], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)

    def not_plain(self) -> list[int]:
        """Which records hold something else than A C G T."""
        other = np.flatnonzero(np.isin(self.text, _ACGT, invert=True)) // PER_BYTE
        places: list[int] = np.unique(np.searchsorted(self._ends, other, "right")).tolist()
        return places

    def pack(self) -> list[_Plain]:
        """Pack them all, and part them again."""
        if not self._texts:
            return []
        bases, starts = pack(self.text), self._ends - self._sizes
        numbers = count_gc(bases, starts).tolist()
        bounds = zip(starts.tolist(), self._ends.tolist(), strict=True)
        return [
            _Plain(text, _digested(len(text), bases[start:end], NO_RUNS, gc))
            for text, (start, end), gc in zip(self._texts, bounds, numbers, strict=True)
        ]


def _digested(length: int, bases: UInt8[ndarray, "P"], others: ndarray, gc: int) -> Packed:
    digest = hashlib.sha256(bases)
    digest.update(length.to_bytes(8, "little") + others.tobytes())
    return Packed(length, bases, others, gc, digest.digest()[:DIGEST_BYTES])


def _find_others(text: UInt8[ndarray, "T"]) -> Int64[ndarray, "K 3"]:
    tokens = np.frombuffer(text.tobytes().translate(_OTHERS), dtype=np.uint8)
    runs = find_runs(tokens)
    found = tokens[runs[:, 0]]
    rows = np.column_stack([runs[:, 0], runs[:, 1] - runs[:, 0], found])
    return rows[found > 0].astype(np.int64)


def _others_table() -> bytes:
    table = bytearray(256)
    for token, letter in enumerate(LETTERS, start=1):
        table[ord(letter)] = 0 if letter in "ACGT" else token
    return bytes(table)


_OTHERS = _others_table()
_NO_MASK = np.empty((0, 2), dtype=np.int64)
