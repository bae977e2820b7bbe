"""Road masks from rasters, from lines drawn at their width, and from areas."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataSourceError
from rasterio import features
from rasterio.enums import Resampling

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Grid
from roadfuse_core.imagery import RASTER_SUFFIXES, open_raster, read_warped
from roadfuse_core.settings import City, MapSpec

__all__ = ["RoadMap", "lanes_of", "open_map", "read_lines"]

LINES, AREAS = ("LineString", "MultiLineString"), ("Polygon", "MultiPolygon")
DRIVABLE = ("motorway", "trunk", "primary", "secondary", "tertiary", "unclassified", "residential", "living_street",
            "service", "motorway_link", "trunk_link", "primary_link", "secondary_link", "tertiary_link", "road",
            "track")  # fmt: skip
# Lanes by class where a way does not say (PP-LinkNet, as released).
WIDE = ("motorway", "trunk", "primary", "secondary", "tertiary")
LANES = {kind: 1.5 for k in WIDE for kind in (k, f"{k}_link")} | {"track": 0.5, "living_street": 0.5}


class RoadMap(Protocol):
    """A map of roads on a grid."""

    def window(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Road, and where the map knows at all; both (height, width) bool."""

    def covers(self) -> bool:
        """Whether the map shares area with the grid."""


class RasterMap:
    """A mask in a file: above zero is road; pixels without data are unknown."""

    def __init__(self, path: str, spec: MapSpec, key: str, grid: Grid) -> None:
        self.path, self.spec, self.key, self.grid = path, spec, key, grid
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
    """Lines drawn at their width, or areas as they are; the convex hull of all is where the map knows."""

    def __init__(self, lines: gpd.GeoDataFrame, widths: NDArray[np.float64], grid: Grid) -> None:
        self.grid = grid
        self.shapes = shapely.buffer(lines.geometry.to_numpy(), widths / 2)
        self.tree = shapely.STRtree(self.shapes)
        self.footprint = shapely.convex_hull(shapely.geometrycollections(lines.geometry.to_numpy()))

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


def open_map(city: City, spec: MapSpec, key: str, grid: Grid) -> RoadMap:
    """The map behind a setting.

    Args:
        city: For relative paths.
        spec: The setting.
        key: Its dotted name, for messages.
        grid: The city's grid.

    Raises:
        ConfigError: The file is missing, has no CRS, or lacks the width column.
        DataError: The file is unreadable.
    """
    path = city.path(spec.path)
    if not path.is_file():
        raise ConfigError(f"{key}.path", spec.path, "does not exist", "correct the path")
    if path.suffix.lower() in RASTER_SUFFIXES:
        return RasterMap(str(path), spec, f"{key}.path", grid)
    lines = read_lines(path, spec, key).to_crs(grid.crs)
    widths = np.full(len(lines), spec.width_m)
    if spec.lane_m is not None:
        widths = lanes_of(lines, key, str(path)) * spec.lane_m
    if spec.width is not None:
        if spec.width not in lines.columns:
            columns = ", ".join(c for c in lines.columns if c != "geometry")
            raise ConfigError(f"{key}.width", spec.width, f"is not a column of {path}", f"it has: {columns}")
        widths = pd.to_numeric(lines[spec.width], errors="coerce").fillna(spec.width_m).to_numpy(float)
    widths = np.where(lines.geom_type.isin(AREAS), 0, widths)
    return LineMap(lines, widths, grid)


def lanes_of(ways: gpd.GeoDataFrame, key: str, path: str) -> NDArray[np.float64]:
    """Lanes of OpenStreetMap's ways: as tagged, or by class (1.5, 1 or one half).

    Args:
        ways: With a column `highway`, and `lanes`, or `other_tags` as GDAL reads them from PBF.
        key: For messages.
        path: For messages.

    Returns:
        (n,) lanes, more than 0.

    Raises:
        ConfigError: There is no column `highway`.
    """
    if "highway" not in ways.columns:
        raise ConfigError(
            f"{key}.lane_m", path, "has no column `highway`", "leave lane_m out, or give an extract of OpenStreetMap"
        )
    lanes = pd.Series(np.nan, ways.index)
    if "lanes" in ways.columns:
        lanes = pd.to_numeric(ways["lanes"], errors="coerce")
    if "other_tags" in ways.columns:
        lanes = lanes.fillna(pd.to_numeric(ways["other_tags"].astype(str).str.extract(r'"lanes"=>"([\d.]+)"')[0]))
    by_class = ways["highway"].map(LANES).fillna(1.0)
    return lanes.where(lanes > 0, by_class).to_numpy(float)


def read_lines(path: Path, spec: MapSpec, key: str) -> gpd.GeoDataFrame:
    """The lines of a vector file, or its areas where it has no line, in its own CRS.

    Args:
        path: GeoPackage, GeoJSON, GeoParquet, shapefile, OpenStreetMap (.osm.pbf or .osm: its drivable roads), any of the
            text formats packed by gzip, or a zip of two text files as trajectory benchmarks publish them: vertices
            `id,x,y` and edges `id,from,to,…`.
        spec: For the CRS.
        key: For messages.

    Raises:
        ConfigError: Neither file nor setting states a CRS.
        DataError: The file is unreadable or holds neither.
    """
    try:
        table = _read_table(path)
    except (DataSourceError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{key}.path: {path} is not a readable map ({str(error).splitlines()[0]}); check the file") from error
    if spec.crs is not None:
        table = table.set_crs(spec.crs, allow_override=True)
    if table.crs is None:
        raise ConfigError(f"{key}.path", spec.path, "has no CRS", f"state it as {key}.crs")
    kinds = table.geom_type
    wanted = kinds.isin(LINES) if kinds.isin(LINES).any() else kinds.isin(AREAS)
    if not wanted.any():
        raise DataError(f"{key}.path: {path} holds neither lines nor areas; give a map of road centre lines or of road areas")
    return table[wanted]


def _read_table(path: Path) -> gpd.GeoDataFrame:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".geoparquet"):
        return gpd.read_parquet(path)
    file: str | Path = path
    if suffix == ".gz":
        file, suffix = f"/vsigzip/{path}", path.with_suffix("").suffix.lower()
    if suffix in (".pbf", ".osm"):
        ways = gpd.read_file(file, layer="lines")
        return ways[ways["highway"].isin(DRIVABLE)]
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.startswith("__MACOSX")]
            texts = {part: next((n for n in names if part in n and n.endswith(".txt")), None) for part in ("vertices", "edges")}
            if all(texts.values()):
                with archive.open(str(texts["vertices"])) as v, archive.open(str(texts["edges"])) as e:
                    return _graph(pd.read_csv(v, header=None), pd.read_csv(e, header=None))
    return gpd.read_file(file)


def _graph(vertices: pd.DataFrame, edges: pd.DataFrame) -> gpd.GeoDataFrame:
    xy = vertices.set_index(0)[[1, 2]]
    ends = np.stack([xy.loc[edges[k]].to_numpy(float) for k in (1, 2)], 1)
    return gpd.GeoDataFrame(geometry=list(shapely.linestrings(ends)))
