"""What is done with each character of a record, and how many there were of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS, PROTEIN_LETTERS
from pipelines.genomics.packing import find_runs_of
from pipelines.shared.errors import InputError

GAPS = b"-.*"
DIGITS = b"0123456789"
WHITESPACE = b" \t\r\n\v\f"
NOTED = ("lower", "uracil", "gaps", "digits", "whitespace", "others", "iupac")
"""What is counted besides the letters that are kept."""

_PIECE = 1 << 18
_LONGEST_LINE = 4096
_LOWER_BIT = 0x20


@dataclass(frozen=True, slots=True)
class Reading:
    """How records are read: the choices of `conf/reading/`, where each is explained."""

    soft_mask: bool = True
    iupac: Literal["keep", "n"] = "keep"
    uracil: Literal["t", "error"] = "t"
    gaps: Literal["error", "strip"] = "error"
    digits: Literal["error", "strip"] = "error"
    others: Literal["error", "n"] = "error"
    protein_fraction: float = 0.1
    duplicate_ids: Literal["error", "first", "suffix"] = "error"
    bad_records: Literal["error", "skip"] = "error"
    min_length: int = 1
    label_pattern: str | None = None

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "Reading":
        """Take the section `reading` of a verb; raises InputError for a value without meaning."""
        for key, allowed in _CHOICES.items():
            if section[key] not in allowed:
                options = " or ".join(allowed)
                raise InputError(f"reading.{key} must be {options}; got {section[key]!r}")
        if not 0 < section["protein_fraction"] <= 1:
            raise InputError(
                "reading.protein_fraction is a share, above 0 and up to 1; "
                f"got {section['protein_fraction']}"
            )
        if section["min_length"] < 1:
            raise InputError(f"reading.min_length must be at least 1; got {section['min_length']}")
        _check_pattern(section["label_pattern"])
        return cls(**{item.name: section[item.name] for item in fields(cls)})


_CHOICES = {
    "iupac": ("keep", "n"),
    "uracil": ("t", "error"),
    "gaps": ("error", "strip"),
    "digits": ("error", "strip"),
    "others": ("error", "n"),
    "duplicate_ids": ("error", "first", "suffix"),
    "bad_records": ("error", "skip"),
}


class LetterError(ValueError):
    """A record that cannot be read for its letters; `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Letters:
    """A record's letters as they are kept, and what was done to them."""

    text: UInt8[ndarray, "T"]
    """ASCII codes of `LETTERS`: upper case, U read as T."""
    plain: bool
    """Nothing but A C G T."""
    mask: Int64[ndarray, "R 2"]
    """Runs of letters that stood in lower case, 0-based half-open."""
    counts: dict[str, int] = field(default_factory=dict)
    """How often each of `LETTERS` stands in `text`; and how much was one of `NOTED`: whitespace but
    line breaks, iupac that is read as N. Zeros are left out."""


_NO_RUNS = np.empty((0, 2), dtype=np.int64)


def read_letters(raw: bytes | memoryview, reading: Reading) -> Letters:
    """Read the characters of one record as the settings say.

    Line breaks and other blanks are left out. Raises LetterError for protein, and for a character
    that the settings refuse, named with its position (from 1, blanks not counted).
    """
    read = np.frombuffer(raw, dtype=np.uint8)
    plain = count_letters(read, b"ACGT")
    text = read if sum(plain.values()) == read.size else _unwrap(read)
    if sum(plain.values()) == text.size:
        return Letters(text, True, _NO_RUNS, {k: v for k, v in plain.items() if v})
    copied = text.tobytes()
    del text  # a chromosome is not to be held once more
    return _read_any(copied, reading)


def count_letters(text: UInt8[ndarray, "T"], letters: bytes) -> dict[str, int]:
    """Count some letters in a text of ASCII codes."""
    counts = dict.fromkeys(letters, 0)
    for start in range(0, text.size, _PIECE):
        piece = text[start : start + _PIECE]
        for letter in letters:
            counts[letter] += int(np.count_nonzero(piece == letter))
    return {chr(letter): count for letter, count in counts.items()}


def _unwrap(text: UInt8[ndarray, "T"]) -> UInt8[ndarray, "U"]:
    """Drop line breaks; where all lines are of one length, by copying a table's columns."""
    end = text.size
    while end and text[end - 1] in b"\r\n":
        end -= 1
    text = text[:end]
    breaks = np.flatnonzero(text[:_LONGEST_LINE] == ord("\n"))
    if breaks.size:
        width = int(breaks[0])
        rows = text.size // (width + 1)
        table = text[: rows * (width + 1)].reshape(rows, width + 1)
        if width and (table[:, width] == ord("\n")).all():
            text = np.concatenate([table[:, :width].reshape(-1), text[rows * (width + 1) :]])
    return text


def _read_any(raw: bytes, reading: Reading) -> Letters:
    found = _histogram(np.frombuffer(raw, dtype=np.uint8))
    if any(found[sign] for sign in WHITESPACE):
        raw = raw.translate(None, WHITESPACE)
    _refuse(raw, found, reading)
    counts = _tally(found, reading)
    if counts["gaps"] or counts["digits"]:
        raw = raw.translate(None, GAPS + DIGITS)
    kept = raw.translate(_UPPER_KEEP if reading.iupac == "keep" else _UPPER_N)
    masked = counts["lower"] and reading.soft_mask
    return Letters(
        np.frombuffer(kept, dtype=np.uint8),
        sum(counts[letter] for letter in "ACGT") == len(kept),
        find_runs_of(np.frombuffer(raw, dtype=np.uint8), _is_lower)[0] if masked else _NO_RUNS,
        {name: count for name, count in counts.items() if count},
    )


def _tally(found: list[int], reading: Reading) -> dict[str, int]:
    """Count what is kept by letter, and what was read that is not kept as it stood."""
    counts = {letter: found[ord(letter)] + found[ord(letter.lower())] for letter in LETTERS}
    counts["uracil"] = found[ord("U")] + found[ord("u")]
    counts["lower"] = sum(found[ord(letter.lower())] for letter in f"{LETTERS}U")
    counts["gaps"] = sum(found[sign] for sign in GAPS)
    counts["digits"] = sum(found[sign] for sign in DIGITS)
    counts["whitespace"] = sum(found[sign] for sign in WHITESPACE if sign not in b"\r\n")
    breaks = found[ord("\r")] + found[ord("\n")]
    known = sum(counts[name] for name in (*LETTERS, "uracil", "gaps", "digits", "whitespace"))
    counts["others"] = sum(found) - breaks - known
    counts["T"] += counts["uracil"]
    counts["N"] += counts["others"]
    if reading.iupac == "n":
        counts["iupac"] = sum(counts.pop(letter) for letter in LETTERS[5:])
        counts["N"] += counts["iupac"]
    return counts


def _histogram(text: UInt8[ndarray, "T"]) -> list[int]:
    total = np.zeros(256, dtype=np.int64)
    for start in range(0, text.size, _PIECE):
        total += np.bincount(text[start : start + _PIECE], minlength=256)
    counts: list[int] = total.tolist()
    return counts


def _is_lower(letters: UInt8[ndarray, "T"]) -> UInt8[ndarray, "T"]:
    return (letters >= ord("a")).view(np.uint8)


def _refuse(raw: bytes, found: list[int], reading: Reading) -> None:
    """Raise LetterError for the first character that the settings do not allow."""
    protein = [found[sign] + found[sign | _LOWER_BIT] for sign in PROTEIN_LETTERS]
    is_mixed = sum(count > 0 for count in protein) > 1  # X alone is how some tools mask DNA
    is_protein = is_mixed and sum(protein) > reading.protein_fraction * len(raw)
    allowed = _allowed(reading, unknown=reading.others == "n" and not is_protein)
    if sum(found[sign] for sign in allowed) == sum(found):
        return
    sign = raw.translate(None, allowed)[:1]
    position = raw.find(sign) + 1
    shown = raw[position - 1 : position + 3].decode("utf-8", errors="replace")[0]
    where = f"{shown!r} at position {position:,}"
    if is_protein:
        raise LetterError(f" looks like protein, not DNA ({where})", "give nucleotide sequences")
    raise LetterError(f": {where} is no DNA letter", _remedy(sign))


@lru_cache
def _allowed(reading: Reading, *, unknown: bool) -> bytes:
    refused = b">" if reading.uracil == "t" else b">Uu"  # '>' is a lost line break, never an N
    refused += b"" if reading.gaps == "strip" else GAPS
    refused += b"" if reading.digits == "strip" else DIGITS
    known = f"{LETTERS}U{LETTERS.lower()}u".encode() + GAPS + DIGITS
    signs = range(33, 127) if unknown else known
    return WHITESPACE + bytes(sign for sign in signs if sign not in refused)


def _remedy(sign: bytes) -> str:
    if sign == b">":
        return "put a line break before it"
    if sign in (b"U", b"u"):
        return "this is RNA; read U as T with reading.uracil=t"
    if sign in GAPS:
        return "remove gaps, or leave them out with reading.gaps=strip"
    if sign in DIGITS:
        return "remove the numbers, or leave them out with reading.digits=strip"
    if not 33 <= sign[0] < 127:
        return "remove it: only ASCII letters can be read"
    return "remove it, or read such signs as N with reading.others=n"


def _check_pattern(pattern: str | None) -> None:
    try:
        groups = 1 if pattern is None else re.compile(pattern).groups
    except re.error as error:
        raise InputError(f"reading.label_pattern is no regular expression: {error}") from error
    if groups < 1:
        raise InputError(
            f"reading.label_pattern={pattern} has no group: put the label in brackets, '(\\w+)'"
        )


def _upper_table(kept: str) -> bytes:
    table = bytearray(b"N" * 256)
    for letter in kept:
        table[ord(letter)] = table[ord(letter.lower())] = ord(letter)
    table[ord("U")] = table[ord("u")] = ord("T")
    return bytes(table)


_UPPER_KEEP = _upper_table(LETTERS)
_UPPER_N = _upper_table("ACGTN")
