"""Maps of roads, raster or lines, read as masks on the city's grid."""

from roadfuse_core.labels._read import RoadMap, open_map, read_lines

__all__ = ["RoadMap", "open_map", "read_lines"]
