"""Order tiles along a Hilbert curve, so that a run of rows is a patch of tissue."""

import numpy as np


def hilbert_order(grid: np.ndarray) -> np.ndarray:
    """Permutation int64 [N] that sorts `grid` [N, 2] (col, row) along a Hilbert curve.

    The curve fills the next power of two, so every aligned square of 2^m x 2^m cells is one
    unbroken run of the order, and consecutive cells of a full square are neighbours.
    """
    return np.argsort(hilbert_index(grid), kind="stable")


def hilbert_index(grid: np.ndarray) -> np.ndarray:
    """Position int64 [N] of each non-negative cell (col, row) on the curve."""
    cells = np.asarray(grid, dtype=np.int64).reshape(-1, 2)
    if len(cells) == 0:
        return np.empty(0, dtype=np.int64)
    if cells.min() < 0:
        raise ValueError(f"grid cells must not be negative; got {cells.min()}")
    x, y = cells[:, 0].copy(), cells[:, 1].copy()
    index = np.zeros(len(cells), dtype=np.int64)
    # an even number of bits, so that a larger grid does not turn the curve
    bits = int(cells.max()).bit_length()
    side = 1 << max(bits + bits % 2, 2) >> 1
    while side:
        right, low = (x & side) > 0, (y & side) > 0
        index += side * side * ((3 * right) ^ low)
        flip = right & ~low
        x, y = np.where(flip, ~x, x), np.where(flip, ~y, y)
        x, y = np.where(low, x, y), np.where(low, y, x)
        side >>= 1
    return index
