"""Text files read line by line, each line with its number: plain, gzip or block gzip."""

import gzip
import io
import zlib
from collections.abc import Generator
from pathlib import Path

from pipelines.shared.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends every block-gzip file (SAM specification, section 4.1.2)."""
_BINARY = {
    b"PK\x03\x04": "a zip archive or workbook; unpack it, or save it as text",
    b"BZh": "bzip2; unpack it or compress with gzip",
    b"\xfd7zXZ": "xz; unpack it or compress with gzip",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it or compress with gzip",
    b"BCF": "BCF; convert it with bcftools view",
    b"BAM\1": "BAM; convert it with bedtools bamtobed",
    b"\x26\xfc\x8f\x88": "bigWig; convert it with bigWigToBedGraph",
    b"\x88\x8f\xfc\x26": "bigWig; convert it with bigWigToBedGraph",
    b"\xeb\xf2\x89\x87": "bigBed; convert it with bigBedToBed",
    b"\x87\x89\xf2\xeb": "bigBed; convert it with bigBedToBed",
}


def read_lines(path: Path, kind: str) -> Generator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers from 1, without line breaks and blanks.

    A byte order mark is dropped, CRLF is a line break. `kind` ("BED file") is what messages say is
    wanted. Raises InputError for a file that is missing, empty, binary, cut short or damaged.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one {kind}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path of the {kind}")
    number = 0
    try:
        with path.open("rb") as raw:
            start = raw.read(18)
            if not start:
                raise InputError(f"{path} is empty; give a {kind}")
            compressed = start.startswith(_GZIP_MAGIC)
            if compressed and start[3] & 4 and start[12:14] == b"BC":
                _check_end(path, raw)
            raw.seek(0)
            with gzip.open(raw) if compressed else raw as stream:  # type: ignore[attr-defined]
                text = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig")
                _check_text(path, text.buffer.peek(512)[:512], kind)  # type: ignore[attr-defined]
                for number, line in enumerate(text, start=1):
                    yield number, line.rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: gzip data cut short or damaged after line {number:,} ({error}); copy or "
            "compress it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: bytes that are no UTF-8 text after line {number:,}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); check its rights") from error


def bad_line(path: Path, number: int, problem: str) -> InputError:
    """An error that names file and line; `problem` says what was found and what to do."""
    return InputError(f"{path}: line {number:,}: {problem}")


def whole_number(path: Path, number: int, name: str, text: str) -> int:
    """Read a coordinate; raises InputError for what is no whole number."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise bad_line(
            path, number, f"{name} is {text!r}, no whole number; write digits only (no commas)"
        )
    return int(text)


def _check_end(path: Path, raw: io.BufferedReader) -> None:
    raw.seek(max(0, path.stat().st_size - len(_BGZF_END)))
    if raw.read() != _BGZF_END:
        raise InputError(
            f"{path} is cut short: block gzip without its end marker; copy or compress it again"
        )


def _check_text(path: Path, start: bytes, kind: str) -> None:
    if not start:
        raise InputError(f"{path} is empty once unpacked; give a {kind}")
    for magic, found in _BINARY.items():
        if start.startswith(magic):
            raise InputError(f"{path} is no {kind} but {found}")
    if b"\0" in start:
        raise InputError(f"{path} holds binary data, not text; give a {kind}")
