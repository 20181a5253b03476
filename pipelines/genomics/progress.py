"""How far a verb is: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pipelines.genomics.opening import Source

T = TypeVar("T")
_SECONDS = 10.0


class Progress:
    """Bytes of the files that are read one after the other; nothing in the first two seconds."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._terminal = sys.stderr.isatty()
        self._next_line = time.monotonic() + _SECONDS
        self._bar: tqdm[None] | None = None
        self._source: Source | None = None

    def open(self, source: Source) -> None:
        """Go on with another file."""
        self.close()
        self._source = source
        self._bar = tqdm(
            desc=Path(source.name).name,
            total=source.size,
            unit="B",
            unit_scale=True,
            delay=2.0,
            disable=not (self._shown and self._terminal),
        )

    def update(self, num_records: int) -> None:
        """Say how many records are done."""
        if self._bar is None or self._source is None:
            return
        position = self._source.position()
        self._bar.set_postfix_str(f"{num_records:,} records", refresh=False)
        self._bar.update(position - self._bar.n)
        if self._shown and not self._terminal and time.monotonic() >= self._next_line:
            share = f", {position / self._source.size:.0%}" if self._source.size else ""
            text = f"reading {self._source.name}: {num_records:,} records{share}"
            print(text, file=sys.stderr, flush=True)
            self._next_line += _SECONDS

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def track(items: Iterable[T], *, total: int, label: str, unit: str) -> Iterator[T]:
    """Yield items and say how many there were; nothing in the first two seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit=f" {unit}", delay=2.0, file=sys.stderr)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS:
            share = f"{count:,} of {total:,} {unit}"
            print(f"{label}: {share}, {now - start:.0f} s", file=sys.stderr, flush=True)
            last = now


class BaseCount:
    """Bases that are done, of `total`: a bar, or a line every ten seconds; hidden without label."""

    def __init__(self, label: str | None, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._bar = tqdm(
            desc=label,
            total=total,
            unit="bp",
            unit_scale=True,
            delay=2.0,
            disable=label is None or not sys.stderr.isatty(),
        )
        self._lines = label is not None and not sys.stderr.isatty()
        self._next_line = time.monotonic() + _SECONDS

    def __enter__(self) -> "BaseCount":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, bases: int) -> None:
        """Say how many more bases are done."""
        self._done += bases
        self._bar.update(bases)
        if self._lines and time.monotonic() >= self._next_line:
            share = f"{self._done:,} of {self._total:,} bases"
            print(f"{self._label}: {share}", file=sys.stderr, flush=True)
            self._next_line += _SECONDS
