"""Map: a slice of a dump becomes one sorted shard of integer sums."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.grid import Grid, fit_projection
from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._datum import to_wgs84
from roadfuse_core.points._read import Part, Rows, read_rows, shuffle_rows
from roadfuse_core.settings import PointsSpec

__all__ = [
    "PixelSums",
    "Shuffle",
    "Slice",
    "SliceReport",
    "aggregate",
    "arrays_of",
    "map_slice",
    "needs_vehicles",
    "period_of",
    "read_report",
    "shuffle_slice",
]

Ints = NDArray[np.int64]
ROW_GROUP = 1 << 15
MAX_INTERVAL_S = 1e6
DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Slice:
    """One job of the map.

    Attributes:
        spec: How to read and clean.
        grid: Where points go.
        part: Which rows.
        shard: Where the sums go; a report lies beside it when it is whole.
        quarantine: Folder for the rejected rows; none by default.
    """

    spec: PointsSpec
    grid: Grid
    part: Part
    shard: str
    quarantine: str = ""

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
        first_period: Smallest period number in the shard.
        periods: How many periods the shard's keys speak of.
        tiles: Kept points by tile number.
        sign: 1 for what enters a cube, -1 for what leaves it.
    """

    shard: str
    rows: int
    reasons: dict[str, int]
    first_us: int | None
    last_us: int | None
    first_period: int
    periods: int
    tiles: dict[int, int] = field(default_factory=dict)
    sign: int = 1


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


@dataclass(frozen=True)
class Shuffle:
    """One job of the shuffle: rows of a dump that go to a file sorted by the bucket of their vehicle."""

    spec: PointsSpec
    part: Part
    buckets: int
    target: str


