"""Which rows count, where they fall, and why the others do not: compiled kernels over arrays."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from datetime import UTC, datetime
from enum import IntEnum

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Grid, PixelProjection
from roadfuse_core.grid._projection import cubic, horner
from roadfuse_core.points._read import Rows
from roadfuse_core.points._vehicles import NO_VEHICLE
from roadfuse_core.settings import CleanSpec

__all__ = ["Placed", "Reason", "judge_rows", "judge_vehicles"]

Floats = NDArray[np.float64]
HUGE = 1e300
# Times from 2200 on are no times of vehicles.
DAY_US = 86_400_000_000
QUARTER_US = 900_000_000
# To what times are rounded, coarsest first: a day to two seconds.
ROUND_US = tuple(
    seconds * 1_000_000
    for seconds in (86_400, 43_200, 21_600, 10_800, 7200, 3600, 1800, 900, 600, 300, 120, 60, 30, 20, 15, 10, 5, 2)
)
LAST_DAY = int(np.datetime64("2200-01-01", "D").astype(np.int64))


class Reason(IntEnum):
    """Why a row was rejected; a row has the first reason that applies, in this order."""

    KEPT = 0
    NOT_FINITE = 1
    NULL_ISLAND = 2
    TIME = 3
    SWAPPED = 4
    OUTSIDE = 5
    SPEED = 6
    DUPLICATE = 7
    TELEPORT = 8


class Placed:
    """Rows placed on the grid.

    Attributes:
        reason: (n,) uint8 of `Reason`.
        col: (n,) float64 fractional pixel column, where placed.
        row: (n,) float64 fractional pixel row.
    """

    def __init__(self, reason: NDArray[np.uint8], col: Floats, row: Floats) -> None:
        self.reason, self.col, self.row = reason, col, row


def judge_rows(rows: Rows, clean: CleanSpec, grid: Grid, projection: PixelProjection) -> Placed:
    """Row-local rules, which look at one row alone, so that any split of a dump gives the same answer.

    Args:
        rows: As read.
        clean: Which rules apply.
        grid: The city's grid; its half-open area decides what is outside.
        projection: From the rows' coordinates to pixels.

    Returns:
        Reason and place of each row.
    """
    low, high = 0, LAST_DAY * DAY_US
    if clean.time_range:
        low, high = (int(np.datetime64(_utc(t), "us").astype(np.int64)) for t in clean.time_range)
    limit = clean.max_speed_kmh / 3.6 if clean.max_speed_kmh else HUGE
    n = len(rows.x)
    reason, col, row = np.zeros(n, np.uint8), np.zeros(n), np.zeros(n)
    _judge_rows(
        rows.x, rows.y, rows.time_us, rows.speed, np.array(projection.box), projection.scale(), projection.coefficients,
        projection.degree, grid.shape[0], grid.shape[1], clean.null_island or 0.0, clean.swapped, max(low, 0),
        min(high, LAST_DAY * DAY_US), limit, reason, col, row,
    )  # fmt: skip
    return Placed(reason, col, row)


def _utc(moment: datetime) -> datetime:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).replace(tzinfo=None)


@njit(cache=True, nogil=True)
def _judge_rows(
    x, y, t, speed, box, scale, c, degree, height, width, null_island, swapped, t_low, t_high, limit, reason, col, row
):
    for i in range(len(x)):
        if not (np.isfinite(x[i]) and np.isfinite(y[i])):
            reason[i] = 1
            continue
        if abs(x[i]) < null_island and abs(y[i]) < null_island:
            reason[i] = 2
            continue
        if len(t) and (t[i] < t_low or t[i] >= t_high):
            reason[i] = 3
            continue
        if not (box[0] <= x[i] < box[2] and box[1] <= y[i] < box[3]):
            turned = box[0] <= y[i] < box[2] and box[1] <= x[i] < box[3]
            reason[i] = 4 if swapped and turned else 5
            continue
        u, v = x[i] * scale[0] + scale[1], y[i] * scale[2] + scale[3]
        if degree == 3:
            col[i], row[i] = cubic(u, v, c, 0), cubic(u, v, c, 1)
        else:
            col[i], row[i] = horner(u, v, c, 0, degree), horner(u, v, c, 1, degree)
        if not (0 <= col[i] < width and 0 <= row[i] < height):
            reason[i] = 5
        elif len(speed) and speed[i] > limit:
            reason[i] = 6


def judge_vehicles(rows: Rows, placed: Placed, clean: CleanSpec, pixel_m: tuple[float, float], derive: bool) -> Floats:
    """Vehicle-local rules: repeated rows, and samples that imply an impossible speed.

    Rows without a vehicle have no neighbours and stay as they are. A sample is a teleport when it is too far from the last
    accepted one, unless the next sample confirms it (then the vehicle was somewhere else in between: it is kept, without
    an interval). The first sample of a vehicle is a teleport when the next two agree with each other and not with it.
    Where a vehicle is at several places at one time, its times are rounded: to whole minutes, say, or days. Samples may
    then be as far apart in time as the rounding allows, besides what their times say.

    Args:
        rows: Sorted by vehicle, time and all other columns.
        placed: Their places; `reason` is completed in place, and only rows kept so far are looked at.
        clean: Which rules apply.
        pixel_m: Width and height of a pixel, metres on the ground.
        derive: Compute intervals from the times instead of taking those read.

    Returns:
        (n,) seconds since the vehicle's previous kept sample; NaN for the first and after gaps; or the intervals read.
    """
    interval = np.full(len(rows.x), np.nan) if derive else rows.interval.copy()
    limit = clean.teleport_kmh / 3.6 if clean.teleport_kmh else HUGE
    if not len(rows.x):
        return interval
    facts = np.stack([c for c in (rows.x, rows.y, rows.speed, rows.bearing, rows.interval) if len(c)], 1)
    x, y = placed.col * pixel_m[0], placed.row * pixel_m[1]
    slack = _slack(rows.vehicle, rows.time_us, x, y, placed.reason)
    _judge_vehicles(rows.vehicle, rows.time_us, slack, facts, x, y, placed.reason, clean.duplicates, limit, clean.max_gap_s,
                    derive, interval)  # fmt: skip
    return interval


@njit(cache=True, nogil=True)
def _same(facts, i, j):
    for k in range(facts.shape[1]):
        a, b = facts[i, k], facts[j, k]
        if not (a == b or (np.isnan(a) and np.isnan(b))):
            return False
    return True


@njit(cache=True, nogil=True)
def _slack(vehicle, t, x, y, reason):
    """Microseconds by which the time of each row is rounded, where its vehicle is at several places at that time; else 0."""
    slack = np.zeros(len(vehicle), np.int64)
    i, before = 0, -1
    while i < len(vehicle):
        if reason[i] != 0 or vehicle[i] == NO_VEHICLE:
            i += 1
            continue
        end, moved = i + 1, False
        while end < len(vehicle) and vehicle[end] == vehicle[i] and t[end] == t[i]:
            moved |= reason[end] == 0 and (x[end] != x[i] or y[end] != y[i])
            end += 1
        if moved:
            gap = t[i] - t[before] if before >= 0 and vehicle[before] == vehicle[i] else ROUND_US[0]
            after = end
            while after < len(vehicle) and vehicle[after] == vehicle[i] and reason[after] != 0:
                after += 1
            if after < len(vehicle) and vehicle[after] == vehicle[i]:
                gap = min(gap, t[after] - t[i])
            slack[i:end] = _rounding(t[i], gap)
        before, i = i, end
    return slack


@njit(cache=True, nogil=True)
def _rounding(t, gap):
    """The coarsest usual rounding that a time fits, and that is no more than the gap to the vehicle's neighbouring times."""
    for step in ROUND_US:
        # Days and hours of a time zone begin at a quarter of an hour of UTC.
        if step <= gap and t % min(step, QUARTER_US) == 0:
            return step
    return 0


