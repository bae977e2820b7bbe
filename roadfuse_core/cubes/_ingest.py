"""A dump enters the cube: planned, mapped to shards, reduced to chunks, published with its ledger entry."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from dask.distributed import Client

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes._reduce import BlockJob, Shard, add_block, owned_blocks
from roadfuse_core.cubes._repository import (
    MAIN,
    committer_lock,
    create_arrays,
    grid_attributes,
    open_repository,
    publish,
    read_group,
)
from roadfuse_core.errors import ConfigError, DataError, StoreError
from roadfuse_core.grid import Grid
from roadfuse_core.points import (
    Slice,
    SliceReport,
    SourceFile,
    arrays_of,
    check_columns,
    find_sources,
    identify,
    map_slice,
    materialise,
    needs_vehicles,
)
from roadfuse_core.settings import City, PointsSpec

__all__ = ["IngestPlan", "LedgerEntry", "cubes_path", "ingest", "ledger", "plan_ingest"]

log = logging.getLogger(__name__)
ROWS_PER_SLICE = 4_000_000
BYTES_PER_TEXT_ROW = 30
STAGING = "ingest"
LedgerEntry = dict[str, Any]


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest would do.

    Attributes:
        dump: Name of the new dump, from its content; empty when there is nothing new.
        files: New files with size and content hash.
        known: Files whose content the ledger already holds.
        rows: Rows to read; counted for Parquet, estimated from the size for text.
        slices: Jobs of the map.
    """

    dump: str
    files: list[dict[str, Any]]
    known: list[str]
    rows: int
    slices: int

    @property
    def sources(self) -> list[SourceFile]:
        """The new files."""
        return [SourceFile(f["path"], f["member"]) for f in self.files]


def cubes_path(city: City) -> Path:
    """Where the city's cube repository lies."""
    return city.workspace_path / "cubes"


def ledger(city: City) -> dict[str, LedgerEntry]:
    """Every dump in the cube by name, oldest first; empty before the first ingest."""
    try:
        root = read_group(open_repository(cubes_path(city)))
    except StoreError:
        return {}
    return dict(sorted(root["ledger"].attrs["dumps"].items(), key=lambda item: item[1]["committed"]))


