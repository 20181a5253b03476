"""From the corners of tiles to their cells on the integer grid, or why there are none."""

import numpy as np

from pipelines.pathology.foreign import ForeignError

_MIN_TILES = 9
"""So many tiles tell their common stride; of fewer it may be chance."""

_WITHIN = 1e-3
"""Of a stride: what corners given as floats may be off; micrometres are stored in float32."""


def fit_lattice(
    coords: np.ndarray, stride: float, *, skipped: float = 0.0, certain: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells int32 [N, 2] (col, row) of corners [N, 2] and the first cell's corner [2].

    Corners are whole multiples of `stride` from a common origin: exactly where both are whole
    numbers, within a unit where whole corners were rounded from another stride. `skipped` is added
    to all corners but the first of an axis (TRIDENT begins to overlap at the second tile). Raises
    ForeignError `off_lattice`, `duplicate_tiles`, and, unless the stride is `certain`,
    `stride_mismatch` where all tiles stand a multiple of it apart.
    """
    corners = coords.astype(np.float64)
    shifted = np.where(corners > 0, corners - skipped, 0.0)
    tolerance = _tolerance(coords, stride)
    grid, origin, off = _nearest(shifted, stride)
    if skipped and (off > tolerance).any():
        grid, origin, off = _nearest(corners, stride)
    bad = np.flatnonzero((off > tolerance).any(axis=1))
    if len(bad):
        x, y = coords[bad[0]]
        raise ForeignError(
            "off_lattice",
            f"{len(bad):,} of {len(coords):,} tiles do not stand {stride:g} apart; the first is "
            f"row {bad[0]}, at ({x:g}, {y:g})",
            "give stride= if they stand closer, or snap=true to take the nearest cell (CLAM starts "
            "a grid of its own in each piece of tissue)",
        )
    _check_unique(grid, coords)
    if not certain:
        _check_stride(grid, stride)
    return grid.astype(np.int32), origin


def snap_to_lattice(coords: np.ndarray, stride: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest cell of each corner; tiles that overlap may share one."""
    _check_unique(coords, coords)
    grid, origin, _ = _nearest(coords.astype(np.float64), stride)
    return grid.astype(np.int32), origin


def _nearest(corners: np.ndarray, stride: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, the corner of cell (0, 0), and how far each corner is from its cell's."""
    least = corners.min(axis=0)
    origin = least - np.rint(least / stride) * stride
    grid = np.rint((corners - origin) / stride)
    return grid.astype(np.int64), origin, np.abs(corners - origin - grid * stride)


def _tolerance(coords: np.ndarray, stride: float) -> float:
    if coords.dtype.kind not in "iu":
        return _WITHIN * stride
    # two roundings by half a unit: that of the corner, and that of the least one
    return 0.0 if float(stride).is_integer() else 1.0 + 1e-9


def _check_unique(cells: np.ndarray, coords: np.ndarray) -> None:
    _, first, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(cells)))
    if len(again):
        row, other = again[0], first[inverse.reshape(-1)[again[0]]]
        x, y = coords[row]
        raise ForeignError(
            "duplicate_tiles",
            f"row {row} is the tile of row {other} again, at ({x:g}, {y:g}); {len(again):,} in all",
            "remove the repeated rows, or extract the slide again",
        )


def _check_stride(grid: np.ndarray, stride: float) -> None:
    common = int(np.gcd.reduce((grid - grid.min(axis=0)).reshape(-1)))
    if len(grid) >= _MIN_TILES and common > 1:
        raise ForeignError(
            "stride_mismatch",
            f"tiles should stand {stride:g} apart, but all stand multiples of {common * stride:g} "
            "apart: the unit or the tile's size is probably another",
            f"check unit= and tile=; if it is right, confirm it by stride={common * stride:g}",
        )
