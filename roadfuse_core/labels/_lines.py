"""Lines and areas of vector files: which layer, which of them are roads, and where they lie."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path, PurePosixPath

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely
from numpy.typing import NDArray
from pyproj.exceptions import CRSError, ProjError

from roadfuse_core.errors import ConfigError, DataError, RoadFuseError
from roadfuse_core.settings import MapSpec

__all__ = ["place_lines", "read_lines"]

LINES, AREAS = ("LineString", "MultiLineString"), ("Polygon", "MultiPolygon")
DRIVABLE = ("motorway", "trunk", "primary", "secondary", "tertiary", "unclassified", "residential", "living_street",
            "service", "motorway_link", "trunk_link", "primary_link", "secondary_link", "tertiary_link", "road",
            "track")  # fmt: skip
# Columns in which OpenStreetMap, its extracts by Geofabrik, and Overture keep the class of a road.
CLASS_COLUMNS = ("highway", "fclass", "class")
VECTORS = (".shp", ".gpkg", ".geojson", ".json", ".fgb", ".gml", ".kml", ".tab", ".mif", ".osm", ".pbf", ".parquet")
KINDS = "GeoPackage, GeoJSON, GeoParquet, shapefile, FlatGeobuf, .osm, .osm.pbf, a zip of one of them, GeoTIFF or PNG"
GEOMETRY_COLUMNS = ("geometry", "geom", "wkb_geometry", "the_geom", "wkb", "shape")
# Texts by which GDAL would read other files, or the network, in the place of this one.
ELSEWHERE = (b"<ogrvrt", b"<ogrwfs", b"<ogrcsw", b"gdal_streamed_alg", b"<vrtdataset", b"<gdal_w")
# No position on Earth is farther from the origin of a projection than this.
MAX_COORDINATE = 1e8

# A map is a file of this machine: nothing in it makes GDAL fetch anything.
pyogrio.set_gdal_config_options({"CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none", "GDAL_HTTP_PROXY": "http://127.0.0.1:9"})


def read_lines(path: Path, spec: MapSpec, key: str) -> gpd.GeoDataFrame:
    """The lines of a vector file, or its areas where it has no line, in its own CRS.

    Of tables with the road classes of OpenStreetMap or Overture only what cars drive on is taken.

    Args:
        path: GeoPackage, GeoJSON, GeoParquet or Parquet of WKB, shapefile, OpenStreetMap (.osm.pbf or .osm), any of the
            text formats packed by gzip, a zip of one of these, or a zip of two text files as trajectory benchmarks
            publish them: vertices `id,x,y` and edges `id,from,to,…`.
        spec: For the CRS and the layer.
        key: For messages.

    Raises:
        ConfigError: Neither file nor setting states a CRS, or the layer is not clear.
        DataError: The file is unreadable or holds neither.
    """
    try:
        _refuse_references(path, key)
        with np.errstate(invalid="ignore"):  # coordinates that are no numbers are refused below
            table = _read_table(path, spec, key)
        table = table.explode(ignore_index=True) if (table.geom_type == "GeometryCollection").any() else table
    except RoadFuseError:
        raise
    # GDAL's and zipfile's errors are RuntimeErrors, ValueErrors or KeyErrors; nothing is swallowed: each names the file.
    except (RuntimeError, OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, pa.ArrowException,
            shapely.errors.ShapelyError) as error:  # fmt: skip
        raise DataError(_unreadable(path, key, error)) from error
    if spec.crs is not None:
        table = table.set_crs(spec.crs, allow_override=True)
    if table.crs is None:
        raise ConfigError(f"{key}.path", spec.path, "has no CRS", f"state it as {key}.crs")
    table = table[~(table.geometry.is_empty | table.geometry.isna())]
    of_lines = table.geom_type.isin(LINES)
    wanted = of_lines if of_lines.any() else table.geom_type.isin(AREAS)
    if not wanted.any():
        raise DataError(f"{key}.path: {path} holds neither lines nor areas; give a map of road centre lines or of road areas")
    return _drivable(table[wanted])


def _unreadable(path: Path, key: str, error: Exception) -> str:
    found = next((line for line in str(error).splitlines() if line), type(error).__name__)
    if path.suffix.lower() in (".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz"):
        return f"{key}.path: {path} is packed in a way that is not read; unpack it, or pack it by gzip or zip"
    if "not recognized" in found and path.suffix.lower() not in (*VECTORS, ".zip", ".gz"):
        return f"{key}.path: {path} is of a kind that is not read as a map; give one of: {KINDS}"
    return f"{key}.path: {path} is not a readable map ({found.split(';')[0]}); check the file"


def _refuse_references(path: Path, key: str) -> None:
    with path.open("rb") as file:
        head = file.read(4096).lower()
    if any(text in head for text in ELSEWHERE):
        raise DataError(f"{key}.path: {path} only refers to another map; give that one")


def place_lines(lines: gpd.GeoDataFrame, crs: str, key: str, spec: MapSpec) -> tuple[gpd.GeoDataFrame, int]:
    """Lines in a grid's CRS, and the number of those that lie too far away to have a place in it.

    Raises:
        ConfigError: Coordinates do not fit the CRS that the file or the setting states.
    """
    bounds = lines.geometry.bounds.to_numpy()
    fix = f"state the CRS of the file as {key}.crs"
    if not np.isfinite(bounds).all():
        raise ConfigError(f"{key}.path", spec.path, "has coordinates that are no numbers", "correct the file")
    if lines.crs.is_geographic and (np.abs(bounds) > np.array([360, 90, 360, 90]) * 1.001).any():
        far = bounds[np.abs(bounds).max(1).argmax()]
        raise ConfigError(
            f"{key}.path", spec.path, f"has coordinates that are no degrees, such as {far[0]:.6g}, {far[1]:.6g}", fix
        )
    try:
        with np.errstate(all="ignore"):
            placed = lines.to_crs(crs)
    except (CRSError, ProjError, ValueError) as error:
        raise ConfigError(f"{key}.path", spec.path, f"cannot be placed in the city's CRS ({error})", fix) from error
    both = np.concatenate([bounds, placed.geometry.bounds.to_numpy()], 1)
    near = (np.isfinite(both) & (np.abs(both) < MAX_COORDINATE)).all(1)
    if not near.any():
        raise ConfigError(f"{key}.path", spec.path, "cannot be placed in the city's CRS", fix)
    return placed[near], int((~near).sum())


def _read_table(path: Path, spec: MapSpec, key: str) -> gpd.GeoDataFrame:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".geoparquet"):
        return _read_parquet(path)
    if suffix == ".gz":
        return _read_layer(f"/vsigzip/{path}", path.with_suffix("").suffix.lower(), spec, key)
    if suffix == ".zip":
        return _read_zip(path, spec, key)
    return _read_layer(str(path), suffix, spec, key)


def _read_parquet(path: Path) -> gpd.GeoDataFrame:
    """GeoParquet, or a table with a column of WKB, as DuckDB, PostGIS and pandas write them."""
    if b"geo" in (pq.read_schema(path).metadata or {}):
        return gpd.read_parquet(path)
    table = pd.read_parquet(path)
    names = [c for c in table.columns if str(c).lower() in GEOMETRY_COLUMNS]
    if not names:
        raise ValueError(f"no column of geometries among {', '.join(map(str, table.columns))}")
    values = table.pop(names[0]).to_numpy()
    read = shapely.from_wkt if any(isinstance(v, str) for v in values) else shapely.from_wkb
    return gpd.GeoDataFrame(table, geometry=read(values))


def _read_zip(path: Path, spec: MapSpec, key: str) -> gpd.GeoDataFrame:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if not n.startswith("__MACOSX") and not PurePosixPath(n).name.startswith(".")]
        texts = {part: next((n for n in names if part in n and n.endswith(".txt")), None) for part in ("vertices", "edges")}
        if all(texts.values()):
            with archive.open(str(texts["vertices"])) as v, archive.open(str(texts["edges"])) as e:
                return _graph(pd.read_csv(v, header=None), pd.read_csv(e, header=None))
    maps = [n for n in names if PurePosixPath(n).suffix.lower() in VECTORS]
    stems = [PurePosixPath(n).stem for n in maps]
    if spec.layer in stems:
        maps, spec = [maps[stems.index(spec.layer)]], spec.model_copy(update={"layer": None})
    if len(maps) > 1:
        raise ConfigError(f"{key}.layer", spec.layer, f"names no map of {path}", f"it has: {', '.join(stems[:20])}")
    inside = f"/vsizip/{path}" + (f"/{maps[0]}" if maps else "")
    return _read_layer(inside, PurePosixPath(maps[0]).suffix.lower() if maps else "", spec, key)


def _read_layer(file: str, suffix: str, spec: MapSpec, key: str) -> gpd.GeoDataFrame:
    """The layer that the setting names, or the only one with lines, or with areas where there are no lines."""
    layers = {str(name): str(kind) for name, kind in pyogrio.list_layers(file) if kind is not None}
    name = spec.layer
    if suffix in (".pbf", ".osm"):
        name = name or "lines"
    elif name is None:
        name = _only_layer(file, layers, spec, key)
    if name is not None and name not in layers:
        raise ConfigError(
            f"{key}.layer", name, f"is not a layer of {spec.path}", f"it has: {', '.join(layers) or 'none with geometries'}"
        )
    columns = list(pyogrio.read_info(file, layer=name)["fields"])
    wanted = [c for c in columns if c in (*CLASS_COLUMNS, "subtype", "lanes", "other_tags", spec.width)]
    table = gpd.read_file(file, layer=name, columns=wanted)
    if suffix in (".pbf", ".osm"):
        table = table[table["highway"].isin(DRIVABLE)]
    table.attrs["columns"] = columns
    return table


def _only_layer(file: str, layers: dict[str, str], spec: MapSpec, key: str) -> str | None:
    if len(layers) <= 1:
        return None
    for words in (("Line", "Curve", "Unknown", "Collection"), ("Polygon", "Surface")):
        fit = [name for name, kind in layers.items() if any(word in kind for word in words)]
        if len(fit) > 1:
            fit = [name for name in fit if pyogrio.read_info(file, layer=name, force_feature_count=True)["features"]]
        if len(fit) == 1:
            return fit[0]
        if fit:
            raise ConfigError(
                f"{key}.layer", None, f"is needed: {spec.path} has several layers", f"name one of: {', '.join(fit)}"
            )
    return next(iter(layers))


def _drivable(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """What cars drive on, where a column tells the class of each line; a table without any drivable road stays as it is."""
    column = next((c for c in CLASS_COLUMNS if c in table.columns and (c != "class" or "subtype" in table.columns)), None)
    if column is None:
        return table
    drivable = np.array([_is_drivable(value) for value in table[column]], bool)
    if "subtype" in table.columns and (table["subtype"] == "road").any():
        drivable &= (table["subtype"] == "road").to_numpy()
    if not drivable.any() or drivable.all():
        return table
    kept = table[drivable]
    kept.attrs["note"] = f"{len(kept):,} of {len(table):,} lines are roads for cars, by `{column}`"
    return kept


def _is_drivable(value: object) -> bool:
    """Of one class, or of several of a simplified graph: `['residential', 'service']`."""
    words = value if isinstance(value, list | tuple | np.ndarray) else re.findall(r"[a-z_]+", str(value))
    return any(re.sub(r"_grade\d?$", "", str(word)) in DRIVABLE for word in words)


def _graph(vertices: pd.DataFrame, edges: pd.DataFrame) -> gpd.GeoDataFrame:
    xy = vertices.set_index(0)[[1, 2]]
    ends: NDArray[np.float64] = np.stack([xy.loc[edges[k]].to_numpy(float) for k in (1, 2)], 1)
    return gpd.GeoDataFrame(geometry=list(shapely.linestrings(ends)))
