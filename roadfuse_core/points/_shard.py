"""Map: a slice of a dump becomes shards of small integers, sorted by tile and period."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyproj import CRS

from roadfuse_core.files import DamagedFileError, digest_of, read_record, write_record
from roadfuse_core.grid import Grid, PixelProjection, fit_projection, ground_metres, pixel_metres
from roadfuse_core.points._clean import Placed, Reason, judge_rows, judge_vehicles
from roadfuse_core.points._datum import shift_datum
from roadfuse_core.points._read import Part, Rows, read_batches, rows_by_bucket, shuffle_rows
from roadfuse_core.points._samples import Collector
from roadfuse_core.points._shard_file import write_shard
from roadfuse_core.points._times import count_suspects, rolled_over_us
from roadfuse_core.points._units import SpeedRatios
from roadfuse_core.settings import PointsSpec

__all__ = [
    "Shuffle",
    "Shuffled",
    "Slice",
    "SliceReport",
    "cut_buckets",
    "is_intact",
    "map_slice",
    "needs_vehicles",
    "read_report",
    "shuffle_slice",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """One job of the map.

    Attributes:
        spec: How to read and clean.
        grid: Where points go.
        part: Which rows.
        shard: The report that is written last; shards get its name and a number.
        capacity: Most rows held in memory; a part with more becomes several shards.
        quarantine: Folder for the rejected rows; none by default.
    """

    spec: PointsSpec
    grid: Grid
    part: Part
    shard: str
    capacity: int
    quarantine: str = ""

    @property
    def vehicles_matter(self) -> bool:
        """Whether rows must be seen in vehicle and time order."""
        return needs_vehicles(self.spec)


@dataclass(frozen=True)
class SliceReport:
    """What a slice held; rows = sum of reasons, `KEPT` included.

    Attributes:
        shards: Paths of its shards.
        rows: Rows read.
        reasons: Rows by `Reason` name.
        first_us: Earliest time of a kept row, microseconds since 1970; None if none is kept.
        last_us: Latest.
        periods: Smallest and largest period number; None if no row is kept.
        tiles: Kept points by tile number.
        ratios: Reported against implied speed by day, see `SpeedRatios`.
        digests: BLAKE3 of each shard; none in reports of versions before there were any.
        sign: 1 for what enters a cube, -1 for what leaves it.
        before_gps: Kept rows before 1980-01-06.
        rolled_over: Kept rows after that and more than 1,024 weeks ago, see `describe_suspects`.
    """

    shards: tuple[str, ...]
    rows: int
    reasons: dict[str, int]
    first_us: int | None
    last_us: int | None
    periods: tuple[int, int] | None
    tiles: dict[int, int] = field(default_factory=dict)
    ratios: dict[int, list[int]] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    sign: int = 1
    before_gps: int = 0
    rolled_over: int = 0


def needs_vehicles(spec: PointsSpec) -> bool:
    """Whether a rule of the city looks at a vehicle's neighbouring samples."""
    known = spec.columns.vehicle is not None and spec.columns.time is not None
    return known and (spec.clean.duplicates or spec.clean.teleport_kmh is not None or spec.columns.interval is None)


@dataclass(frozen=True)
class Shuffle:
    """One job of the shuffle: rows of a dump that go to a file sorted by the bucket of their vehicle."""

    spec: PointsSpec
    part: Part
    target: str


@dataclass(frozen=True)
class Shuffled:
    """A file of the shuffle.

    Attributes:
        path: Where it is.
        rows: (4096,) int64 rows of each bucket.
    """

    path: str
    rows: NDArray[np.int64]


def shuffle_slice(job: Shuffle) -> Shuffled:
    """Shuffle a part; a file that is already there, as it was written, is taken."""
    target = Path(job.target)
    record = target.with_suffix(".json")
    if not _is_shuffled(target, record):
        target.parent.mkdir(parents=True, exist_ok=True)
        shuffle_rows(job.spec, job.part, target, target.with_suffix(".spill"))
        write_record(record, {"digest": digest_of(target)})
    return Shuffled(job.target, rows_by_bucket(target))


def cut_buckets(files: Sequence[Shuffled], rows_per_slice: int) -> list[Part]:
    """Shuffled files in parts of neighbouring buckets that hold at most so many rows; one larger bucket is a part alone."""
    counts = np.sum([f.rows for f in files], axis=0)
    edges, held = [0], 0
    for bucket, rows in enumerate(counts.tolist()):
        if held and held + rows > rows_per_slice:
            edges.append(bucket)
            held = 0
        held += rows
    edges.append(len(counts))
    paths = tuple(f.path for f in files)
    return [Part(paths, buckets=pair) for pair in pairwise(edges)]


def _is_shuffled(target: Path, record: Path) -> bool:
    try:
        return bool(read_record(record)["digest"] == digest_of(target))
    except (FileNotFoundError, DamagedFileError):
        return False


def map_slice(job: Slice) -> SliceReport:
    """Read, judge, place and sort a slice; one that is already there, as it was written, is taken.

    Returns:
        Its report, also written as JSON, last of all.
    """
    report_path = Path(job.shard)
    if done := _finished(report_path):
        return done
    report_path.parent.mkdir(parents=True, exist_ok=True)
    report = _Mapper(job).run()
    write_record(report_path, asdict(report))
    return report


