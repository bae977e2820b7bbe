"""Warped windows through rasterio's WarpedVRT and rioxarray."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import rasterio
import rioxarray
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Bounds, Grid
from roadfuse_core.imagery._parts import FilePart, parts_of
from roadfuse_core.settings import City, ImagerySpec

__all__ = ["ImageFile", "ImageryReader", "RasterKey", "find_imagery", "identify", "open_raster", "warped"]

RasterKey = Literal["imagery", "lidar"]

SQUARE = 512


def find_imagery(city: City, key: RasterKey = "imagery") -> list[str]:
    """Absolute paths of the city's images, sorted; empty if it has none.

    Args:
        city: The city.
        key: Which setting names them.

    Raises:
        ConfigError: A source matches nothing.
    """
    out: set[str] = set()
    spec: ImagerySpec | None = getattr(city, key)
    for text in spec.sources if spec else []:
        paths = [p for p in glob.glob(str(city.path(text)), recursive=True) if Path(p).is_file()]
        if not paths:
            raise ConfigError(f"{key}.sources", text, "matches no file", "correct the path or the pattern")
        out.update(paths)
    return sorted(out)


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


@contextmanager
def open_raster(path: str, key: str, crs: str | None) -> Iterator[tuple[DatasetReader, str]]:
    """A raster and the CRS it is in.

    Raises:
        DataError: GDAL cannot read the file.
        ConfigError: Neither the file nor the setting states a CRS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            source = rasterio.open(path)
        except RasterioIOError as error:
            raise DataError(f"{key}: {path} is not a readable raster ({error}); copy it again") from error
    with source:
        stated = crs or (source.crs.to_wkt() if source.crs else None)
        if stated is None:
            raise ConfigError(key, path, "has no CRS", f"state it as {key.split('.')[0]}.crs, or write it into the file")
        yield source, stated


def raster_box(source: DatasetReader, move: Transformer) -> Bounds:
    """A raster's box after a transformation of coordinates."""
    b = source.bounds
    return Bounds(*move.transform_bounds(b.left, b.bottom, b.right, b.top, densify_pts=21))


def bands_of(source: DatasetReader) -> list[int]:
    """Numbers, from 0, of the bands that are shown: red, green and blue by name, else the first three, or one."""
    shown = [
        source.colorinterp.index(c) for c in (ColorInterp.red, ColorInterp.green, ColorInterp.blue) if c in source.colorinterp
    ]
    return shown if len(shown) == 3 else [0, 1, 2] if source.count >= 3 else [0]


def palette_of(source: DatasetReader) -> NDArray[np.uint8] | None:
    """(3, values) the colour behind each value of a file with a palette; None for others."""
    if source.colorinterp[0] != ColorInterp.palette:
        return None
    out = np.zeros((3, 1 << 8 * np.dtype(source.dtypes[0]).itemsize), np.uint8)
    for value, colour in source.colormap(1).items():
        out[:, value] = colour[:3]
    return out


