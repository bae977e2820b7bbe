"""The cube of integer sums: written in whole dumps, read in windows, rendered to layers."""

from roadfuse_core.cubes._ingest import (
    IngestPlan,
    LedgerEntry,
    changed_tiles,
    cubes_path,
    files_between,
    ingest,
    ledger,
    plan_ingest,
)
from roadfuse_core.cubes._read import CubeReader
from roadfuse_core.cubes._render import FIXED_POINT, Layer, halo_px, render
from roadfuse_core.cubes._repository import (
    committer_lock,
    grid_attributes,
    open_repository,
    publish,
    read_group,
)

__all__ = [
    "FIXED_POINT",
    "CubeReader",
    "IngestPlan",
    "Layer",
    "LedgerEntry",
    "changed_tiles",
    "committer_lock",
    "cubes_path",
    "files_between",
    "grid_attributes",
    "halo_px",
    "ingest",
    "ledger",
    "open_repository",
    "plan_ingest",
    "publish",
    "read_group",
    "render",
]
