"""Records read and packed many at a time: short ones of plain A C G T as if they were one.

What is found of a record does not depend on the others in its batch, nor on the way it took.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.genome import RawRecord, RecordError, parse_record
from pipelines.genomics.letters import Letters, Reading
from pipelines.genomics.packing import (
    PER_BYTE,
    WORD_BASES,
    count_bases,
    find_runs,
    pack,
    pack_plain,
)

BATCH_BYTES = 4 << 20
DIGEST_BYTES = 16
NO_RUNS = np.empty((0, 3), dtype=np.int64)

_PADS = [b"A" * (-length % WORD_BASES) for length in range(WORD_BASES)]
_LONGEST_LINE = 4096
_ACGT = np.frombuffer(b"ACGT", dtype=np.uint8)


class Packed(NamedTuple):
    """A record's letters as the store keeps them."""

    length: int
    bases: UInt8[ndarray, "P"]
    others: Int64[ndarray, "K 3"]
    """Start, length and token of each run that is not A C G T, from the record's beginning."""
    mask: Int64[ndarray, "R 2"]
    """Runs of letters that stood in lower case, half-open, from the record's beginning."""
    counts: Mapping[str, int]
    """As `Letters.counts`; zeros may be left out."""
    digest: bytes
    """SHA-256, its first 16 bytes, of bases, length and other runs."""

    @property
    def gc(self) -> int:
        """How many letters are G or C."""
        return self.counts.get("G", 0) + self.counts.get("C", 0)


@dataclass(slots=True)
class Batch:
    """What became of a batch of records, in their order."""

    found: list[tuple[RawRecord, Packed] | RecordError]
    counts: Counter[str] = field(default_factory=Counter)
    """Of `Packed.counts`, over all records that were read."""


def parse_batch(raws: Sequence[RawRecord], reading: Reading) -> Batch:
    """Read the characters of records and pack them; what cannot be read is in its place."""
    batch = Batch([])
    plain = _pack_plain(raws, reading, batch.counts)
    for place, raw in enumerate(raws):
        packed = plain.get(place)
        batch.found.append((raw, packed) if packed else _parse_alone(raw, reading, batch.counts))
    return batch


def pack_letters(letters: Letters) -> Packed:
    """Pack the letters of one record."""
    text = letters.text
    others = NO_RUNS if letters.plain else _find_others(text)
    bases = pack(text)
    digest = _digest(text.size, bases, others.tobytes())
    return Packed(text.size, bases, others, letters.mask, letters.counts, digest)


def _parse_alone(
    raw: RawRecord, reading: Reading, counts: Counter[str]
) -> tuple[RawRecord, Packed] | RecordError:
    try:
        letters = parse_record(raw, reading).letters
    except RecordError as error:
        return error
    counts.update(letters.counts)
    return raw, pack_letters(letters)


def _pack_plain(
    raws: Sequence[RawRecord], reading: Reading, counts: Counter[str]
) -> dict[int, Packed]:
    """Pack those records that are short, without fault, and A C G T in upper case throughout.

    They are laid out one after the other, each from a whole word on, packed and counted at once.
    """
    texts = {}
    for place, raw in enumerate(raws):
        if raw.id and raw.problem is None and len(raw.letters) <= BATCH_BYTES:
            text = _without_breaks(raw.letters)
            if len(text) >= reading.min_length:
                texts[place] = text
    layout = _Layout(list(texts.values()))
    packed = layout.pack(counts)
    if packed is None:
        other = set(layout.not_plain())
        texts = {place: text for i, (place, text) in enumerate(texts.items()) if i not in other}
        packed = _Layout(list(texts.values())).pack(counts)
        assert packed is not None, "what is not plain was taken out"
    return dict(zip(texts, packed, strict=True))


def _without_breaks(text: bytes | memoryview) -> bytes | memoryview:
    if bytes(text[:_LONGEST_LINE]).find(b"\n") < 0:
        return text
    return bytes(text).replace(b"\n", b"")


class _Layout:
    """Records one after the other, filled up with A to whole words."""

    def __init__(self, texts: Sequence[bytes | memoryview]) -> None:
        lengths = [len(text) for text in texts]
        pads = [_PADS[length % WORD_BASES] for length in lengths]
        joined = b"".join([part for pair in zip(texts, pads, strict=True) for part in pair])
        self._text = np.frombuffer(joined, dtype=np.uint8)
        self._lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(-(-self._lengths // WORD_BASES))

    def not_plain(self) -> list[int]:
        """Which records hold something else than A C G T."""
        other = np.flatnonzero(np.isin(self._text, _ACGT, invert=True)) // WORD_BASES
        places: list[int] = np.unique(np.searchsorted(self._ends, other, "right")).tolist()
        return places

    def pack(self, counts: Counter[str]) -> list[Packed] | None:
        """Pack and count them all, and part them again; None where one is not plain."""
        if not self._lengths.size:
            return []
        bases = pack_plain(self._text)
        if bases is None:
            return None
        starts = np.append(0, self._ends[:-1])
        found = count_bases(bases, starts, self._lengths)
        counts.update(dict(zip("ACGT", found.sum(axis=0).tolist(), strict=True)))
        packed = []
        firsts = (starts * (WORD_BASES // PER_BYTE)).tolist()
        for first, length, row in zip(firsts, self._lengths.tolist(), found.tolist(), strict=True):
            own = bases[first : first - (-length // PER_BYTE)]
            letters = dict(zip("ACGT", row, strict=True))
            packed.append(
                Packed(length, own, NO_RUNS, _NO_MASK, letters, _digest(length, own, b""))
            )
        return packed


def _digest(length: int, bases: UInt8[ndarray, "P"], others: bytes) -> bytes:
    digest = hashlib.sha256(bases)
    digest.update(length.to_bytes(8, "little") + others)
    return digest.digest()[:DIGEST_BYTES]


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
