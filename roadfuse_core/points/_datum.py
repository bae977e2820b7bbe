"""Chinese map coordinates back to WGS-84.

GCJ-02 shifts WGS-84 by a published trigonometric polynomial of the position; BD-09 turns and shifts GCJ-02 once
more. Both are inverted by fixed-point iteration, which gains more than two digits a round.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.points._read import Rows

__all__ = ["from_wgs84", "shift_datum", "to_wgs84"]

Floats = NDArray[np.float64]
AXIS_M = 6_378_245.0
ECCENTRICITY = 0.00669342162296594323
BD_TURN = np.pi * 3000 / 180
ROUNDS = 6


def _gcj_shift(lon: Floats, lat: Floats) -> tuple[Floats, Floats]:
    """GCJ-02 minus WGS-84, degrees, as a function of the WGS-84 position."""
    x, y = lon - 105, lat - 35
    common = (20 * np.sin(6 * x * np.pi) + 20 * np.sin(2 * x * np.pi)) * 2 / 3
    north = -100 + 2 * x + 3 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * np.sqrt(np.abs(x)) + common
    north += (20 * np.sin(y * np.pi) + 40 * np.sin(y / 3 * np.pi)) * 2 / 3
    north += (160 * np.sin(y / 12 * np.pi) + 320 * np.sin(y * np.pi / 30)) * 2 / 3
    east = 300 + x + 2 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * np.sqrt(np.abs(x)) + common
    east += (20 * np.sin(x * np.pi) + 40 * np.sin(x / 3 * np.pi)) * 2 / 3
    east += (150 * np.sin(x / 12 * np.pi) + 300 * np.sin(x / 30 * np.pi)) * 2 / 3
    phi = np.radians(lat)
    w = 1 - ECCENTRICITY * np.sin(phi) ** 2
    d_lat = north * 180 / (AXIS_M * (1 - ECCENTRICITY) / (w * np.sqrt(w)) * np.pi)
    d_lon = east * 180 / (AXIS_M / np.sqrt(w) * np.cos(phi) * np.pi)
    return d_lon, d_lat


def _gcj_to_bd(lon: Floats, lat: Floats) -> tuple[Floats, Floats]:
    radius = np.hypot(lon, lat) + 2e-5 * np.sin(lat * BD_TURN)
    angle = np.arctan2(lat, lon) + 3e-6 * np.cos(lon * BD_TURN)
    return radius * np.cos(angle) + 0.0065, radius * np.sin(angle) + 0.006


def from_wgs84(lon: Floats, lat: Floats, datum: str) -> tuple[Floats, Floats]:
    """WGS-84 degrees as a Chinese datum shows them; "wgs84" gives them back."""
    if datum == "wgs84":
        return lon, lat
    d_lon, d_lat = _gcj_shift(lon, lat)
    shifted = lon + d_lon, lat + d_lat
    return shifted if datum == "gcj02" else _gcj_to_bd(*shifted)


def to_wgs84(lon: Floats, lat: Floats, datum: str) -> tuple[Floats, Floats]:
    """Degrees of a datum as WGS-84.

    Args:
        lon: Degrees; NaN stays NaN, and values that are no position come out as anything.
        lat: Degrees.
        datum: wgs84, gcj02 or bd09.

    Returns:
        Longitude and latitude within 1e-9 degrees (0.1 mm) of the inverse, inside China.
    """
    if datum == "wgs84":
        return lon, lat
    guess = lon.copy(), lat.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(ROUNDS):
            back = from_wgs84(*guess, datum)
            guess = guess[0] + (lon - back[0]), guess[1] + (lat - back[1])
    return guess


def shift_datum(rows: Rows, datum: str) -> Rows:
    """Rows in WGS-84.

    Args:
        rows: As read; what is exactly 0, 0 stays there, to be rejected as such.
        datum: wgs84, gcj02 or bd09.
    """
    if datum == "wgs84":
        return rows
    nowhere = (rows.x == 0) & (rows.y == 0)
    x, y = to_wgs84(rows.x, rows.y, datum)
    return replace(rows, x=np.where(nowhere, 0, x), y=np.where(nowhere, 0, y))
