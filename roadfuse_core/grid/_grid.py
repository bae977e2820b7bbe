"""One city, one grid: a projected CRS, a resolution and an origin on whole tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from pyproj.exceptions import CRSError

from roadfuse_core.errors import ConfigError

# A country at half a metre has some 10^12 pixels.
MAX_PX = 10**13
MAX_TILES = 4_000_000
# How far beyond its area of use a CRS may be taken for a city.
AREA_DEGREES = 20.0


class Bounds(NamedTuple):
    """A box, half-open [min, max) on both axes, in the unit of its CRS."""

    left: float
    bottom: float
    right: float
    top: float


class TileIndex(NamedTuple):
    """A tile's place in its grid; row 0 is the northernmost."""

    row: int
    col: int


@dataclass(frozen=True)
class Grid:
    """Square pixels in a projected CRS, cut into square tiles.

    The origin lies on a multiple of the tile size in the CRS, so that any two grids of equal CRS,
    resolution and tile size line up, whatever bounds they were made from.

    Attributes:
        crs: Authority string, for example "EPSG:32634".
        resolution_m: Pixel edge, metres.
        tile_px: Tile edge, pixels.
        left_tile: Tiles from the CRS origin to the left edge.
        top_tile: Tiles from the CRS origin to the top edge, northwards.
        tiles_y: Rows of tiles.
        tiles_x: Columns of tiles.
    """

    crs: str
    resolution_m: float
    tile_px: int
    left_tile: int
    top_tile: int
    tiles_y: int
    tiles_x: int

    @property
    def tile_m(self) -> float:
        """Tile edge, metres."""
        return self.tile_px * self.resolution_m

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width), pixels."""
        return self.tiles_y * self.tile_px, self.tiles_x * self.tile_px

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return self.tiles_y * self.tiles_x

    @property
    def bounds(self) -> Bounds:
        """Metres in the grid's CRS, half-open."""
        left, top = self.left_tile * self.tile_m, self.top_tile * self.tile_m
        return Bounds(left, top - self.tiles_y * self.tile_m, left + self.tiles_x * self.tile_m, top)

    @property
    def affine(self) -> Affine:
        """Pixel (column, row) to metres."""
        return Affine(self.resolution_m, 0, self.bounds.left, 0, -self.resolution_m, self.bounds.top)

    def window_geobox(self, row: int, col: int, height: int, width: int) -> GeoBox:
        """GeoBox of a pixel rectangle, which may reach past the grid's rim."""
        return GeoBox((height, width), self.affine @ Affine.translation(col, row), self.crs)

    def tiles(self) -> list[TileIndex]:
        """All tiles, row-major."""
        return [TileIndex(r, c) for r in range(self.tiles_y) for c in range(self.tiles_x)]

    def tile_bounds(self, tile: TileIndex) -> Bounds:
        """Metres in the grid's CRS, half-open."""
        left, top = self.bounds.left + tile.col * self.tile_m, self.bounds.top - tile.row * self.tile_m
        return Bounds(left, top - self.tile_m, left + self.tile_m, top)

    def tiles_covering(self, box: Bounds) -> list[TileIndex]:
        """Tiles that share area with a box.

        Args:
            box: Metres in the grid's CRS, half-open.

        Returns:
            Row-major; empty if the box has no area or lies outside. Touching along an edge does not count.
        """
        if box.right <= box.left or box.top <= box.bottom:
            return []
        bounds = self.bounds
        cols = _cells(box.left - bounds.left, box.right - bounds.left, self.tile_m, self.tiles_x)
        rows = _cells(bounds.top - box.top, bounds.top - box.bottom, self.tile_m, self.tiles_y)
        return [TileIndex(r, c) for r in rows for c in cols]


