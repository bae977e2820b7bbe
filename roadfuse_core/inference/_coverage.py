"""Which windows of the lattice must be predicted, and which pixels that changes: masks over lattice and cells.

A cell is a square of one stride. Window i of an axis begins (k - 1) cells before cell i - k + 1 … and covers the cells
i - k + 1 … i, where k = window / stride; so cell a lies in the windows a … a + k - 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.grid import Block, Grid, Lattice

__all__ = ["Coverage", "cells_of", "cells_within", "pixels_of", "whole", "windows_meeting", "windows_over"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Coverage:
    """What a refresh predicts and writes.

    Attributes:
        windows: (rows, cols) bool over the lattice: predict, if there is evidence.
        cells: (H / stride, W / stride) bool, rounded up: pixels whose value may change; all others stand.
    """

    windows: Mask
    cells: Mask


def _shape(grid: Grid, lattice: Lattice) -> tuple[int, int]:
    """Windows by rows and columns."""
    rows, cols = (len(lattice.starts(0, n)) for n in grid.shape)
    return rows, cols


def whole(grid: Grid, lattice: Lattice, possible: Mask) -> Coverage:
    """Everything anew, where there may be evidence."""
    return Coverage(possible, cells_of(np.ones(_shape(grid, lattice), bool), lattice))


def windows_meeting(grid: Grid, lattice: Lattice, boxes: Iterable[Block]) -> Mask:
    """Windows that share a pixel with any of some rectangles."""
    out = np.zeros(_shape(grid, lattice), bool)
    for box in boxes:
        rows, cols = (_span(a, b, lattice) for a, b in ((box.row0, box.row1), (box.col0, box.col1)))
        out[rows, cols] = True
    return out


def _span(low: int, high: int, lattice: Lattice) -> slice:
    stride, k = lattice.stride_px, lattice.window_px // lattice.stride_px
    if high <= low:
        return slice(0, 0)
    return slice(max(0, low // stride), max(0, -(-high // stride) + k - 1))


def cells_of(windows: Mask, lattice: Lattice) -> Mask:
    """Cells that any of some windows covers."""
    k = lattice.window_px // lattice.stride_px
    rows, cols = (n - k + 1 for n in windows.shape)
    out = np.zeros((rows, cols), bool)
    for i in range(k):
        for j in range(k):
            out |= windows[i : i + rows, j : j + cols]
    return out


def cells_within(cells: Mask, lattice: Lattice, block: Block) -> Mask:
    """The cells that share a pixel with a block; the first and the last may reach past it."""
    s = lattice.stride_px
    return cells[block.row0 // s : -(-block.row1 // s), block.col0 // s : -(-block.col1 // s)]


def pixels_of(cells: Mask, lattice: Lattice, block: Block) -> Mask:
    """(h, w) bool: the pixels of a block that lie in marked cells, of `cells_within` it."""
    s = lattice.stride_px
    rows, cols = (np.arange(low, high) // s - low // s for low, high in ((block.row0, block.row1), (block.col0, block.col1)))
    return cells[np.ix_(rows, cols)]


def windows_over(cells: Mask, lattice: Lattice) -> Mask:
    """Windows that cover any of some cells."""
    k = lattice.window_px // lattice.stride_px
    rows, cols = cells.shape
    out = np.zeros((rows + k - 1, cols + k - 1), bool)
    for i in range(k):
        for j in range(k):
            out[i : i + rows, j : j + cols] |= cells
    return out
