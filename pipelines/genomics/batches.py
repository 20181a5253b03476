"""Records read and packed many at a time: short ones of plain A C G T as if they were one.

What is found of a record does not depend on the others in its batch, nor on the way it took.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.genome import RawRecord, RecordError, parse_record
from pipelines.genomics.letters import NOTED, Reading
from pipelines.genomics.packing import (
    PER_BYTE,
    WORD_BASES,
    count_bases,
    find_runs_of,
    pack,
    pack_plain,
)

BATCH_BYTES = 4 << 20
DIGEST_BYTES = 16
NO_RUNS = np.empty((0, 3), dtype=np.int64)
COUNTED = (*LETTERS, *NOTED)
"""What is counted of a record, as in `Letters.counts`: columns of `Batch.counts`."""

_PADS = [b"A" * (-length % WORD_BASES) for length in range(WORD_BASES)]
_LONGEST_LINE = 4096
_ACGT = np.frombuffer(b"ACGT", dtype=np.uint8)
_HELD_BYTES = 2047
"""hashlib lets other threads run while it hashes more than this at once."""
_SHORT_BYTES = 1 << 16


@dataclass(slots=True)
class Batch:
    """What became of R records, in their order, as the store keeps them.

    Dictionaries have a record's place in the batch as key, and no entry where there is nothing.
    """

    raws: list[RawRecord]
    bases: list[memoryview]
    """Packed: four bases a byte."""
    digests: list[bytes]
    """SHA-256, its first 16 bytes, of bases, length and other runs."""
    lengths: Int64[ndarray, "R"]
    counts: Int64[ndarray, "R C"]
    others: dict[int, Int64[ndarray, "K 3"]] = field(default_factory=dict)
    """Start, length and token of each run that is not A C G T, from the record's beginning."""
    masks: dict[int, Int64[ndarray, "K 2"]] = field(default_factory=dict)
    """Runs of letters that stood in lower case, half-open, from the record's beginning."""
    errors: dict[int, RecordError] = field(default_factory=dict)
    """Records that could not be read; their rows are empty."""

    def only(self, places: Sequence[int]) -> "Batch":
        """Choose some records, in ascending order."""
        chosen = np.array(places, dtype=np.int64)
        renumbered = {old: new for new, old in enumerate(places)}
        return Batch(
            [self.raws[place] for place in places],
            [self.bases[place] for place in places],
            [self.digests[place] for place in places],
            self.lengths[chosen],
            self.counts[chosen],
            {renumbered[old]: runs for old, runs in self.others.items() if old in renumbered},
            {renumbered[old]: runs for old, runs in self.masks.items() if old in renumbered},
        )


def parse_batch(raws: Sequence[RawRecord], reading: Reading) -> Batch:
    """Read the characters of records and pack them; what cannot be read is in `errors`."""
    size = len(raws)
    batch = Batch(
        list(raws),
        [_NOTHING] * size,
        [b""] * size,
        np.zeros(size, dtype=np.int64),
        np.zeros((size, len(COUNTED)), dtype=np.int64),
    )
    plain = _pack_plain(batch, reading)
    if len(plain) < size:
        for place in sorted(set(range(size)).difference(plain)):
            _parse_alone(batch, place, reading)
    return batch


def _parse_alone(batch: Batch, place: int, reading: Reading) -> None:
    try:
        letters = parse_record(batch.raws[place], reading).letters
    except RecordError as error:
        batch.errors[place] = error
        return
    others = NO_RUNS if letters.plain else _find_others(letters.text)
    bases = memoryview(pack(letters.text))
    batch.bases[place] = bases
    batch.digests[place] = _digest(letters.text.size, bases, others.tobytes())
    batch.lengths[place] = letters.text.size
    batch.counts[place] = [letters.counts.get(name, 0) for name in COUNTED]
    if others.size:
        batch.others[place] = others
    if letters.mask.size:
        batch.masks[place] = letters.mask


def _pack_plain(batch: Batch, reading: Reading) -> Sequence[int]:
    """Pack those records that are short, without fault, and A C G T in upper case throughout.

    They are laid out one after the other, each from a whole word on, packed and counted at once.
    Returns their places.
    """
    places, texts = [], []
    for place, raw in enumerate(batch.raws):
        if raw.id and raw.problem is None and len(raw.letters) <= BATCH_BYTES:
            text = _without_breaks(raw.letters)
            if len(text) >= reading.min_length:
                places.append(place)
                texts.append(text)
    layout = _Layout(texts)
    if not layout.pack():
        other = set(layout.not_plain())
        chosen = [number for number in range(len(texts)) if number not in other]
        places = [places[number] for number in chosen]
        layout = _Layout([texts[number] for number in chosen])
        assert layout.pack(), "what is not plain was taken out"
    layout.hand_over(batch, places)
    return places


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
        self._bases: UInt8[ndarray, P] | None = None

    def pack(self) -> bool:
        """Pack all; False where one is not plain."""
        self._bases = pack_plain(self._text)
        return self._bases is not None

    def not_plain(self) -> list[int]:
        """Which records hold something else than A C G T."""
        other = np.flatnonzero(np.isin(self._text, _ACGT, invert=True)) // WORD_BASES
        places: list[int] = np.unique(np.searchsorted(self._ends, other, "right")).tolist()
        return places

    def hand_over(self, batch: Batch, places: Sequence[int]) -> None:
        """Count each record, and put it into its place of the batch."""
        if not places:
            return
        assert self._bases is not None, "packed before"
        starts = np.append(0, self._ends[:-1])
        batch.lengths[places] = self._lengths
        batch.counts[places, : len(_ACGT)] = count_bases(self._bases, starts, self._lengths)
        bases = memoryview(self._bases)
        firsts = (starts * (WORD_BASES // PER_BYTE)).tolist()
        for place, first, length in zip(places, firsts, self._lengths.tolist(), strict=True):
            own = batch.bases[place] = bases[first : first - (-length // PER_BYTE)]
            batch.digests[place] = _digest(length, own, b"")


def _digest(length: int, bases: memoryview, others: bytes) -> bytes:
    digest = hashlib.sha256()
    if len(bases) > _SHORT_BYTES:
        digest.update(bases)
    else:  # in pieces: changing threads once a record takes longer than hashing does
        for start in range(0, len(bases), _HELD_BYTES):
            digest.update(bases[start : start + _HELD_BYTES])
    digest.update(length.to_bytes(8, "little") + others)
    return digest.digest()[:DIGEST_BYTES]


def _find_others(text: UInt8[ndarray, "T"]) -> Int64[ndarray, "K 3"]:
    runs, tokens = find_runs_of(text, lambda letters: np.take(_OTHERS, letters))
    return np.column_stack([runs[:, 0], runs[:, 1] - runs[:, 0], tokens]).astype(np.int64)


def _others_table() -> UInt8[ndarray, "256"]:
    table = np.zeros(256, dtype=np.uint8)
    for token, letter in enumerate(LETTERS, start=1):
        table[ord(letter)] = 0 if letter in "ACGT" else token
    return table


_OTHERS = _others_table()
_NOTHING = memoryview(b"")
