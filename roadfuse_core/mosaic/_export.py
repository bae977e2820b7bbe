"""City rasters as cloud-optimised GeoTIFF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_translate
from rio_cogeo.profiles import cog_profiles

from roadfuse_core.grid import Grid

__all__ = ["write_cog"]

BLOCK_PX = 2048
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
        nodata: Value that means nothing is known; None for none.
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
    cog_translate(plain, part, cog_profiles.get("deflate"), nodata=nodata, overview_resampling=resampling,
                  in_memory=False, quiet=True)  # fmt: skip
    part.rename(path)
    plain.unlink()
    return path
