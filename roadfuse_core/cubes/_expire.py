"""Old snapshots and leftovers are given back to the disk; the ledger and what is published stay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import icechunk

from roadfuse_core.cubes._ingest import leftover_shards, remove_shards
from roadfuse_core.cubes._ledger import cubes_path
from roadfuse_core.cubes._repository import MAIN, open_repository
from roadfuse_core.errors import StoreError
from roadfuse_core.locks import COMMITTER, INGEST, MAP, sole_writer
from roadfuse_core.settings import City
from roadfuse_core.workspace import holds_anything

__all__ = ["Expiry", "expire"]

# Folders that a refresh writes: a map and the digest of what decides it.
SCRATCH = re.compile(r"[a-z][a-z0-9_-]*-[0-9a-f]{16}")


@dataclass(frozen=True)
class Expiry:
    """What an expiry removes, or would remove.

    Attributes:
        snapshots: Snapshots that are no longer readable.
        bytes: Stored data that nothing refers to; of a dry run, only what nothing refers to already.
        leftovers: Files and folders of shards that no dump in the ledger needs, half-written files, and blocks of
            refreshes that were stopped before the time and never went on.
    """

    snapshots: int
    bytes: int
    leftovers: int


def expire(city: City, older_than: datetime, dry_run: bool = False, keep: str | None = None) -> Expiry:
    """Forget snapshots made before a time, but for the newest, and sweep what crashes have left.

    Args:
        city: The city.
        older_than: With a zone, or UTC.
        dry_run: Count and remove nothing.
        keep: A snapshot of the cube that must stay, with all that came after it: what the published map was made of.

    Raises:
        StoreError: Another process is writing: removing what it has not yet published would destroy it; or the ledger
            cannot be read.
    """
    before = older_than.replace(tzinfo=older_than.tzinfo or UTC)
    with sole_writer(city.workspace_path, (INGEST, MAP, COMMITTER), f"expiry of {city.name}"):
        leftovers = _leftovers(city, before)  # by the ledger, before anything is removed
        cubes_before = min([before, *_made(city, keep)])
        done = [_expire_one(p, cubes_before if p == cubes_path(city) else before, dry_run) for p in _repositories(city)]
        if not dry_run:
            remove_shards(leftovers)
    return Expiry(sum(d[0] for d in done), sum(d[1] for d in done), len(leftovers))


def _leftovers(city: City, before: datetime) -> list[Path]:
    scratch = [p for p in (city.workspace_path / "scratch").glob("*") if SCRATCH.fullmatch(p.name)]
    forgotten = [p for p in scratch if p.stat().st_mtime < before.timestamp()]
    return leftover_shards(city) + forgotten + [p for path in _repositories(city) for p in path.rglob("*#[0-9]*")]


def _made(city: City, snapshot: str | None) -> list[datetime]:
    history = open_repository(cubes_path(city)).ancestry(branch=MAIN) if snapshot else ()
    return [s.written_at for s in history if s.id == snapshot]


def _repositories(city: City) -> Iterator[Path]:
    yield from (p for p in (cubes_path(city), city.workspace_path / "maps") if holds_anything(p))


def _expire_one(path: Path, before: datetime, dry_run: bool) -> tuple[int, int]:
    """Snapshots and bytes of one repository; its newest snapshot stays, whatever its age."""
    repository = open_repository(path)
    try:
        old = sum(s.written_at < before for s in list(repository.ancestry(branch=MAIN))[1:-1])
        if not dry_run:
            for branch in set(repository.list_branches()) - {MAIN}:
                if not branch.startswith("candidate-"):  # a map that waits for its release
                    repository.delete_branch(branch)  # nobody writes now: a crash left it
            repository.expire_snapshots(before, delete_expired_tags=True)
        collected = repository.garbage_collect(datetime.now(UTC), dry_run=dry_run)
    except icechunk.IcechunkError as error:
        raise StoreError(f"{path}: cannot be cleaned ({str(error).splitlines()[0]}); run again") from error
    return old, int(collected.bytes_deleted)
