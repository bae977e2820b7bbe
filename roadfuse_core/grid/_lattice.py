"""Windows on one global lattice, and the blocks of tiles that workers own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.grid._grid import Grid

__all__ = ["Block", "Lattice", "blocks_of"]

WEIGHT_MAX = 4095  # 12 bits: 16 overlapping windows × uint16 × 4095 still fits uint32


class Block(NamedTuple):
    """A rectangle of whole tiles that one worker owns while it writes; pixels, half-open."""

    row0: int
    col0: int
    row1: int
    col1: int


@dataclass(frozen=True)
class Lattice:
    """Square windows at every multiple of the stride, reaching past the grid on all sides.

    Every pixel of the grid lies in (window / stride)² windows, also at the rim, so that no weight ramps to
    zero inside the city.

    Attributes:
        window_px: Edge of a window.
        stride_px: Distance between windows; divides the window, at most four times.
    """

    window_px: int
    stride_px: int

    def __post_init__(self) -> None:
        """Refuse strides whose overlaps would overflow the accumulators."""
        if self.window_px % self.stride_px or self.window_px // self.stride_px > 4:
            raise ValueError(
                f"stride {self.stride_px} must be a half, a third or a quarter of the window {self.window_px}, or equal"
            )

    @property
    def overhang_px(self) -> int:
        """How far windows that start in a block reach past its right and lower edge."""
        return self.window_px - self.stride_px

    def starts(self, low: int, high: int) -> range:
        """Window origins whose cell [origin, origin + stride) starts in [low, high); multiples of the stride.

        A block at the grid's rim (low = 0) also owns the windows that start before it and reach into it.
        """
        first = -(-low // self.stride_px) * self.stride_px
        return range(-self.overhang_px if low == 0 else first, high, self.stride_px)

    def windows(self, block: Block) -> list[tuple[int, int]]:
        """(row, column) origins of the windows that a block computes, row-major; may be negative."""
        rows, cols = self.starts(block.row0, block.row1), self.starts(block.col0, block.col1)
        return [(r, c) for r in rows for c in cols]

    def weight(self) -> NDArray[np.uint32]:
        """(window, window) blending weights, 1 … 4095, greatest in the middle, smooth and symmetric."""
        x = (np.arange(self.window_px) + 0.5) / self.window_px
        ramp = np.sin(np.pi * x) ** 2
        return np.maximum(1, np.rint(WEIGHT_MAX * np.outer(ramp, ramp))).astype(np.uint32)


def blocks_of(grid: Grid, block_tiles: int) -> list[Block]:
    """The grid cut into blocks of block_tiles² tiles, row-major; the last row and column may be smaller."""
    height, width = grid.shape
    step = block_tiles * grid.tile_px
    return [
        Block(r, c, min(r + step, height), min(c + step, width)) for r in range(0, height, step) for c in range(0, width, step)
    ]
