"""FASTA as bytes: records of a stream, split at line starts that say '>'.

A reader of whole blocks: letters are checked as bytes later on, so nothing is decoded here but the
headers, and a record of one line is handed on without a copy.
"""

import io
from collections.abc import Iterator

_BLOCK_BYTES = 1 << 20
_BREAK = ord("\n")
_UTF8_BOM = b"\xef\xbb\xbf"


def split_records(stream: io.BufferedReader) -> Iterator[tuple[str, bytes | memoryview]]:
    """Yield the title of each record, and its letters with the line breaks between them.

    Lines may end in LF, CRLF or CR. What stands before the first record is passed over: blank
    lines and a byte order mark, since `tell_format` refuses anything else. Records before a fault
    of the file are yielded before it raises. Raises UnicodeDecodeError for a title that is no
    UTF-8.
    """
    title: str | None = None
    header: bytes | None = None  # of a title that goes on in the next block
    parts: list[memoryview] = []
    after_break = True
    for block in _blocks(stream):
        start = 0
        if header is not None:
            start = block.find(b"\n") + 1
            if not start:
                header += block
                continue
            title, header = _title(header + block[:start]), None
        view = memoryview(block)
        for at in _header_places(block, start, after_break):
            if title is not None:
                yield title, _joined([*parts, view[start:at]])
            parts = []
            start = block.find(b"\n", at) + 1
            if not start:
                header, start = block[at:], len(block)
            title = _title(block[at:start]) if header is None else None
        parts.append(view[start:])
        after_break = block[-1] == _BREAK
    if header is not None:
        title, parts = _title(header), []
    if title is not None:
        yield title, _joined(parts)


def _blocks(stream: io.BufferedReader) -> Iterator[bytes]:
    """The stream in blocks; CR becomes LF where no LF stands at the beginning."""
    start = stream.peek(_BLOCK_BYTES)
    stream.read(len(_UTF8_BOM) if start.startswith(_UTF8_BOM) else 0)
    only_cr = b"\r" in start and b"\n" not in start
    while block := stream.read1(_BLOCK_BYTES):
        yield block.replace(b"\r", b"\n") if only_cr else block


def _header_places(block: bytes, start: int, after_break: bool) -> Iterator[int]:
    """Where lines begin with '>'; a title's own are passed over."""
    at = block.find(b">", start)
    while at >= 0:
        if block[at - 1] == _BREAK if at else after_break:
            yield at
            end = block.find(b"\n", at)
            if end < 0:
                return
            at = end
        at = block.find(b">", at + 1)


def _title(line: bytes) -> str:
    return line[1:].decode("utf-8").strip()


def _joined(parts: list[memoryview]) -> bytes | memoryview:
    parts = [part for part in parts if part]
    letters = parts[0] if len(parts) == 1 else b"".join(parts)
    return letters[:-1] if letters and letters[-1] == _BREAK else letters