def plan_ingest(city: City, patterns: list[str] | None = None) -> IngestPlan:
    """What is new among the city's files; reads headers and hashes, writes nothing.

    Args:
        city: The city.
        patterns: Files or globs instead of the city's own sources.

    Raises:
        ConfigError: Sources match nothing or lack a column.
        DataError: A file is unreadable, or one that was ingested has changed.
    """
    files = find_sources(city, patterns)
    rows = check_columns(city, files)
    entries = ledger(city)
    held = {f["hash"]: name for name, e in entries.items() for f in e["files"]}
    by_label = {f["label"]: f["hash"] for e in entries.values() for f in e["files"]}
    if needs_vehicles(_spec(city)) and len({f.is_parquet for f in files}) > 1:
        raise ConfigError("points.sources", patterns or list(_spec(city).sources), "mix Parquet and text",
                          "ingest them apart, so that each vehicle is seen whole")  # fmt: skip
    identified = identify(files)
    for f in identified:
        if f["label"] in by_label and f["hash"] not in held:
            raise DataError(f"points.sources: {f['label']} was ingested with other content; give the new content a new name")
    new = [f for f in identified if f["hash"] not in held]
    known = [str(f["label"]) for f in identified if f["hash"] in held]
    if not new:
        return IngestPlan("", [], known, 0, 0)
    if known:
        rows = check_columns(city, [SourceFile(str(f["path"]), str(f["member"])) for f in new])
    rows += (
        sum(int(str(f["size"])) for f in new if not str(f["member"] or f["path"]).endswith((".parquet", ".pq")))
        // BYTES_PER_TEXT_ROW
    )
    dump = hashlib.blake2b("".join(sorted(str(f["hash"]) for f in new)).encode(), digest_size=6).hexdigest()
    return IngestPlan(dump, new, known, rows, max(1, -(-rows // ROWS_PER_SLICE)))


def ingest(
    city: City, patterns: list[str] | None = None, client: Client | None = None, tell: Progress = quiet
) -> LedgerEntry | None:
    """Bring the new files into the cube as one dump: wholly or not at all.

    Killed at any moment and run again, it takes the shards that are whole, and nothing is counted twice.

    Args:
        city: The city; its `points` say how to read.
        patterns: Files or globs instead of the city's own sources.
        client: Dask; None works in this process, with the same result.
        tell: Progress.

    Returns:
        The dump's ledger entry; None when nothing is new.

    Raises:
        ConfigError: The settings do not fit the files, or the cube.
        DataError: A file is unreadable, or its coordinates are exchanged throughout.
        StoreError: Another process is writing.
    """
    spec = city.points
    if spec is None:
        return None
    grid = city.make_grid()
    with committer_lock(city.workspace_path):
        plan = plan_ingest(city, patterns)
        if not plan.dump:
            return None
        _require_same_cube(city, grid, spec)
        began = time.perf_counter()
        folder = city.workspace_path / "shards" / f"{plan.dump}-{_digest(spec, grid)}"
        reports = _map(plan, spec, grid, folder, client, tell)
        entry = _entry(plan, reports, began)
        _refuse_exchanged(entry)
        repository = open_repository(cubes_path(city), create=True)
        snapshot = _reduce(repository, spec, grid, entry, reports, client, tell)
        shutil.rmtree(folder, ignore_errors=True)
    return entry | {"snapshot": snapshot}


def _spec(city: City) -> PointsSpec:
    if city.points is None:
        raise ConfigError("points", None, "is missing", "add a points section to ingest trajectories")
    return city.points


def _digest(spec: PointsSpec, grid: Grid) -> str:
    """Names the settings that decide a shard's content, so that shards of other settings are never reused."""
    text = json.dumps([spec.model_dump(mode="json", exclude={"sources"}), grid.__dict__], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _require_same_cube(city: City, grid: Grid, spec: PointsSpec) -> None:
    try:
        attributes = dict(read_group(open_repository(cubes_path(city))).attrs)
    except StoreError:
        return
    for key, value, held in (
        ("grid", grid_attributes(grid)["grid"], attributes["grid"]),
        ("points.period", spec.period, attributes["period"]),
        ("points.columns", list(arrays_of(spec)), attributes["arrays"]),
    ):
        if value != held:
            raise ConfigError(
                key, value, f"differs from the existing cube's {held}", "use another workspace or the old setting"
            )


def _map(
    plan: IngestPlan, spec: PointsSpec, grid: Grid, folder: Path, client: Client | None, tell: Progress
) -> list[SliceReport]:
    parts = {True: [f for f in plan.sources if f.is_parquet], False: [f for f in plan.sources if not f.is_parquet]}
    bare = spec.model_copy(update={"sources": ("-",)})
    jobs = []
    for parquet, files in parts.items():
        if not files:
            continue
        paths = tuple(materialise(files, folder / "unpacked"))
        # Vehicle rules need all samples of a vehicle in one slice; otherwise a hash of nothing splits nothing.
        buckets = plan.slices if needs_vehicles(spec) else 1
        groups = [paths] if needs_vehicles(spec) else [paths[k :: plan.slices] for k in range(min(plan.slices, len(paths)))]
        kind = "parquet" if parquet else "text"
        for n, bucket in itertools.product(range(len(groups)), range(buckets)):
            shard = folder / f"{kind}-{n:04d}-{bucket:04d}.parquet"
            jobs.append(Slice(bare, grid, groups[n], bucket, buckets, str(shard)))
    return run_jobs(client, map_slice, jobs, "reading points", tell)


def _entry(plan: IngestPlan, reports: list[SliceReport], began: float) -> LedgerEntry:
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.reasons)
    kept = reasons.pop("kept", 0)
    times = [t for r in reports for t in (r.first_us, r.last_us) if t is not None]
    span = [str(np.datetime64(t, "us").astype("datetime64[s]")) for t in (min(times), max(times))] if times else None
    return {
        "dump": plan.dump, "files": plan.files, "rows": sum(r.rows for r in reports), "kept": kept,
        "rejected": {k: v for k, v in reasons.items() if v}, "time": span,
        "tiles": len({t for r in reports for t in r.tiles}), "seconds": round(time.perf_counter() - began, 2),
        "committed": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }  # fmt: skip


def _refuse_exchanged(entry: LedgerEntry) -> None:
    swapped = entry["rejected"].get("swapped", 0)
    if swapped > entry["kept"]:
        problem = f"place {swapped:,} rows in the city only when exchanged, and {entry['kept']:,} as they are"
        raise ConfigError("points.columns", {"lon": "…", "lat": "…"}, problem, "exchange lon and lat")


def _reduce(
    repository: icechunk.Repository, spec: PointsSpec, grid: Grid, entry: LedgerEntry,
    reports: list[SliceReport], client: Client | None, tell: Progress,
) -> str:  # fmt: skip
    """Add the shards to the cube on a staging branch, ledger last, then move `main` to it."""
    base = repository.lookup_branch(MAIN)
    if STAGING in repository.list_branches():
        repository.delete_branch(STAGING)
    repository.create_branch(STAGING, base)
    names = arrays_of(spec)
    _grow(repository, spec, grid, names, reports)
    session = repository.writable_session(STAGING)
    points: Counter[int] = Counter()
    for report in reports:
        points.update(report.tiles)
    owners = owned_blocks(points)
    fork, fresh = session.fork(), not zarr.open_group(session.store, mode="r")["ledger"].attrs["dumps"]
    jobs = [BlockJob(fork, tiles, tuple(map(_shard, reports)), grid, names, fresh) for tiles in owners]
    forks = run_jobs(client, add_block, jobs, "writing blocks", tell)
    session.merge(*forks)
    root = zarr.open_group(session.store)
    dumps = dict(root["ledger"].attrs["dumps"])
    root["ledger"].attrs["dumps"] = dumps | {entry["dump"]: entry}
    snapshot = session.commit(f"dump {entry['dump']}: {entry['kept']} points")
    publish(repository, snapshot, base)
    repository.delete_branch(STAGING)
    return str(snapshot)


def _grow(
    repository: icechunk.Repository, spec: PointsSpec, grid: Grid, names: tuple[str, ...], reports: list[SliceReport]
) -> None:
    """Make the arrays, and lengthen their period axis, in a commit of its own: forks refuse uncommitted changes."""
    periods = max((r.first_period + r.periods for r in reports), default=1)
    session = repository.writable_session(STAGING)
    root = zarr.open_group(session.store)
    if "ledger" not in root:
        create_arrays(root, grid, names, spec.period)
    for name in names:
        array = root[f"period/{name}"]
        if array.shape[0] < periods:
            array.resize((periods, *array.shape[1:]))
    if session.has_uncommitted_changes:
        session.commit("grow the period axis")


def _shard(report: SliceReport) -> Shard:
    return Shard(report.shard, report.first_period, report.periods)
