import numpy as np
import pytest

from pipelines.pathology.ordering import hilbert_index, hilbert_order


def full_square(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("side", [2, 4, 8, 32, 128])
def test_consecutive_cells_of_a_full_square_are_neighbours(side):
    grid = full_square(side)
    steps = np.abs(np.diff(grid[hilbert_order(grid)], axis=0)).sum(axis=1)
    assert (steps == 1).all()
    assert np.array_equal(np.sort(hilbert_index(grid)), np.arange(side * side))


@pytest.mark.parametrize("block", [2, 4, 8])
def test_aligned_squares_are_runs(block):
    grid = full_square(32)
    grid = grid[hilbert_order(grid)] // block
    assert (np.diff(grid, axis=0) != 0).any(axis=1).sum() == (32 // block) ** 2 - 1


@pytest.mark.parametrize("n", [0, 1, 63, 1000])
def test_order_is_a_permutation_of_ragged_cells(n):
    cells = np.random.default_rng(n).permutation(full_square(50))[:n]
    order = hilbert_order(cells)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_a_far_cell_does_not_turn_the_curve():
    square = full_square(4)
    alone = hilbert_order(square)
    assert np.array_equal(hilbert_order(np.r_[square, [[900, 900]]])[:16], alone)


def test_negative_cells_are_refused():
    with pytest.raises(ValueError, match="negative"):
        hilbert_order(np.array([[0, -1]]))