def _finite(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """(H, W): where all bands hold numbers; a file of floats may miss pixels without saying so."""
    if not np.issubdtype(values.dtype, np.floating):
        return np.ones(values.shape[1:], bool)
    return np.asarray(np.isfinite(values).all(0))


def _resampling(source: DatasetReader) -> Resampling:
    """Between two numbers of a palette there is no colour."""
    return Resampling.bilinear if palette_of(source) is None else Resampling.nearest


@contextmanager
def warped(
    source: DatasetReader, crs: str, nodata: float | None, grid: Grid, row: int, col: int, height: int, width: int,
    resampling: Resampling,
) -> Iterator[WarpedVRT]:  # fmt: skip
    """A pixel rectangle of the grid as a virtual raster; its mask says what the source covers."""
    box = grid.window_geobox(row, col, height, width)
    value = source.nodata if nodata is None else nodata
    alpha = ColorInterp.alpha in source.colorinterp
    options = {"src_nodata": value, "nodata": value} if value is not None else {"add_alpha": not alpha}
    with WarpedVRT(source, src_crs=crs, crs=str(box.crs), transform=box.affine, height=height, width=width,
                   resampling=resampling, **options) as vrt:  # fmt: skip
        yield vrt


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
        with open_raster(path, f"{self.key}.sources", self.spec.crs) as (source, crs):
            if source.dtypes[0] != "uint8" and self.spec.value_range is None and palette_of(source) is None:
                raise ConfigError(f"{self.key}.value_range", None, f"is needed for {source.dtypes[0]} values in {path}",
                                  "give the values shown as black and white, for example [0, 3000]")  # fmt: skip
            try:
                move = Transformer.from_crs(CRS.from_user_input(crs), self.grid.crs, always_xy=True)
            except CRSError as error:
                raise ConfigError(f"{self.key}.crs", crs, "is not a CRS", "give a code such as EPSG:32633") from error
            box = raster_box(source, move)
        if not all(np.isfinite(box)):
            raise ConfigError(f"{self.key}.sources", path, "cannot be placed in the city's CRS", "check its georeference")
        return box

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
        with open_raster(path, f"{self.key}.sources", self.spec.crs) as (source, crs):
            corner = self._corner(source, crs)
            if corner is not None:
                return self._read_aligned(source, row - corner[0], col - corner[1], height, width)
            return self._read_warped(source, crs, row, col, height, width)

    def _read_warped(
        self, source: DatasetReader, crs: str, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """By squares of the grid, so that a pixel does not depend on the rectangle.

        GDAL approximates a warp over the rectangle that it is asked for, up to an eighth of a pixel.
        """
        rgb, known = np.zeros((3, height, width), np.uint8), np.zeros((height, width), bool)
        for r in range(row // SQUARE * SQUARE, row + height, SQUARE):
            for c in range(col // SQUARE * SQUARE, col + width, SQUARE):
                values, seen = self._square(source, crs, r, c)
                r0, r1, c0, c1 = max(r, row), min(r + SQUARE, row + height), max(c, col), min(c + SQUARE, col + width)
                its = (slice(r0 - r, r1 - r), slice(c0 - c, c1 - c))
                at = (slice(r0 - row, r1 - row), slice(c0 - col, c1 - col))
                rgb[:, at[0], at[1]], known[at] = values[:, its[0], its[1]], seen[its]
        return rgb, known

    def _square(self, source: DatasetReader, crs: str, row: int, col: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        with (
            warnings.catch_warnings(),
            warped(source, crs, self.spec.nodata, self.grid, row, col, SQUARE, SQUARE, _resampling(source)) as vrt,
        ):
            # A value that the city file states goes before an alpha band.
            warnings.simplefilter("ignore", NodataShadowWarning)
            values = np.asarray(rioxarray.open_rasterio(vrt))[bands_of(source)]
            return self._colours(source, values), (vrt.dataset_mask() > 0) & _finite(values)

    def _corner(self, source: DatasetReader, crs: str) -> tuple[int, int] | None:
        """Row and column of the grid at which a file's pixels begin, where they are the grid's own; else None."""
        plain = self.spec.nodata is None and source.nodata is None and ColorInterp.alpha not in source.colorinterp
        if not plain or not all(MaskFlags.all_valid in flags for flags in source.mask_flag_enums):
            return None
        if CRS.from_user_input(crs) != CRS.from_user_input(self.grid.crs):
            return None
        to_pixel = ~self.grid.affine @ source.transform
        if not to_pixel.almost_equals(Affine.translation(round(to_pixel.c), round(to_pixel.f)), 1e-6):
            return None
        return round(to_pixel.f), round(to_pixel.c)

    def _read_aligned(
        self, source: DatasetReader, row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Without warping: the same bytes, in a fraction of the time."""
        rgb, known = np.zeros((3, height, width), np.uint8), np.zeros((height, width), bool)
        r0, r1, c0, c1 = max(row, 0), min(row + height, source.height), max(col, 0), min(col + width, source.width)
        if r0 < r1 and c0 < c1:
            at = (slice(r0 - row, r1 - row), slice(c0 - col, c1 - col))
            bands = [number + 1 for number in bands_of(source)]
            values = source.read(bands, window=Window(c0, r0, c1 - c0, r1 - r0))
            rgb[:, at[0], at[1]], known[at] = self._colours(source, values), _finite(values)
        return rgb, known

    def _colours(self, source: DatasetReader, values: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Values of the bands shown (3 or 1, H, W) as bytes; those of a palette are looked up in it."""
        palette = palette_of(source)
        if palette is not None:
            return palette[:, values[0]]
        if self.spec.value_range is None and values.dtype == np.uint8:
            return values.astype(np.uint8, copy=False)
        low, high = self.spec.value_range or (0, 255)
        scaled = np.nan_to_num((values.astype(np.float32) - low) * np.float32(255 / (high - low)), nan=0)
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)
