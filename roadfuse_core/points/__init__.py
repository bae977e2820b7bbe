"""Trajectories: found, read by DuckDB, cleaned, placed on the grid and sorted into shards."""

from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._columns import check_columns, empty_files, single_precision_step
from roadfuse_core.points._datum import from_wgs84, shift_datum, to_wgs84
from roadfuse_core.points._opening import SourceFile
from roadfuse_core.points._read import DUCKDB_BYTES, METRES_PER_SECOND, Part, Rows, read_batches, read_rows, time_span
from roadfuse_core.points._samples import ADDENDS, Collector, Samples, addend_table, arrays_of, columns_of, period_of
from roadfuse_core.points._shard import (
    Shuffle,
    Shuffled,
    Slice,
    SliceReport,
    cut_buckets,
    is_intact,
    map_slice,
    needs_vehicles,
    read_report,
    shuffle_slice,
)
from roadfuse_core.points._shard_file import ShardFile, write_shard
from roadfuse_core.points._sources import current_version, find_sources, identify, left_out, matches, points_of
from roadfuse_core.points._times import count_suspects, describe_suspects, rolled_over_us
from roadfuse_core.points._units import SpeedBreak, SpeedRatios, find_speed_break
from roadfuse_core.points._unpack import materialise

__all__ = [
    "ADDENDS",
    "DUCKDB_BYTES",
    "METRES_PER_SECOND",
    "Collector",
    "Part",
    "Placed",
    "Reason",
    "Rows",
    "Samples",
    "ShardFile",
    "Shuffle",
    "Shuffled",
    "Slice",
    "SliceReport",
    "SourceFile",
    "SpeedBreak",
    "SpeedRatios",
    "addend_table",
    "arrays_of",
    "check_columns",
    "columns_of",
    "count_suspects",
    "current_version",
    "cut_buckets",
    "describe_suspects",
    "empty_files",
    "find_sources",
    "find_speed_break",
    "from_wgs84",
    "identify",
    "is_intact",
    "judge_rows",
    "judge_vehicles",
    "left_out",
    "map_slice",
    "matches",
    "materialise",
    "needs_vehicles",
    "period_of",
    "points_of",
    "read_batches",
    "read_report",
    "read_rows",
    "rolled_over_us",
    "shift_datum",
    "shuffle_slice",
    "single_precision_step",
    "time_span",
    "to_wgs84",
    "write_shard",
]