def shuffle_slice(job: Shuffle) -> str:
    """Shuffle a part; a file that is already whole is taken as it is. Returns its path."""
    target = Path(job.target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shuffle_rows(job.spec, job.part, job.buckets, target, target.with_suffix(".spill"))
    return job.target


def map_slice(job: Slice) -> SliceReport:
    """Read, judge, place and add up a slice; a shard that is already whole is taken as it is.

    Returns:
        Its report, also written as JSON beside the shard.
    """
    report_path = Path(job.shard).with_suffix(".json")
    if report_path.exists():
        return read_report(report_path)
    scratch = Path(job.shard).with_suffix(".spill")
    rows = read_rows(job.spec, job.part, job.vehicles_matter, scratch)
    # What is exactly 0, 0 stays there, to be rejected as such.
    if job.spec.datum != "wgs84":
        nowhere = (rows.x == 0) & (rows.y == 0)
        x, y = to_wgs84(rows.x, rows.y, job.spec.datum)
        rows = replace(rows, x=np.where(nowhere, 0, x), y=np.where(nowhere, 0, y))
    placed = judge_rows(rows, job.spec.clean, job.grid, fit_projection(job.grid, job.spec.crs))
    interval = rows.interval
    if job.vehicles_matter:
        derive = job.spec.columns.interval is None
        interval = judge_vehicles(rows, placed, job.spec.clean, job.grid.resolution_m, derive)
    if job.quarantine:
        _quarantine(rows, placed, Path(job.quarantine) / Path(job.shard).name)
    sums = aggregate(rows, placed, interval, job.spec, job.grid)
    _write(sums, Path(job.shard))
    report = _report(job, rows, placed, sums)
    part = report_path.with_suffix(".part")
    part.write_text(json.dumps(asdict(report)))
    part.rename(report_path)
    return report


def read_report(path: Path) -> SliceReport:
    """The report beside a whole shard; the shard is where the report lies, wherever the workspace was moved."""
    raw = json.loads(path.read_text())
    tiles = {int(k): v for k, v in raw["tiles"].items()}
    return SliceReport(**{**raw, "tiles": tiles, "shard": str(path.with_suffix(".parquet"))})


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


@dataclass(frozen=True)
class PixelSums:
    """Sums of kept rows per tile, period and pixel.

    Attributes:
        key: (m,) int64, ascending, ((tile · periods + period - first_period) · tile_px² + pixel).
        arrays: (m,) int64 each, by array name.
        first_period: Smallest period number.
        periods: How many periods the keys speak of.
    """

    key: Ints
    arrays: dict[str, Ints]
    first_period: int
    periods: int


def aggregate(rows: Rows, placed: Placed, interval: NDArray[np.float64], spec: PointsSpec, grid: Grid) -> PixelSums:
    """Add up the kept rows.

    Keys are sorted together with their row numbers, packed into one integer: NumPy sorts those with vector
    instructions, which is faster than sorting an index.
    """
    first_day, table, first_period, periods = _period_table(rows, placed, spec.period)
    keep = np.flatnonzero(placed.reason == Reason.KEPT)
    key = np.empty(len(keep), np.int64)
    _keys(keep, placed.col, placed.row, rows.time_us, first_day, table, periods, grid.tile_px, grid.tiles_x, key)
    names = arrays_of(spec)
    if names == ("count",):
        key.sort()
        order = np.zeros(0, np.int64)
    else:
        key, order = _sorted_with_rows(key, keep, grid.n_tiles * periods * grid.tile_px**2)
    sums = np.zeros((len(names), len(key)), np.int64)
    quantities = interval if "interval_sum" in names else rows.interval[:0]
    distinct = _sum_runs(key, order, rows.speed, rows.bearing, quantities, _SIN, _COS, sums)
    arrays = {name: sums[k, :distinct] for k, name in enumerate(names)}
    return PixelSums(key[:distinct], arrays, first_period, periods)


def _period_table(rows: Rows, placed: Placed, period: str) -> tuple[int, Ints, int, int]:
    """Each day's period, relative to the first: first day, table, first period, number of periods."""
    kept = rows.time_us[placed.reason == Reason.KEPT] if len(rows.time_us) else rows.time_us
    if period == "all" or not len(kept):
        return 0, np.zeros(0, np.int64), 0, 1
    low, high = int(kept.min() // DAY_US), int(kept.max() // DAY_US)
    table = period_of(np.arange(low, high + 1) * DAY_US, period)
    return low, table - table[0], int(table[0]), int(table[-1] - table[0]) + 1


@njit(cache=True, nogil=True)
def _keys(keep, col, row, time_us, first_day, table, periods, px, tiles_x, key):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    for k in range(len(keep)):
        i = keep[k]
        c, r = int(col[i]), int(row[i])
        period = table[time_us[i] // DAY_US - first_day] if len(table) else 0
        key[k] = (((r // px) * tiles_x + c // px) * periods + period) * px * px + (r % px) * px + c % px


def _sorted_with_rows(key: Ints, keep: Ints, keys: int) -> tuple[Ints, Ints]:
    """Keys ascending, and the row that each came from; the order among equal keys does not matter to sums."""
    bits = max(1, len(key).bit_length())
    if keys.bit_length() + bits > 63:
        order = np.argsort(key, kind="stable")
        return key[order], keep[order]
    packed = (key << bits) | np.arange(len(key))
    packed.sort()
    return packed >> bits, keep[packed & ((1 << bits) - 1)]


_ANGLES = np.radians(np.arange(36_000) / 100)
# Sine and cosine from a table of 0.01 degree, so that they are the same on every machine.
_SIN, _COS = (np.rint(f(_ANGLES) * 10_000).astype(np.int64) for f in (np.sin, np.cos))


@njit(cache=True, nogil=True)
def _sum_runs(key, order, speed, bearing, interval, sines, cosines, sums):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Add up runs of equal keys, in fixed-point units (mm/s, 1e-4, ms); distinct keys move to the front."""
    m = -1
    for k in range(len(key)):
        if m < 0 or key[k] != key[m]:
            m += 1
            key[m] = key[k]
        sums[0, m] += 1
        if not len(order):
            continue
        i, a = order[k], 1
        if len(speed):
            if np.isfinite(speed[i]) and speed[i] >= 0:
                sums[a, m] += np.int64(np.rint(speed[i] * 1000))
                sums[a + 1, m] += 1
            a += 2
        if len(bearing):
            if np.isfinite(bearing[i]) and abs(bearing[i]) <= 720:
                angle = np.int64(np.rint(bearing[i] * 100)) % 36_000
                sums[a, m] += sines[angle]
                sums[a + 1, m] += cosines[angle]
                sums[a + 2, m] += 1
            a += 3
        if len(interval) and 0 <= interval[i] <= MAX_INTERVAL_S:
            sums[a, m] += np.int64(np.rint(interval[i] * 1000))
            sums[a + 1, m] += 1
    return m + 1


def _write(sums: PixelSums, shard: Path) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    part = shard.with_suffix(".part")
    columns = {"key": sums.key} | sums.arrays
    schema = pa.schema([(k, pa.int64()) for k in columns])
    table = pa.Table.from_arrays([pa.array(v) for v in columns.values()], schema=schema)
    # Ascending keys as differences: a few bits each.
    pq.write_table(table, part, compression="zstd", compression_level=1, row_group_size=ROW_GROUP, use_dictionary=False,
                   column_encoding=dict.fromkeys(columns, "DELTA_BINARY_PACKED"))  # fmt: skip
    part.rename(shard)


def _quarantine(rows: Rows, placed: Placed, path: Path) -> None:
    """Rejected rows as they were read, with the name of the reason."""
    bad = np.flatnonzero(placed.reason != Reason.KEPT)
    names = np.array([r.name.lower() for r in Reason])
    columns = {k: getattr(rows, k)[bad] for k in Rows.__dataclass_fields__ if len(getattr(rows, k))}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.table(columns | {"reason": names[placed.reason[bad]]}), part, compression="zstd")
    part.rename(path)


def _report(job: Slice, rows: Rows, placed: Placed, sums: PixelSums) -> SliceReport:
    counts = np.bincount(placed.reason, minlength=len(Reason))
    kept = rows.time_us[placed.reason == Reason.KEPT] if len(rows.time_us) else rows.time_us
    tile = sums.key // (sums.periods * job.grid.tile_px**2)
    starts = np.flatnonzero(np.diff(tile, prepend=-1) != 0)
    per_tile = np.add.reduceat(sums.arrays["count"], starts) if len(starts) else starts
    return SliceReport(
        shard=job.shard, rows=len(rows.x), reasons={r.name.lower(): int(counts[r]) for r in Reason},
        first_us=int(kept.min()) if len(kept) else None, last_us=int(kept.max()) if len(kept) else None,
        first_period=sums.first_period, periods=sums.periods,
        tiles={int(t): int(n) for t, n in zip(tile[starts], per_tile, strict=True)},
    )  # fmt: skip
