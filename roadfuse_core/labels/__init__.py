"""Maps of roads, raster or lines, read as masks on the city's grid."""

from roadfuse_core.labels._digest import labels_digest
from roadfuse_core.labels._lines import read_lines
from roadfuse_core.labels._read import RoadMap, open_map
from roadfuse_core.labels._widths import lanes_of

__all__ = ["RoadMap", "labels_digest", "lanes_of", "open_map", "read_lines"]
