"""Windows of images on the grid, through rasterio's WarpedVRT."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from pyproj import CRS
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NodataShadowWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Bounds, Grid
from roadfuse_core.imagery._open import RASTER_SUFFIXES, Raster, open_raster
from roadfuse_core.imagery._parts import FilePart, parts_of
from roadfuse_core.settings import City, ImagerySpec
from roadfuse_core.wildcards import find_paths

__all__ = ["ImageFile", "ImageryReader", "RasterKey", "find_imagery", "identify", "read_warped"]

RasterKey = Literal["imagery", "lidar"]

SQUARE = 512
# What GDAL and others keep beside an image.
COMPANIONS = (".ovr", ".msk", ".xml", ".aux", ".prj", ".tfw", ".tifw", ".wld", ".pgw", ".jgw", ".j2w", ".bpw", ".gfw", ".hdr")


def find_imagery(city: City, key: RasterKey = "imagery") -> list[str]:
    """Absolute paths of the city's images, sorted; empty if it has none.

    Overviews, masks, world files and the like beside an image are not images.

    Args:
        city: The city.
        key: Which setting names them.

    Raises:
        ConfigError: A source matches nothing.
    """
    out: set[str] = set()
    spec: ImagerySpec | None = getattr(city, key)
    for text in spec.sources if spec else []:
        paths = _files_of(city, text)
        if not paths:
            raise ConfigError(f"{key}.sources", text, "matches no file", "correct the path or the pattern")
        out.update(paths)
    return sorted(out)


def _files_of(city: City, text: str) -> list[str]:
    """Images behind a file, a pattern, or folders with all that is below them."""
    found = find_paths(city.root, text)
    if found and found == [city.path(text)] and found[0].is_file():
        return [str(found[0])]
    files = [p for p in found if p.is_file() and not p.name.lower().endswith(COMPANIONS)]
    if not files:
        files = [p for folder in found for p in _below(folder) if p.suffix.lower() in RASTER_SUFFIXES]
    return [str(p) for p in files]


def _below(folder: Path) -> Iterator[Path]:
    """Files of a folder and of those within; hidden ones are nobody's data."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        yield from (Path(place, f) for f in sorted(files) if not f.startswith("."))


class ImageFile(NamedTuple):
    """An image as it is now; another one when the file is rewritten.

    Attributes:
        path: Absolute.
        size: Bytes.
        changed_ns: Time of the last change, nanoseconds since 1970.
        parts: Other files that it is read from: behind a virtual raster, and beside it.
    """

    path: str
    size: int
    changed_ns: int
    parts: tuple[FilePart, ...] = ()


def identify(paths: Sequence[str]) -> tuple[ImageFile, ...]:
    """What the files are now, with all that they are read from."""
    stats = [os.stat(p) for p in paths]
    return tuple(ImageFile(p, s.st_size, s.st_mtime_ns, parts_of(p)) for p, s in zip(paths, stats, strict=True))


def shown_bands(raster: Raster) -> list[int]:
    """Numbers, from 0, of the bands that are shown: red, green and blue by name, else the first three, or one."""
    colours = raster.source.colorinterp
    named = [colours.index(c) for c in (ColorInterp.red, ColorInterp.green, ColorInterp.blue) if c in colours]
    if len(named) == 3:
        return named
    return raster.bands[:3] if len(raster.bands) >= 3 else raster.bands[:1]


def palette_of(source: DatasetReader) -> NDArray[np.uint8] | None:
    """(4, values) the colour and its opacity behind each value of a file with a palette; None for others."""
    if source.colorinterp[0] != ColorInterp.palette:
        return None
    out = np.zeros((4, 1 << 8 * np.dtype(source.dtypes[0]).itemsize), np.uint8)
    for value, colour in source.colormap(1).items():
        out[:, value] = colour
    return out


