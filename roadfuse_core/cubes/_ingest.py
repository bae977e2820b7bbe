"""A dump enters the cube: planned, mapped to shards, reduced to chunks, published with its ledger entry."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import duckdb
import icechunk
import numba
import numpy as np
import pyarrow as pa
import pyproj
import zarr
from dask.distributed import Client
from numpy.typing import NDArray

import roadfuse_core.grid
import roadfuse_core.points
from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes._ledger import LedgerEntry, cubes_path, kept_nothing, ledger, read_settings
from roadfuse_core.cubes._plan import IngestPlan, cut_parts, leave_out, most_rows_per_slice, plan_ingest
from roadfuse_core.cubes._reduce import BlockJob, Shard, add_block, owned_blocks
from roadfuse_core.cubes._repository import (
    MAIN,
    committer_lock,
    create_arrays,
    is_untouched,
    open_repository,
    publish,
    storing,
)
from roadfuse_core.cubes._skipped import changed_files, damaged_files, forget_readable, write_skipped
from roadfuse_core.errors import ConfigError, DataError, StoreError
from roadfuse_core.files import DamagedFileError, read_record, write_record
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.locks import INGEST, waiting_lock
from roadfuse_core.points import (
    ShardFile,
    Shuffle,
    Slice,
    SliceReport,
    SourceFile,
    arrays_of,
    cut_buckets,
    describe_suspects,
    find_speed_break,
    is_intact,
    map_slice,
    needs_vehicles,
    read_report,
    shuffle_slice,
)
from roadfuse_core.settings import City, PointsSpec
from roadfuse_core.workspace import enter_workspace

__all__ = ["changed_tiles", "ingest", "leftover_shards", "remove_shards"]

STAGING = "ingest"
SLICES = "slices.json"  # how an ingest began to cut a dump
# Settings that are likely wrong where a reason takes all rows of a dump.
SUSPECTS = {
    "not_finite": "name the columns of the positions in points.columns",
    "null_island": "name the columns of the positions in points.columns",
    "time": "correct points.columns.time, points.time_unit or points.clean.time_range",
    "outside": "correct grid.bounds, points.columns, points.crs or points.datum",
    "speed": "correct points.speed_unit or points.clean.max_speed_kmh",
}
# What an ingest writes: a folder a dump, and files in it. Whatever else lies there is somebody else's.
DUMP_FOLDER = re.compile(r"[0-9a-f]{12}-[0-9a-f]{12}")
KEPT_FILE = re.compile(r"shard-\d{5}\.(json|\d+\.samples)|slices\.json")
PASSING_FILE = re.compile(r"unpacked|shuffle-\d{5}\.(parquet|json|spill)|shard-\d{5}\.spill|\.?(shard|shuffle|slices).*\.part")


def ingest(
    city: City,
    patterns: Sequence[str | SourceFile] | None = None,
    client: Client | None = None,
    tell: Progress = quiet,
    replace: str | None = None,
    quarantine: Path | None = None,
) -> LedgerEntry | None:
    """Bring the new files into the cube as one dump: wholly or not at all.

    Killed at any moment and run again, it takes the shards that are whole, and nothing is counted twice. While another
    process ingests into this workspace, it waits, and then finds what is still new. Of the city's own sources, files that
    wait, are damaged or change meanwhile are left out; `read_skipped` lists them, and a later ingest takes them.

    Args:
        city: The city; its `points` say how to read.
        patterns: Files or globs instead of the city's own sources; what was found before is not searched again.
        client: Dask; None works in this process, with the same result.
        tell: Progress.
        replace: A dump of the ledger that leaves the cube in the same step; the result is as if it had never been in.
        quarantine: Folder for the rejected rows, as Parquet with their reasons.

    Returns:
        The dump's ledger entry; None when nothing is new.

    Raises:
        ConfigError: The settings do not fit the files, or the cube.
        DataError: A file that was named is unreadable or changes meanwhile, or no file of the sources is right.
        StoreError: The cube, its ledger or a disk cannot be read or written.
    """
    spec = city.points
    if spec is None:
        return None
    grid = city.make_grid()
    workspace = city.workspace_path
    with committer_lock(workspace):
        enter_workspace(workspace)
    with waiting_lock(workspace, INGEST, f"ingest of {city.name}"), storing(workspace):
        began = time.perf_counter()
        if patterns is None:
            forget_readable(city, client, tell)
        plan = plan_ingest(city, patterns, replace)
        outgoing = _outgoing(city, replace) if replace else []
        reading = _Reading(city, spec, grid, client, tell, str(quarantine or ""))
        plan, reports = _read(reading, plan, replace, patterns is not None)
        if patterns is None:
            write_skipped(city, plan.skipped)
        if not reports:
            _keep_contributions(city)
            return None
        entry = _entry(plan, spec, reports, began) | {
            "shards": reading.folder(plan).name, "settings": read_settings(spec),
            "skipped": [{"label": s.label, "reason": s.reason} for s in plan.skipped],
        }  # fmt: skip
        _refuse_spoilt(entry, spec)
        snapshot = _reduce(city, spec, entry, [*reports, *outgoing], replace, client, tell)
        _keep_contributions(city)
    return entry | {"snapshot": snapshot}


@dataclass(frozen=True)
class _Reading:
    """What the slices of a dump are made with."""

    city: City
    spec: PointsSpec
    grid: Grid
    client: Client | None
    tell: Progress
    quarantine: str

    def folder(self, plan: IngestPlan) -> Path:
        """Where a dump's shards lie."""
        return self.city.workspace_path / "shards" / f"{plan.dump}-{_digest(self.spec, self.grid)}"


