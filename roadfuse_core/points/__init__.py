"""Trajectories: found, read by DuckDB, cleaned, placed on the grid and added up in shards."""

from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._read import METRES_PER_SECOND, Rows, read_rows
from roadfuse_core.points._shard import (
    PixelSums,
    Slice,
    SliceReport,
    aggregate,
    arrays_of,
    map_slice,
    needs_vehicles,
    period_of,
)
from roadfuse_core.points._sources import SourceFile, check_columns, empty_files, find_sources, identify, materialise

__all__ = [
    "METRES_PER_SECOND",
    "PixelSums",
    "Placed",
    "Reason",
    "Rows",
    "Slice",
    "SliceReport",
    "SourceFile",
    "aggregate",
    "arrays_of",
    "check_columns",
    "empty_files",
    "find_sources",
    "identify",
    "judge_rows",
    "judge_vehicles",
    "map_slice",
    "materialise",
    "needs_vehicles",
    "period_of",
    "read_rows",
]
