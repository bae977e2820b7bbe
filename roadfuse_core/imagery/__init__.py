"""Images of any CRS, resolution and nodata, read as windows of the city's grid."""

from roadfuse_core.imagery._open import RASTER_SUFFIXES, Raster, open_raster
from roadfuse_core.imagery._read import ImageFile, ImageryReader, RasterKey, find_imagery, identify, read_warped

__all__ = [
    "RASTER_SUFFIXES",
    "ImageFile",
    "ImageryReader",
    "Raster",
    "RasterKey",
    "find_imagery",
    "identify",
    "open_raster",
    "read_warped",
]
