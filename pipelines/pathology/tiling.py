"""Lay a grid of tiles over the tissue at one physical resolution, and read them.

The grid's integers (column, row) are the truth; level-0 pixels follow from them in floating point,
so nothing drifts and one scan stored at two resolutions has the same cells. A survey holds every
cell that touches tissue with what is known of it; a plan's thresholds only choose among them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.pathology.ordering import hilbert_order
from pipelines.pathology.slides import SlideError, SlideReader
from pipelines.pathology.tissue import (
    FLAGS,
    MAX_HOLE_UM2,
    MIN_OBJECT_UM2,
    OVERVIEW_MIN_PX,
    OVERVIEW_MPP,
    TISSUE_REVISION,
    TissueMask,
    area_share,
    find_tissue,
)
from pipelines.shared.errors import InputError

MIN_TILE_PX = 16
LEAST_TISSUE = 1e-6
"""Share of tissue from which a cell is surveyed: any at all, but for rounding."""
UPSAMPLE_TOLERANCE = 0.01
UNTOUCHED_TOLERANCE = 1e-3
RESAMPLING = "lanczos"  # Pillow's, whose support widens with the reduction: antialiased


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Which tiles to cut: `tile_px` pixels a side at `mpp` um per pixel, side by side.

    A tile counts when at least `min_tissue` of it is tissue, and at most `max_flagged` of it bears
    one of the flags in `leave_out` (`pen`, `dark`, `blur`). Two plans with one hash cut the same
    tiles from the same slide; two with one `grid_hash` choose from the same survey.
    """

    tile_px: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.5
    leave_out: tuple[str, ...] = ()
    max_flagged: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave_out", tuple(sorted(set(self.leave_out))))
        if self.tile_px < MIN_TILE_PX:
            raise ValueError(f"tile_px must be at least {MIN_TILE_PX}; got {self.tile_px}")
        if not 0 < self.mpp < float("inf"):
            raise ValueError(f"mpp must be positive, in um per pixel; got {self.mpp}")
        for name in ("min_tissue", "max_flagged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)}")
        unknown = [name for name in self.leave_out if name not in FLAGS]
        if unknown:
            raise ValueError(f"leave_out takes {', '.join(FLAGS)}; got {unknown[0]!r}")

    @property
    def params(self) -> dict[str, object]:
        """Everything that decides which pixels are cut, as plain values."""
        chosen = asdict(self) | {"leave_out": list(self.leave_out)}
        return chosen | {
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
        return _digest(self.params)

    @property
    def grid_hash(self) -> str:
        """Digest of `params` without the thresholds that choose among the cells."""
        thresholds = ("min_tissue", "leave_out", "max_flagged")
        return _digest({k: v for k, v in self.params.items() if k not in thresholds})


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one slide in Hilbert order.

    `grid` int32 [N, 2] is (col, row), the truth; `xy0` int64 [N, 2] the corner in level-0 pixels;
    `tissue` float32 [N] the share of tissue; `pitch0` the tile's side in level-0 pixels;
    `index` int64 [N] the tile's row in its survey.
    """

    grid: np.ndarray
    xy0: np.ndarray
    tissue: np.ndarray
    pitch0: float
    mask: TissueMask
    index: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.grid)


@dataclass(frozen=True, slots=True)
class Survey:
    """Every cell of a slide's grid that touches tissue, in Hilbert order.

    `grid` int32 [M, 2], `xy0` int64 [M, 2] and `pitch0` are as in `Tiles`. `tissue` float32 [M] is
    the share of tissue, and `flagged` holds the share of each flag, float32 [M] by name; `blur` is
    there only if it was asked for.
    """

    grid: np.ndarray
    xy0: np.ndarray
    tissue: np.ndarray
    flagged: dict[str, np.ndarray]
    pitch0: float
    mask: TissueMask

    def __len__(self) -> int:
        return len(self.grid)

    def choose(self, plan: TilePlan) -> Tiles:
        """Keep the cells that pass the plan's thresholds: maybe none."""
        kept = self.tissue >= plan.min_tissue
        for name in plan.leave_out:
            kept &= self.flagged[name] <= plan.max_flagged
        rows = np.flatnonzero(kept)
        return Tiles(
            self.grid[rows], self.xy0[rows], self.tissue[rows], self.pitch0, self.mask, rows
        )


@dataclass(frozen=True, slots=True)
class ReadingLevel:
    """Where a plan's pixels come from: a level of the pyramid, and the filter that shrinks it.

    `downsample` is the level's, `shrink` what is left to the filter (1: pixels are taken as they
    are, `filter` is `none`).
    """

    level: int
    downsample: float
    shrink: float
    filter: str


def make_plan(config: Mapping[str, Any]) -> TilePlan:
    """Take the plan from a verb's configuration: tile_px, or tile_um in its place, and the rest.

    Raises InputError for values that make no plan.
    """
    names = ("mpp", "min_tissue", "leave_out", "max_flagged")
    given = {name: config[name] for name in names if name in config}
    tile_px, tile_um = config["tile_px"], config.get("tile_um")
    if tile_um is not None:
        tile_px = _pixels_of(tile_um, given["mpp"])
    try:
        return TilePlan(tile_px, **given)
    except ValueError as error:
        raise InputError(str(error)) from None


def choose_level(reader: SlideReader, mpp: float) -> ReadingLevel:
    """Choose the coarsest level that is no coarser than `mpp` (within 1 %).

    Raises SlideError `too_coarse` where the slide itself is.
    """
    if mpp < reader.mpp * (1 - UPSAMPLE_TOLERANCE):
        reason = f"the slide has {reader.mpp:.4g} um per pixel, the plan wants {mpp:.4g}"
        remedy = (
            f"pixels are never invented: choose mpp={reader.mpp:.4g} or coarser, or leave it out"
        )
        raise SlideError("too_coarse", reason, remedy)
    wanted = mpp / reader.mpp
    level, downsample = max(
        (level, downsample)
        for level, downsample in enumerate(reader.level_downsamples)
        if level == 0 or downsample <= wanted * (1 + UPSAMPLE_TOLERANCE)
    )
    shrink = wanted / downsample
    untouched = abs(shrink - 1) <= UNTOUCHED_TOLERANCE
    return ReadingLevel(level, downsample, shrink, "none" if untouched else RESAMPLING)


def grid_size(reader: SlideReader, plan: TilePlan) -> tuple[int, int, float]:
    """Columns, rows, and the tile's side in level-0 pixels of the grid over a slide.

    Raises SlideError `too_small`.
    """
    pitch0 = plan.tile_px * plan.mpp / reader.mpp
    width, height = reader.bounds[2:]
    cols, rows = int((width + 0.5) / pitch0), int((height + 0.5) / pitch0)
    if cols < 1 or rows < 1:
        reason = f"{width} x {height} px is less than one tile of {pitch0:.0f} px"
        raise SlideError("too_small", reason, "leave it out, or choose smaller tiles")
    return cols, rows, pitch0


def survey_tiles(
    reader: SlideReader, plan: TilePlan, mask: TissueMask | None = None, *, blur: bool = False
) -> Survey:
    """Look at every cell of a slide's grid; the grid starts where the scanner's picture does.

    `mask` takes the place of the thresholds of `find_tissue`, which is asked for `blur` too where
    that is wanted. Raises SlideError `too_coarse`, `too_small` and `unreadable`.
    """
    choose_level(reader, plan.mpp)
    if mask is None:  # before the grid: a slide that cannot be read is not called too small
        mask = find_tissue(reader, blur=blur or "blur" in plan.leave_out)
    cols, rows, pitch0 = grid_size(reader, plan)
    grid = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), axis=-1).reshape(-1, 2)
    # from the exact pitch: nothing drifts
    xy0 = np.rint(grid * pitch0 + reader.bounds[:2]).astype(np.int64)
    tissue = area_share(mask.mask, mask.scale, xy0, pitch0)
    held = np.flatnonzero(tissue >= LEAST_TISSUE)
    held = held[hilbert_order(grid[held])]
    xy0 = xy0[held]
    flagged = {
        name: area_share(where, mask.scale, xy0, pitch0)
        if where.any()
        else np.zeros(len(held), dtype=np.float32)
        for name, where in mask.flags.items()
    }
    return Survey(grid[held].astype(np.int32), xy0, tissue[held], flagged, pitch0, mask)


