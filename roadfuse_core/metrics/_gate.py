"""Whether a new map may replace the published one, and the history of what was refreshed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from roadfuse_core.cubes import LedgerEntry, read_skipped
from roadfuse_core.files import write_whole
from roadfuse_core.settings import City

__all__ = ["Verdict", "append_history", "judge", "read_history", "write_metrics"]

Facts = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: Why the map is held back; empty where it may be published.
    """

    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the map may be published."""
        return not self.reasons


def judge(city: City, record: Facts, scored: Facts, dumps: list[LedgerEntry], before: Facts | None) -> Verdict:
    """Compare a candidate with the newest published refresh.

    Args:
        city: For the thresholds and the grid.
        record: Of the candidate.
        scored: Its scores by map and subset; empty without labels.
        dumps: Entries of the ledger, in the order in which they entered.
        before: Entry of the history; None where nothing was published yet: then everything passes.
    """
    gate, reasons = city.gate, []
    if before is None:
        return Verdict(())
    old, new = (s.get("map", {}).get("test", {}).get("g_iou") for s in (before["scores"], scored))
    if gate.g_iou_drop is not None and old is not None and new is not None and not old - new <= gate.g_iou_drop:
        reasons.append(f"g_iou on the test tiles fell from {old:.3f} to {new:.3f}, by more than {gate.g_iou_drop:g}")
    height, width = city.make_grid().shape
    was, now = (1 - r["nodata_px"] / (height * width) for r in (before["record"], record))
    if gate.coverage_drop is not None and was - now > gate.coverage_drop:
        reasons.append(f"mapped area shrank from {was:.1%} to {now:.1%} of the city, by more than {gate.coverage_drop:.0%}")
    shares = [sum(d["rejected"].values()) / d["rows"] for d in dumps if d["rows"]]
    if gate.rejected_rise is not None and len(shares) > 1:
        usual = sum(shares[:-1]) / (len(shares) - 1)
        if shares[-1] - usual > gate.rejected_rise:
            reasons.append(f"the newest dump lost {shares[-1]:.1%} of its rows, the earlier ones {usual:.1%}")
    return Verdict(tuple(reasons))


def _path(city: City) -> Path:
    return city.workspace_path / "history.jsonl"


def append_history(city: City, entry: Facts) -> None:
    """Add a refresh to the history, one line of JSON each."""
    with open(_path(city), "a") as file:
        file.write(json.dumps(entry, default=str) + "\n")


def write_metrics(city: City, entry: Facts, dumps: list[LedgerEntry]) -> Path:
    """The newest refresh as Prometheus text, for the textfile collector of node-exporter.

    Returns:
        `metrics/roadfuse.prom` in the workspace; it appears whole.
    """
    newest = dumps[-1] if dumps else None
    path = city.workspace_path / "metrics/roadfuse.prom"
    values = {
        "g_iou": entry["scores"].get("map", {}).get("test", {}).get("g_iou"),
        "held_back": int(not entry["published"]),
        "windows_predicted": 0 if entry["record"].get("unchanged") else entry["record"]["windows"],
        "windows_failed": entry["windows_failed"],
        "files_left_out": len(read_skipped(city)),
        "refresh_seconds": round(entry["seconds"], 3),
        "rows_rejected_share": sum(newest["rejected"].values()) / newest["rows"] if newest and newest["rows"] else None,
        "published_timestamp_seconds": _last_published(city),
    }
    lines = [f'roadfuse_{name}{{city="{city.name}"}} {value}' for name, value in values.items() if value is not None]
    return write_whole(path, "\n".join(f"# TYPE {line.split('{')[0]} gauge\n{line}" for line in lines) + "\n")


def _last_published(city: City) -> float | None:
    made = next((e["made"] for e in reversed(read_history(city)) if e["published"]), None)
    return None if made is None else datetime.fromisoformat(made).timestamp()


def read_history(city: City) -> list[Facts]:
    """All refreshes, the oldest first; a line that a crash has cut is passed over."""
    if not _path(city).is_file():
        return []
    out = []
    for line in _path(city).read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out
