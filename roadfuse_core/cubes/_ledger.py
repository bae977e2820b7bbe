"""What the cube holds: its dumps, the settings that they were read with, its snapshots."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import zarr

from roadfuse_core.cubes._repository import FORMAT, MAIN, grid_attributes, open_repository, read_group
from roadfuse_core.errors import ConfigError, NothingPublishedError, StoreError
from roadfuse_core.points import (
    arrays_of,
    points_of,
)
from roadfuse_core.settings import City, PointsSpec

__all__ = [
    "LedgerEntry",
    "Snapshot",
    "cubes_path",
    "kept_nothing",
    "ledger",
    "other_settings",
    "read_settings",
    "require_same_cube",
    "snapshots",
    "stored_cube",
]

LedgerEntry = dict[str, Any]


def cubes_path(city: City) -> Path:
    """Where the city's cube repository lies."""
    return city.workspace_path / "cubes"


def stored_cube(city: City) -> zarr.Group | None:
    """The root group of the city's cube, read-only; None before the first ingest.

    Raises:
        StoreError: The cube cannot be read.
    """
    try:
        return read_group(open_repository(cubes_path(city)))
    except NothingPublishedError:
        return None


def ledger(city: City) -> dict[str, LedgerEntry]:
    """Every dump in the cube by name, oldest first; empty before the first ingest.

    Raises:
        StoreError: The cube cannot be read; that is never taken for an empty ledger.
    """
    root = stored_cube(city)
    if root is None:
        return {}
    if root.attrs.get("format") != FORMAT:
        raise StoreError(f"{cubes_path(city)}: was made by an earlier version; ingest anew in another workspace")
    return dict(sorted(root["ledger"].attrs["dumps"].items(), key=lambda item: item[1]["committed"]))


def require_same_cube(city: City) -> None:
    """Refuse a city file that does not fit the cube in its workspace.

    Raises:
        ConfigError: The cube has another grid or period, or sums of other columns.
        StoreError: The cube cannot be read.
    """
    cube, spec = stored_cube(city), points_of(city)
    if cube is None:
        return
    for key, value, stored in (
        ("grid", grid_attributes(city.make_grid())["grid"], cube.attrs["grid"]),
        ("points.period", spec.period, cube.attrs["period"]),
        ("points.columns", list(arrays_of(spec)), cube.attrs["arrays"]),
    ):
        if value != stored:
            problem, fix = f"differs from the existing cube's {stored}", "use another workspace or the old setting"
            raise ConfigError(key, value, problem, fix)


def read_settings(spec: PointsSpec) -> dict[str, Any]:
    """What decides which sums a file's rows become, besides grid and period, which a cube has once and for all."""
    settings = spec.model_dump(mode="json", exclude={"sources", "period", "settle_s"})
    settings["clean"].pop("stop_above")
    return settings


def kept_nothing(entry: LedgerEntry) -> bool:
    """Whether a dump of an earlier version has rows and none of them in the cube; its files count as new."""
    return bool(entry["rows"] and not entry["kept"])


def other_settings(city: City) -> list[str]:
    """A line for each dump that was read with other settings than the city file has now.

    Dumps of versions that did not write their settings down are passed over.
    """
    now = _flat(read_settings(points_of(city)))
    lines = []
    for name, entry in ledger(city).items():
        then = _flat(entry["settings"]) if "settings" in entry else now
        differ = [key for key in now if key in then and then[key] != now[key]]
        if differ:
            told = ", ".join(f"{key} was {then[key]!r} and is {now[key]!r}" for key in differ)
            fix = f"`roadfuse ingest CITY.yaml --replace {name}` reads its files again"
            lines.append(f"dump {name} was read with other settings ({told}); {fix}")
    return lines


def _flat(settings: dict[str, Any], within: str = "points") -> dict[str, Any]:
    """Values by dotted key."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        place = f"{within}.{key}"
        out |= _flat(value, place) if isinstance(value, dict) else {place: value}
    return out


@dataclass(frozen=True)
class Snapshot:
    """A published state of the cube.

    Attributes:
        id: Its name, as `changed_tiles` takes it.
        made: When, UTC.
        message: What it brought.
    """

    id: str
    made: datetime
    message: str


def snapshots(city: City, limit: int = 10) -> list[Snapshot]:
    """The newest states of the cube, newest first; none before the first ingest."""
    try:
        history = open_repository(cubes_path(city)).ancestry(branch=MAIN)
    except NothingPublishedError:
        return []
    told = (Snapshot(s.id, s.written_at, s.message) for s in history if s.message.startswith("dump "))
    return list(itertools.islice(told, limit))
