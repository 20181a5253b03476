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
    """Yield the title of each record, and its letters with their line breaks.

    Lines may end in LF, CRLF or CR. What stands before the first record is passed over: blank
    lines and a byte order mark, since `tell_format` refuses anything else. Raises
    UnicodeDecodeError for a title that is no UTF-8.
    """
    title: str | None = None
    parts: list[memoryview] = []
    for block in _whole_lines(stream):
        view = memoryview(block)
        start = 0
        for at in _header_places(block):
            if title is not None:
                yield title, _joined([*parts, view[start:at]])
            end = block.find(b"\n", at)
            end = len(block) if end < 0 else end
            title, parts, start = block[at + 1 : end].decode("utf-8").strip(), [], end + 1
        parts.append(view[start:])
    if title is not None:
        yield title, _joined(parts)


def _whole_lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Blocks that begin and end with a line; CR becomes LF where no LF stands at the beginning.

    What was read before a fault is handed on before the fault is met.
    """
    start = stream.peek(_BLOCK_BYTES)
    stream.read(len(_UTF8_BOM) if start.startswith(_UTF8_BOM) else 0)
    only_cr = b"\r" in start and b"\n" not in start
    rest: list[bytes] = []
    while block := stream.read1(_BLOCK_BYTES):
        block = block.replace(b"\r", b"\n") if only_cr else block
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        rest.append(block[end:])
    yield b"".join(rest)


def _header_places(block: bytes) -> Iterator[int]:
    at = block.find(b">")
    while at >= 0:
        if at == 0 or block[at - 1] == _BREAK:
            yield at
        at = block.find(b">", at + 1)


def _joined(parts: list[memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)
