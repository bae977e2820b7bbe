"""Kept rows become small integers, are brought together by tile, and are added up by pixel and period."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Grid
from roadfuse_core.points._clean import DAY_US, LAST_DAY, Placed
from roadfuse_core.points._read import Rows
from roadfuse_core.settings import PointsSpec

__all__ = ["Collector", "PixelSums", "arrays_of", "period_of"]

Ints = NDArray[np.int64]
MISSING_ANGLE = 65_535
_ANGLES = np.radians(np.arange(36_000) / 100)
# Sine and cosine from a table of 0.01 degree, so that they are the same on every machine.
_SIN, _COS = (np.rint(f(_ANGLES) * 10_000).astype(np.int64) for f in (np.sin, np.cos))


@dataclass(frozen=True)
class PixelSums:
    """Sums of kept rows by tile, period and pixel, ascending in this order, each place once.

    Attributes:
        tile: (m,) int32 number of the tile, row-major.
        period: (m,) int32 number of the period since 1970.
        pixel: (m,) int32 number of the pixel in its tile, row-major.
        arrays: (m,) each, by array name: uint32 counts, int64 sums in fixed-point units (mm/s, 1e-4, ms).
    """

    tile: NDArray[np.int32]
    period: NDArray[np.int32]
    pixel: NDArray[np.int32]
    arrays: dict[str, NDArray[Any]]


def arrays_of(spec: PointsSpec) -> tuple[str, ...]:
    """The cube arrays that a city's columns fill."""
    names = ["count"]
    if spec.columns.speed:
        names += ["speed_sum", "speed_count"]
    if spec.columns.bearing:
        names += ["sin_sum", "cos_sum", "bearing_count"]
    if spec.columns.interval or (spec.columns.vehicle and spec.columns.time):
        names += ["interval_sum", "interval_count"]
    return tuple(names)


def period_of(time_us: Ints, period: str) -> Ints:
    """Number of the period that holds a time: days, ISO weeks (of Monday 1969-12-29) or months since 1970; 0 for `all`."""
    stamps = time_us.astype("datetime64[us]")
    if period == "day":
        return stamps.astype("datetime64[D]").astype(np.int64)
    if period == "week":
        return (stamps.astype("datetime64[D]").astype(np.int64) + 3) // 7
    if period == "month":
        return stamps.astype("datetime64[M]").astype(np.int64)
    return np.zeros(len(time_us), np.int64)


@lru_cache(maxsize=4)
def _periods_by_day(period: str) -> Ints:
    return period_of(np.arange(LAST_DAY) * DAY_US, period)


class Collector:
    """Takes kept rows in batches, a few bytes each, and adds them up.

    Args:
        spec: Which quantities there are, and the period.
        grid: Where rows fall.
        capacity: Most rows held at a time, unless one batch has more.
    """

    def __init__(self, spec: PointsSpec, grid: Grid, capacity: int) -> None:
        self.names, self.grid = arrays_of(spec), grid
        self.by_day = _periods_by_day(spec.period if spec.columns.time else "all")
        self.per_tile = np.zeros(grid.n_tiles, np.int64)
        self.held, self.place = 0, np.empty(0, np.int64)
        self.reserve(capacity)

    def fits(self, rows: int) -> bool:
        """Whether so many rows can still be held."""
        return self.held + rows <= len(self.place)

    def reserve(self, rows: int) -> None:
        """Make room for so many rows, while none is held."""
        if rows <= len(self.place):
            return
        self.place, self.tile = np.empty(rows, np.int64), np.empty(rows, np.int32)
        self.speed = np.empty(rows if "speed_sum" in self.names else 0, np.int32)
        self.angle = np.empty(rows if "sin_sum" in self.names else 0, np.uint16)
        self.interval = np.empty(rows if "interval_sum" in self.names else 0, np.int32)

    def add(self, rows: Rows, placed: Placed, interval: NDArray[np.float64]) -> None:
        """Take the kept rows of a batch.

        Args:
            rows: The batch.
            placed: Their places and reasons.
            interval: (n,) seconds, read or derived; NaN where there is none; may be empty.
        """
        self.held = _collect(
            placed.reason, placed.col, placed.row, rows.time_us, rows.speed, rows.bearing, interval, self.by_day,
            self.grid.tile_px, self.grid.tiles_x, self.held, self.place, self.tile, self.speed, self.angle, self.interval,
            self.per_tile,
        )  # fmt: skip

    def sums(self) -> PixelSums:
        """Add up what is held, and hold nothing.

        Rows are partitioned by tile, and each tile's few thousand are sorted by period and pixel, packed with their
        numbers into one integer: NumPy sorts those with vector instructions, and everything stays in the cache.
        """
        n, names = self.held, self.names
        ends = np.cumsum(self.per_tile)
        bits = max(1, int(self.per_tile.max(initial=0)).bit_length())
        packed, speed = np.empty(n, np.int64), np.empty(min(n, len(self.speed)), np.int32)
        angle, interval = np.empty(min(n, len(self.angle)), np.uint16), np.empty(min(n, len(self.interval)), np.int32)
        _partition(n, self.place, self.tile, self.speed, self.angle, self.interval, ends - self.per_tile, bits,
                   packed, speed, angle, interval)  # fmt: skip
        for t in np.flatnonzero(self.per_tile > 1):
            packed[ends[t] - self.per_tile[t] : ends[t]].sort()
        counts = np.empty((sum(k.endswith("count") for k in names), n), np.uint32)
        totals = np.empty((len(names) - len(counts), n), np.int64)
        where = np.empty((3, n), np.int32)
        m = _sum_runs(packed, speed, angle, interval, ends, bits, self.grid.tile_px, _SIN, _COS, where, counts, totals)
        self.per_tile[:] = 0
        self.held = 0
        rows: dict[bool, Iterator[NDArray[Any]]] = {True: iter(counts), False: iter(totals)}
        tile, period, pixel = where[:, :m]
        return PixelSums(tile, period, pixel, {k: next(rows[k.endswith("count")])[:m] for k in names})


