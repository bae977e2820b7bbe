"""A dump enters the cube: planned, mapped to shards, reduced to chunks, published with its ledger entry."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
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
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.points import (
    Part,
    Shuffle,
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
    read_report,
    shuffle_slice,
    time_span,
)
from roadfuse_core.settings import City, PointsSpec

__all__ = ["IngestPlan", "LedgerEntry", "changed_tiles", "cubes_path", "files_between", "ingest", "ledger", "plan_ingest"]

log = logging.getLogger(__name__)
ROWS_PER_SLICE = 6_000_000
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


def plan_ingest(city: City, patterns: list[str] | None = None, replace: str | None = None) -> IngestPlan:
    """What is new among the city's files; reads headers and hashes, writes nothing.

    Args:
        city: The city.
        patterns: Files or globs instead of the city's own sources.
        replace: A dump whose files count as new, because it leaves the cube.

    Raises:
        ConfigError: Sources match nothing or lack a column.
        DataError: A file is unreadable, or one that was ingested has changed.
    """
    files = find_sources(city, patterns)
    if needs_vehicles(_spec(city)) and len({f.is_parquet for f in files}) > 1:
        raise ConfigError("points.sources", patterns or list(_spec(city).sources), "mix Parquet and text",
                          "ingest them apart, so that each vehicle is seen whole")  # fmt: skip
    counted = check_columns(city, files)
    entries = {name: e for name, e in ledger(city).items() if name != replace}
    held = {f["hash"] for e in entries.values() for f in e["files"]}
    by_label = {f["label"] for e in entries.values() for f in e["files"]}
    new: list[dict[str, Any]] = []
    known: list[str] = []
    for f, rows in zip(identify(files), counted, strict=True):
        if f["hash"] in held:
            known.append(str(f["label"]))
        elif f["label"] in by_label:
            raise DataError(f"points.sources: {f['label']} was ingested with other content; give the new content a new name")
        else:
            new.append(f | {"rows": rows if rows is not None else int(str(f["size"])) // BYTES_PER_TEXT_ROW})
    if not new:
        return IngestPlan("", [], known, 0, 0)
    # In the order of their content, so that a run after a crash makes the same slices, whatever the files are called.
    new.sort(key=lambda f: (f["hash"], f["label"]))
    dump = hashlib.blake2b("".join(f["hash"] for f in new).encode(), digest_size=6).hexdigest()
    rows = sum(f["rows"] for f in new)
    return IngestPlan(dump, new, known, rows, max(1, -(-rows // ROWS_PER_SLICE)))


def files_between(city: City, plan: IngestPlan, since: datetime, until: datetime) -> list[str]:
    """Labels of a plan's new files that hold any time in [since, until); a file is taken whole.

    Args:
        city: The city; its points name a time column.
        plan: What is new.
        since: With a zone, or UTC.
        until: Likewise.

    Raises:
        ConfigError: The city's points have no time, or the range is empty.
    """
    spec = _spec(city)
    if spec.columns.time is None:
        raise ConfigError("points.columns.time", None, "is missing", "name the time column to choose files by time")
    low, high = (int(t.replace(tzinfo=t.tzinfo or UTC).timestamp() * 1e6) for t in (since, until))
    if low >= high:
        raise ConfigError("--to", until.isoformat(), f"is not after --from {since.isoformat()}", "exchange them")
    with tempfile.TemporaryDirectory() as scratch:
        paths = materialise(plan.sources, Path(scratch) / "unpacked")
        spans = [time_span(spec, path, Path(scratch) / "spill") for path in paths]
    return [f.label for f, s in zip(plan.sources, spans, strict=True) if s and s[0] < high and s[1] >= low]


def ingest(
    city: City,
    patterns: list[str] | None = None,
    client: Client | None = None,
    tell: Progress = quiet,
    replace: str | None = None,
    quarantine: Path | None = None,
) -> LedgerEntry | None:
    """Bring the new files into the cube as one dump: wholly or not at all.

    Killed at any moment and run again, it takes the shards that are whole, and nothing is counted twice.

    Args:
        city: The city; its `points` say how to read.
        patterns: Files or globs instead of the city's own sources.
        client: Dask; None works in this process, with the same result.
        tell: Progress.
        replace: A dump of the ledger that leaves the cube in the same step; the result is as if it had never been in.
        quarantine: Folder for the rejected rows, as Parquet with their reasons.

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
        outgoing = _outgoing(city, replace) if replace else []
        plan = plan_ingest(city, patterns, replace)
        if not plan.dump or plan.dump == replace:
            _keep_contributions(city)
            return None
        _require_same_cube(city, grid, spec)
        began = time.perf_counter()
        folder = city.workspace_path / "shards" / f"{plan.dump}-{_digest(spec, grid)}"
        jobs = _slices(plan, spec, folder, client, tell, str(quarantine or ""), grid)
        reports = run_jobs(client, map_slice, jobs, "reading points", tell)
        entry = _entry(plan, reports, began) | {"shards": folder.name}
        _refuse_exchanged(entry)
        repository = open_repository(cubes_path(city), create=True)
        snapshot = _reduce(repository, spec, grid, entry, [*reports, *outgoing], replace, client, tell)
        _keep_contributions(city)
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