@njit(cache=True, nogil=True)
def _too_far(t, slack, x, y, i, j, limit):
    # Times are often whole seconds: shorter steps count as one second.
    seconds = max((t[j] - t[i] + max(slack[i], slack[j])) / 1e6, 1.0)
    return np.hypot(x[j] - x[i], y[j] - y[i]) > limit * seconds


@njit(cache=True, nogil=True)
def _next_kept(vehicle, t, facts, reason, i, duplicates):
    """The vehicle's next row that is neither rejected nor a repetition of i; -1 if none."""
    j = i + 1
    while j < len(vehicle) and vehicle[j] == vehicle[i]:
        if reason[j] == 0 and not (duplicates and t[j] == t[i] and _same(facts, i, j)):
            return j
        j += 1
    return -1


@njit(cache=True, nogil=True)
def _judge_vehicles(  # noqa: C901
    vehicle, t, slack, facts, x, y, reason, duplicates, limit, max_gap_s, derive, interval
):
    last, before = -1, -1
    for i in range(len(vehicle)):
        if reason[i] != 0 or vehicle[i] == NO_VEHICLE:
            continue
        if last >= 0 and vehicle[last] != vehicle[i]:
            last = -1
        if before >= 0 and vehicle[before] != vehicle[i]:
            before = -1
        if duplicates and before >= 0 and t[before] == t[i] and _same(facts, before, i):
            reason[i] = 7
            continue
        before = i
        jumped = last >= 0 and _too_far(t, slack, x, y, last, i, limit)
        if jumped or last < 0:
            j = _next_kept(vehicle, t, facts, reason, i, duplicates)
            if jumped:
                confirmed = j >= 0 and not _too_far(t, slack, x, y, i, j, limit) and _too_far(t, slack, x, y, last, j, limit)
                if not confirmed:
                    reason[i] = 8
                    continue
            elif j >= 0 and _too_far(t, slack, x, y, i, j, limit):
                k = _next_kept(vehicle, t, facts, reason, j, duplicates)
                if k >= 0 and not _too_far(t, slack, x, y, j, k, limit) and _too_far(t, slack, x, y, i, k, limit):
                    reason[i] = 8
                    continue
        if derive and last >= 0 and not jumped:
            seconds = (t[i] - t[last]) / 1e6
            if 0 < seconds <= max_gap_s:
                interval[i] = seconds
        last = i
