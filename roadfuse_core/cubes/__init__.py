"""The cube of integer sums: written in whole dumps, read in windows, rendered to layers."""

from roadfuse_core.cubes._chunks import Chunks
from roadfuse_core.cubes._expire import Expiry, expire
from roadfuse_core.cubes._forecast import Forecast, forecast
from roadfuse_core.cubes._ingest import changed_tiles, ingest
from roadfuse_core.cubes._ledger import LedgerEntry, Snapshot, cubes_path, ledger, other_settings, require_same_cube, snapshots
from roadfuse_core.cubes._plan import IngestPlan, files_between, find_new, plan_ingest, worker_memory
from roadfuse_core.cubes._read import CubeReader
from roadfuse_core.cubes._render import FIXED_POINT, MEANS, Layer, halo_px, render
from roadfuse_core.cubes._repository import (
    ZSTD,
    committer_lock,
    grid_attributes,
    open_repository,
    publish,
    read_group,
    storing,
    write_coordinates,
)
from roadfuse_core.cubes._skipped import SkippedFile, read_skipped, sift, split_off_young

__all__ = [
    "FIXED_POINT",
    "MEANS",
    "ZSTD",
    "Chunks",
    "CubeReader",
    "Expiry",
    "Forecast",
    "IngestPlan",
    "Layer",
    "LedgerEntry",
    "SkippedFile",
    "Snapshot",
    "changed_tiles",
    "committer_lock",
    "cubes_path",
    "expire",
    "files_between",
    "find_new",
    "forecast",
    "grid_attributes",
    "halo_px",
    "ingest",
    "ledger",
    "open_repository",
    "other_settings",
    "plan_ingest",
    "publish",
    "read_group",
    "read_skipped",
    "render",
    "require_same_cube",
    "sift",
    "snapshots",
    "split_off_young",
    "storing",
    "worker_memory",
    "write_coordinates",
]
