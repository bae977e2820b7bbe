"""How long a unit of a projected CRS is on the ground: the metres of EPSG:3857 are half a metre in Helsinki."""

from __future__ import annotations

from functools import lru_cache

from pyproj import CRS, Geod, Transformer

from roadfuse_core.grid._grid import Grid

__all__ = ["ground_metres", "pixel_metres"]

HALF_M = 500.0


@lru_cache(maxsize=64)
def ground_metres(crs: str, grid: Grid) -> tuple[float, float]:
    """Metres on the ground, along a projected CRS's x and y axes, that one unit of it is at the centre of a grid."""
    bounds = grid.bounds
    into = Transformer.from_crs(grid.crs, crs, always_xy=True)
    x, y = into.transform((bounds.left + bounds.right) / 2, (bounds.top + bounds.bottom) / 2)
    unit = HALF_M / CRS.from_user_input(crs).axis_info[0].unit_conversion_factor
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lon, lat = to_degrees.transform([x - unit, x + unit, x, x], [y, y, y - unit, y + unit])
    _, _, (along_x, along_y) = Geod(ellps="WGS84").inv(lon[::2], lat[::2], lon[1::2], lat[1::2])
    return float(along_x / (2 * unit)), float(along_y / (2 * unit))


def pixel_metres(grid: Grid) -> tuple[float, float]:
    """Width and height of a pixel at the centre of a grid, metres on the ground."""
    along_x, along_y = ground_metres(grid.crs, grid)
    return along_x * grid.resolution_m, along_y * grid.resolution_m
