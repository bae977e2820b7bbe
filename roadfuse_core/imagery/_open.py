"""Opening of rasters: which files GDAL may read, where their pixels lie, and at what cost."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Bounds

__all__ = ["RASTER_SUFFIXES", "Raster", "open_raster"]

# Formats whose files hold their own pixels. Others of GDAL fetch them from elsewhere: by HTTP, or from any file of the machine.
DRIVERS = ["GTiff", "COG", "VRT", "PNG", "JPEG", "JP2OpenJPEG", "WEBP", "GIF", "BMP", "PNM", "HFA", "AAIGrid", "GSAG", "GSBG",
           "GS7BG", "XYZ", "EHdr", "ENVI", "netCDF", "GPKG", "MBTiles", "GRIB", "NITF", "RST", "SAGA", "DTED", "SRTMHGT",
           "USGSDEM", "PCIDSK", "RMF", "BT"]  # fmt: skip
PLAIN_DRIVERS = [name for name in DRIVERS if name != "VRT"]
# Local archives whose members a virtual raster may name.
ARCHIVES = ("/vsizip/", "/vsitar/", "/vsigzip/")
RASTER_SUFFIXES = frozenset({".tif", ".tiff", ".vrt", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".webp", ".gif", ".bmp", ".img",
                             ".asc", ".nc", ".mbtiles", ".bil", ".hgt", ".dt2", ".ntf", ".rst", ".pix", ".bt"})  # fmt: skip
# For what a file refers to in ways that are not looked for below.
ENVIRONMENT = {
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE": "SIBLING_OR_CHILD_OF_VRT_PATH",
}
# GDAL decodes a block as a whole, whatever part of it is asked for.
MAX_BLOCK_PX = 1 << 26
# Formats that are decoded from the first row, whatever row is asked for.
WHOLE = ("PNG", "JPEG", "GIF", "WEBP")
# GDAL opens a source once for each path that leads to it.
MAX_SOURCES = 1_000_000
MAX_DEPTH = 16
VRT_CLASSES = (None, "VRTWarpedDataset", "VRTPansharpenedDataset")
# Control points of a scan that no affine transform meets to within this many of its pixels need a warp of their own.
MAX_RESIDUAL_PX = 1.0
OUTLINE_POINTS = 21


@dataclass(frozen=True)
class Raster:
    """An open raster and its place.

    Attributes:
        source: The open dataset.
        path: Of the file.
        key: Dotted setting that names it, for messages.
        crs: WKT, or what the city file states.
        place: Pixel (column, row) to coordinates of `crs`.
        from_points: Whether `place` was fitted to ground control points.
    """

    source: DatasetReader
    path: str
    key: str
    crs: str
    place: Affine
    from_points: bool

    @property
    def bands(self) -> list[int]:
        """Numbers, from 0, of the bands that hold data and not transparency."""
        return [k for k, colour in enumerate(self.source.colorinterp) if colour != ColorInterp.alpha]

    def box(self, crs: str) -> Bounds:
        """The smallest box in another CRS that holds the raster, whichever way its rows and columns run.

        Raises:
            ConfigError: The CRS is none, or has no place for the raster.
        """
        along = np.linspace(0, 1, OUTLINE_POINTS)
        edges = [(along, 0 * along), (along, 0 * along + 1), (0 * along, along), (0 * along + 1, along)]
        cols, rows = np.concatenate(edges, 1) * np.array([[self.source.width], [self.source.height]])
        try:
            move = Transformer.from_crs(CRS.from_user_input(self.crs), crs, always_xy=True)
        except (CRSError, ProjError) as error:
            raise ConfigError(
                f"{_setting(self.key)}.crs", self.crs, "is not a CRS", "give a code such as EPSG:32633"
            ) from error
        x, y = move.transform(*(self.place @ (cols, rows)))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ConfigError(self.key, self.path, "cannot be placed in the city's CRS", "check its georeference and its CRS")
        return Bounds(float(x.min()), float(y.min()), float(x.max()), float(y.max()))


@contextmanager
def open_raster(path: str, key: str, crs: str | None) -> Iterator[Raster]:
    """A raster, open for reading.

    Nothing but local files is read: a description of a web service, or a virtual raster that refers to one, is refused.

    Args:
        path: Absolute.
        key: Dotted setting that names it, for messages.
        crs: What the city file states; goes before the file's own.

    Raises:
        DataError: GDAL cannot read the file, or only at a cost without bound.
        ConfigError: Neither the file nor the setting states a CRS, or the file says nothing of its place.
    """
    with rasterio.Env(**ENVIRONMENT):
        try:
            changed = os.stat(path)
        except OSError as error:
            raise DataError(f"{key}: {path} cannot be read ({error.strerror}); copy it again") from error
        _check_sources(path, key, changed.st_mtime_ns, changed.st_size)
        with _open(path, key) as source:
            yield _placed(source, path, key, crs)


def _placed(source: DatasetReader, path: str, key: str, crs: str | None) -> Raster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        points, points_crs = source.gcps
        own = source.crs or points_crs
        place = source.transform
    stated = crs or (own.to_wkt() if own else None)
    if stated is None:
        fix = f"state it as {_setting(key)}.crs, or write it into the file"
        raise ConfigError(key, path, "has no CRS", fix)
    fitted = bool(points) and place.is_identity
    if fitted:
        place = _fit(points, key, path)
    if place.is_identity:
        raise ConfigError(
            key, path, "does not say where it lies", "give it a world file, or a transform as docs/own-city.md shows"
        )
    return Raster(source, path, key, stated, place, fitted)


def _setting(key: str) -> str:
    """The setting above `sources` or `path`."""
    return key.rpartition(".")[0]


def _open(path: str, key: str, drivers: Sequence[str] = DRIVERS) -> DatasetReader:
    """The dataset, by a driver that reads local pixels alone; its blocks are small enough to be decoded often."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            source = DatasetReader(path, driver=list(drivers))
    except RasterioError as error:
        raise DataError(
            f"{key}: {path} is not a readable raster ({_first_line(error)}); copy it again, or convert it by gdal_translate"
        ) from error
    height, width = _block(source)
    if height * width > MAX_BLOCK_PX:
        source.close()
        raise DataError(
            f"{key}: {path} is stored in blocks of {width} × {height} px, each of which is decoded for every window; "
            f"write it in tiles: gdal_translate -co TILED=YES"
        )
    return source