def plan_tiles(reader: SlideReader, plan: TilePlan, mask: TissueMask | None = None) -> Tiles:
    """Choose the tiles of a slide.

    Raises SlideError `too_coarse` where the slide has fewer pixels than the plan wants,
    `unreadable`, `too_small` and `empty`.
    """
    survey = survey_tiles(reader, plan, mask)
    tiles = survey.choose(plan)
    if len(tiles) == 0:
        raise no_tiles(survey, plan)
    return tiles


def no_tiles(survey: Survey, plan: TilePlan) -> SlideError:
    """Say why no cell of a survey passes the plan's thresholds: SlideError `empty`."""
    found = (
        f"{survey.mask.mask.mean():.1%} of the slide is tissue; "
        f"threshold: {survey.mask.threshold_source}"
    )
    flagged = [
        f"{int((survey.flagged[name] > plan.max_flagged).sum()):,} tiles are left out for {name}"
        for name in plan.leave_out
    ]
    reason = f"no tile has {plan.min_tissue:.0%} tissue ({'; '.join([found, *flagged])})"
    return SlideError("empty", reason, "look at the slide; lower min_tissue or leave it out")


def _digest(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _pixels_of(tile_um: object, mpp: float) -> int:
    if not isinstance(tile_um, int | float) or not 0 < tile_um < float("inf"):
        raise InputError(f"tile_um must be a positive number of micrometres; got {tile_um!r}")
    exact = tile_um / mpp
    if abs(exact - round(exact)) > 1e-3:
        better = tile_um / max(1, round(exact))
        raise InputError(
            f"tile_um={tile_um:g} at mpp={mpp:g} is {exact:.3f} pixels; give mpp={better:.6g}, "
            f"at which it is {round(exact)}"
        )
    return round(exact)
