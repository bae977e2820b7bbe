"""Images of any CRS, resolution and nodata, read as windows of the city's grid."""

from roadfuse_core.imagery._read import ImageryReader, find_imagery, imagery_identity

__all__ = ["ImageryReader", "find_imagery", "imagery_identity"]
