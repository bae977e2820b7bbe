"""How the windows of a city are shared out among cards: blocks that keep all of them busy to the end."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.grid import Block, Grid, Lattice, blocks_of

__all__ = ["choose_block_px", "finish", "windows_in"]

# A larger block is taken if it costs at most so much of the time: less is read twice along its edges.
SLACK = 1.03
MANY = 64  # blocks a card, from which on the last ones do not matter


def windows_in(windows: NDArray[np.bool_], lattice: Lattice, blocks: Sequence[Block]) -> NDArray[np.int64]:
    """Number of wanted windows that start in each block.

    Args:
        windows: (rows, cols) bool over the lattice.
        lattice: The windows.
        blocks: Of the grid.
    """
    sums = np.zeros((windows.shape[0] + 1, windows.shape[1] + 1), np.int64)
    sums[1:, 1:] = windows.cumsum(0).cumsum(1)
    corners = np.array([[_number(lattice, edge) for edge in block] for block in blocks]).T
    top, left, bottom, right = corners
    return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]


def _number(lattice: Lattice, edge: int) -> int:
    """Number of the first window that starts at or behind an edge of blocks; all before the grid belong to the first block."""
    return 0 if edge == 0 else -(-edge // lattice.stride_px) + lattice.overhang_px // lattice.stride_px


def finish(costs: Sequence[int], workers: int) -> int:
    """When the last of some jobs ends, of which each free worker takes the next one."""
    ends = [0] * workers
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def choose_block_px(
    grid: Grid, lattice: Lattice, windows: NDArray[np.bool_], batch: int, workers: int, most_px: int
) -> int:  # fmt: skip
    """Edge of blocks, whole tiles, with which some workers are done first; of those nearly as good the largest.

    Args:
        grid: The city's grid.
        lattice: Its windows.
        windows: (rows, cols) bool over the lattice: those to predict.
        batch: Windows that a worker computes together; a block's last batch costs as much as a full one.
        workers: How many.
        most_px: Largest edge.
    """
    most = max(1, most_px // grid.tile_px)
    ends = {}
    for tiles in [n for n in (64, 48, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1) if n <= most]:
        counts = windows_in(windows, lattice, blocks_of(grid, tiles))
        batches = np.sort(-(-counts[counts > 0] // batch))[::-1]  # the order in which they are predicted
        even = -(-int(batches.sum()) // workers)
        ends[tiles] = even if len(batches) > MANY * workers else finish(batches.tolist(), workers)
        if ends[tiles] == even and len(batches) > MANY * workers:
            break  # smaller ones only read more
    best = min(ends.values())
    return max(tiles for tiles, end in ends.items() if end <= SLACK * best) * grid.tile_px
