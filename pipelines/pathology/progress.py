"""Show how far a loop has come: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[T], *, total: int, label: str, enabled: bool) -> Iterator[T]:
    """Yield `items` and report on standard error."""
    if not enabled or total == 0:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit="slide", file=sys.stderr)
    else:
        yield from _with_lines(items, total, label)


def track_tiles(
    parts: Iterable[T], count: Callable[[T], int], *, total: int, label: str, enabled: bool
) -> Iterator[T]:
    """Yield parts of one slide, of `count(part)` tiles each, and report below the slides' bar.

    Without a terminal there is a line every ten seconds, and none for what takes less.
    """
    if not enabled:
        yield from parts
        return
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="tile", leave=False, file=sys.stderr) as bar:
            for part in parts:
                yield part
                bar.update(count(part))
        return
    start = last = time.monotonic()
    done = 0
    for part in parts:
        yield part
        done += count(part)
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            print(f"{label}: {done:,}/{total:,} tiles, {now - start:.0f} s", file=sys.stderr)
            last = now


def _with_lines(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if count == total or now - last >= _SECONDS_BETWEEN_LINES:
            print(f"{label}: {count}/{total} slides, {now - start:.0f} s", file=sys.stderr)
            last = now
