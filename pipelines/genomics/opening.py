"""Files as unpacked bytes, from a path or from stdin; damage is said and never passed on.

Gzip is told by its first bytes. Block gzip (BGZF, SAM specification, section 4.1) must end with its
empty block: cut between two blocks it unpacks without an error. Of a pipe, the end is seen last.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import igzip, isal_zlib

from pipelines.shared.errors import InputError

STDIN = "-"
START_BYTES = 1 << 16
"""How much `Source.start` shows, at most."""

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 20
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class Source:
    """One opened file: its unpacked bytes, and what it begins with."""

    def __init__(self, name: str, raw: io.BufferedReader, *, size: int | None) -> None:
        self.name = name
        """The path, or `stdin`: what messages say."""
        self.size = size
        """Bytes of the file as it is stored; None for stdin and other pipes."""
        self._raw = raw
        head = raw.peek(18)
        self.compression = _compression(head)
        """`none`, `gzip` or `bgzf`."""
        if self.compression == "bgzf" and isinstance(raw.raw, _Pipe):
            raw.raw.expected_end = _BGZF_END
        elif self.compression == "bgzf":
            self._check_bgzf_end()
        packed = self.compression != "none"
        unpacked = igzip.IGzipFile(fileobj=raw, mode="rb") if packed else raw
        self.stream = cast(io.BufferedReader, unpacked)
        with reading_errors(name, lambda: "at its start"):
            self.start = self.stream.peek(START_BYTES)[:START_BYTES]
            """The first unpacked bytes, not taken from the stream."""

    def position(self) -> int:
        """Bytes of the file, as it is stored, that were read so far."""
        if self.size is None:
            return 0
        return self.size if self._raw.closed else self._raw.tell()

    def _check_bgzf_end(self) -> None:
        self._raw.seek(-min(len(_BGZF_END), self.size or 0), io.SEEK_END)
        end = self._raw.read()
        self._raw.seek(0)
        if end != _BGZF_END:
            raise InputError(
                f"{self.name} is cut short: block gzip without its end marker; copy or compress "
                "it again"
            )


class _Pipe(io.RawIOBase):
    """What can be read only once; raises EOFError where it does not end as expected."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._end = b""
        self.expected_end = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # the type of a buffer has no name in Python 3.11
        block = self._stream.read(len(buffer))
        if not block and not self._end.endswith(self.expected_end):
            raise EOFError("the end marker is missing")
        buffer[: len(block)] = block
        self._end = (self._end + block)[-len(_BGZF_END) :]
        return len(block)


@contextmanager
def open_source(path: str | Path, *, wanted: str = "a file of sequences") -> Iterator[Source]:
    """Open a file, or stdin for `-`, for reading its unpacked bytes.

    `wanted` says what messages ask for. Raises InputError for a file that is missing, a folder,
    empty, not readable, or block gzip that was cut short.
    """
    if str(path) == STDIN:
        yield _checked(Source("stdin", _piped(sys.stdin.buffer), size=None), wanted)
        return
    path = Path(path)
    _require_file(path, wanted)
    try:
        handle: BinaryIO = path.open("rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from error
    with handle:
        if path.is_file():
            file, size = cast(io.BufferedReader, handle), path.stat().st_size
            yield _checked(Source(str(path), file, size=size), wanted)
        else:
            yield _checked(Source(str(path), _piped(handle), size=None), wanted)


def is_pipe(path: str | Path) -> bool:
    """Tell stdin, named pipes and a shell's `<(command)`: what can be read only once."""
    path = Path(path)
    return str(path) == STDIN or (path.exists() and not path.is_file() and not path.is_dir())


def refuse_pipe(path: str | Path, setting: str) -> None:
    """Raise InputError for a pipe where the file is read more than once."""
    if is_pipe(path):
        raise InputError(
            f"{setting}={path} is a pipe, and is read more than once; save it as a file"
        )


def _piped(stream: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(_Pipe(stream), _BUFFER_BYTES)


@contextmanager
def as_text(stream: io.BufferedReader, *, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Read a stream as UTF-8 text, and leave it to whom it belongs."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
    try:
        yield text
    finally:
        if not text.closed:
            text.detach()


@contextmanager
def reading_errors(name: str, where: Callable[[], str]) -> Iterator[None]:
    """Turn what a damaged file raises into InputErrors; `where` says how far reading came."""
    again = "copy or compress it again"
    try:
        yield
    except EOFError as error:
        raise InputError(f"{name}: gzip data cut short {where()}; {again}") from error
    except (gzip.BadGzipFile, zlib.error, isal_zlib.error) as error:
        raise InputError(f"{name}: damaged gzip data ({error}) {where()}; {again}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: bytes that are no UTF-8 text {where()}; save it as UTF-8 or repair it"
        ) from error
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error}) {where()}") from error


def _compression(head: bytes) -> str:
    if head[:2] != _GZIP_MAGIC:
        return "none"
    is_bgzf = len(head) >= 18 and head[3] & 4 and head[12:14] == b"BC"
    return "bgzf" if is_bgzf else "gzip"


def _require_file(path: Path, wanted: str) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give {wanted}")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is empty; give {wanted}")


def _checked(source: Source, wanted: str) -> Source:
    if not source.start:
        unpacked = " once unpacked" if source.compression != "none" else ""
        raise InputError(f"{source.name} is empty{unpacked}; give {wanted}")
    return source
