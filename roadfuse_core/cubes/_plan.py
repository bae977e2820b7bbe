"""What an ingest would do: which files are new, how they are cut, and what it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import secrets
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distributed.system import MEMORY_LIMIT

from roadfuse_core.cluster import count_workers
from roadfuse_core.cubes._ledger import LedgerEntry, kept_nothing, ledger, read_settings, require_same_cube
from roadfuse_core.cubes._reduce import TILE_ROWS
from roadfuse_core.cubes._skipped import SkippedFile, sift, split_off_young
from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.points import (
    DUCKDB_BYTES,
    Part,
    SourceFile,
    check_columns,
    columns_of,
    find_sources,
    identify,
    matches,
    materialise,
    needs_vehicles,
    points_of,
    time_span,
)
from roadfuse_core.settings import City

__all__ = [
    "IngestPlan",
    "cut_parts",
    "files_between",
    "find_new",
    "leave_out",
    "most_rows_per_slice",
    "plan_ingest",
    "rows_per_slice",
]

log = logging.getLogger(__name__)
ROWS_PER_SLICE = 4_000_000  # more would let memory grow with the points
# Jobs for each worker, so that none waits long for the last; fewer rows than the least are not worth a job.
JOBS_PER_WORKER = 4
LEAST_ROWS_PER_SLICE = 250_000
# Resident bytes of a worker before it does anything, with all libraries loaded; measured, with room.
BASE_BYTES = 450_000_000
GIB = 1 << 30


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest would do.

    Attributes:
        dump: Name of the new dump, from its content and the settings that it is read with; empty when there is nothing new.
        files: New files with size and content hash.
        known: Files whose content the ledger already holds.
        copies: Files with the content of another one of the dump; they are not read.
        skipped: Files of the city's sources that wait or are damaged.
        archived: Sources that match nothing any more, and whose files are in the ledger.
        rows: Rows to read; counted for Parquet, estimated from the size and the first rows for text.
        slices: Jobs of the map, about.
        rows_per_slice: Most rows of a job, by the memory of a worker.
        addresses: Where files are read whose address is more than their path, by label; no ledger holds these.
    """

    dump: str
    files: list[dict[str, Any]]
    known: list[str]
    copies: list[str]
    skipped: list[SkippedFile]
    archived: list[str]
    rows: int
    slices: int
    rows_per_slice: int
    addresses: Mapping[str, str] = field(default_factory=dict, repr=False)

    def cut_by(self, rows_per_slice: int) -> IngestPlan:
        """The same dump in slices of another size."""
        slices = max(1, -(-self.rows // rows_per_slice))
        return dataclasses.replace(self, slices=slices, rows_per_slice=rows_per_slice)

    @property
    def sources(self) -> list[SourceFile]:
        """The new files."""
        return [
            SourceFile(f["path"], f["member"], f["size"], f["version"], self.addresses.get(f["label"], "")) for f in self.files
        ]


def plan_ingest(city: City, patterns: Sequence[str | SourceFile] | None = None, replace: str | None = None) -> IngestPlan:
    """What is new among the city's files; opens those that the ledger does not hold, and writes nothing.

    Of the city's own sources, files that are too young or damaged are left out, so that the others enter. Files that are
    named one by one all have to be right.

    Args:
        city: The city.
        patterns: Files or globs instead of the city's own sources; what was found before is not searched again.
        replace: A dump whose files count as new, because it leaves the cube.

    Raises:
        ConfigError: Sources match nothing or lack a column, a worker's memory is too small, there is no dump to replace, or
            the existing cube has another grid, period or other columns.
        DataError: A file that was named is unreadable or was ingested with other content, or no file of the sources is right.
    """
    require_same_cube(city)
    every = ledger(city)
    if replace is not None and replace not in every:
        raise ConfigError("--replace", replace, "is not in the ledger", f"it holds {', '.join(every) or 'nothing'}")
    entries = [e for name, e in every.items() if name != replace and not kept_nothing(e)]
    held = {f["hash"] for e in entries for f in e["files"]}
    by_label = {f["label"] for e in entries for f in e["files"]}
    versions = _hashes(every.values())
    found, archived = _find(city, patterns, every.values())
    known_files, files = _split(found, versions, held)
    known = [f.label for f in known_files]
    looked, skipped = _look(city, files, versions, bool(every)) if patterns is None else (_strictly(city, files, versions), [])
    new: dict[str, dict[str, Any]] = {}
    copies: list[str] = []
    for f in looked:
        if f["hash"] in held:
            known.append(str(f["label"]))
        elif f["hash"] in new:
            copies.append(str(f["label"]))
        elif f["label"] in by_label:
            problem = f"points.sources: {f['label']} was ingested with other content; give the new content a new name"
            if patterns is not None:
                raise DataError(problem)
            skipped.append(SkippedFile(f["label"], f["version"], problem, damaged=True))
        else:
            new[f["hash"]] = f
    addresses = {f.label: f.address for f in files if f.address}
    plan = IngestPlan("", [], known, copies, skipped, archived, 0, 0, rows_per_slice(city, 0), addresses)
    return _with_files(city, plan, list(new.values()))


def _with_files(city: City, plan: IngestPlan, files: list[dict[str, Any]]) -> IngestPlan:
    """A plan to read files, in the order of their content: a run after a crash makes the same slices, whatever their names."""
    if not files:
        return dataclasses.replace(plan, dump="", files=[], rows=0, slices=0)
    ordered = sorted(files, key=lambda f: str(f["hash"]))
    rows = sum(f["rows"] for f in files)
    per_slice = rows_per_slice(city, rows)
    sized = dataclasses.replace(plan, dump=_dump_name(city, ordered), files=ordered, rows=rows)
    return sized.cut_by(per_slice)


def leave_out(city: City, plan: IngestPlan, skipped: Sequence[SkippedFile]) -> IngestPlan:
    """The plan for a dump without some of its files."""
    labels = {s.label for s in skipped}
    others = [f for f in plan.files if f["label"] not in labels]
    return _with_files(city, dataclasses.replace(plan, skipped=[*plan.skipped, *skipped]), others)


def _strictly(city: City, files: list[SourceFile], versions: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    counted = check_columns(city, files)
    return [f | {"rows": rows} for f, rows in zip(identify(files, versions), counted, strict=True)]


def _look(
    city: City, files: list[SourceFile], versions: Mapping[tuple[str, str], str], dumps_stored: bool
) -> tuple[list[dict[str, Any]], list[SkippedFile]]:
    """Identities and rows of the files that are right, and the others.

    Raises:
        ConfigError: No file is right, so that it is the settings that are not.
        DataError: Likewise.
    """
    old, young = split_off_young(city, files)
    counted, damaged = sift(old, lambda some: check_columns(city, some))
    identified, unreadable = sift([f for f, _ in counted], lambda some: identify(some, versions))
    if damaged and not counted and not dumps_stored:
        _strictly(city, old, versions)
    rows = {file: n for file, n in counted}
    return [f | {"rows": rows[file]} for file, f in identified], [*young, *damaged, *unreadable]


def _dump_name(city: City, files: Sequence[dict[str, Any]]) -> str:
    """From what is read and how, so that a dump that was read with wrong settings can be read again with right ones."""
    parts = [read_settings(points_of(city)), *(f["hash"] for f in files)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()


def find_new(city: City) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files behind the city's sources that the ledger holds in this very version, and all others.

    Only others are worth opening: a look at many known objects costs their listing alone.

    Raises:
        ConfigError: A source matches nothing, or a file is of an unknown kind.
        DataError: An object store does not answer.
    """
    entries = [e for e in ledger(city).values() if not kept_nothing(e)]
    versions = _hashes(entries)
    return _split(_find(city, None, entries)[0], versions, set(versions.values()))


def _find(
    city: City, patterns: Sequence[str | SourceFile] | None, entries: Collection[LedgerEntry]
) -> tuple[list[SourceFile], list[str]]:
    """The files behind sources, and those sources that match nothing now but once did, by the ledger."""
    archived: list[str] = []

    def was_ingested(source: str) -> bool:
        archived.append(source)
        return any(matches(source, f["label"]) for e in entries for f in e["files"])

    return find_sources(city, patterns, was_ingested), archived


def _hashes(entries: Iterable[LedgerEntry]) -> dict[tuple[str, str], str]:
    """Content hashes by label and version."""
    return {(f["label"], f["version"]): f["hash"] for e in entries for f in e["files"]}


def _split(
    found: Sequence[SourceFile], versions: Mapping[tuple[str, str], str], held: Collection[str]
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Files whose content is known to be in the cube by their version, and all others."""
    known = [f for f in found if versions.get((f.label, f.version)) in held]
    others = [f for f in found if versions.get((f.label, f.version)) not in held]
    return known, others


def worker_memory(city: City) -> int:
    """Bytes that one worker may use: the city's setting, or its share of the machine, at most 2 GiB."""
    if city.cluster.memory_gib is not None:
        return int(city.cluster.memory_gib * GIB)
    return int(min(2 * GIB, MEMORY_LIMIT / count_workers(city.cluster)))


def rows_per_slice(city: City, rows: int) -> int:
    """Most rows of one job of the map, so that a worker stays within its memory and every worker has some.

    Args:
        city: The city.
        rows: Of the whole dump.

    Raises:
        ConfigError: Not even the smallest job fits, or a block of tiles does not.
    """
    fair = max(LEAST_ROWS_PER_SLICE, rows // (JOBS_PER_WORKER * count_workers(city.cluster)))
    return min(fair, most_rows_per_slice(city))


def most_rows_per_slice(city: City) -> int:
    """Most rows of one job of the map that a worker's memory allows.

    Raises:
        ConfigError: Not even the smallest job fits, or a block of tiles does not.
    """
    spec, px = points_of(city), city.grid.tile_px
    sample, limit = 4 * len(columns_of(spec)), worker_memory(city)
    # A row of the map: as collected and as sorted, with tile and period, and its target; with vehicles also as read and sorted.
    a_row = 2 * (sample + 8) + 16 + (170 if needs_vehicles(spec) else 0)
    # The reduce: the samples of a tile, those of one more shard, packed and unpacked, and four dense tiles.
    reduce = (TILE_ROWS + 2 * LEAST_ROWS_PER_SLICE) * sample + 24 * px**2
    need = BASE_BYTES + max(DUCKDB_BYTES + LEAST_ROWS_PER_SLICE * a_row, reduce)
    if need > limit:
        raise ConfigError(
            "cluster.memory_gib", round(limit / GIB, 2), f"is less than the {need / GIB:.2f} GiB that a worker needs",
            "raise it, use fewer workers or smaller tiles",
        )  # fmt: skip
    return min(ROWS_PER_SLICE, (limit - BASE_BYTES - DUCKDB_BYTES) // a_row)


def files_between(city: City, plan: IngestPlan, since: datetime, until: datetime) -> list[SourceFile]:
    """A plan's new files that hold any time in [since, until); a file is taken whole.

    Args:
        city: The city; its points name a time column.
        plan: What is new.
        since: With a zone, or UTC.
        until: Likewise.

    Raises:
        ConfigError: The city's points have no time, or the range is empty.

    A file that cannot be read is left out, with a warning: it may lie outside the range.
    """
    spec = points_of(city)
    if spec.columns.time is None:
        raise ConfigError("points.columns.time", None, "is missing", "name the time column to choose files by time")
    low, high = (int(t.replace(tzinfo=t.tzinfo or UTC).timestamp() * 1e6) for t in (since, until))
    if low >= high:
        raise ConfigError("--to", until.isoformat(), f"is not after --from {since.isoformat()}", "exchange them")
    with tempfile.TemporaryDirectory() as scratch:

        def spans(files: list[SourceFile]) -> list[tuple[int, int] | None]:
            unpacked = Path(scratch) / f"unpacked-{secrets.token_hex(4)}"
            return [time_span(spec, path, Path(scratch) / "spill") for path in materialise(files, unpacked)]

        found, damaged = sift(plan.sources, spans)
    for file in damaged:
        log.warning("%s; it is left out, whatever times it holds", file.reason)
    return [f for f, s in found if s and s[0] < high and s[1] >= low]


def cut_parts(plan: IngestPlan, folder: Path) -> list[Part]:
    """The dump in parts of at most about `rows_per_slice` rows: small files together, large Parquet files in pieces."""
    parts: list[Part] = []
    for parquet in (True, False):
        files = [f for f, s in zip(plan.files, plan.sources, strict=True) if s.is_parquet == parquet]
        sources = [s for s in plan.sources if s.is_parquet == parquet]
        paths = materialise(sources, folder / "unpacked")
        together: list[str] = []
        held = 0
        for path, rows in zip(paths, (f["rows"] for f in files), strict=True):
            if parquet and rows > plan.rows_per_slice:
                pieces = -(-rows // plan.rows_per_slice)
                cuts = [rows * k // pieces for k in range(pieces + 1)]
                parts += [Part((path,), rows=pair, expected=pair[1] - pair[0]) for pair in itertools.pairwise(cuts)]
                continue
            if together and held + rows > plan.rows_per_slice:
                parts.append(Part(tuple(together), expected=held if parquet else None))
                together, held = [], 0
            together.append(path)
            held += rows
        if together:
            parts.append(Part(tuple(together), expected=held if parquet else None))
    return parts