def _outgoing(city: City, dump: str) -> list[SliceReport]:
    """What a dump once added, from the shards that are kept.

    Raises:
        ConfigError: There is no such dump.
        StoreError: Its shards are gone.
    """
    entries = ledger(city)
    if dump not in entries:
        raise ConfigError("--replace", dump, "is not in the ledger", f"it holds {', '.join(entries) or 'nothing'}")
    folder = city.workspace_path / "shards" / str(entries[dump].get("shards"))
    reports = [read_report(p) for p in sorted(folder.glob("shard-*.json"))]
    if sum(r.rows for r in reports) != entries[dump]["rows"]:
        raise StoreError(f"{folder}: the dump's contributions are no longer kept; build the cube anew in another workspace")
    return [dataclasses.replace(r, sign=-1) for r in reports]


def _keep_contributions(city: City) -> None:
    """Keep the shards of dumps in the ledger, for replacing; remove everything else."""
    kept = {e.get("shards") for e in ledger(city).values()}
    for folder in (city.workspace_path / "shards").glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not path.name.startswith("shard-"):
                path.unlink()


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
    chunks = diff.updated_chunks.get("/total/count", [])
    return {TileIndex(*place) for place in chunks}


def _slices(
    plan: IngestPlan, spec: PointsSpec, folder: Path, client: Client | None, tell: Progress, quarantine: str, grid: Grid
) -> list[Slice]:
    """The jobs of the map; where vehicles matter, their samples are brought together first."""
    bare = spec.model_copy(update={"sources": ("-",)})
    parts = _parts(plan, folder)
    if needs_vehicles(spec) and len(parts) > 1:
        shuffles = [Shuffle(bare, part, plan.slices, str(folder / f"shuffle-{n:05d}.parquet")) for n, part in enumerate(parts)]
        shuffled = tuple(run_jobs(client, shuffle_slice, shuffles, "shuffling vehicles", tell))
        parts = [Part(shuffled, bucket=k) for k in range(plan.slices)]
    away = f"{quarantine}/{plan.dump}" if quarantine else ""
    return [Slice(bare, grid, part, str(folder / f"shard-{n:05d}.json"), ROWS_PER_SLICE, away) for n, part in enumerate(parts)]


def _parts(plan: IngestPlan, folder: Path) -> list[Part]:
    """The dump in parts of at most about `ROWS_PER_SLICE` rows: small files together, large Parquet files in pieces."""
    parts: list[Part] = []
    for parquet in (True, False):
        files = [f for f, s in zip(plan.files, plan.sources, strict=True) if s.is_parquet == parquet]
        sources = [s for s in plan.sources if s.is_parquet == parquet]
        paths = materialise(sources, folder / "unpacked")
        together: list[str] = []
        held = 0
        for path, rows in zip(paths, (f["rows"] for f in files), strict=True):
            if parquet and rows > ROWS_PER_SLICE:
                pieces = -(-rows // ROWS_PER_SLICE)
                cuts = [rows * k // pieces for k in range(pieces + 1)]
                parts += [Part((path,), rows=pair) for pair in itertools.pairwise(cuts)]
                continue
            if together and held + rows > ROWS_PER_SLICE:
                parts.append(Part(tuple(together)))
                together, held = [], 0
            together.append(path)
            held += rows
        if together:
            parts.append(Part(tuple(together)))
    return parts


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
    reports: list[SliceReport], replace: str | None, client: Client | None, tell: Progress,
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
    shards = tuple(Shard(path, r.sign) for r in reports for path in r.shards)
    jobs = [BlockJob(fork, tiles, shards, grid, names, fresh) for tiles in owners]
    forks = run_jobs(client, add_block, jobs, "writing blocks", tell)
    session.merge(*forks)
    root = zarr.open_group(session.store)
    dumps = {name: e for name, e in root["ledger"].attrs["dumps"].items() if name != replace}
    root["ledger"].attrs["dumps"] = dumps | {entry["dump"]: entry}
    snapshot = session.commit(f"dump {entry['dump']}: {entry['kept']} points")
    publish(repository, snapshot, base)
    repository.delete_branch(STAGING)
    return str(snapshot)


def _grow(
    repository: icechunk.Repository, spec: PointsSpec, grid: Grid, names: tuple[str, ...], reports: list[SliceReport]
) -> None:
    """Make the arrays, and lengthen their period axis, in a commit of its own: forks refuse uncommitted changes."""
    periods = max((r.periods[1] + 1 for r in reports if r.periods), default=1)
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
