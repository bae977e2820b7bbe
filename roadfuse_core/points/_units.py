"""Reported against implied speed, by day: dumps change their unit of speed without saying so."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numba import njit

from roadfuse_core.points._clean import Placed, Reason
from roadfuse_core.points._read import METRES_PER_SECOND, Rows
from roadfuse_core.points._vehicles import NO_VEHICLE

__all__ = ["SpeedBreak", "SpeedRatios", "find_speed_break"]

BINS_PER_DOUBLING = 8
METRES_PER_DEGREE = 111_195.0
KEPT, OUTSIDE = int(Reason.KEPT), int(Reason.OUTSIDE)
BINS = 12 * BINS_PER_DOUBLING
MIN_PAIRS = 200
# Less than the step between any two units (km/h to mph, 1.61), more than what traffic does to a median.
MIN_STEP = np.log2(1.4)


@dataclass(frozen=True)
class SpeedRatios:
    """Histograms of log2(reported / implied speed), by day since 1970; 96 bins of 1/8 from 2^-6 to 2^6.

    Implied is the straight way between a vehicle's neighbouring samples, 1 to 180 s and at least 2 m/s apart; samples
    outside the grid speak too.
    """

    by_day: dict[int, list[int]] = field(default_factory=dict)

    def add(self, rows: Rows, placed: Placed, metres_per_unit: tuple[float, float] | None) -> None:
        """Count a batch, sorted by vehicle and time.

        Args:
            rows: The batch.
            placed: Its reasons.
            metres_per_unit: On the ground, along both axes of projected coordinates; None for degrees.
        """
        if not len(rows.speed):
            return
        day, place = np.empty(len(rows.x), np.int64), np.empty(len(rows.x), np.int64)
        n = _ratios(
            rows.vehicle, rows.time_us, rows.speed, rows.x, rows.y, metres_per_unit or (0.0, 0.0), placed.reason, day, place
        )
        days, inverse = np.unique(day[:n], return_inverse=True)
        counts = np.bincount(inverse * BINS + place[:n], minlength=len(days) * BINS).reshape(len(days), BINS)
        for d, row in zip(days.tolist(), counts.tolist(), strict=True):
            self.by_day[d] = [a + b for a, b in zip(self.by_day.get(d, [0] * BINS), row, strict=True)]


@njit(cache=True, nogil=True)
def _ratios(vehicle, t, speed, x, y, unit, reason, day, place):
    n, last = 0, -1
    for i in range(len(vehicle)):
        if (reason[i] != KEPT and reason[i] != OUTSIDE) or vehicle[i] == NO_VEHICLE:
            continue
        if last >= 0 and vehicle[last] == vehicle[i] and speed[i] > 0:
            seconds = (t[i] - t[last]) / 1e6
            if 1 <= seconds <= 180:
                east, north = (x[i] - x[last]) * unit[0], (y[i] - y[last]) * unit[1]
                if unit[0] == 0:  # degrees, on a sphere: a thousandth is nothing here
                    east = (x[i] - x[last]) * np.cos(np.radians(y[i])) * METRES_PER_DEGREE
                    north = (y[i] - y[last]) * METRES_PER_DEGREE
                implied = np.hypot(east, north) / seconds
                if implied >= 2:
                    k = int(np.floor((np.log2(speed[i] / implied) + 6) * BINS_PER_DOUBLING))
                    day[n], place[n] = t[i] // 86_400_000_000, min(max(k, 0), BINS - 1)
                    n += 1
        last = i
    return n


@dataclass(frozen=True)
class SpeedBreak:
    """Two stretches of a dump whose reported speeds are in different units.

    Attributes:
        day: First day of the later stretch, ISO.
        before: Median of reported / implied speed before it, under the stated unit.
        after: And from it on.
        wrong: `before` or `after`: the stretch that does not fit the stated unit.
        likely_unit: The unit that it is likely in.
    """

    day: str
    before: float
    after: float
    wrong: str
    likely_unit: str


def find_speed_break(by_day: Mapping[int, list[int]], stated: str) -> SpeedBreak | None:
    """The day that parts reported / implied speed best (least absolute deviations), if its medians part by a step of units.

    Args:
        by_day: As `SpeedRatios` counts them.
        stated: The unit that the city file states.

    Returns:
        The break; None where the stretches differ by less than a factor of 1.4, or hold too few pairs.
    """
    days = sorted(by_day)
    counts = np.array([by_day[d] for d in days], np.int64).reshape(-1, BINS)
    before, after = counts.cumsum(0), counts[::-1].cumsum(0)[::-1]
    cuts = [k for k in range(1, len(days)) if min(before[k - 1].sum(), after[k].sum()) >= MIN_PAIRS]
    if not cuts:
        return None
    best = min(cuts, key=lambda k: _spread(before[k - 1]) + _spread(after[k]))
    if abs(_median(before[best - 1]) - _median(after[best])) < MIN_STEP:
        return None
    low, high = _median(before[best - 1]), _median(after[best])
    wrong, ratio = ("before", low) if abs(low) > abs(high) else ("after", high)
    factors = {
        unit: np.log2(METRES_PER_SECOND[stated] / metres) for unit, metres in METRES_PER_SECOND.items() if unit != stated
    }
    likely = min(factors, key=lambda unit: abs(factors[unit] - ratio))
    date = str(np.datetime64(days[best], "D"))
    return SpeedBreak(date, round(float(2**low), 2), round(float(2**high), 2), wrong, likely)


def _spread(histogram: np.ndarray) -> float:
    """Sum of the distances from the median, in bins."""
    middle = (_median(histogram) + 6) * BINS_PER_DOUBLING - 0.5
    return float((histogram * np.abs(np.arange(BINS) - middle)).sum())


def _median(histogram: np.ndarray) -> float:
    """Median of log2 of the ratio, within its bin by linear interpolation."""
    half = histogram.sum() / 2
    k = int(np.searchsorted(histogram.cumsum(), half))
    inside = (half - histogram[:k].sum()) / max(1, histogram[k])
    return float((k + inside) / BINS_PER_DOUBLING - 6)
