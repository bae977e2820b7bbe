"""Images of any CRS, resolution and nodata, read as windows of the city's grid."""

from roadfuse_core.imagery._read import ImageFile, ImageryReader, RasterKey, find_imagery, identify

__all__ = ["ImageFile", "ImageryReader", "RasterKey", "find_imagery", "identify"]