def _block(source: DatasetReader) -> tuple[int, int]:
    """Height and width of what is decoded together, at most; a picture that is packed as a whole looks as if it had rows."""
    packed = source.driver in WHOLE or (source.driver == "GTiff" and source.compression and not _second_block(source))
    return source.shape if packed else max(source.block_shapes, key=math.prod, default=(0, 0))


def _second_block(source: DatasetReader) -> bool:
    """Whether a TIFF has more than one block."""
    return any(source.get_tag_item(f"BLOCK_OFFSET_{at}", "TIFF", bidx=1) for at in ("1_0", "0_1"))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _fit(points: list[rasterio.control.GroundControlPoint], key: str, path: str) -> Affine:
    """The affine transform nearest to ground control points."""
    at = np.array([[p.col, p.row, 1.0] for p in points])
    to = np.array([[p.x, p.y] for p in points])
    solution, _, rank, _ = np.linalg.lstsq(at, to, rcond=None)
    if rank < 3:
        raise ConfigError(key, path, f"has {len(points)} ground control points, which do not place it", "warp it by gdalwarp")
    (a, d), (b, e), (c, f) = solution
    place = Affine(a, b, c, d, e, f)
    miss_px = np.abs(to - at @ solution).max() / math.sqrt(abs(place.determinant) or 1)
    if miss_px > MAX_RESIDUAL_PX:
        raise ConfigError(
            key, path, f"has ground control points that bend it by up to {miss_px:.1f} px", "warp it by gdalwarp first"
        )
    return place


@lru_cache(maxsize=65536)
def _check_sources(path: str, key: str, changed_ns: int, size: int) -> int:
    """How many files GDAL opens to read a file, itself included; all of them are local rasters.

    Args:
        path: The file.
        key: For messages.
        changed_ns: Of the file, so that a changed one is checked again.
        size: Of the file, bytes.

    Raises:
        DataError: A virtual raster refers to something else, to itself, or to too much.
    """
    return _count_opens(Path(path), key, {}, ())


