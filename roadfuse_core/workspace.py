"""The marker of a workspace: says that a folder is one, and which repositories were made in it.

A failed look at a disk must not pass for "there is nothing yet": an ingest would count every point again. So a repository that
the marker names and that is not there is lost, not new.
"""

from __future__ import annotations

import os
from pathlib import Path

from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.files import read_record, write_record

__all__ = ["enter_workspace", "expected_repositories", "holds_anything", "note_repository", "require_workspace"]

MARKER = "workspace.json"
REPOSITORIES = ("cubes", "maps")
CONTRIBUTIONS = f"shards/{'[0-9a-f]' * 12}-{'[0-9a-f]' * 12}/shard-*.json"


def enter_workspace(workspace: Path) -> None:
    """Make a folder a workspace, or know it again; a run that a person starts does so first.

    Raises:
        StoreError: The folder cannot be read, or its marker is damaged.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    if _read_marker(workspace) is None:
        _write_marker(workspace, expected_repositories(workspace))


def require_workspace(workspace: Path) -> None:
    """Refuse a folder that is no workspace yet; a scheduled or served run does so first, and never makes one.

    A disk that is not mounted, or a path of another machine, would otherwise become an empty city.

    Raises:
        ConfigError: There is no such folder, or no run of ours was ever there.
        StoreError: The folder cannot be read, or its marker is damaged.
    """
    fix = "mount its disk, correct the path, or make it by a first `roadfuse refresh CITY.yaml` from a terminal"
    if not _is_folder(workspace):
        raise ConfigError("workspace", str(workspace), "does not exist, and a scheduled run makes none", fix)
    if _read_marker(workspace) is None and not expected_repositories(workspace):
        raise ConfigError("workspace", str(workspace), "is a folder that RoadFuse never used", fix)


def expected_repositories(workspace: Path) -> frozenset[str]:
    """Which of `cubes` and `maps` were made in a workspace, whether they are there or not.

    Without a marker (workspaces of earlier versions): those that hold anything, and `cubes` wherever contributions of dumps
    are kept.

    Raises:
        StoreError: The folder cannot be read, or its marker is damaged.
    """
    marked = _read_marker(workspace)
    if marked is not None:
        return marked
    found = {name for name in REPOSITORIES if holds_anything(workspace / name)}
    if holds_anything(workspace / "shards") and next(workspace.glob(CONTRIBUTIONS), None):
        found.add("cubes")
    return frozenset(found)


def note_repository(repository: Path) -> None:
    """Write down that a repository exists, in the marker of the workspace around it."""
    known = expected_repositories(repository.parent)
    if repository.name not in known or _read_marker(repository.parent) is None:
        _write_marker(repository.parent, known | {repository.name})


def holds_anything(folder: Path) -> bool:
    """Whether there is such a folder with anything in it.

    Raises:
        StoreError: That cannot be found out.
    """
    if not _is_folder(folder):
        return False
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror}); nothing was changed, run again") from error


def _is_folder(path: Path) -> bool:
    """Whether there is such a folder; only a path that does not exist is none."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); nothing was changed, run again") from error
    if not path.is_dir():
        raise StoreError(f"{path}: is a file, not a folder; move it away or correct `workspace`")
    return True


def _read_marker(workspace: Path) -> frozenset[str] | None:
    """Repositories by the marker; None where there is none."""
    path = workspace / MARKER
    try:
        return frozenset(read_record(path)["repositories"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); nothing was changed, run again") from error


def _write_marker(workspace: Path, repositories: frozenset[str]) -> None:
    write_record(workspace / MARKER, {"repositories": sorted(repositories)})