def read_warped(
    raster: Raster, box: GeoBox, bands: Sequence[int], resampling: Resampling, nodata: float | None = None
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """A raster as it falls on the pixels of a box.

    Args:
        raster: An open raster.
        box: The pixels, in any CRS.
        bands: Numbers of the bands, from 0.
        resampling: Between pixels.
        nodata: Value of missing pixels; by default what the file states for each band.

    Returns:
        (bands, H, W) values; and (H, W) bool, where any of them is known: covered by the raster, not transparent, not masked,
        another value than the missing one, and a number.

    Raises:
        DataError: The file is damaged.
    """
    stated = [raster.source.nodatavals[k] if nodata is None else nodata for k in raster.bands]
    if len({repr(value) for value in stated}) <= 1:
        values, known = _warp(raster, box, resampling, stated[0] if stated else None)
        return values[list(bands)], known & _finite(values[list(bands)])
    parts = []
    for band in bands:
        value = stated[raster.bands.index(band)]
        values, known = _warp(raster, box, resampling, value, only=band)
        parts.append((values[band], known & _finite(values[band : band + 1])))
    return np.stack([values for values, _ in parts]), np.logical_or.reduce([known for _, known in parts])


def _warp(
    raster: Raster, box: GeoBox, resampling: Resampling, nodata: float | None, only: int | None = None
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """All bands, and where any band, or the only one that counts, is not the missing value.

    GDAL derives a mask from transparency for some types and counts of bands alone; so it is read as what it is: a band.
    """
    source, alpha = raster.source, ColorInterp.alpha in raster.source.colorinterp
    options: dict[str, object] = {"src_nodata": nodata, "nodata": nodata} if nodata is not None else {"add_alpha": not alpha}
    if raster.from_points:
        options["src_transform"] = raster.place
    if only is not None:
        options["UNIFIED_SRC_NODATA"] = "NO"
    height, width = box.shape
    with (
        _damage(raster),
        warnings.catch_warnings(),
        # Whatever its type, a pixel is transparent or it is not.
        WarpedVRT(source, src_crs=raster.crs, crs=str(box.crs), transform=box.affine, height=height, width=width,
                  resampling=resampling, SRC_ALPHA_MAX="1", **options) as vrt,
    ):  # fmt: skip
        warnings.simplefilter("ignore", NodataShadowWarning)
        values = vrt.read()
        transparency = [k for k, colour in enumerate(vrt.colorinterp) if colour == ColorInterp.alpha]
    known = np.ones((height, width), bool)
    for band in transparency:
        known &= values[band] > 0
    if nodata is not None and not np.isnan(nodata):
        counted = raster.bands if only is None else [only]
        known &= (values[counted] != np.asarray(nodata).astype(values.dtype)).any(0)
    return values, known


@contextmanager
def _damage(raster: Raster) -> Iterator[None]:
    """What GDAL finds while it reads is a fault of the file."""
    try:
        yield
    except RasterioError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{raster.key}: {raster.path} is damaged ({cause}); copy it again") from error


def _finite(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """(H, W): where all bands hold numbers; a file of floats may miss pixels without saying so."""
    if not np.issubdtype(values.dtype, np.floating):
        return np.ones(values.shape[1:], bool)
    return np.asarray(np.isfinite(values).all(0))


def _resampling(source: DatasetReader) -> Resampling:
    """Between two numbers of a palette there is no colour."""
    return Resampling.bilinear if palette_of(source) is None else Resampling.nearest


class ImageryReader:
    """Reads a city's images as RGB on its grid; where files overlap, the first by name wins.

    Args:
        spec: The imagery settings.
        paths: Absolute paths.
        grid: The city's grid.
        key: Which setting they come from.

    Raises:
        ConfigError: A file has no CRS, needs a value range, or lies elsewhere.
        DataError: A file is unreadable.
    """

    def __init__(self, spec: ImagerySpec, paths: list[str], grid: Grid, key: RasterKey = "imagery") -> None:
        self.spec, self.grid, self.key = spec, grid, key
        self.files = [(path, self._inspect(path)) for path in paths]

    def _inspect(self, path: str) -> Bounds:
        """The file's box in the grid's CRS."""
        key = f"{self.key}.sources"
        with open_raster(path, key, self.spec.crs) as raster:
            dtype = raster.source.dtypes[0]
            if dtype.startswith("complex"):
                raise DataError(f"{key}: {path} holds complex numbers; convert it to amplitudes")
            if dtype != "uint8" and self.spec.value_range is None and palette_of(raster.source) is None:
                raise ConfigError(f"{self.key}.value_range", None, f"is needed for {dtype} values in {path}",
                                  "give the values shown as black and white, for example [0, 3000]")  # fmt: skip
            if self.spec.nodata is not None and not in_dtype_range(self.spec.nodata, dtype):
                raise ConfigError(f"{self.key}.nodata", self.spec.nodata, f"is no value of {dtype}, the type of {path}",
                                  "give the value that missing pixels have")  # fmt: skip
            return raster.box(self.grid.crs)

    def covers(self) -> bool:
        """Whether any file shares area with the grid."""
        return any(self.grid.tiles_covering(box) for _, box in self.files)

    def window(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """RGB of a pixel rectangle, which may reach past the grid.

        Returns:
            (3, height, width) uint8, zeros where nothing is known; and (height, width) bool, where something is. Bands are
            those that a file calls red, green and blue, else the first three; one band is grey, or looked up in its palette.
        """
        rgb = np.zeros((3, height, width), np.uint8)
        valid = np.zeros((height, width), bool)
        res, b = self.grid.resolution_m, self.grid.bounds
        left, top = b.left + col * res, b.top - row * res
        for path, box in self.files:
            apart = box.right <= left or box.left >= left + width * res or box.top <= top - height * res or box.bottom >= top
            if apart or valid.all():
                continue
            values, known = self._read(path, row, col, height, width)
            fresh = known & ~valid
            if fresh.all():
                rgb[:] = values
            else:
                np.copyto(rgb, values, where=fresh)
            valid |= known
        return rgb, valid

    def boxes(self) -> list[Bounds]:
        """Each file's box in the grid's CRS, in the order of the paths."""
        return [box for _, box in self.files]

    def _read(self, path: str, row: int, col: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        with open_raster(path, f"{self.key}.sources", self.spec.crs) as raster:
            corner = self._corner(raster)
            if corner is not None:
                return self._read_aligned(raster, row - corner[0], col - corner[1], height, width)
            return self._read_warped(raster, row, col, height, width)

    def _read_warped(
        self, raster: Raster, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """By squares of the grid, so that a pixel does not depend on the rectangle.

        GDAL approximates a warp over the rectangle that it is asked for, up to an eighth of a pixel.
        """
        rgb, known = np.zeros((3, height, width), np.uint8), np.zeros((height, width), bool)
        for r in range(row // SQUARE * SQUARE, row + height, SQUARE):
            for c in range(col // SQUARE * SQUARE, col + width, SQUARE):
                values, seen = self._square(raster, r, c)
                r0, r1, c0, c1 = max(r, row), min(r + SQUARE, row + height), max(c, col), min(c + SQUARE, col + width)
                its = (slice(r0 - r, r1 - r), slice(c0 - c, c1 - c))
                at = (slice(r0 - row, r1 - row), slice(c0 - col, c1 - col))
                rgb[:, at[0], at[1]], known[at] = values[:, its[0], its[1]], seen[its]
        return rgb, known

    def _square(self, raster: Raster, row: int, col: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        box = self.grid.window_geobox(row, col, SQUARE, SQUARE)
        values, known = read_warped(raster, box, shown_bands(raster), _resampling(raster.source), self.spec.nodata)
        colours, opaque = self._colours(raster, values)
        return colours, known & opaque

    def _corner(self, raster: Raster) -> tuple[int, int] | None:
        """Row and column of the grid at which a file's pixels begin, where they are the grid's own; else None."""
        source = raster.source
        plain = self.spec.nodata is None and ColorInterp.alpha not in source.colorinterp
        if not plain or not all(flags == [MaskFlags.all_valid] for flags in source.mask_flag_enums):
            return None
        if CRS.from_user_input(raster.crs) != CRS.from_user_input(self.grid.crs):
            return None
        to_pixel = ~self.grid.affine @ raster.place
        if not to_pixel.almost_equals(Affine.translation(round(to_pixel.c), round(to_pixel.f)), 1e-6):
            return None
        return round(to_pixel.f), round(to_pixel.c)

    def _read_aligned(
        self, raster: Raster, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Without warping: the same bytes, in a fraction of the time."""
        rgb, known = np.zeros((3, height, width), np.uint8), np.zeros((height, width), bool)
        source = raster.source
        r0, r1, c0, c1 = max(row, 0), min(row + height, source.height), max(col, 0), min(col + width, source.width)
        if r0 < r1 and c0 < c1:
            at = (slice(r0 - row, r1 - row), slice(c0 - col, c1 - col))
            bands = [number + 1 for number in shown_bands(raster)]
            with _damage(raster):
                values = source.read(bands, window=Window(c0, r0, c1 - c0, r1 - r0))
            rgb[:, at[0], at[1]], opaque = self._colours(raster, values)
            known[at] = _finite(values) & opaque
        return rgb, known

    def _colours(self, raster: Raster, values: NDArray[np.generic]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Values of the bands shown (3 or 1, H, W) as bytes; those of a palette are looked up in it. And which are opaque."""
        palette = palette_of(raster.source)
        if palette is not None:
            found = palette[:, values[0]]
            return found[:3], found[3] > 0
        opaque = np.ones(values.shape[1:], bool)
        if self.spec.value_range is None and values.dtype == np.uint8:
            return values.astype(np.uint8, copy=False), opaque
        low, high = self.spec.value_range or (0, 255)
        scaled = np.nan_to_num((values.astype(np.float32) - low) * np.float32(255 / (high - low)), nan=0)
        return np.rint(scaled.clip(0, 255)).astype(np.uint8), opaque
