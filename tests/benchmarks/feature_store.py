"""Reading tile features: this store against TRIDENT's layout, in one run on one disk.

    python tests/benchmarks/feature_store.py [TILES] [FEATURES] [FOLDER]

Writes the same float16 features [TILES, FEATURES] to FOLDER both ways: as the store does (Zarr,
uncompressed chunks of 4,096 rows), and as TRIDENT does (HDF5, a chunk per row: `save_h5` of its
source). Then reads all, and windows of 1,024 rows that begin anywhere, in turn, from a warm page
cache, each time from opening the file. Bars: the whole in a fifth of TRIDENT's time or less, a
window in 3 ms or less. Exits with 1 where one is missed. Needs the extra `interchange`.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from pipelines.pathology.exporting import write_geojson
from pipelines.pathology.scale import draw_tissue
from pipelines.pathology.store import (
    SCHEMA,
    encoder_entry,
    read_slide,
    slide_folder,
    write_group,
)

WINDOW = 1_024
ROUNDS = 7
MIN_RATIO, MAX_WINDOW_MS, MAX_GEOJSON_S = 5.0, 3.0, 5.0


def main(num_tiles: int = 100_000, num_features: int = 1_024, folder: str | None = None) -> int:
    """Print a table; 0 if all bars are met."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _measure(Path(scratch), num_tiles, num_features)


def _measure(scratch: Path, num_tiles: int, num_features: int) -> int:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((num_tiles, num_features), dtype=np.float32).astype(np.float16)
    group, h5 = slide_folder(scratch, "slide"), scratch / "slide.h5"
    written = _seconds(lambda: _write_store(group, features))
    written_h5 = _seconds(lambda: _write_like_trident(h5, features))
    assert np.array_equal(read_slide(group).features(), _read_h5(h5)), "both hold the same"
    whole, whole_h5 = _in_turn(lambda: read_slide(group).features(), lambda: _read_h5(h5))
    starts = iter(rng.integers(0, num_tiles - WINDOW, 4 * ROUNDS).tolist())
    slide = read_slide(group)
    window, window_h5 = _in_turn(
        lambda: slide.features(start := next(starts), start + WINDOW),
        lambda: _read_h5(h5, start := next(starts), start + WINDOW),
    )
    geojson = _seconds(lambda: write_geojson(scratch / "slide.geojson", slide))
    print(f"{num_tiles:,} tiles x {num_features:,} float16, median of {ROUNDS}, warm cache\n")
    print("| | store | TRIDENT's layout | ratio |\n|---|--:|--:|--:|")
    for name, own, other in (
        ("all features, ms", whole, whole_h5),
        (f"{WINDOW:,} rows, ms", window, window_h5),
        ("writing, ms", written, written_h5),
    ):
        print(f"| {name} | {own * 1e3:,.2f} | {other * 1e3:,.2f} | {other / own:.1f} x |")
    print(f"\nGeoJSON of {num_tiles:,} tiles: {geojson:.2f} s")
    met = whole_h5 / whole >= MIN_RATIO and window * 1e3 <= MAX_WINDOW_MS
    met &= geojson <= MAX_GEOJSON_S
    print("all bars met" if met else "a bar is missed")
    return 0 if met else 1


def _write_store(group: Path, features: np.ndarray) -> None:
    grid = draw_tissue(len(features))
    attributes = {
        "schema": SCHEMA, "slide_id": "slide", "dimensions": [1, 1], "mpp": 0.5, "pitch0": 256.0,
        "encoders": {"normal": encoder_entry("normal", {})},
    }  # fmt: skip
    arrays = {
        "grid": grid.astype(np.int32),
        "xy0": grid * 256,
        "tissue": np.ones(len(grid), dtype=np.float32),
        "features/normal": features,
    }
    write_group(group, attributes, arrays)


def _write_like_trident(path: Path, features: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        tail = features.shape[1:]
        made = file.create_dataset(
            "features", features.shape, features.dtype, maxshape=(None, *tail), chunks=(1, *tail)
        )
        made[:] = features


def _read_h5(path: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    with h5py.File(path, "r") as file:
        return np.asarray(file["features"][start:stop])


def _in_turn(one: Callable[[], object], two: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each; taking turns, so that a busy machine weighs on both alike."""
    pairs = [(_seconds(one), _seconds(two)) for _ in range(ROUNDS)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[1:3]]
    raise SystemExit(main(*sizes, *sys.argv[3:4]))
