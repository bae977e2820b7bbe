"""Windows become one city raster, and the raster a file."""

from roadfuse_core.mosaic._blend import NODATA, PROBABILITY_SCALE, Accumulator, to_probability
from roadfuse_core.mosaic._export import write_cog, write_item
from roadfuse_core.mosaic._map_export import export_map

__all__ = ["NODATA", "PROBABILITY_SCALE", "Accumulator", "export_map", "to_probability", "write_cog", "write_item"]
