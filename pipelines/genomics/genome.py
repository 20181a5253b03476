"""FASTA records as tokens: plain, gzip or block gzip, streamed, refused clearly when damaged."""

import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser
from jaxtyping import UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import (
    BadCharacterError,
    count_lower,
    count_uracil,
    encode,
    looks_like_protein,
    to_bytes,
)
from pipelines.shared.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_START_BYTES = 1 << 16
_UTF8_BOM = b"\xef\xbb\xbf"
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends every block-gzip file (SAM specification, section 4.1.2)."""

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "bzip2; unpack it or compress with gzip",
    b"\xfd7zXZ": "xz; unpack it or compress with gzip",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it or compress with gzip",
    b"LOCUS": "GenBank; convert it to FASTA",
    b"@": "FASTQ or SAM; convert it to FASTA",
    b"\x43\x27\x41\x1a": "2bit; convert it with twoBitToFa",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One FASTA record; `number` counts from 1 in the file."""

    id: str
    description: str
    tokens: UInt8[ndarray, "T"]
    number: int
    lower: int
    """Letters that stood in lower case."""
    uracil: int
    """U letters, read as T."""


def read_fasta(path: str | Path) -> Generator[Record]:
    """Yield the records of a FASTA file (plain, .gz or .bgz: told by content, not by name).

    One record is held at a time. Raises InputError, with file, record, position and remedy, for
    a file that is missing, empty, cut short, damaged, no FASTA, or protein, and for a record
    without an id, without sequence, with a second record's id, or with other than DNA letters.
    """
    path = Path(path)
    _check_file(path)
    numbers: dict[str, int] = {}
    number = 0
    with _open_text(path) as handle, _reading_errors(path, numbers):
        for number, (title, sequence) in enumerate(SimpleFastaParser(handle), start=1):
            record = _parse_record(path, number, title, sequence)
            if record.id in numbers:
                raise InputError(
                    f"{path}: records {numbers[record.id]:,} and {number:,} have the same id "
                    f"{record.id!r}; give each record its own id"
                )
            numbers[record.id] = number
            yield record
    if number == 0:
        raise InputError(f"{path}: no records, only blank lines; give a FASTA file")


def _parse_record(path: Path, number: int, title: str, sequence: str) -> Record:
    words = title.split(maxsplit=1)
    if not words:
        raise InputError(f"{path}: record {number:,} has no id; write one after its '>'")
    name, description = words[0], words[1] if len(words) > 1 else ""
    where = f"{path}: record {number:,} ({name!r})"
    if not sequence:
        raise InputError(f"{where} has a header but no sequence; remove it or add its letters")
    try:
        tokens = encode(sequence)
    except BadCharacterError as error:
        raise InputError(f"{where}{_describe_bad_letter(sequence, error)}") from None
    raw = to_bytes(sequence)
    return Record(name, description, tokens, number, count_lower(raw), count_uracil(raw))


def _describe_bad_letter(sequence: str, error: BadCharacterError) -> str:
    found = f"{error.character!r} at position {error.position:,}"
    if looks_like_protein(sequence):
        return f" looks like protein, not DNA ({found}); give nucleotide sequences"
    remedies = {">": "put a line break before it", "-": "remove gaps", ".": "remove gaps"}
    return f": {found} is no DNA letter; {remedies.get(error.character, 'remove it or write N')}"


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one FASTA file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path of the FASTA file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; give a FASTA file")


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open as text, unpacked where needed, after a look at the first bytes."""
    compressed = _check_compression(path)
    with (
        gzip.open(path, "rb") if compressed else path.open("rb", buffering=0) as stream,
        io.BufferedReader(cast(io.FileIO, stream), buffer_size=1 << 20) as raw,
    ):
        with _reading_errors(path, {}):
            _check_start(path, raw.peek(_START_BYTES)[:_START_BYTES])
        with io.TextIOWrapper(raw, encoding="utf-8-sig") as handle:
            yield handle


def _check_compression(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            compressed = handle.read(2) == _GZIP_MAGIC
            if compressed:
                _check_bgzf_end(path, handle)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from error
    return compressed


def _check_bgzf_end(path: Path, handle: BinaryIO) -> None:
    """Refuse block gzip without its end block: cut between blocks it unpacks without error."""
    handle.seek(0)
    header = handle.read(18)
    is_bgzf = len(header) == 18 and header[3] & 4 and header[12:14] == b"BC"
    if not is_bgzf:
        return
    handle.seek(max(0, path.stat().st_size - len(_BGZF_END)))
    if handle.read() != _BGZF_END:
        raise InputError(
            f"{path} is cut short: block gzip without its end marker; copy or compress it again"
        )


def _check_start(path: Path, start: bytes) -> None:
    if not start:
        raise InputError(f"{path} is empty once unpacked; give a FASTA file")
    for magic, kind in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise InputError(f"{path} is no FASTA file but {kind}")
    if b"\0" in start:
        raise InputError(f"{path} holds binary data, not text; give a FASTA file")
    lines = start.removeprefix(_UTF8_BOM).splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith(b">"):
            return
        if line.strip():
            shown = line[:40].decode("utf-8", errors="replace")
            raise InputError(
                f"{path}: line {number} has text before the first record: {shown!r}; "
                "a FASTA record begins with '>'; remove what stands before it"
            )


@contextmanager
def _reading_errors(path: Path, numbers: dict[str, int]) -> Iterator[None]:
    """Turn what a damaged file raises into InputErrors that say how far reading came."""
    try:
        yield
    except EOFError as error:
        reason, remedy = "gzip data cut short", "copy or compress it again"
        raise InputError(f"{path}: {reason} {_after(numbers)}; {remedy}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        reason, remedy = f"damaged gzip data ({error})", "copy or compress it again"
        raise InputError(f"{path}: {reason} {_after(numbers)}; {remedy}") from error
    except UnicodeDecodeError as error:
        reason, remedy = "bytes that are no UTF-8 text", "save it as UTF-8 or repair it"
        raise InputError(f"{path}: {reason} {_after(numbers)}; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}) {_after(numbers)}") from error


def _after(numbers: dict[str, int]) -> str:
    if not numbers:
        return "before the first record was read"
    name, number = next(reversed(numbers.items()))
    return f"after record {number:,} ({name!r})"
