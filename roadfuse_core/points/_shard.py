"""Map: a slice of a dump becomes one sorted shard of integer sums."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from roadfuse_core.grid import Grid, fit_projection
from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._read import Rows, read_rows
from roadfuse_core.settings import PointsSpec

__all__ = ["Slice", "SliceReport", "aggregate", "arrays_of", "map_slice", "period_of"]

Ints = NDArray[np.int64]
ROW_GROUP = 1 << 16
MAX_INTERVAL_S = 1e6


@dataclass(frozen=True)
class Slice:
    """One job of the map.

    Attributes:
        spec: How to read and clean.
        grid: Where points go.
        paths: Files to read.
        bucket: Which vehicles, out of `buckets`.
        buckets: 1 where rows are judged alone.
        shard: Where the sums go; a report lies beside it when it is whole.
    """

    spec: PointsSpec
    grid: Grid
    paths: tuple[str, ...]
    bucket: int
    buckets: int
    shard: str

    @property
    def vehicles_matter(self) -> bool:
        """Whether rows must be seen in vehicle and time order."""
        return needs_vehicles(self.spec)


@dataclass(frozen=True)
class SliceReport:
    """What a slice held; rows = sum of reasons, `KEPT` included.

    Attributes:
        shard: Path of the shard.
        rows: Rows read.
        reasons: Rows by `Reason` name.
        first_us: Earliest time of a kept row, microseconds since 1970; None if none is kept.
        last_us: Latest.
        tiles: Kept points by tile number.
    """

    shard: str
    rows: int
    reasons: dict[str, int]
    first_us: int | None
    last_us: int | None
    tiles: dict[int, int] = field(default_factory=dict)


def needs_vehicles(spec: PointsSpec) -> bool:
    """Whether a rule of the city looks at a vehicle's neighbouring samples."""
    known = spec.columns.vehicle is not None and spec.columns.time is not None
    return known and (spec.clean.duplicates or spec.clean.teleport_kmh is not None or spec.columns.interval is None)


def arrays_of(spec: PointsSpec) -> tuple[str, ...]:
    """The cube arrays that a city's columns fill."""
    names = ["count"]
    if spec.columns.speed:
        names += ["speed_sum", "speed_count"]
    if spec.columns.bearing:
        names += ["sin_sum", "cos_sum", "bearing_count"]
    if spec.columns.interval or (spec.columns.vehicle and spec.columns.time):
        names += ["interval_sum", "interval_count"]
    return tuple(names)


def map_slice(job: Slice) -> SliceReport:
    """Read, judge, place and add up a slice; a shard that is already whole is taken as it is.

    Returns:
        Its report, also written as JSON beside the shard.
    """
    report_path = Path(job.shard).with_suffix(".json")
    if report_path.exists():
        raw = json.loads(report_path.read_text())
        return SliceReport(**{**raw, "tiles": {int(k): v for k, v in raw["tiles"].items()}})
    scratch = Path(job.shard).with_suffix(".spill")
    rows = read_rows(job.spec, list(job.paths), job.bucket, job.buckets, job.vehicles_matter, scratch)
    placed = judge_rows(rows, job.spec.clean, job.grid, fit_projection(job.grid, job.spec.crs))
    interval = rows.interval
    if job.vehicles_matter:
        derive = job.spec.columns.interval is None
        interval = judge_vehicles(rows, placed, job.spec.clean, job.grid.resolution_m, derive)
    table = aggregate(rows, placed, interval, job.spec, job.grid)
    _write(table, Path(job.shard))
    report = _report(job, rows, placed, table)
    part = report_path.with_suffix(".part")
    part.write_text(json.dumps(asdict(report)))
    part.rename(report_path)
    return report


def period_of(time_us: Ints, period: str) -> Ints:
    """Number of the period that holds a time: days, ISO weeks (of Monday 1969-12-29) or months since 1970; 0 for `all`."""
    stamps = time_us.astype("datetime64[us]")
    if period == "day":
        return stamps.astype("datetime64[D]").astype(np.int64)
    if period == "week":
        return (stamps.astype("datetime64[D]").astype(np.int64) + 3) // 7
    if period == "month":
        return stamps.astype("datetime64[M]").astype(np.int64)
    return np.zeros(len(time_us), np.int64)