def _finished(report_path: Path) -> SliceReport | None:
    """The report of a slice that an earlier run finished; None where there is none, or what it left was damaged."""
    try:
        report = read_report(report_path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("%s; it is made again", error)
        return None
    if not is_intact(report):
        log.warning("%s: its shards are not what was written; they are made again", report_path)
        return None
    return report


def _report_record(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except DamagedFileError:
        content = path.read_bytes()
        if not content.startswith(b'{"shards"'):
            raise
        record: dict[str, Any] = json.loads(content)  # as earlier versions wrote it, without a digest
        return record


def is_intact(report: SliceReport) -> bool:
    """Whether all shards of a report are there as they were written; never, where the report knows no digests."""
    if len(report.digests) != len(report.shards):
        return False
    try:
        return all(digest_of(Path(s)) == digest for s, digest in zip(report.shards, report.digests, strict=True))
    except FileNotFoundError:
        return False


def read_report(path: Path) -> SliceReport:
    """The report of a finished slice; its shards are where the report lies, wherever the workspace was moved.

    Raises:
        FileNotFoundError: There is none.
        DamagedFileError: It is not what was written.
    """
    try:
        raw = _report_record(path)
        numbered = {key: {int(k): v for k, v in raw[key].items()} for key in ("tiles", "ratios")}
        places = tuple(str(path.parent / Path(s).name) for s in raw["shards"])
        periods = tuple(raw["periods"]) if raw["periods"] else None
        digests = tuple(raw.get("digests", ()))
        return SliceReport(**{**raw, **numbered, "shards": places, "periods": periods, "digests": digests})
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path}: is damaged") from error


class _Mapper:
    """The state of one `map_slice`: everything that grows with the batches."""

    def __init__(self, job: Slice) -> None:
        self.job = job
        self.collector = Collector(job.spec, job.grid, job.capacity)
        self.ratios = SpeedRatios()
        geographic = CRS.from_user_input(job.spec.crs).is_geographic
        self.metres_per_unit = None if geographic else ground_metres(job.spec.crs, job.grid)
        self.reasons = np.zeros(len(Reason), np.int64)
        self.tiles: Counter[int] = Counter()
        self.shards: list[str] = []
        self.times: list[int] = []
        self.periods: list[int] = []
        self.before_gps = 0
        self.rolled_over = 0
        self.rolled_over_us = rolled_over_us()

    def run(self) -> SliceReport:
        job, stem = self.job, Path(self.job.shard)
        projection = fit_projection(job.grid, job.spec.crs)
        with _Quarantine(job.quarantine, stem.stem) as quarantine:
            for rows in read_batches(job.spec, job.part, job.vehicles_matter, stem.with_suffix(".spill")):
                self._take(shift_datum(rows, job.spec.datum), projection, quarantine)
        self._flush()
        return SliceReport(
            shards=tuple(self.shards), rows=int(self.reasons.sum()),
            reasons={r.name.lower(): int(self.reasons[r]) for r in Reason},
            first_us=min(self.times, default=None), last_us=max(self.times, default=None),
            periods=(min(self.periods), max(self.periods)) if self.periods else None,
            tiles=dict(self.tiles), ratios=self.ratios.by_day, digests=tuple(digest_of(Path(s)) for s in self.shards),
            before_gps=self.before_gps, rolled_over=self.rolled_over,
        )  # fmt: skip

    def _take(self, rows: Rows, projection: PixelProjection, quarantine: _Quarantine) -> None:
        job = self.job
        placed = judge_rows(rows, job.spec.clean, job.grid, projection)
        interval = rows.interval
        if job.vehicles_matter:
            derive = job.spec.columns.interval is None
            interval = judge_vehicles(rows, placed, job.spec.clean, pixel_metres(job.grid), derive)
            self.ratios.add(rows, placed, self.metres_per_unit)
        self.reasons += np.bincount(placed.reason, minlength=len(Reason))
        if not self.collector.fits(len(rows.x)):
            self._flush()
            self.collector.reserve(len(rows.x))
        quarantine.take(rows, placed)
        self._span(rows, placed)
        self.collector.add(rows, placed, interval)

    def _span(self, rows: Rows, placed: Placed) -> None:
        if len(rows.time_us):
            kept = rows.time_us[placed.reason == Reason.KEPT]
            self.times += [int(kept.min()), int(kept.max())] if len(kept) else []
            before_gps, rolled_over = count_suspects(kept, self.rolled_over_us)
            self.before_gps += before_gps
            self.rolled_over += rolled_over

    def _flush(self) -> None:
        if not self.collector.held:
            return
        touched = np.flatnonzero(self.collector.per_tile)
        self.tiles.update(dict(zip(touched.tolist(), self.collector.per_tile[touched].tolist(), strict=True)))
        samples = self.collector.samples()
        path = Path(self.job.shard).with_suffix(f".{len(self.shards)}.samples")
        write_shard(samples, path)
        self.shards.append(str(path))
        self.periods += [int(samples.runs[:, 1].min()), int(samples.runs[:, 1].max())]


class _Quarantine:
    """Rejected rows as they were read, with the name of the reason; nothing without a folder."""

    NAMES = np.array([r.name.lower() for r in Reason])

    def __init__(self, folder: str, name: str) -> None:
        self.path = Path(folder) / f"{name}.parquet" if folder else None
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Quarantine:
        return self

    def take(self, rows: Rows, placed: Placed) -> None:
        """Write the rejected rows of a batch."""
        if self.path is None:
            return
        bad = np.flatnonzero(placed.reason != Reason.KEPT)
        columns: dict[str, NDArray[np.generic]] = {
            k: getattr(rows, k)[bad] for k in Rows.__dataclass_fields__ if len(getattr(rows, k))
        }
        table = pa.table(columns | {"reason": self.NAMES[placed.reason[bad]]})
        if self.writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = pq.ParquetWriter(self.path.with_suffix(".part"), table.schema, compression="zstd")
        self.writer.write_table(table)

    def __exit__(self, kind: object, *_: object) -> None:
        if self.writer is not None and self.path is not None:
            self.writer.close()
            if kind is None:
                self.path.with_suffix(".part").rename(self.path)