def tiles_near(grid: Grid, tiles: Iterable[TileIndex], halo_px: int) -> set[TileIndex]:
    """Tiles of a grid that share a pixel with any of some tiles, these enlarged by some pixels."""
    reach = -(-halo_px // grid.tile_px)
    steps = range(-reach, reach + 1)
    near = {TileIndex(row + i, col + j) for row, col in tiles for i in steps for j in steps}
    return {t for t in near if 0 <= t.row < grid.tiles_y and 0 <= t.col < grid.tiles_x}


def _cells(low: float, high: float, size: float, count: int) -> range:
    return range(max(0, math.floor(low / size)), min(count, math.ceil(high / size)))


def make_grid(bounds_lonlat: Bounds, resolution_m: float = 0.5, tile_px: int = 1024, crs: str | None = None) -> Grid:
    """The grid that covers a box of longitudes and latitudes.

    Args:
        bounds_lonlat: Degrees, WGS-84.
        resolution_m: Pixel edge, metres.
        tile_px: Tile edge, pixels.
        crs: A projected CRS in metres; by default the UTM zone of the centre.

    Returns:
        The smallest grid of whole tiles, on the CRS's lattice of tiles, that holds the box.

    Raises:
        ConfigError: The CRS is not projected in metres or has no place for the box, the grid has too many pixels, or it
            reaches across 180 degrees.
    """
    left, bottom, right, top = bounds_lonlat
    try:
        code = CRS(crs) if crs else CRS.utm((left + right) / 2, (bottom + top) / 2)
    except (CRSError, ValueError) as error:
        raise ConfigError("grid.crs", crs, "is not a CRS", "name a UTM zone, such as EPSG:32634") from error
    if not code.projected or code.proj.axis_info[0].unit_name != "metre":
        raise ConfigError("grid.crs", crs, "is not a projected CRS in metres", "name a UTM zone, such as EPSG:32634")
    if area := _other_area(code, (left + right) / 2, (bottom + top) / 2):
        raise ConfigError("grid.crs", crs, f"is made for {area}", "leave it out, and the UTM zone is taken")
    to_grid = Transformer.from_crs("EPSG:4326", code.proj, always_xy=True)
    x0, y0, x1, y1 = to_grid.transform_bounds(left, bottom, right, top, densify_pts=51)
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ConfigError("grid.crs", str(code), "has no place for grid.bounds", "leave it out, and the UTM zone is taken")
    tile_m = resolution_m * tile_px
    left_tile, top_tile = math.floor(x0 / tile_m), math.ceil(y1 / tile_m)
    tiles_y, tiles_x = top_tile - math.floor(y0 / tile_m), math.ceil(x1 / tile_m) - left_tile
    if tiles_y * tiles_x > MAX_TILES or tiles_y * tiles_x * tile_px**2 > MAX_PX:
        raise ConfigError("grid.resolution_m", resolution_m, f"makes {tiles_x * tile_px:,} × {tiles_y * tile_px:,} px in "
                          f"{tiles_x * tiles_y:,} tiles", "choose larger pixels or tiles, or smaller bounds")  # fmt: skip
    grid = Grid(str(code), resolution_m, tile_px, left_tile, top_tile, tiles_y, tiles_x)
    if _crosses_180(grid):
        raise ConfigError("grid.bounds", bounds_lonlat, f"reach across 180 degrees once they are whole tiles of {tile_m:g} m",
                          f"end them {tile_m:g} m before it, or choose a smaller grid.tile_px")  # fmt: skip
    return grid


def _other_area(crs: CRS, lon: float, lat: float) -> str | None:
    """Where a CRS is used, if that is far from a place; some project the far side of the Earth too, upside down."""
    area = crs.proj.area_of_use
    if area is None:
        return None
    middle = (area.west + (area.east + 360 * (area.east < area.west))) / 2
    half_width = (area.east - area.west) % 360 / 2 or 180
    away = abs((lon - middle + 180) % 360 - 180)
    near = away <= half_width + AREA_DEGREES and area.south - AREA_DEGREES <= lat <= area.north + AREA_DEGREES
    return None if near else str(area.name)


def _crosses_180(grid: Grid) -> bool:
    """Whether longitudes jump along the grid's upper or lower edge."""
    b, steps = grid.bounds, 65
    x = [b.left + (b.right - b.left) * k / (steps - 1) for k in range(steps)]
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    edges = [to_degrees.transform(x, [y] * steps)[0] for y in (b.bottom, b.top)]
    return any(abs(one - other) > 180 for lons in edges for one, other in pairwise(lons))