def _count_opens(path: Path, key: str, known: dict[Path, int], above: tuple[Path, ...]) -> int:
    if path in above or len(above) > MAX_DEPTH:
        raise DataError(f"{key}: {path} refers to itself, or to sources in sources; build it again by gdalbuildvrt")
    if path in known:
        return known[path]
    count, references = 1, _references(path, key)
    for reference in references:
        if _is_member(reference.text) and not reference.raw:
            _open(reference.text, key, PLAIN_DRIVERS).close()
            count += 1
            continue
        child = _local(reference, path, key)
        count += 1 if reference.raw else _count_opens(child, key, known, (*above, path))
        if count > MAX_SOURCES:
            raise DataError(f"{key}: {path} leads to more than {MAX_SOURCES:,} files; build it of the images themselves")
    if above and not references:
        _open(str(path), key).close()
    known[path] = count
    return count


class _Reference(NamedTuple):
    """What a file names as a source of pixels: a path, read as a raster or as raw bytes."""

    text: str
    raw: bool


def _references(path: Path, key: str) -> list[_Reference]:
    """Of a virtual raster its sources; of any raster the overviews that lie in another file by name."""
    found = []
    try:
        tree, beside = _trees(path)
    except (OSError, ElementTree.ParseError, ValueError, RecursionError) as error:
        raise DataError(f"{key}: {path} is not a readable raster ({_first_line(error)}); copy it again") from error
    if tree is not None:
        found += _sources(tree, path, key)
    if beside is not None:
        found += _overviews(beside, path)
    return found


def _trees(path: Path) -> tuple[ElementTree.Element | None, ElementTree.Element | None]:
    """A virtual raster as XML, and the XML that GDAL keeps beside a raster; None for what there is not."""
    tree = None
    with path.open("rb") as file:
        head = file.read(1024)
        if b"<VRTDataset" in head:
            tree = ElementTree.fromstring(head + file.read())
    beside = Path(f"{path}.aux.xml")
    return tree, ElementTree.parse(beside).getroot() if beside.is_file() else None


def _sources(tree: ElementTree.Element, vrt: Path, key: str) -> list[_Reference]:
    kind = tree.get("subClass")
    if kind not in VRT_CLASSES:
        raise DataError(f"{key}: {vrt} is a {kind}, which is not read; convert it by gdal_translate")
    raw = [e for band in tree.iter() if band.get("subClass") == "VRTRawRasterBand" for e in band.iter("SourceFilename")]
    named = [e for tag in ("SourceFilename", "SourceDataset") for e in tree.iter(tag)]
    return [_Reference(_named(e, vrt), e in raw) for e in named] + _overviews(tree, vrt)


def _overviews(tree: ElementTree.Element, raster: Path) -> list[_Reference]:
    named = [e.text or "" for e in tree.iter("MDI") if e.get("key") == "OVERVIEW_FILE"]
    return [_Reference(text.replace(":::BASE:::", f"{raster.parent}/"), False) for text in named]


def _named(element: ElementTree.Element, vrt: Path) -> str:
    text = element.text or ""
    relative = element.get("relativeToVRT", element.get("relativetoVRT"))
    return os.path.join(vrt.parent, text) if relative == "1" else text


def _is_member(text: str) -> bool:
    """Whether a reference is a member of an archive on this machine: `/vsizip/FILE/MEMBER`."""
    prefix = next((p for p in ARCHIVES if text.startswith(p)), None)
    if prefix is None or "/vsi" in text.removeprefix(prefix):
        return False
    return any(place.is_file() for place in (Path(text.removeprefix(prefix)), *Path(text.removeprefix(prefix)).parents))


def _local(reference: _Reference, vrt: Path, key: str) -> Path:
    """The plain file behind a reference; one that is read as raw bytes lies in the folder of the raster."""
    try:
        found = Path(reference.text).resolve(strict=True)
        plain = found.is_file()
    except (OSError, ValueError):
        plain = False
    shown = repr(reference.text[:200])
    if not plain:
        raise DataError(f"{key}: {vrt} refers to {shown}, which is not a file of this machine; build it of local images")
    if reference.raw and not found.is_relative_to(vrt.resolve().parent):
        raise DataError(f"{key}: {vrt} reads {shown} as raw bytes from another folder; put the file beside it")
    return found
