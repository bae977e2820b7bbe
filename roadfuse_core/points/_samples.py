"""Kept rows become samples of a few small integers, brought together by tile and period."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Grid
from roadfuse_core.points._clean import DAY_US, LAST_DAY, Placed
from roadfuse_core.points._read import Rows
from roadfuse_core.settings import PointsSpec

__all__ = ["ADDENDS", "Collector", "Samples", "addend_table", "arrays_of", "columns_of", "period_of"]

Ints = NDArray[np.int64]
# What a sample adds to each array of a cube: the column that must be known, and what of it.
ADDENDS = {
    "count": ("pixel", "one"),
    "speed_sum": ("speed", "value"), "speed_count": ("speed", "one"),
    "sin_sum": ("bearing", "sin"), "cos_sum": ("bearing", "cos"), "bearing_count": ("bearing", "one"),
    "interval_sum": ("interval", "value"), "interval_count": ("interval", "one"),
}  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Kept rows by tile, then period, in the order in which they came.

    Attributes:
        runs: (k, 3) int64 tile number (row-major), period number since 1970, and how many samples they have; ascending.
        columns: (n,) int32 each: `pixel` in its tile, row-major; where the city has them `speed` (mm/s), `bearing`
            (0.01 degree, [0, 36000)) and `interval` (ms), -1 where a sample has none.
    """

    runs: Ints
    columns: dict[str, NDArray[np.int32]]


def arrays_of(spec: PointsSpec) -> tuple[str, ...]:
    """The cube arrays that a city's columns fill."""
    held = columns_of(spec)
    return tuple(name for name, (column, _) in ADDENDS.items() if column in held)


def columns_of(spec: PointsSpec) -> tuple[str, ...]:
    """What a sample of this city holds."""
    c = spec.columns
    interval = c.interval or (c.vehicle and c.time)
    return ("pixel", *(n for n, held in (("speed", c.speed), ("bearing", c.bearing), ("interval", interval)) if held))


def addend_table(what: str) -> Ints:
    """Sine or cosine times 10,000 of every 0.01 degree, the same on every machine; empty for `one` and `value`."""
    angles = np.radians(np.arange(36_000 if what in ("sin", "cos") else 0) / 100)
    return np.rint((np.cos if what == "cos" else np.sin)(angles) * 10_000).astype(np.int64)


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
    """Takes kept rows in batches, a few bytes each, and brings them together.

    Args:
        spec: Which quantities there are, and the period.
        grid: Where rows fall.
        capacity: Most rows held at a time, unless one batch has more.
    """

    def __init__(self, spec: PointsSpec, grid: Grid, capacity: int) -> None:
        self.names, self.grid = columns_of(spec), grid
        self.by_day = _periods_by_day(spec.period if spec.columns.time else "all")
        self.per_tile = np.zeros(grid.n_tiles, np.int64)
        self.held, self.room = 0, 0
        self.reserve(capacity)

    def fits(self, rows: int) -> bool:
        """Whether so many rows can still be held."""
        return self.held + rows <= self.room

    def reserve(self, rows: int) -> None:
        """Make room for so many rows, while none is held."""
        if rows <= self.room:
            return
        self.room = rows
        self.tile, self.period = np.empty(rows, np.int32), np.empty(rows, np.int32)
        every = ("pixel", "speed", "bearing", "interval")
        self.columns = {name: np.empty(rows if name in self.names else 0, np.int32) for name in every}

    def add(self, rows: Rows, placed: Placed, interval: NDArray[np.float64]) -> None:
        """Take the kept rows of a batch.

        Args:
            rows: The batch.
            placed: Their places and reasons.
            interval: (n,) seconds, read or derived; NaN where there is none; may be empty.
        """
        self.held = _collect(
            placed.reason, placed.col, placed.row, rows.time_us, rows.speed, rows.bearing, interval, self.by_day,
            self.grid.tile_px, self.grid.tiles_x, self.held, self.tile, self.period, self.columns["pixel"],
            self.columns["speed"], self.columns["bearing"], self.columns["interval"], self.per_tile,
        )  # fmt: skip

    def samples(self) -> Samples:
        """What is held, by tile and period; holds nothing afterwards."""
        n = self.held
        period, several = self.period[:n], bool(n) and self.period[:n].min() < self.period[:n].max()
        order = _by_period(period) if several else np.arange(0)
        target = _targets(self.tile[:n], order, np.cumsum(self.per_tile) - self.per_tile)
        runs = self._runs(_moved(period, target) if several else period[:1])
        columns = {name: _moved(self.columns[name][:n], target) for name in self.names}
        self.per_tile[:] = 0
        self.held = 0
        return Samples(runs, columns)

    def _runs(self, period: NDArray[np.int32]) -> Ints:
        """Runs of the rows held; their periods in the order of tiles, or one for all."""
        tiles = np.flatnonzero(self.per_tile)
        rows = self.per_tile[tiles]
        if len(period) <= 1:
            return np.stack([tiles, np.resize(period, len(tiles)).astype(np.int64), rows], 1)
        tile = np.repeat(tiles, rows)
        starts = np.flatnonzero(np.r_[True, (tile[1:] != tile[:-1]) | (period[1:] != period[:-1])])
        return np.stack([tile[starts], period[starts], np.diff(np.r_[starts, len(tile)])], 1)