@njit(cache=True, nogil=True)
def _collect(
    reason, col, row, time_us, speed, bearing, interval, by_day, px, tiles_x, n, place, tile, speeds, angles, intervals,
    per_tile,
):  # fmt: skip
    # A tile's edge is a power of two: shifts instead of divisions.
    shift = int(np.log2(px))
    for i in range(len(reason)):
        if reason[i] != 0:
            continue
        c, r = int(col[i]), int(row[i])
        period = by_day[np.uint64(time_us[i]) // np.uint64(DAY_US)] if len(time_us) else 0
        t = (r >> shift) * tiles_x + (c >> shift)
        tile[n] = t
        place[n] = (period << (2 * shift)) | ((r & (px - 1)) << shift) | (c & (px - 1))
        per_tile[t] += 1
        if len(speeds):
            known = speed[i] >= 0 and speed[i] < 2e6  # false for NaN
            speeds[n] = np.int32(np.rint(speed[i] * 1000)) if known else -1
        if len(angles):
            known = abs(bearing[i]) <= 720
            angles[n] = np.int64(np.rint(bearing[i] * 100)) % 36_000 if known else MISSING_ANGLE
        if len(intervals):
            known = interval[i] >= 0 and interval[i] <= 1e6
            intervals[n] = np.int32(np.rint(interval[i] * 1000)) if known else -1
        n += 1
    return n


@njit(cache=True, nogil=True)
def _partition(n, place, tile, speeds, angles, intervals, starts, bits, packed, speed, angle, interval):
    """Move rows to their tile's range; their number in it goes into the low bits of the sorting key."""
    cursor = starts.copy()
    for k in range(n):
        t = tile[k]
        to = cursor[t]
        cursor[t] += 1
        packed[to] = (place[k] << bits) | (to - starts[t])
        if len(speed):
            speed[to] = speeds[k]
        if len(angle):
            angle[to] = angles[k]
        if len(interval):
            interval[to] = intervals[k]


@njit(cache=True, nogil=True)
def _sum_runs(packed, speed, angle, interval, ends, bits, px, sines, cosines, where, counts, totals):
    """Add up runs of equal places, tile by tile; returns how many places there are."""
    m, start, mask, shift = -1, 0, (1 << bits) - 1, 2 * int(np.log2(px))
    for t in range(len(ends)):
        last = -1
        for k in range(start, ends[t]):
            place = packed[k] >> bits
            if place != last:
                last = place
                m += 1
                where[0, m], where[1, m], where[2, m] = t, place >> shift, place & (px * px - 1)
                counts[:, m] = 0
                totals[:, m] = 0
            i, c, s = start + (packed[k] & mask), 1, 0
            counts[0, m] += 1
            if len(speed):
                if speed[i] >= 0:
                    totals[s, m] += speed[i]
                    counts[c, m] += 1
                c, s = c + 1, s + 1
            if len(angle):
                if angle[i] != MISSING_ANGLE:
                    totals[s, m] += sines[angle[i]]
                    totals[s + 1, m] += cosines[angle[i]]
                    counts[c, m] += 1
                c, s = c + 1, s + 2
            if len(interval) and interval[i] >= 0:
                totals[s, m] += interval[i]
                counts[c, m] += 1
        start = ends[t]
    return m + 1
