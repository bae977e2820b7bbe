"""Blending in integers: exact, and the same for any order, block size and number of workers."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Block, Lattice

__all__ = ["NODATA", "PROBABILITY_SCALE", "Accumulator", "to_probability"]

NODATA = 255
PROBABILITY_SCALE = 254
FULL = 65_535
EDGES = ("top", "bottom", "left", "right")


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

    def add(self, row: int, col: int, planes: NDArray[np.float32], weight: NDArray[np.uint32]) -> None:
        """Add a window with its corner at a pixel of the grid; planes (P, S, S) float32 in [0, 1]."""
        r, c = row - self.region.row0, col - self.region.col0
        s = weight.shape[0]
        _add(self.sums[:, r : r + s, c : c + s], np.ascontiguousarray(planes, np.float32), weight)

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

    def merge(self, parts: Mapping[str, NDArray[Any]]) -> None:
        """Add what a block left, where it meets this rectangle; finished values stand as they are."""
        for name in EDGES:
            found = self._meet(parts[f"{name}_at"], parts[name].shape[1:])
            if found:
                mine, its = found
                self.sums[:, *mine] += parts[name][:, *its]
        found = self._meet(parts["inner_at"], parts["inner"].shape[1:])
        if found:
            mine, its = found
            values = parts["inner"][:, *its]
            known = values[0] != NODATA
            # As sums that come out as these very values: value / 254 with weight 254 · 65535 stays within uint32.
            self.sums[:-1, *mine] = np.where(known, values.astype(np.uint32) * FULL, 0)
            self.sums[-1, *mine] = np.where(known, PROBABILITY_SCALE, 0)

    def _meet(self, at: NDArray[Any], shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
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
def _add(sums, planes, weight):
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w = weight[i, j]
            for p in range(planes.shape[0]):
                sums[p, i, j] += np.uint32(np.rint(planes[p, i, j] * np.float32(FULL))) * w
            sums[-1, i, j] += w


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
    for i in range(height):
        for j in range(width):
            weight = np.uint64(sums[planes, i, j]) * np.uint64(FULL)
            for p in range(planes):
                if weight == 0:
                    out[p, i, j] = NODATA
                else:
                    value = np.uint64(2 * PROBABILITY_SCALE) * np.uint64(sums[p, i, j]) + weight
                    out[p, i, j] = value // (np.uint64(2) * weight)
    return out
