"""City rasters as cloud-optimised GeoTIFF."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pystac
import rasterio
import shapely
import shapely.geometry
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_translate
from rio_cogeo.profiles import cog_profiles

from roadfuse_core.files import write_whole
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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, part = path.with_suffix(".plain.tif"), path.with_suffix(".part.tif")
    height, width = grid.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype, "nodata": nodata, "tiled": True,
               "crs": grid.crs, "transform": grid.affine, "compress": "zstd", "BIGTIFF": "IF_SAFER"}  # fmt: skip
    with rasterio.open(plain, "w", **profile) as target:
        for r in range(0, height, BLOCK_PX):
            for c in range(0, width, BLOCK_PX):
                h, w = min(BLOCK_PX, height - r), min(BLOCK_PX, width - c)
                target.write(read(r, c, h, w).astype(dtype), 1, window=Window(c, r, w, h))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        cog_translate(plain, part, cog_profiles.get("deflate"), nodata=nodata, add_mask=nodata is not None,
                      overview_resampling=resampling, in_memory=False, quiet=True)  # fmt: skip
    part.rename(path)
    plain.unlink()
    return path


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
