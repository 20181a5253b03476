"""Text files read line by line, each line with its number: plain, gzip or block gzip."""

import io
from collections.abc import Generator
from pathlib import Path

from pipelines.genomics.opening import open_source, reading_errors
from pipelines.shared.errors import InputError

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
    """Yield the lines of a text file with their numbers from 1, without their breaks.

    A byte order mark is dropped, CRLF is a line break. `kind` ("BED file") is what messages say is
    wanted. Raises InputError for a file that is missing, empty, binary, cut short or damaged.
    """
    number = 0
    with open_source(path, wanted=f"a {kind}") as source:
        _check_text(path, source.start, kind)
        text = io.TextIOWrapper(source.stream, encoding="utf-8-sig")
        try:
            with reading_errors(str(path), lambda: f"after line {number:,}"):
                for number, line in enumerate(text, start=1):
                    yield number, line.rstrip("\r\n")
        finally:
            text.detach()


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


def _check_text(path: Path, start: bytes, kind: str) -> None:
    for magic, found in _BINARY.items():
        if start.startswith(magic):
            raise InputError(f"{path} is no {kind} but {found}")
    if b"\0" in start:
        raise InputError(f"{path} holds binary data, not text; give a {kind}")