@njit(cache=True, nogil=True)
def _collect(
    reason, col, row, time_us, speed, bearing, interval, by_day, px, tiles_x, n, tile, period, pixel, speeds, bearings,
    intervals, per_tile,
):  # fmt: skip
    # A tile's edge is a power of two: shifts instead of divisions.
    shift = int(np.log2(px))
    for i in range(len(reason)):
        if reason[i] != 0:
            continue
        c, r = int(col[i]), int(row[i])
        t = (r >> shift) * tiles_x + (c >> shift)
        tile[n] = t
        period[n] = by_day[np.uint64(time_us[i]) // np.uint64(DAY_US)] if len(time_us) else 0
        pixel[n] = ((r & (px - 1)) << shift) | (c & (px - 1))
        per_tile[t] += 1
        if len(speeds):
            known = speed[i] >= 0 and speed[i] < 2e6  # false for NaN
            speeds[n] = np.int32(np.rint(speed[i] * 1000)) if known else -1
        if len(bearings):
            # Below zero is west of north; -1 and numbers beyond a circle, such as 511, are what devices write for unknown.
            known = bearing[i] >= -180 and bearing[i] <= 360 and bearing[i] != -1
            bearings[n] = np.int64(np.rint(bearing[i] * 100)) % 36_000 if known else -1
        if len(intervals):
            known = interval[i] >= 0 and interval[i] <= 1e6
            intervals[n] = np.int32(np.rint(interval[i] * 1000)) if known else -1
        n += 1
    return n


@njit(cache=True, nogil=True)
def _by_period(period):
    """Row numbers by period, in the order in which they came: a counting sort."""
    first = np.int64(period.min())
    starts = np.zeros(np.int64(period.max()) - first + 2, np.int64)
    for i in range(len(period)):
        starts[period[i] - first + 1] += 1
    starts = np.cumsum(starts)
    order = np.empty(len(period), np.int64)
    for i in range(len(period)):
        order[starts[period[i] - first]] = i
        starts[period[i] - first] += 1
    return order


@njit(cache=True, nogil=True)
def _targets(tile, order, cursor):
    """Where each row goes, taken in an order (empty: as they came): a counting sort by tile, whose starts are used up."""
    target = np.empty(len(tile), np.int32)
    for k in range(len(tile)):
        i = order[k] if len(order) else k
        target[i] = cursor[tile[i]]
        cursor[tile[i]] += 1
    return target


@njit(cache=True, nogil=True)
def _moved(values, target):
    out = np.empty_like(values)
    for i in range(len(values)):
        out[target[i]] = values[i]
    return out
