"""Lay a grid of tiles over the tissue at one physical resolution, and read them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from pipelines.pathology.ordering import hilbert_order
from pipelines.pathology.slides import SlideError, SlideReader
from pipelines.pathology.tissue import (
    MAX_HOLE_UM2,
    MIN_OBJECT_UM2,
    OVERVIEW_MIN_PX,
    OVERVIEW_MPP,
    TISSUE_REVISION,
    TissueMask,
    find_tissue,
    tissue_fraction,
)

MIN_TILE_PX = 16
UPSAMPLE_TOLERANCE = 0.01
UNTOUCHED_TOLERANCE = 1e-3
RESAMPLING = "lanczos"  # Pillow's, whose support widens with the reduction: antialiased
_BLOCK_PX = 1024


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Which tiles to cut: `tile_px` pixels a side at `mpp` um per pixel, side by side.

    A tile counts when at least `min_tissue` of it is tissue. Two plans with one hash cut the same
    tiles from the same slide.
    """

    tile_px: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.5

    def __post_init__(self) -> None:
        if self.tile_px < MIN_TILE_PX:
            raise ValueError(f"tile_px must be at least {MIN_TILE_PX}; got {self.tile_px}")
        if not 0 < self.mpp < float("inf"):
            raise ValueError(f"mpp must be positive, in um per pixel; got {self.mpp}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must lie between 0 and 1; got {self.min_tissue}")

    @property
    def params(self) -> dict[str, int | float | str]:
        """Everything that decides which pixels are cut, as plain values."""
        return asdict(self) | {
            "resampling": RESAMPLING,
            "overview_mpp": OVERVIEW_MPP,
            "overview_min_px": OVERVIEW_MIN_PX,
            "min_object_um2": MIN_OBJECT_UM2,
            "max_hole_um2": MAX_HOLE_UM2,
            "tissue_revision": TISSUE_REVISION,
        }

    @property
    def hash(self) -> str:
        """Digest of `params`."""
        return hashlib.sha256(json.dumps(self.params, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one slide in Hilbert order.

    `grid` int32 [N, 2] is (col, row), the truth; `xy0` int64 [N, 2] the corner in level-0 pixels;
    `tissue` float32 [N] the share of tissue; `pitch0` the tile's side in level-0 pixels.
    """

    grid: np.ndarray
    xy0: np.ndarray
    tissue: np.ndarray
    pitch0: float
    mask: TissueMask

    def __len__(self) -> int:
        return len(self.grid)


def plan_tiles(reader: SlideReader, plan: TilePlan) -> Tiles:
    """Choose the tiles of a slide.

    Raises SlideError `too_coarse` where the slide has fewer pixels than the plan wants,
    `unreadable`, `too_small` and `empty`.
    """
    if plan.mpp < reader.mpp * (1 - UPSAMPLE_TOLERANCE):
        reason = f"the slide has {reader.mpp:.4g} um per pixel, the plan wants {plan.mpp:.4g}"
        remedy = "pixels are never invented: choose a coarser plan or leave the slide out"
        raise SlideError("too_coarse", reason, remedy)
    mask = find_tissue(reader)
    pitch0 = plan.tile_px * plan.mpp / reader.mpp
    cols, rows = (int((side + 0.5) / pitch0) for side in reader.dimensions)
    if cols < 1 or rows < 1:
        width, height = reader.dimensions
        reason = f"{width} x {height} px is less than one tile of {pitch0:.0f} px"
        raise SlideError("too_small", reason, "leave it out, or choose smaller tiles")
    grid = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), axis=-1).reshape(-1, 2)
    xy0 = np.rint(grid * pitch0).astype(np.int64)  # from the exact pitch: nothing drifts
    tissue = tissue_fraction(mask, xy0, pitch0)
    chosen = np.flatnonzero(tissue >= max(plan.min_tissue, 1e-6))
    if len(chosen) == 0:
        reason = (
            f"no tile has {plan.min_tissue:.0%} tissue "
            f"({mask.mask.mean():.1%} of the slide is tissue; threshold: {mask.threshold_source})"
        )
        raise SlideError("empty", reason, "look at the slide; lower min_tissue or leave it out")
    chosen = chosen[hilbert_order(grid[chosen])]
    return Tiles(grid[chosen].astype(np.int32), xy0[chosen], tissue[chosen], pitch0, mask)


def read_tiles(
    reader: SlideReader, tiles: Tiles, plan: TilePlan
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows of `tiles`, uint8 RGB [n, tile_px, tile_px, 3]), each tile once, in order.

    Pixels come from the coarsest level that is fine enough and are resampled to the plan's
    resolution; where that level has it already (within 0.1 %) they are untouched: bit for bit
    where the level is a whole number of times smaller, else as OpenSlide interpolates.
    Aligned squares of 2^m tiles are runs of the Hilbert order, so each is one read.
    """
    wanted = plan.mpp / reader.mpp
    level = max(
        i
        for i, downsample in enumerate(reader.level_downsamples)
        if i == 0 or downsample <= wanted * (1 + UPSAMPLE_TOLERANCE)
    )
    level_px = tiles.pitch0 / reader.level_downsamples[level]
    shift = max(0, int(_BLOCK_PX / level_px).bit_length() - 1)
    block = tiles.grid.astype(np.int64) >> shift
    starts = np.flatnonzero(np.r_[True, (block[1:] != block[:-1]).any(axis=1)])
    for start, stop in zip(starts, np.r_[starts[1:], len(tiles)], strict=True):
        rows = slice(int(start), int(stop))
        yield rows, _read_block(reader, tiles.xy0[rows], level, level_px, plan.tile_px)


def _read_block(
    reader: SlideReader, xy0: np.ndarray, level: int, level_px: float, tile_px: int
) -> np.ndarray:
    downsample = reader.level_downsamples[level]
    limit = np.array(reader.level_dimensions[level])
    untouched = abs(level_px / tile_px - 1) <= UNTOUCHED_TOLERANCE
    size = float(tile_px) if untouched else level_px
    corners = xy0 / downsample
    if untouched:
        corners = np.rint(corners)
    corners = np.maximum(0, np.minimum(corners, limit - size))
    origin = np.floor(corners.min(axis=0)).astype(np.int64)
    extent = np.minimum(np.ceil(corners.max(axis=0) + size - 1e-6), limit).astype(np.int64) - origin
    x0, y0 = (int(v) for v in np.rint(origin * downsample))
    pixels = reader.read_region(x0, y0, int(extent[0]), int(extent[1]), level)
    if untouched:
        return _cut(pixels, (corners - origin).astype(np.int64), tile_px)
    return _resample(pixels, corners - origin, size, tile_px)


def _cut(pixels: np.ndarray, corners: np.ndarray, tile_px: int) -> np.ndarray:
    return np.stack([pixels[y : y + tile_px, x : x + tile_px] for x, y in corners])


def _resample(pixels: np.ndarray, corners: np.ndarray, size: float, tile_px: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    tiles = np.empty((len(corners), tile_px, tile_px, 3), dtype=np.uint8)
    for tile, (x, y) in zip(tiles, corners.tolist(), strict=True):
        box = (x, y, min(x + size, image.width), min(y + size, image.height))
        tile[:] = np.asarray(image.resize((tile_px, tile_px), Image.Resampling.LANCZOS, box=box))
    return tiles