def _read(
    reading: _Reading, plan: IngestPlan, replace: str | None, named: bool
) -> tuple[IngestPlan, list[SliceReport]]:  # fmt: skip
    """The slices of a plan, and the plan of what was read: a damaged or changing file is left out, unless it was named.

    Raises:
        DataError: A file that was named is damaged, or changed while it was read.
    """
    while plan.dump and plan.dump != replace:
        try:
            reports = _map(reading, plan)
            left = changed_files(plan.sources)
            if left:  # its shards have the name of other content
                _clear(reading.folder(plan))
        except DataError:
            left = [] if named else damaged_files(reading.city, plan.sources, reading.client, reading.tell)
            if not left:
                raise
        if not left:
            return plan, reports
        if named:
            raise DataError(left[0].reason)
        plan = leave_out(reading.city, plan, left)
    return plan, []


def _map(reading: _Reading, plan: IngestPlan) -> list[SliceReport]:
    folder = reading.folder(plan)
    plan = _resume(reading.city, plan, folder)
    jobs = _slices(plan, reading.spec, folder, reading.client, reading.tell, reading.quarantine, reading.grid)
    return run_jobs(
        reading.client, map_slice, jobs, "reading points", reading.tell, amount=lambda r: r.rows, expected=plan.rows
    )