def aggregate(rows: Rows, placed: Placed, interval: NDArray[np.float64], spec: PointsSpec, grid: Grid) -> pa.Table:
    """Sums of the kept rows per tile, period and pixel, sorted by these; all int64."""
    keep = np.flatnonzero(placed.reason == Reason.KEPT)
    col, row = placed.col[keep].astype(np.int64), placed.row[keep].astype(np.int64)
    px = grid.tile_px
    tile = row // px * grid.tiles_x + col // px
    pixel = row % px * px + col % px
    period = period_of(rows.time_us[keep], spec.period)
    periods = int(period.max(initial=0)) + 1
    key = (tile * periods + period) * px**2 + pixel
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
    columns = {
        "tile": key[first] // px**2 // periods,
        "period": key[first] // px**2 % periods,
        "pixel": key[first] % px**2,
        "count": np.diff(np.append(first, len(key))),
    }
    chosen = keep[order]
    wanted = set(arrays_of(spec))
    for name, values in _fixed_point(rows, interval, chosen).items():
        if name in wanted:
            columns[name] = np.add.reduceat(values, first) if len(first) else np.zeros(0, np.int64)
    return pa.table({k: pa.array(v, pa.int64()) for k, v in columns.items()})


_ANGLES = np.radians(np.arange(36_000) / 100)
_SIN, _COS = (np.rint(f(_ANGLES) * 10_000).astype(np.int64) for f in (np.sin, np.cos))


def _fixed_point(rows: Rows, interval: NDArray[np.float64], chosen: Ints) -> dict[str, Ints]:
    """Each quantity as integers in its unit: mm/s, 1e-4, ms; zero and uncounted where missing.

    Sine and cosine come from a table of 0.01 degree, so that they are the same on every machine.
    """
    speed, bearing, step = rows.speed[chosen], rows.bearing[chosen], interval[chosen]
    has_speed = np.isfinite(speed) & (speed >= 0)
    has_bearing = np.isfinite(bearing) & (np.abs(bearing) <= 720)
    has_step = (step >= 0) & (step <= MAX_INTERVAL_S)
    angle = np.rint(np.where(has_bearing, bearing, 0) * 100).astype(np.int64) % 36_000
    return {
        "speed_sum": np.rint(np.where(has_speed, speed, 0) * 1000).astype(np.int64),
        "speed_count": has_speed.astype(np.int64),
        "sin_sum": np.where(has_bearing, _SIN[angle], 0),
        "cos_sum": np.where(has_bearing, _COS[angle], 0),
        "bearing_count": has_bearing.astype(np.int64),
        "interval_sum": np.rint(np.where(has_step, step, 0) * 1000).astype(np.int64),
        "interval_count": has_step.astype(np.int64),
    }


def _write(table: pa.Table, shard: Path) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    part = shard.with_suffix(".part")
    pq.write_table(table, part, compression="zstd", compression_level=1, row_group_size=ROW_GROUP)
    part.rename(shard)


def _report(job: Slice, rows: Rows, placed: Placed, table: pa.Table) -> SliceReport:
    counts = np.bincount(placed.reason, minlength=len(Reason))
    kept = rows.time_us[placed.reason == Reason.KEPT]
    tile, points = table["tile"].to_numpy(), table["count"].to_numpy()
    per_tile = np.bincount(tile, points, minlength=0).astype(np.int64) if len(tile) else np.zeros(0, np.int64)
    return SliceReport(
        shard=job.shard, rows=len(rows.x), reasons={r.name.lower(): int(counts[r]) for r in Reason},
        first_us=int(kept.min()) if len(kept) else None, last_us=int(kept.max()) if len(kept) else None,
        tiles={int(t): int(per_tile[t]) for t in np.flatnonzero(per_tile)},
    )  # fmt: skip
