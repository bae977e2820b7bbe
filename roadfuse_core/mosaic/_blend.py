"""Blending in integers: exact, and the same for any order, block size and number of workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NODATA", "PROBABILITY_SCALE", "Accumulator", "to_probability"]

NODATA = 255
PROBABILITY_SCALE = 254
FULL = 65_535


class Accumulator:
    """Sums of weighted windows over a pixel rectangle.

    Attributes:
        row: Grid row of the first pixel; may be negative.
        col: Grid column of the first pixel.
        sums: (2, H, W) uint32: Σ probability16 · weight and Σ weight. Sixteen overlaps fit.
    """

    def __init__(self, row: int, col: int, height: int, width: int) -> None:
        self.row, self.col = row, col
        self.sums: NDArray[np.uint32] = np.zeros((2, height, width), np.uint32)

    def add(self, row: int, col: int, probability: NDArray[np.float32], weight: NDArray[np.uint32]) -> None:
        """Add a window at grid position (row, col); probability in [0, 1]."""
        r, c = row - self.row, col - self.col
        h, w = probability.shape
        value = np.rint(probability * FULL).astype(np.uint32)
        self.sums[0, r : r + h, c : c + w] += value * weight
        self.sums[1, r : r + h, c : c + w] += weight


def to_probability(sums: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Weighted means as 0 … 254, rounded half up in integers; 255 where no window was added.

    Args:
        sums: (2, H, W) as in `Accumulator`.

    Returns:
        (H, W) uint8.
    """
    value, weight = sums[0].astype(np.uint64), sums[1].astype(np.uint64) * FULL
    safe = np.maximum(weight, 1)
    out = (2 * PROBABILITY_SCALE * value + safe) // (2 * safe)
    return np.where(weight > 0, out, NODATA).astype(np.uint8)
