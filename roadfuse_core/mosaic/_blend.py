"""Blending in integers: exact, and the same for any order, block size and number of workers."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Block, Lattice

__all__ = ["NODATA", "PROBABILITY_SCALE", "Accumulator", "to_probability"]

NODATA = 255
PROBABILITY_SCALE = 254
FULL = 65_535
BAND_PX = 16  # rows of a region that one share of a window's addition takes together
EDGES = ("top", "bottom", "left", "right")


class Parts(Protocol):
    """What a block left, as `safetensors.safe_open` reads it: arrays by name, whole or in part."""

    def get_tensor(self, name: str) -> NDArray[Any]:
        """An array."""

    def get_slice(self, name: str) -> Any:
        """An array that is read where it is indexed."""


class Accumulator:
    """Sums of weighted windows over a pixel rectangle.

    Attributes:
        region: The rectangle, pixels of the grid; may reach past it.
        sums: (planes + 1, H, W) uint32: Σ value16 · weight of each plane, then Σ weight. Sixteen overlaps fit.
    """

    def __init__(self, region: Block, planes: int = 1) -> None:
        self.region = region
        shape = region.row1 - region.row0, region.col1 - region.col0
        self.sums: NDArray[np.uint32] = np.zeros((planes + 1, *shape), np.uint32)

    def add(
        self, row: int, col: int, planes: NDArray[np.float32], weight: NDArray[np.uint32],
        known: NDArray[np.bool_] | None = None, share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        """Add a window with its corner at a pixel of the grid, or one share of its rows.

        Shares of one accumulator touch no pixel together, so that each may be added in a thread of its own.

        Args:
            row: Of the corner.
            col: The same.
            planes: (P, S, S) float32 in [0, 1].
            weight: (S, S) uint32.
            known: (S, S) bool; other pixels are left out. None for all.
            share: Which of how many.
        """
        r, c = row - self.region.row0, col - self.region.col0
        s = weight.shape[0]
        values = np.ascontiguousarray(planes, np.float32)
        seen = np.ones((s, s), bool) if known is None else known
        _add(self.sums[:, r : r + s, c : c + s], values, weight, seen, r, *share)

    def parts(self, lattice: Lattice) -> dict[str, NDArray[Any]]:
        """What a block leaves: finished values where no other block's window reaches, sums along its edges.

        Args:
            lattice: The city's windows; the region must be what the block's own cover.

        Returns:
            "inner" (planes, h, w) uint8 and sums of the four edges, each with its place as "…_at" (row, column, pixels).
        """
        over, r = lattice.overhang_px, self.region
        # Windows of the blocks before and after reach `over` into the region; before the grid there are none.
        r0, c0 = (low if low < 0 else low + over for low in (r.row0, r.col0))
        r1, c1 = max(r0, r.row1 - over), max(c0, r.col1 - over)
        inner = (slice(r0 - r.row0, r1 - r.row0), slice(c0 - r.col0, c1 - r.col0))
        whole = slice(None)
        edges = {
            "top": (slice(0, inner[0].start), whole), "bottom": (slice(inner[0].stop, None), whole),
            "left": (inner[0], slice(0, inner[1].start)), "right": (inner[0], slice(inner[1].stop, None)),
        }  # fmt: skip
        out: dict[str, NDArray[Any]] = {"inner": to_probability(self.sums[:, *inner]), "inner_at": np.array([r0, c0])}
        for name, (rows, cols) in edges.items():
            out[name] = self.sums[:, rows, cols]
            out[f"{name}_at"] = np.array([r.row0 + (rows.start or 0), r.col0 + (cols.start or 0)])
        return out

    def values(self, left: Iterable[Parts]) -> NDArray[np.uint8]:
        """The rectangle's (planes, H, W) values: edges of what blocks left are added up, finished values stand as they are."""
        finished = []
        for parts in left:
            for name in EDGES:
                its = parts.get_slice(name)
                if found := self._meet(parts.get_tensor(f"{name}_at"), its.get_shape()[1:]):
                    (rows, cols), (r, c) = found
                    self.sums[:, rows, cols] += its[:, r, c]
            inner = parts.get_slice("inner")
            if found := self._meet(parts.get_tensor("inner_at"), inner.get_shape()[1:]):
                finished.append((found[0], inner[:, *found[1]]))
        out = to_probability(self.sums)
        for (rows, cols), values in finished:
            out[:, rows, cols] = values
        return out

    def _meet(self, at: NDArray[Any], shape: Sequence[int]) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
        """Slices of this rectangle and of another where they overlap."""
        mine, its = [], []
        for low, high, start, size in zip(self.region[:2], self.region[2:], (int(v) for v in at), shape, strict=True):
            a, b = max(low, start), min(high, start + size)
            if a >= b:
                return None
            mine.append(slice(a - low, b - low))
            its.append(slice(a - start, b - start))
        return (mine[0], mine[1]), (its[0], its[1])


@njit(cache=True, nogil=True)
def _add(sums, planes, weight, known, row, share, shares):
    height, width = weight.shape
    for i in range(height):
        if (row + i) // BAND_PX % shares != share:
            continue
        for p in range(planes.shape[0]):  # along rows, so that the compiler takes many pixels at once
            for j in range(width):
                value = np.uint32(np.int32(np.rint(planes[p, i, j] * np.float32(FULL))))
                sums[p, i, j] += value * (weight[i, j] * np.uint32(known[i, j]))
        for j in range(width):
            sums[-1, i, j] += weight[i, j] * np.uint32(known[i, j])


def to_probability(sums: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Weighted means as 0 … 254, rounded half up in integers; 255 where no window was added.

    Args:
        sums: (planes + 1, H, W) as in `Accumulator`.

    Returns:
        (planes, H, W) uint8.
    """
    return _divide(np.ascontiguousarray(sums, np.uint32))


@njit(cache=True, nogil=True)
def _divide(sums):
    planes, height, width = sums.shape[0] - 1, sums.shape[1], sums.shape[2]
    out = np.empty((planes, height, width), np.uint8)
    for p in range(planes):
        for i in range(height):
            for j in range(width):
                # Whole numbers below 2^53, and a quotient below 255 that misses the next whole number by more than 2^-34:
                # the floor of the rounded division is the floor.
                weight = np.float64(sums[planes, i, j]) * FULL
                value = (2.0 * PROBABILITY_SCALE * np.float64(sums[p, i, j]) + weight) / (2.0 * weight if weight > 0 else 1.0)
                out[p, i, j] = np.uint8(np.int32(value)) if weight > 0 else np.uint8(NODATA)
    return out
