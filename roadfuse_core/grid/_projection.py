"""From coordinates to pixels by a polynomial whose distance from PROJ is computed and kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pyproj import Transformer

from roadfuse_core.errors import ConfigError
from roadfuse_core.grid._grid import Bounds, Grid

__all__ = ["PixelProjection", "fit_projection"]

Floats = NDArray[np.float64]
MAX_ERROR_PX = 0.01
DEGREES = (3, 4, 5, 6, 7)


@dataclass(frozen=True)
class PixelProjection:
    """A bivariate polynomial from source coordinates to fractional pixels of one grid.

    Attributes:
        box: The source coordinates in which the polynomial holds; outside of it a point is off the grid.
        degree: Total degree of the polynomial.
        coefficients: (2, k) float64, for column and row, over the terms u^i v^j, i + j ≤ degree, i-major,
            with u and v the box mapped to [-1, 1].
        error_px: Greatest distance from PROJ over the whole box, measured on a lattice finer than the fit's
            and enlarged by a tenth; at most 0.01 px.
    """

    box: Bounds
    degree: int
    coefficients: Floats
    error_px: float

    def scale(self) -> Floats:
        """(4,) float64: u = x·s[0] + s[1], v = y·s[2] + s[3]."""
        left, bottom, right, top = self.box
        return np.array(
            [2 / (right - left), -(left + right) / (right - left), 2 / (top - bottom), -(bottom + top) / (top - bottom)]
        )

    def pixels(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Fractional (column, row) of source coordinates; the reference for the compiled kernel.

        Args:
            x: Longitudes, or eastings of a projected source.
            y: Latitudes, or northings.

        Returns:
            Two arrays, pixels; a point lies in pixel floor(column), floor(row), edges half-open.
        """
        s = self.scale()
        col, row = _polynomial(x * s[0] + s[1], y * s[2] + s[3], self.coefficients, self.degree)
        return col, row


def _polynomial(u: Floats, v: Floats, c: Floats, degree: int) -> Floats:
    """Horner in v inside Horner in u, the same order of operations as the compiled kernel."""
    out = np.zeros((2, *np.shape(u)))
    k = c.shape[1]
    for i in range(degree, -1, -1):
        k -= degree - i + 1
        for axis in (0, 1):
            inner = np.full(np.shape(u), c[axis, k + degree - i])
            for j in range(degree - i - 1, -1, -1):
                inner = inner * v + c[axis, k + j]
            out[axis] = out[axis] * u + inner
    return out


@njit(inline="always", cache=True)
def horner(u: float, v: float, c: Floats, axis: int, degree: int) -> float:
    """One coordinate of the polynomial at one point (compiled)."""
    out = 0.0
    k = c.shape[1]
    for i in range(degree, -1, -1):
        k -= degree - i + 1
        inner = c[axis, k + degree - i]
        for j in range(degree - i - 1, -1, -1):
            inner = inner * v + c[axis, k + j]
        out = out * u + inner
    return out


@njit(inline="always", cache=True)
def cubic(u: float, v: float, c: Floats, axis: int) -> float:
    """`horner` of degree 3, unrolled; the same operations in the same order."""
    return (
        ((0.0 * u + c[axis, 9]) * u + (c[axis, 8] * v + c[axis, 7])) * u + ((c[axis, 6] * v + c[axis, 5]) * v + c[axis, 4])
    ) * u + (((c[axis, 3] * v + c[axis, 2]) * v + c[axis, 1]) * v + c[axis, 0])


@lru_cache(maxsize=64)
def fit_projection(grid: Grid, source_crs: str = "EPSG:4326") -> PixelProjection:
    """The polynomial of lowest degree that stays within 0.01 px of PROJ over the whole grid.

    Args:
        grid: The target grid.
        source_crs: CRS of the points, x (or longitude) first.

    Returns:
        The polynomial with its measured error bound.

    Raises:
        ConfigError: No degree up to 7 is close enough: the city is too large for one grid, or the CRSs do not fit.
    """
    to_grid = Transformer.from_crs(source_crs, grid.crs, always_xy=True)
    box = _source_box(grid, to_grid)
    nodes = np.cos(np.pi * (np.arange(24) + 0.5) / 24)
    fit_at, check_at = np.meshgrid(nodes, nodes), np.meshgrid(*[np.linspace(-1, 1, 131)] * 2)
    error_px = np.inf
    for degree in DEGREES:
        terms = [fit_at[0].ravel() ** i * fit_at[1].ravel() ** j for i in range(degree + 1) for j in range(degree + 1 - i)]
        target = _proj_pixels(grid, to_grid, box, fit_at)
        solution = np.linalg.lstsq(np.stack(terms, 1), target.reshape(2, -1).T, rcond=None)[0]
        coefficients = np.ascontiguousarray(solution.T)
        miss = _polynomial(check_at[0], check_at[1], coefficients, degree) - _proj_pixels(grid, to_grid, box, check_at)
        error_px = float(np.hypot(*miss).max()) * 1.1
        if error_px <= MAX_ERROR_PX:
            return PixelProjection(box, degree, coefficients, error_px)
    raise ConfigError(
        "grid.bounds", tuple(box), f"cannot be projected within {MAX_ERROR_PX} px (best {error_px:.3g} px)",
        "split the city or choose a CRS made for it",
    )  # fmt: skip


def _proj_pixels(grid: Grid, to_grid: Transformer, box: Bounds, at: list[Floats] | tuple[Floats, ...]) -> Floats:
    x = box.left + (at[0] + 1) / 2 * (box.right - box.left)
    y = box.bottom + (at[1] + 1) / 2 * (box.top - box.bottom)
    east, north = to_grid.transform(x, y)
    return np.stack([(east - grid.bounds.left), (grid.bounds.top - north)]) / grid.resolution_m


def _source_box(grid: Grid, to_grid: Transformer) -> Bounds:
    """Source coordinates of the grid, a pixel wider on each side so that no edge point is lost."""
    b, pad = grid.bounds, grid.resolution_m
    box = to_grid.transform_bounds(
        b.left - pad, b.bottom - pad, b.right + pad, b.top + pad, densify_pts=101, direction="INVERSE"
    )
    return Bounds(*(float(v) for v in box))
