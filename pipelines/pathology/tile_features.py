"""From an open slide to the features of its tiles: reading, encoding, and what is damaged."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.progress import track_tiles
from pipelines.pathology.reading import DAMAGED_REMEDY, Source, TileBatch, TileReader
from pipelines.pathology.slides import SlideError, SlideReader, open_slide
from pipelines.pathology.tiling import TilePlan, Tiles

MAX_DAMAGED = 0.1
"""Share of damaged tiles above which a slide counts as unreadable."""

CHUNK_TILES = 64
"""Tiles that are read and sent at once: 13 MB at 256 px."""

CHUNKS_AHEAD = 3
"""Chunks, or runs of them, under way per process."""

RUN_CHUNKS = 4
"""Chunks in a row that one process encodes: neighbours in tissue share the file's own tiles."""

R = TypeVar("R")
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TileRequest:
    """What any process needs to read tiles of a slide: everything but which ones."""

    path: Path
    mpp: float | None
    plan: TilePlan
    source: Source = "auto"


@dataclass(frozen=True, slots=True)
class TileFeatures:
    """Features [n, dim] of the tiles that could be read; `damage` is what the first other met."""

    tiles: Tiles
    features: np.ndarray
    num_damaged: int
    damage: str | None


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Features [v, dim] of the valid tiles of a run of tiles, and which those are, bool [n]."""

    features: np.ndarray
    valid: np.ndarray
    damage: str | None


def encode_tiles(
    tiles: Tiles,
    request: TileRequest,
    encoder: TileEncoder,
    *,
    reader: TileReader,
    pool: ProcessPoolExecutor | None = None,
    processes: int = 1,
    label: str | None = None,
) -> TileFeatures:
    """Read and encode tiles with `reader`, or in the processes of `pool`, ahead of the encoder.

    With a `label` it shows under this name how far it is.

    A cheap encoder (`in_workers`) runs in the processes, too. The result does not depend on them.
    Raises SlideError `unreadable` where more than a tenth of the tiles are damaged; fewer are left
    out of the result.
    """
    chunks = _cut(tiles.xy0, CHUNK_TILES)
    ahead = CHUNKS_AHEAD * processes
    if pool is None:
        encoded = _encode_all(map(reader.read, chunks), encoder)
    elif encoder.in_workers:
        # short runs where there are few tiles, so that all processes end at about the same time
        run = min(RUN_CHUNKS, 1 + len(chunks) // (8 * processes))
        runs = _cut(tiles.xy0, run * CHUNK_TILES)
        parts = _run_ahead(pool, ahead, _read_and_encode, runs, request, encoder)
        encoded = (part for run in parts for part in run)
    else:
        encoded = _encode_all(_run_ahead(pool, ahead, _read, chunks, request), encoder)
    tracked = track_tiles(
        encoded,
        lambda part: len(part.valid),
        total=len(tiles),
        label=label or "",
        enabled=label is not None,
    )
    return _collect(tiles, tracked, encoder)


def start_worker() -> None:
    """Begin a worker process, which ends with its parent; what reading needs is imported by now."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker process"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    # a worker waits for work on a pipe that it holds open itself: it would wait forever
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _cut(xy0: np.ndarray, rows: int) -> list[np.ndarray]:
    return [xy0[start : start + rows] for start in range(0, len(xy0), rows)]


def _run_ahead(
    pool: ProcessPoolExecutor,
    ahead: int,
    function: Callable[..., R],
    chunks: Iterable[np.ndarray],
    *arguments: object,
) -> Iterator[R]:
    """Yield `function(chunk, *arguments)` in order, with `ahead` calls under way at most."""
    waiting: deque[Future[R]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(function, chunk, *arguments))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode_all(batches: Iterable[TileBatch], encoder: TileEncoder) -> Iterator[_Encoded]:
    """Encode read tiles, as many at once as the encoder takes."""
    held: list[TileBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(int(b.valid.sum()) for b in held) >= encoder.batch_size:
            yield _encode(held, encoder)
            held = []
    if held:
        yield _encode(held, encoder)


def _encode(batches: list[TileBatch], encoder: TileEncoder) -> _Encoded:
    valid = np.concatenate([batch.valid for batch in batches])
    damage = next((batch.damage for batch in batches if batch.damage is not None), None)
    if not valid.any():
        return _Encoded(np.zeros((0, encoder.dim), dtype=np.float32), valid, damage)
    pixels = [b.pixels if b.valid.all() else b.pixels[b.valid] for b in batches]
    joined = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
    return _Encoded(encoder(joined), valid, damage)


def _collect(tiles: Tiles, encoded: Iterable[_Encoded], encoder: TileEncoder) -> TileFeatures:
    features = np.empty((len(tiles), encoder.dim), dtype=encoder.feature_dtype)
    kept: list[np.ndarray] = []
    damage: str | None = None
    end = 0
    for part in encoded:
        start, end = end, end + len(part.features)
        if features.dtype == np.float16 and np.abs(part.features).max(initial=0) > _LARGEST_HALF:
            features = features.astype(np.float32)  # a bfloat16 network may give such values
        features[start:end] = part.features
        kept.append(part.valid)
        damage = damage or part.damage
    valid = np.concatenate([np.zeros(0, dtype=bool), *kept])
    num_damaged = int(len(valid) - valid.sum())
    if num_damaged > MAX_DAMAGED * len(valid):
        reason = f"{num_damaged:,} of {len(valid):,} tiles are damaged; the first: {damage}"
        raise SlideError("unreadable", reason, DAMAGED_REMEDY)
    return TileFeatures(select_tiles(tiles, valid), features[:end], num_damaged, damage)


def select_tiles(tiles: Tiles, rows: np.ndarray) -> Tiles:
    """Keep some rows of tiles, by number or by a mask."""
    return replace(
        tiles,
        grid=tiles.grid[rows],
        xy0=tiles.xy0[rows],
        tissue=tiles.tissue[rows],
        index=None if tiles.index is None else tiles.index[rows],
    )


def _read(xy0: np.ndarray, request: TileRequest) -> TileBatch:
    return _kept_reader(request).read(xy0)


def _read_and_encode(xy0: np.ndarray, request: TileRequest, encoder: TileEncoder) -> list[_Encoded]:
    reader = _kept_reader(request)
    return list(_encode_all(map(reader.read, _cut(xy0, CHUNK_TILES)), encoder))


_kept: dict[TileRequest, tuple[SlideReader, TileReader]] = {}


def _kept_reader(request: TileRequest) -> TileReader:
    """Keep the last slide of a worker process open from one chunk to the next."""
    if request not in _kept:
        for slide, tiles in _kept.values():
            tiles.close()
            slide.close()
        _kept.clear()
        slide = open_slide(request.path, mpp=request.mpp)
        _kept[request] = slide, TileReader(slide, request.plan, source=request.source)
    return _kept[request][1]
