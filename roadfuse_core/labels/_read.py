"""Road masks from rasters, from lines drawn at their width, and from areas."""

from __future__ import annotations

from typing import Protocol

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import features
from rasterio.enums import Resampling

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Grid, ground_metres
from roadfuse_core.imagery import RASTER_SUFFIXES, open_raster, read_warped
from roadfuse_core.labels._lines import place_lines, read_lines
from roadfuse_core.labels._widths import widths_of
from roadfuse_core.settings import City, MapSpec

__all__ = ["RoadMap", "open_map"]

# Pictures whose values change a little where they are packed: a mask's rim would become road.
LOSSY = (".jpg", ".jpeg", ".webp")
PIECE_SEGMENTS = 32
TRUE_METRE = 0.02


class RoadMap(Protocol):
    """A map of roads on a grid."""

    note: str

    def window(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Road, and where the map knows at all; both (height, width) bool."""

    def covers(self) -> bool:
        """Whether the map shares area with the grid."""


class RasterMap:
    """A mask in a file: above zero is road; pixels without data are unknown."""

    def __init__(self, path: str, spec: MapSpec, key: str, grid: Grid) -> None:
        self.path, self.spec, self.key, self.grid = path, spec, key, grid
        self.note = ""
        with open_raster(path, key, spec.crs) as raster:
            self.box = raster.box(grid.crs)

    def covers(self) -> bool:
        """Whether the raster shares area with the grid."""
        return bool(self.grid.tiles_covering(self.box))

    def window(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Road and known, by the nearest pixel."""
        box = self.grid.window_geobox(row, col, height, width)
        with open_raster(self.path, self.key, self.spec.crs) as raster:
            values, known = read_warped(raster, box, raster.bands[:1], Resampling.nearest)
        return (values[0] > 0) & known, known


class LineMap:
    """Lines drawn at their width, or areas as they are; the convex hull of all is where the map knows.

    Args:
        lines: Lines or areas in the grid's CRS.
        widths: (n,) metres, in the order of the lines.
        grid: The city's grid.
        note: What was left out or filled in, for people.
    """

    def __init__(self, lines: gpd.GeoDataFrame, widths: NDArray[np.float64], grid: Grid, note: str = "") -> None:
        self.grid, self.note = grid, note
        geometries = lines.geometry.to_numpy()
        self.shapes = np.concatenate([_lines_at_width(geometries, widths), _areas(geometries)])
        self.tree = shapely.STRtree(self.shapes)
        self.footprint = shapely.convex_hull(shapely.geometrycollections(geometries))

    def covers(self) -> bool:
        """Whether any line reaches into the grid."""
        return len(self.tree.query(shapely.box(*self.grid.bounds), predicate="intersects")) > 0

    def window(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Road and known; a pixel belongs to a shape that holds its centre."""
        box = self.grid.window_geobox(row, col, height, width)
        near = self.tree.query(shapely.box(*box.boundingbox.bbox))
        return self._burn(self.shapes[near], box), self._burn([self.footprint], box)

    @staticmethod
    def _burn(shapes: object, box: object) -> NDArray[np.bool_]:
        drawn = [s for s in shapes if not s.is_empty]  # type: ignore[attr-defined]
        if not drawn:
            return np.zeros(box.shape, np.bool_)  # type: ignore[attr-defined]
        return features.rasterize(drawn, box.shape, transform=box.affine, dtype="uint8").astype(bool)  # type: ignore[attr-defined]


def _metre(grid: Grid) -> float:
    """Metres on the ground of one of the grid's, where it is another one, as in Web Mercator."""
    metre = float(np.mean(ground_metres(grid.crs, grid)))
    return metre if abs(metre - 1) > TRUE_METRE else 1.0


def _lines_at_width(geometries: NDArray[np.object_], widths: NDArray[np.float64]) -> NDArray[np.object_]:
    """The ground that lines cover, long ones by pieces: a line that crosses itself costs the square of its vertices."""
    of_lines = shapely.get_dimensions(geometries) == 1
    lines, index = shapely.get_parts(geometries[of_lines], return_index=True)
    half_widths = widths[of_lines][index] / 2
    long = shapely.get_num_coordinates(lines) > 2 * PIECE_SEGMENTS
    pieces = [_pieces(line) for line in lines[long]]
    counts = [len(p) for p in pieces]
    drawn = shapely.buffer(lines[~long], half_widths[~long])
    return np.concatenate([drawn, shapely.buffer(np.array([p for one in pieces for p in one], object),
                                                 np.repeat(half_widths[long], counts))])  # fmt: skip


def _pieces(line: shapely.LineString) -> list[shapely.LineString]:
    xy = shapely.get_coordinates(line)
    return [shapely.LineString(xy[k : k + PIECE_SEGMENTS + 1]) for k in range(0, len(xy) - 1, PIECE_SEGMENTS)]


def _areas(geometries: NDArray[np.object_]) -> NDArray[np.object_]:
    """Areas as they are; small ones whose rim crosses itself are put right."""
    parts = shapely.get_parts(geometries[shapely.get_dimensions(geometries) == 2])
    small = shapely.get_num_coordinates(parts) <= 4 * PIECE_SEGMENTS
    parts[small] = shapely.buffer(parts[small], 0)
    return parts


def open_map(city: City, spec: MapSpec, key: str, grid: Grid) -> RoadMap:
    """The map behind a setting.

    Args:
        city: For relative paths.
        spec: The setting.
        key: Its dotted name, for messages.
        grid: The city's grid.

    Raises:
        ConfigError: The file is missing, has no CRS, holds several layers, or lacks usable widths.
        DataError: The file is unreadable, or a picture packed with loss.
    """
    path = city.path(spec.path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{key}.path", spec.path, problem, "give the path of a file")
    if path.suffix.lower() in LOSSY:
        raise DataError(f"{key}.path: {path} is packed with loss, so that its zeros are none; save the mask as GeoTIFF or PNG")
    if path.suffix.lower() in RASTER_SUFFIXES:
        return RasterMap(str(path), spec, f"{key}.path", grid)
    read = read_lines(path, spec, key)
    lines, far = place_lines(read, grid.crs, key, spec)
    widths, unknown = widths_of(lines, spec, key, str(path))
    widths = widths / _metre(grid)
    notes = [read.attrs.get("note", ""), f"{far} lie too far away to be placed" if far else "",
             f"{unknown} of {len(lines)} have no width of their own and get width_m" if unknown else ""]  # fmt: skip
    return LineMap(lines, widths, grid, "; ".join(n for n in notes if n))