def _digest(spec: PointsSpec, grid: Grid) -> str:
    """Names the settings and the code that decide a shard's content, so that shards of others are never taken."""
    settings = read_settings(spec)
    text = json.dumps(["samples", settings, spec.period, grid.__dict__, _software()], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@lru_cache(maxsize=1)
def _software() -> list[str]:
    """Our own code that makes shards, and the libraries that read and place points for it."""
    rooms = [Path(str(room.__file__)).parent for room in (roadfuse_core.grid, roadfuse_core.points)]
    sources = [p for room in rooms for p in sorted(room.glob("*.py"))]
    ours = hashlib.blake2b(b"\0".join(p.read_bytes() for p in sources), digest_size=16).hexdigest()
    return [ours, duckdb.__version__, numba.__version__, np.__version__, pa.__version__, pyproj.proj_version_str]


def _clear(folder: Path) -> None:
    """Remove what an ingest wrote into a dump's folder."""
    if folder.is_dir():
        remove_shards([p for p in folder.iterdir() if _is_ours(p)])


def _resume(city: City, plan: IngestPlan, folder: Path) -> IngestPlan:
    """The plan with the slices that an interrupted ingest of the same dump began with, whatever machine that was on.

    Where they would not fit into a worker of today, what was done of them is removed.
    """
    record = folder / SLICES
    try:
        begun = int(read_record(record)["rows_per_slice"])
    except (FileNotFoundError, DamagedFileError, KeyError, TypeError, ValueError):
        begun = 0
    if 0 < begun <= most_rows_per_slice(city):
        return plan.cut_by(begun)
    _clear(folder)
    write_record(record, {"rows_per_slice": plan.rows_per_slice})
    return plan


def _outgoing(city: City, dump: str) -> list[SliceReport]:
    """What a dump once added, from the shards that are kept.

    Raises:
        StoreError: Its shards are gone, or of a form that can no longer be read.
    """
    entry = ledger(city)[dump]
    folder = city.workspace_path / "shards" / str(entry.get("shards"))
    fix = "bring them back from a backup, or build the cube again in another workspace"
    try:
        reports = [read_report(p) for p in sorted(folder.glob("shard-*.json"))]
    except DamagedFileError as error:
        raise StoreError(f"{error}, and with it contributions of dump {dump}, which cannot leave; {fix}") from error
    if sum(r.rows for r in reports) != entry["rows"]:
        raise StoreError(f"{folder}: the contributions of dump {dump} are no longer kept; {fix}")
    for report in reports:
        if report.digests and not is_intact(report):
            raise StoreError(f"{report.shards[0]}: contributions of dump {dump} are damaged, and it cannot leave; {fix}")
        if report.shards and not report.digests:  # of an earlier version, perhaps of an earlier form
            ShardFile(Path(report.shards[0]))
    return [dataclasses.replace(r, sign=-1) for r in reports]


def _keep_contributions(city: City) -> None:
    """Keep the shards of dumps in the ledger, for replacing; remove everything else."""
    remove_shards(leftover_shards(city))


def leftover_shards(city: City) -> list[Path]:
    """Below `workspace/shards`: folders of no dump in the ledger, and what a map leaves beside shards and reports.

    Files and folders that no ingest wrote are never among them.

    Raises:
        StoreError: The ledger cannot be read.
    """
    kept = {e.get("shards") for e in ledger(city).values()}
    folders = [f for f in (city.workspace_path / "shards").glob("*") if f.is_dir() and not f.is_symlink()]
    ours = [f for f in folders if DUMP_FOLDER.fullmatch(f.name)]
    unpublished = [f for f in ours if f.name not in kept and _only_ours(f)]
    return unpublished + [p for f in ours if f.name in kept for p in f.iterdir() if PASSING_FILE.fullmatch(p.name)]


def _only_ours(folder: Path) -> bool:
    """Whether an ingest wrote everything in a folder."""
    return all(_is_ours(p) for p in folder.iterdir())


def _is_ours(path: Path) -> bool:
    return bool(KEPT_FILE.fullmatch(path.name) or PASSING_FILE.fullmatch(path.name))


def remove_shards(paths: list[Path]) -> None:
    """Remove files and folders, under the committer lock."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def changed_tiles(city: City, since: str) -> set[TileIndex]:
    """Tiles whose points changed between a snapshot of the cube and the newest.

    Args:
        city: The city.
        since: An earlier snapshot, as an ingest returns it.

    Raises:
        StoreError: The snapshot is no longer among the newest one's ancestors.
    """
    repository = open_repository(cubes_path(city))
    try:
        diff = repository.diff(from_snapshot_id=since, to_branch=MAIN)
    except icechunk.IcechunkError as error:
        raise StoreError(f"{cubes_path(city)}: snapshot {since} is no longer held; compare by a full run") from error
    totals = [chunks for path, chunks in diff.updated_chunks.items() if path.startswith("/total/")]
    return {TileIndex(*place) for chunks in totals for place in chunks}


def _slices(
    plan: IngestPlan, spec: PointsSpec, folder: Path, client: Client | None, tell: Progress, quarantine: str, grid: Grid
) -> list[Slice]:
    """The jobs of the map; where vehicles matter, their samples are brought together first."""
    bare = spec.model_copy(update={"sources": ("-",)})
    parts = cut_parts(plan, folder)
    # How many rows text has is known once it was read.
    if needs_vehicles(spec) and (len(parts) > 1 or not all(s.is_parquet for s in plan.sources)):
        shuffles = [Shuffle(bare, part, str(folder / f"shuffle-{n:05d}.parquet")) for n, part in enumerate(parts)]
        shuffled = run_jobs(client, shuffle_slice, shuffles, "shuffling vehicles", tell)
        parts = cut_buckets(shuffled, plan.rows_per_slice)
    away = f"{quarantine}/{plan.dump}" if quarantine else ""
    return [
        Slice(bare, grid, part, str(folder / f"shard-{n:05d}.json"), plan.rows_per_slice, away) for n, part in enumerate(parts)
    ]


def _entry(plan: IngestPlan, spec: PointsSpec, reports: list[SliceReport], began: float) -> LedgerEntry:
    reasons: Counter[str] = Counter()
    ratios: dict[int, NDArray[np.int64]] = {}
    for report in reports:
        reasons.update(report.reasons)
        for day, counts in report.ratios.items():
            ratios[day] = ratios.get(day, 0) + np.array(counts)
    broken = find_speed_break({day: counts.tolist() for day, counts in ratios.items()}, spec.speed_unit)
    kept = reasons.pop("kept", 0)
    times = [t for r in reports for t in (r.first_us, r.last_us) if t is not None]
    span = [str(np.datetime64(t, "us").astype("datetime64[s]")) for t in (min(times), max(times))] if times else None
    return {
        "dump": plan.dump, "files": plan.files, "rows": sum(r.rows for r in reports), "kept": kept,
        "rejected": {k: v for k, v in reasons.items() if v}, "time": span,
        "tiles": len({t for r in reports for t in r.tiles}), "seconds": round(time.perf_counter() - began, 2),
        "speed_break": dataclasses.asdict(broken) if broken else None,
        "time_warnings": describe_suspects(sum(r.before_gps for r in reports), sum(r.rolled_over for r in reports), kept),
        "committed": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }  # fmt: skip


def _refuse_spoilt(entry: LedgerEntry, spec: PointsSpec) -> None:
    """Stop a dump of which too much was rejected for one reason."""
    rejected, rows = entry["rejected"], max(1, entry["rows"])
    if rejected.get("swapped", 0) > entry["kept"]:
        problem = f"place {rejected['swapped']:,} rows in the city only when exchanged, and {entry['kept']:,} as they are"
        raise ConfigError("points.columns", {"lon": "…", "lat": "…"}, problem, "exchange lon and lat")
    for reason, share in spec.clean.stop_above.items():
        if rejected.get(reason, 0) / rows > share:
            problem = (
                f"is exceeded: {rejected[reason]:,} of {rows:,} rows ({rejected[reason] / rows:.1%}) are rejected as {reason}"
            )
            raise DataError(f"points.clean.stop_above.{reason}: {share} {problem}; mend the dump or raise the limit")
    if entry["rows"] and not entry["kept"]:
        most = max(rejected, key=lambda reason: rejected[reason])
        problem = f"is why none of {entry['rows']:,} rows is kept; nothing was stored"
        raise ConfigError("points", rejected, problem, SUSPECTS.get(most, "correct points and run again"))


def _reduce(
    city: City, spec: PointsSpec, entry: LedgerEntry, reports: list[SliceReport], replace: str | None, client: Client | None,
    tell: Progress,
) -> str:  # fmt: skip
    """Add the shards to the cube on a staging branch, ledger last, then move `main` to it.

    Others may commit while blocks are written; the cube itself is nobody else's, by the lock of the ingest.
    """
    grid, names = city.make_grid(), arrays_of(spec)
    with committer_lock(city.workspace_path):
        repository = open_repository(cubes_path(city), create=True)
        base = repository.lookup_branch(MAIN)
        if STAGING in repository.list_branches():
            repository.delete_branch(STAGING)
        repository.create_branch(STAGING, base)
        _grow(repository, spec, grid, names, reports)
    session = repository.writable_session(STAGING)
    owners = owned_blocks({tile for report in reports for tile in report.tiles})
    held = zarr.open_group(session.store, mode="r")["ledger"].attrs["dumps"]
    _refuse_known(held, entry, replace)
    fork, fresh = session.fork(), not held
    shards = tuple(Shard(path, r.sign) for r in reports for path in r.shards)
    jobs = [BlockJob(fork, tiles, shards, grid, names, fresh) for tiles in owners]
    forks = run_jobs(client, add_block, jobs, "writing blocks", tell)
    hashes = {f["hash"] for f in entry["files"]}
    emptied = {name for name, e in held.items() if kept_nothing(e) and hashes & {f["hash"] for f in e["files"]}}
    dumps = {name: e for name, e in held.items() if name != replace and name not in emptied}
    with committer_lock(city.workspace_path):
        session.merge(*forks)
        zarr.open_group(session.store, mode="r+")["ledger"].attrs["dumps"] = dumps | {entry["dump"]: entry}
        snapshot = session.commit(f"dump {entry['dump']}: {entry['kept']} points")
        publish(repository, snapshot, base)
        repository.delete_branch(STAGING)
    return str(snapshot)


def _refuse_known(dumps: dict[str, LedgerEntry], entry: LedgerEntry, replace: str | None) -> None:
    """The last look before anything is added: by the ledger of the branch itself, whatever was planned by.

    Raises:
        StoreError: The cube already holds one of the dump's files, or not the dump that is replaced.
    """
    if replace is not None and replace not in dumps:
        raise StoreError(f"the cube no longer holds dump {replace}; nothing was changed, run again")
    stored = {f["hash"]: name for name, e in dumps.items() if name != replace and not kept_nothing(e) for f in e["files"]}
    for file in entry["files"]:
        if file["hash"] in stored:
            raise StoreError(f"{file['label']}: the cube holds this file already, in dump {stored[file['hash']]}; "
                             "nothing was changed, run again")  # fmt: skip


def _grow(
    repository: icechunk.Repository, spec: PointsSpec, grid: Grid, names: tuple[str, ...], reports: list[SliceReport]
) -> None:
    """Make the arrays, and lengthen their period axis, in a commit of its own: forks refuse uncommitted changes."""
    periods = max((r.periods[1] + 1 for r in reports if r.periods), default=1)
    session = repository.writable_session(STAGING)
    if is_untouched(repository, STAGING):
        create_arrays(zarr.open_group(session.store), grid, names, spec.period)
    root = zarr.open_group(session.store, mode="r+")
    for name in names:
        array = root[f"period/{name}"]
        if array.shape[0] < periods:
            array.resize((periods, *array.shape[1:]))
    if session.has_uncommitted_changes:
        session.commit("grow the period axis")
