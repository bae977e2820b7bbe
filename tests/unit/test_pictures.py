"""Overviews: what is shown is the mean, or the maximum, of what lies under a picture's pixel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadfuse_core.grid import Grid
from roadfuse_core.report import _pictures as pictures


@given(st.integers(1, 5), st.integers(1, 5), st.integers(20, 64), st.sampled_from([np.mean, np.max]))
def test_a_picture_is_the_reduced_city(rows, cols, longest, how):
    grid = Grid("EPSG:32633", 1.0, 64, 6250, 82_000, rows, cols)
    whole = np.random.default_rng(rows).random((2, *grid.shape)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "BLOCK_PX", 96)
        got = pictures._reduce(
            grid, lambda w, step: whole[:, w[0] : w[0] + w[2], w[1] : w[1] + w[3]], how, longest, samples=None
        )
    assert max(got.shape[1:]) <= longest
    cell = -(-max(grid.shape) // longest)
    for i, j in [(0, 0), (got.shape[1] - 1, got.shape[2] - 1), (got.shape[1] // 2, 0)]:
        under = whole[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
        short = ((0, 0), (0, cell - under.shape[1]), (0, cell - under.shape[2]))
        assert np.allclose(got[:, i, j], how(np.pad(under, short, mode="edge"), axis=(1, 2)))


def test_a_city_larger_than_the_picture_by_more_than_a_tile_is_drawn_from_samples():
    grid, seen = Grid("EPSG:32633", 1.0, 64, 6250, 82_000, 8, 8), []

    def paint(where, step):
        seen.append(step)
        return np.full((3, -(-where[2] // step), -(-where[3] // step)), 7, np.float32)

    got = pictures._reduce(grid, paint, np.mean, 5)
    assert got.shape == (3, 5, 5)
    assert set(seen) == {12}, "103 px become one; eight or nine of them are looked at along each edge"
    assert (got == 7).all()
