"""Trajectories: found, read by DuckDB, cleaned, placed on the grid and added up in shards."""

from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._datum import from_wgs84, to_wgs84
from roadfuse_core.points._read import METRES_PER_SECOND, Part, Rows, read_rows, time_span
from roadfuse_core.points._shard import (
    PixelSums,
    Shuffle,
    Slice,
    SliceReport,
    aggregate,
    arrays_of,
    map_slice,
    needs_vehicles,
    period_of,
    read_report,
    shuffle_slice,
)
from roadfuse_core.points._sources import SourceFile, check_columns, empty_files, find_sources, identify, materialise

__all__ = [
    "METRES_PER_SECOND",
    "Part",
    "PixelSums",
    "Placed",
    "Reason",
    "Rows",
    "Shuffle",
    "Slice",
    "SliceReport",
    "SourceFile",
    "aggregate",
    "arrays_of",
    "check_columns",
    "empty_files",
    "find_sources",
    "from_wgs84",
    "identify",
    "judge_rows",
    "judge_vehicles",
    "map_slice",
    "materialise",
    "needs_vehicles",
    "period_of",
    "read_report",
    "read_rows",
    "shuffle_slice",
    "time_span",
    "to_wgs84",
]
