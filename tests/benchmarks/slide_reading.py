"""Measure reading and embedding: `python -m tests.benchmarks.slide_reading SLIDE`.

Reading is compared with OpenSlide's `read_region` into RGB arrays, both on one thread, with nothing
decoded before, in turn, each the best of several rounds: whole rows of the grid, and every third
tile in tissue order. Coarser tiles are shrunk by the same filter on both sides. Embedding runs from
the file to the store, on a large slide made of the given one's own JPEG tiles, repeated.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image

from pipelines.pathology.reading import FILTERS, TileReader
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.tiling import ReadingLevel, TilePlan, choose_level, grid_size, plan_tiles
from pipelines.shared.tables import align
from tests.benchmarks.processes import run_watched

TILE_PX = 256


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", type=Path, help="a slide whose first level has JPEG tiles")
    parser.add_argument("--rounds", type=int, default=15, help="of which the best counts")
    parser.add_argument("--repeat", type=int, default=16, help="of the slide in either direction")
    parser.add_argument("--processes", type=int, default=2, help="that embed")
    given = parser.parse_args()
    header = ["tiles/s of 256 px, one thread", "OpenSlide", "ours", "ratio", "apart"]
    print(align([header, *compare_reading(given.slide, given.rounds)]))
    with tempfile.TemporaryDirectory() as folder:
        print()
        print(time_embedding(given.slide, Path(folder), given.repeat, given.processes))


def compare_reading(path: Path, rounds: int) -> Iterator[list[str]]:
    """Yield rows: what is read, OpenSlide's tiles/s, ours, ratio, largest difference in grey."""
    for factor in (1, 2):
        with open_slide(path) as slide:
            plan = TilePlan(TILE_PX, factor * slide.mpp, min_tissue=0.0)
            columns, rows, pitch0 = grid_size(slide, plan)
            scattered = plan_tiles(slide, plan).xy0[::3]
        grid = np.array([(column, row) for row in range(rows) for column in range(columns)])
        whole_rows = np.rint(grid * pitch0).astype(np.int64)
        yield _compare("whole rows", path, whole_rows, plan, rounds)
        yield _compare("every third in tissue order", path, scattered, plan, rounds)


def _compare(title: str, path: Path, xy0: np.ndarray, plan: TilePlan, rounds: int) -> list[str]:
    with open_slide(path) as slide:
        level = choose_level(slide, plan.mpp)
    (theirs, expected), (ours, found) = _in_turn(
        (lambda: _by_openslide(path, xy0, level), lambda: _by_tile_reader(path, xy0, plan)), rounds
    )
    return [
        f"{title}, {plan.mpp:.3f} um/px, filter {level.filter}",
        f"{len(xy0) / theirs:,.0f}",
        f"{len(xy0) / ours:,.0f}",
        f"{theirs / ours:.1f} x",
        str(np.abs(found.astype(np.int16) - expected).max()),
    ]


def _by_tile_reader(path: Path, xy0: np.ndarray, plan: TilePlan) -> tuple[float, np.ndarray]:
    with open_slide(path) as slide, TileReader(slide, plan) as reader:
        start = time.perf_counter()
        batch = reader.read(xy0)
        return time.perf_counter() - start, batch.pixels


def _by_openslide(path: Path, xy0: np.ndarray, level: ReadingLevel) -> tuple[float, np.ndarray]:
    side = round(TILE_PX * level.shrink)
    with openslide.OpenSlide(path) as slide:
        start = time.perf_counter()
        tiles = np.empty((len(xy0), TILE_PX, TILE_PX, 3), dtype=np.uint8)
        for tile, corner in zip(tiles, xy0.tolist(), strict=True):
            region = slide.read_region(corner, level.level, (side, side)).convert("RGB")
            if side != TILE_PX:
                region = region.resize((TILE_PX, TILE_PX), FILTERS[level.filter])
            tile[:] = np.asarray(region)
        return time.perf_counter() - start, tiles


def _in_turn(
    readers: tuple[Callable[[], tuple[float, np.ndarray]], ...], rounds: int
) -> list[tuple[float, np.ndarray]]:
    """Best seconds and pixels of each."""
    results = [[reader() for reader in readers] for _ in range(rounds)]
    best = [min(seconds for seconds, _ in column) for column in zip(*results, strict=True)]
    return [(seconds, pixels) for seconds, (_, pixels) in zip(best, results[-1], strict=True)]


def time_embedding(path: Path, folder: Path, repeat: int, processes: int) -> str:
    """Say how fast the command `embed` makes a large slide into stored statistics, from its start.

    CPU seconds are those of all its processes: where others use the machine they say more than the
    clock does.
    """
    target = repeat_slide(path, folder / "large.tiff", repeat)
    with open_slide(target) as slide:
        mpp, (width, height) = slide.mpp, slide.dimensions
    used = run_watched(
        ["-m", "pipelines.pathology", "embed", f"slides={target}", f"out={folder / 'out'}",
         f"tile_px={TILE_PX}", f"mpp={mpp}", f"num_workers={processes}", "progress=false"]
    )  # fmt: skip
    assert used.code == 0, used.output
    count = len(read_slide(slide_folder(folder / "out" / "features", target.stem)))
    return (
        f"{width:,} x {height:,} px from file to stored statistics, {processes} processes: "
        f"{count:,} tiles in {used.seconds:.1f} s, {count / used.seconds:,.0f} tiles/s; "
        f"{used.cpu_seconds:.1f} CPU s, {processes * count / used.cpu_seconds:,.0f} tiles/s where "
        f"{processes} cores do nothing else; at most {used.peaks[0]:,.0f} MiB in a process"
    )


def repeat_slide(path: Path, target: Path, repeat: int) -> Path:
    """Write a pyramid that shows a slide's whole JPEG tiles `repeat` x `repeat` times.

    The first level holds the compressed tiles as they are; two more are made from its picture.
    """
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        side = page.tilewidth
        columns, rows = (n // side for n in slide.dimensions)
        stride = -(-page.imagewidth // side)
        tiles = []
        for index in (row * stride + column for row in range(rows) for column in range(columns)):
            tiff.filehandle.seek(page.dataoffsets[index])
            tiles.append(tiff.filehandle.read(page.databytecounts[index]))
        picture = Image.fromarray(slide.read_region(0, 0, columns * side, rows * side, 0))
        per_cm = 1e4 / slide.mpp
        options = {"photometric": page.photometric.name.lower(), "jpegtables": page.jpegtables}
    order = (
        tiles[row % rows * columns + column % columns]
        for row in range(rows * repeat)
        for column in range(columns * repeat)
    )
    with tifffile.TiffWriter(target, bigtiff=True) as writer:
        for scale in (1, 4, 16):
            small = np.asarray(picture.reduce(scale))
            shape = (small.shape[0] * repeat, small.shape[1] * repeat, 3)
            writer.write(
                order if scale == 1 else np.tile(small, (repeat, repeat, 1)),
                shape=shape,
                dtype=np.uint8,
                tile=(side, side),
                compression="jpeg",
                resolution=(per_cm / scale, per_cm / scale),
                resolutionunit="CENTIMETER",
                subfiletype=int(scale > 1),
                metadata=None,
                **(options if scale == 1 else {"photometric": "rgb"}),
            )
    return target


if __name__ == "__main__":
    main()
