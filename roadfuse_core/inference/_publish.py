"""Which finished map readers see: candidates that wait, tags of published maps, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import icechunk
import zarr

from roadfuse_core.cubes import committer_lock, open_repository, publish, read_group, storing
from roadfuse_core.errors import NothingPublishedError, StoreError
from roadfuse_core.inference._map import MapRecord, candidate, map_key, maps_path
from roadfuse_core.settings import City

__all__ = ["move_main", "published", "release", "rollback", "tagged_record", "waiting"]

MAIN = "main"
TAG_TIME = "%Y%m%dT%H%M%S%f"


def waiting(city: City, group: str = "map") -> MapRecord | None:
    """The record of the candidate that waits for its release on top of what is published now; None if there is none.

    Raises:
        StoreError: The repository cannot be read.
    """
    try:
        repository = open_repository(maps_path(city))
        return _record_at(repository, group, _waiting_snapshot(repository, group))
    except NothingPublishedError:
        return None


def _waiting_snapshot(repository: icechunk.Repository, group: str) -> str | None:
    if candidate(group) not in repository.list_branches():
        return None
    head, *parents = (s.id for s in repository.ancestry(branch=candidate(group)))
    return head if repository.lookup_branch(MAIN) in parents else None


def _record_at(repository: icechunk.Repository, group: str, snapshot: str | None) -> MapRecord | None:
    """The record of a group in a snapshot; None where it has none, or is the empty one that every repository begins with."""
    if snapshot is None or next(iter(repository.ancestry(snapshot_id=snapshot))).parent_id is None:
        return None
    root = read_group(repository, snapshot=snapshot)
    return dict(root[group].attrs["record"]) if group in root and "record" in root[group].attrs else None


def _key_at(repository: icechunk.Repository, group: str, snapshot: str) -> str | None:
    record = _record_at(repository, group, snapshot)
    return map_key(record) if record else None


def move_main(repository: icechunk.Repository, group: str, snapshot: str, base: str) -> None:
    """Publish a snapshot in one step, and give it a tag by which `rollback` finds it.

    Args:
        repository: Of maps.
        group: Which map is new in it.
        snapshot: What becomes the published one.
        base: What is published now.

    Raises:
        StoreError: Something else was published meanwhile.
    """
    _tag_published(repository, group)
    publish(repository, snapshot, base)
    _tag(repository, group, snapshot)


def _tag(repository: icechunk.Repository, group: str, snapshot: str) -> None:
    repository.create_tag(f"{group}-{datetime.now(UTC):{TAG_TIME}}", snapshot)


def _tag_published(repository: icechunk.Repository, group: str) -> None:
    """Tag the published map where it has no tag, because a crash came between, or the tag expired."""
    head = repository.lookup_branch(MAIN)
    key = _key_at(repository, group, head)
    nearest = next((s for _, s in _tagged_line(repository, group)), None)
    if key is not None and (nearest is None or _key_at(repository, group, nearest) != key):
        _tag(repository, group, head)


def _tags(repository: icechunk.Repository, group: str) -> dict[str, str]:
    """Snapshot by tag."""
    return {tag: repository.lookup_tag(tag) for tag in repository.list_tags() if tag.startswith(f"{group}-")}


def _tagged_line(repository: icechunk.Repository, group: str) -> Iterator[tuple[str, str]]:
    """Tags and snapshots from which the published map came, it first: by descent, whatever the clocks said."""
    tags = {snapshot: tag for tag, snapshot in _tags(repository, group).items()}
    for snapshot in repository.ancestry(branch=MAIN):
        if snapshot.id in tags:
            yield tags[snapshot.id], snapshot.id


def release(city: City, group: str = "map", key: str | None = None, facts: dict[str, Any] | None = None) -> MapRecord:
    """Publish the candidate that was held back.

    Args:
        city: The city.
        group: Which map.
        key: Only the candidate of this key; by default whichever waits.
        facts: What its record says from now on besides what it says already.

    Returns:
        The record of the published map. Where the map of that key is published already, nothing changes.

    Raises:
        StoreError: None is held back, or another one, or something else was published since.
    """
    with committer_lock(city.workspace_path), storing(city.workspace_path):
        repository = open_repository(maps_path(city))
        base = repository.lookup_branch(MAIN)
        record = _record_at(repository, group, _waiting_snapshot(repository, group))
        if key is not None and _key_at(repository, group, base) == key:
            return _record_at(repository, group, base) or {}
        if record is None:
            raise StoreError(f"{maps_path(city)}: no {group} is held back on top of what is published; run `roadfuse refresh`")
        if key is not None and map_key(record) != key:
            raise StoreError(
                f"{maps_path(city)}: {group} {map_key(record)} is held back now, not {key}; look at that one first"
            )
        _add_facts(repository, group, facts or {})
        move_main(repository, group, repository.lookup_branch(candidate(group)), base)
        repository.delete_branch(candidate(group))
        return record | (facts or {})


def _add_facts(repository: icechunk.Repository, group: str, facts: dict[str, Any]) -> None:
    """Extend the record of the candidate by a commit of its own; nothing where it says so already."""
    session = repository.writable_session(candidate(group))
    attributes = zarr.open_group(session.store)[group].attrs
    record = attributes["record"]
    if record != record | facts:
        attributes["record"] = record | facts
        session.commit(f"{group} as it is published")


def published(city: City, group: str = "map") -> list[tuple[str, datetime]]:
    """Tags of all maps that were published and are still stored, with their times (UTC).

    The published map and those from which it came are first, the newest first; then those that a rollback left, the newest by
    their clock first.
    """
    repository = open_repository(maps_path(city))
    line = [tag for tag, _ in _tagged_line(repository, group)]
    rest = sorted(set(_tags(repository, group)) - set(line), reverse=True)
    return [(tag, datetime.strptime(tag.removeprefix(f"{group}-"), TAG_TIME).replace(tzinfo=UTC)) for tag in [*line, *rest]]


def rollback(city: City, to: str | None = None, dry_run: bool = False) -> str:
    """Make an earlier map the published one again; the next refresh starts from it.

    Args:
        city: The city.
        to: A tag that `published` lists; by default the one from which the published map came.
        dry_run: Say which, and change nothing.

    Returns:
        The tag.

    Raises:
        StoreError: There is no such tag, or no earlier map; or another process is writing.
    """
    with committer_lock(city.workspace_path), storing(city.workspace_path):
        repository = open_repository(maps_path(city))
        now, tags = repository.lookup_branch(MAIN), _tags(repository, "map")
        to = to or _before(repository, now)
        if to is None or to not in tags:
            known = ", ".join(tag for tag, _ in published(city)) or "none"
            raise StoreError(f"{maps_path(city)}: has no {to or 'earlier map'} to go back to; published maps are: {known}")
        if not dry_run and tags[to] != now:
            _tag_published(repository, "map")
            publish(repository, tags[to], now)
        return to


def tagged_record(city: City, tag: str) -> MapRecord:
    """The record of a published map.

    Args:
        city: The city.
        tag: That `published` lists.
    """
    repository = open_repository(maps_path(city))
    return _record_at(repository, "map", repository.lookup_tag(tag)) or {}


def _before(repository: icechunk.Repository, now: str) -> str | None:
    """Tag of the nearest map from which the published one came; a snapshot in between may be another group's."""
    key = _key_at(repository, "map", now)
    return next((tag for tag, s in _tagged_line(repository, "map") if _key_at(repository, "map", s) != key), None)
