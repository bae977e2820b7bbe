"""What happened to a city's map: the history of its runs, and the newest of them for Prometheus."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roadfuse_core.cubes import LedgerEntry, read_skipped, storing
from roadfuse_core.files import write_whole
from roadfuse_core.settings import City

__all__ = ["HistoryEntry", "append_history", "read_history", "write_metrics"]


class HistoryEntry(BaseModel):
    """A run that published a map, or held one back.

    Attributes:
        made: When, UTC.
        action: Which command.
        published: Whether readers see the map of this entry.
        reasons: Why the gate held it back; of a release, what a person decided to overrule.
        record: Of the map, without what is long in it.
        scores: By map ("map", "baseline"), subset and figure; None where there was nothing to divide by.
        seconds: That the run took.
        windows_failed: Windows of the map that could not be predicted.
    """

    model_config = ConfigDict(frozen=True)

    made: datetime = Field(default_factory=lambda: datetime.now(UTC))
    action: Literal["refresh", "release", "rollback"] = "refresh"
    published: bool
    reasons: tuple[str, ...] = ()
    record: dict[str, Any]
    scores: dict[str, dict[str, dict[str, float | None]]]
    seconds: float = 0.0
    windows_failed: int = 0

    def g_iou(self, group: str = "map", subset: str = "test") -> float | None:
        """A score that is a number, or None."""
        value = self.scores.get(group, {}).get(subset, {}).get("g_iou")
        return value if value is not None and math.isfinite(value) else None


def _path(city: City) -> Path:
    return city.workspace_path / "history.jsonl"


def append_history(city: City, entry: HistoryEntry) -> None:
    """Add a run to the history, one line of JSON each; a line that a crash has cut before it stays a line of its own.

    Raises:
        StoreError: It cannot be written.
    """
    line = entry.model_dump_json().encode() + b"\n"
    with storing(city.workspace_path), open(_path(city), "ab+") as file:
        if _ends_in_a_line(file):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _ends_in_a_line(file: Any) -> bool:
    """Whether the last line has no end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")


def read_history(city: City) -> list[HistoryEntry]:
    """All runs, the oldest first; lines that a crash has cut, or that are something else, are passed over."""
    try:
        lines = _path(city).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    out = []
    for line in lines:
        try:
            out.append(HistoryEntry.model_validate(json.loads(line)))
        except (ValidationError, ValueError, RecursionError):
            continue
    return out


def write_metrics(city: City, entry: HistoryEntry, dumps: Sequence[LedgerEntry]) -> Path:
    """The newest run as Prometheus text, for the textfile collector of node-exporter.

    Returns:
        `metrics/roadfuse.prom` in the workspace; it appears whole.
    """
    newest = dumps[-1] if dumps else None
    path = city.workspace_path / "metrics/roadfuse.prom"
    values = {
        "g_iou": entry.g_iou(),
        "held_back": int(not entry.published),
        "windows_predicted": 0 if entry.record.get("unchanged") else entry.record["windows"],
        "windows_failed": entry.windows_failed,
        "files_left_out": len(read_skipped(city)),
        "refresh_seconds": round(entry.seconds, 3),
        "rows_rejected_share": sum(newest["rejected"].values()) / newest["rows"] if newest and newest["rows"] else None,
        "published_timestamp_seconds": _last_published(city),
    }
    lines = [f'roadfuse_{name}{{city="{city.name}"}} {value}' for name, value in values.items() if value is not None]
    return write_whole(path, "\n".join(f"# TYPE {line.split('{')[0]} gauge\n{line}" for line in lines) + "\n")


def _last_published(city: City) -> float | None:
    return next((e.made.timestamp() for e in reversed(read_history(city)) if e.published), None)
