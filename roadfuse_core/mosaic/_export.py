"""City rasters as cloud-optimised GeoTIFF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pystac
import rasterio
import shapely
import shapely.geometry
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_translate
from rio_cogeo.profiles import cog_profiles

from roadfuse_core.errors import StoreError
from roadfuse_core.files import replacing, write_whole
from roadfuse_core.grid import Grid

__all__ = ["write_cog", "write_item"]

BLOCK_PX = 2048
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
Read = Callable[[int, int, int, int], NDArray[np.generic]]


def write_cog(
    path: Path, grid: Grid, read: Read, dtype: str, nodata: float | None, resampling: Literal["average", "mode"] = "average"
) -> Path:
    """Write a one-band raster of the whole grid, block by block; it appears under its name when it is whole.

    Args:
        path: Where to.
        grid: The city's grid.
        read: Values of a pixel rectangle (row, column, height, width).
        dtype: Of the file.
        nodata: Value that means nothing is known; None for none. Those pixels are masked by a mask inside the file.
        resampling: Of the overviews.

    Returns:
        The path.

    Raises:
        StoreError: It cannot be written; what was there stays.
    """
    with replacing(path) as part, TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        plain = Path(scratch) / "plain.tif"
        _write_plain(plain, path, grid, read, dtype, nodata)
        with _writing(path), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            cog_translate(plain, part, cog_profiles.get("deflate"), nodata=nodata, add_mask=nodata is not None,
                          overview_resampling=resampling, in_memory=False, quiet=True)  # fmt: skip
            _read_all(part)
    return path


def _write_plain(plain: Path, path: Path, grid: Grid, read: Read, dtype: str, nodata: float | None) -> None:
    """All pixels as a tiled GeoTIFF without overviews; `path` is the file in messages."""
    height, width = grid.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype, "nodata": nodata, "tiled": True,
               "crs": grid.crs, "transform": grid.affine, "compress": "zstd", "BIGTIFF": "IF_SAFER"}  # fmt: skip
    with _writing(path), rasterio.open(plain, "w", **profile) as target:
        for window in _windows(height, width):
            values = read(window.row_off, window.col_off, window.height, window.width)
            target.write(values.astype(dtype), 1, window=window)


def _windows(height: int, width: int) -> Iterator[Window]:
    """Row-major."""
    for row in range(0, height, BLOCK_PX):
        for col in range(0, width, BLOCK_PX):
            yield Window(col, row, min(BLOCK_PX, width - col), min(BLOCK_PX, height - row))


def _read_all(path: Path) -> None:
    """Read a finished file with its overviews and masks: GDAL loses errors of the last bytes that it writes.

    Raises:
        RasterioIOError: Something in it cannot be read.
    """
    with rasterio.open(path) as source:
        levels = len(source.overviews(1))
    for level in (None, *range(levels)):
        with rasterio.open(path, overview_level=level) as source:
            for window in _windows(source.height, source.width):
                source.read(1, window=window)
                source.read_masks(1, window=window)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of GDAL and of the disk, as one line with the file's name.

    Raises:
        StoreError: Something could not be written.
    """
    try:
        yield
    except (RasterioError, CPLE_BaseError, OSError) as error:
        # GDAL often does not say that a disk is full, and has removed files of its own by now.
        free_mb = shutil.disk_usage(path.parent).free / 1e6
        why = str(error).splitlines()[0]
        line = f"{path}: cannot be written ({why}; {free_mb:,.1f} MB are free there); what was there stays"
        raise StoreError(f"{line}: make room and run again") from error


def write_item(path: Path, name: str, grid: Grid, files: Mapping[str, Path], made: datetime, facts: Mapping[str, Any]) -> Path:
    """A STAC item beside a city's rasters, so that catalogues find them.

    Args:
        path: Where to; ends in .json.
        name: The item's id.
        grid: The city's grid.
        files: COGs by asset name; they are named relative to the item.
        made: When the map was made, UTC.
        facts: Further properties.

    Returns:
        The path.
    """
    b = grid.bounds
    outline = shapely.segmentize(shapely.box(b.left, b.bottom, b.right, b.top), grid.tile_m)
    to_lonlat = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    area = shapely.transform(outline, lambda xy: np.stack(to_lonlat.transform(xy[:, 0], xy[:, 1]), 1))
    properties = {"proj:code": grid.crs, "proj:shape": list(grid.shape), "proj:transform": list(grid.affine)[:6],
                  "gsd": grid.resolution_m, **facts}  # fmt: skip
    item = pystac.Item(name, shapely.geometry.mapping(area), list(area.bounds), made, properties, stac_extensions=[PROJECTION])
    for asset, file in files.items():
        item.add_asset(asset, pystac.Asset(file.name, asset, media_type=pystac.MediaType.COG, roles=["data"]))
    return write_whole(path, json.dumps(item.to_dict(include_self_link=False), indent=1))
