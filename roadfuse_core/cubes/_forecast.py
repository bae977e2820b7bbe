"""What an ingest will make, from a look at some rows."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadfuse_core.cluster import count_workers
from roadfuse_core.cubes._ledger import ledger
from roadfuse_core.cubes._plan import IngestPlan
from roadfuse_core.grid import fit_projection
from roadfuse_core.points import (
    Collector,
    Part,
    arrays_of,
    judge_rows,
    materialise,
    points_of,
    read_rows,
    shift_datum,
)
from roadfuse_core.settings import City

__all__ = ["Forecast", "forecast"]

SAMPLED_FILES = 16
SAMPLED_ROWS = 50_000


@dataclass(frozen=True)
class Forecast:
    """What an ingest will make, from a sample of its rows.

    Attributes:
        sampled: Rows looked at.
        kept: Share of them that fall on the grid and pass the row-local rules.
        tiles: Tiles that hold any of them; more rows may touch more.
        periods: Periods between the earliest and the latest of them.
        points_per_chunk: Kept rows of the whole dump by tile and period.
        chunks: Chunks to be written: periods and total, every array.
        seconds: Expected time, from the speed of this city's latest ingest, or else of the sample.
    """

    sampled: int
    kept: float
    tiles: int
    periods: int
    points_per_chunk: float
    chunks: int
    seconds: float


def forecast(city: City, plan: IngestPlan) -> Forecast:
    """Look at the first rows of some of a plan's files; writes nothing.

    Raises:
        DataError: A file cannot be read.
    """
    spec, grid = points_of(city), city.make_grid()
    chosen = [plan.sources[k] for k in sorted(set(np.linspace(0, len(plan.files) - 1, SAMPLED_FILES).astype(int).tolist()))]
    collector = Collector(spec, grid, SAMPLED_ROWS * len(chosen))
    projection, began, sampled = fit_projection(grid, spec.crs), time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in materialise(chosen, Path(scratch) / "unpacked"):
            rows = shift_datum(read_rows(spec, Part((path,)), Path(scratch) / "spill", SAMPLED_ROWS), spec.datum)
            sampled += len(rows.x)
            placed = judge_rows(rows, spec.clean, grid, projection)
            collector.add(rows, placed, np.full(len(rows.x), np.nan))
    kept, runs = collector.held, collector.samples().runs
    seconds = plan.rows * (time.perf_counter() - began) / max(1, sampled) / count_workers(city.cluster)
    latest = next(reversed(ledger(city).values()), None)
    if latest:
        seconds = plan.rows * latest["seconds"] / max(1, latest["rows"])
    tiles = len(np.unique(runs[:, 0]))
    periods = int(np.ptp(runs[:, 1])) + 1 if kept else 0
    share = kept / max(1, sampled)
    return Forecast(sampled, share, tiles, periods, plan.rows * share / max(1, tiles * periods),
                    tiles * (periods + 1) * len(arrays_of(spec)), seconds)  # fmt: skip
