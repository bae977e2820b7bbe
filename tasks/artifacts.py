"""What a person sees in the Prefect UI: progress while it runs, one page at the end, and the worst tiles."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from roadfuse_core.cubes import ledger, read_skipped
from roadfuse_core.errors import NothingPublishedError
from roadfuse_core.inference import map_key
from roadfuse_core.metrics import MapScores, Verdict, describe_tiles, read_history
from roadfuse_core.report import Stage, map_preview
from roadfuse_core.settings import City, load_city

__all__ = ["ProgressArtifact", "summarise"]

EVERY_S = 2.0
WORST = 50


def slug(*parts: str) -> str:
    """A key as artifacts want it: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class ProgressArtifact:
    """A `tell(what, done, total)` that keeps one progress artifact a job, at most every two seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ids: dict[str, Any] = {}
        self.last: dict[str, float] = {}
        self.began: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Create or update."""
        now = time.monotonic()
        percent = 100.0 * done / max(total, 1)
        self.began.setdefault(what, now)
        if what not in self.ids:
            self.ids[what] = create_progress_artifact(
                percent, key=slug(self.name, what), description=f"{what}: {done:,} of {total:,}"
            )
        elif done == total or now - self.last[what] > EVERY_S:
            self._update(what, done, total, percent, now - self.began[what])
        else:
            return
        self.last[what] = now

    def _update(self, what: str, done: int, total: int, percent: float, spent_s: float) -> None:
        left_s = spent_s * (total - done) / max(done, 1)
        text = f"{what}: {done:,} of {total:,}, {done / max(spent_s, 1e-9):,.1f} a second, {left_s:,.0f} s left"
        try:
            update_progress_artifact(self.ids[what], percent, description=text)
        except Exception:  # somebody may have deleted it: the next step makes another
            del self.ids[what]
            raise


@task(name="summarise")
def summarise(
    city_file: Path, record: dict[str, Any], scored: dict[str, MapScores], stages: list[Stage], files: dict[str, Path],
    verdict: Verdict, workers: int, dashboard: str | None,
) -> None:  # fmt: skip
    """One Markdown artifact of the run, and tables of scores by tile; the run goes on where they cannot be shown."""
    city = load_city(city_file)
    if not verdict.passed:
        get_run_logger().warning("held back: %s", "; ".join(verdict.reasons))
    try:
        text = page(city, record, scored, stages, files, verdict, workers, dashboard)
        create_markdown_artifact(text, key=slug(city.name, "refresh"), description=f"refresh of {city.name}")
        if rows := worst_tiles(city):
            create_table_artifact(rows, key=slug(city.name, "worst-tiles"), description="tiles with the most wrong pixels")
    except Exception as error:
        get_run_logger().warning("the run's artifacts cannot be shown (%s: %s)", type(error).__name__, error)


def page(
    city: City, record: Mapping[str, Any], scored: Mapping[str, MapScores], stages: Sequence[Stage],
    files: Mapping[str, Path], verdict: Verdict, workers: int, dashboard: str | None,
) -> str:  # fmt: skip
    """The run as Markdown: verdict, picture, scores against the last run, rows, windows, time and cost, files."""
    held = not verdict.passed
    out = [f"# {city.name}: {'held back' if held else 'published'}"]
    if held:
        how = f"`roadfuse release CITY.yaml --candidate {map_key(dict(record))}` publishes it"
        out += ["The new map waits, readers see the one before:", *(f"- **{r}**" for r in verdict.reasons), "",
                f"Look at it, then {how}; or fix the cause and refresh again."]  # fmt: skip
    out += [f"- {note}" for note in verdict.notes]
    try:
        out += [
            "",
            f"![probability]({map_preview(city, held)})",
            "",
            f"Probability of {city.target}: black 0, white 1; blue is unknown.",
        ]
    except NothingPublishedError:
        out += ["", "There is no map yet."]
    out += ["", *_scores(city, scored), "", *_points(city), "", *_windows(record), "", *_time(city, stages, workers)]
    if dashboard:
        out += ["", f"Dask dashboard while it ran: {dashboard}"]
    out += ["", "## Files", *(f"- {name}: `{path}`" for name, path in files.items())]
    return "\n".join(out)


def _scores(city: City, scored: Mapping[str, MapScores]) -> list[str]:
    if not scored:
        return ["No labels, no scores."]
    last = next((e for e in reversed(read_history(city)) if e.published and e.scores), None)
    rows = ["## Scores", "| map | on | g_iou | last run | a_iou | F1 |", "| --- | --- | --- | --- | --- | --- |"]
    names = {"map": "this map", "baseline": "kernel density"}
    for group, found in scored.items():
        by = found.subsets
        for subset in ("test", "all"):
            was = last.g_iou(group, subset) if last else None
            told = "–" if was is None else f"{was:.3f} ({by[subset]['g_iou'] - was:+.3f})"
            rows.append(f"| {names.get(group, group)} | {subset} tiles | {by[subset]['g_iou']:.3f} | {told} | "
                        f"{by[subset]['a_iou']:.3f} | {by[subset]['f1']:.3f} |")  # fmt: skip
    return [*rows, *(["", describe_tiles(scored["map"])] if "map" in scored else [])]


def _points(city: City) -> list[str]:
    dumps = list(ledger(city).values()) if city.points else []
    rows = ["## Points", "| newest dumps | rows | share |", "| --- | --- | --- |"]
    for d in reversed(dumps[-3:]):
        rows.append(f"| **`{d['dump']}`** | **{d['rows']:,}** | |")
        for name, n in [("kept", d["kept"]), *((f"rejected: {k.replace('_', ' ')}", v) for k, v in d["rejected"].items())]:
            rows.append(f"| {name} | {n:,} | {n / max(d['rows'], 1):.1%} |")
    skipped = read_skipped(city) if city.points else []
    left = ["", "**Files left out**", *(f"- {file.reason}" for file in skipped)] if skipped else []
    return (rows if dumps else ["No points."]) + left


def _windows(record: Mapping[str, Any]) -> list[str]:
    if record.get("unchanged"):
        return ["## Windows", f"None predicted: nothing changed since {record['made']}, and the map stands."]
    carried = record["windows_possible"] - record["windows"]
    how = f"everything, because {record['why_full']}" if record["full"] else "only what changed"
    return ["## Windows", f"{record['windows']:,} predicted, {carried:,} carried over ({how}); {len(record['failed'])} failed.",
            f"Model `{record['model']}`, {record['precision']}, batches of {record['batch']}."]  # fmt: skip


def _time(city: City, stages: Sequence[Stage], workers: int) -> list[str]:
    seconds = sum(s.seconds for s in stages)
    rows = ["## Time", "| stage | seconds |", "| --- | --- |", *(f"| {s.name} | {s.seconds:.1f} |" for s in stages)]
    rows.append(f"| **all** | **{seconds:.1f}** |")
    if city.price_per_worker_hour is not None:
        rows += ["", f"Cost: {seconds / 3600 * workers * city.price_per_worker_hour:.4f} for {workers} workers."]
    return rows


def worst_tiles(city: City) -> list[dict[str, Any]]:
    """The test and other tiles with the most wrong pixels, as the newest scoring left them."""
    path = city.workspace_path / "scores/map.parquet"
    if not path.is_file():
        return []
    rows = [r for r in pq.read_table(path).to_pylist() if r["subset"] == "known"]
    rows.sort(key=lambda r: r["fp"] + r["fn"], reverse=True)
    return [
        {"row": r["row"], "column": r["col"], "split": r["split"], "missed px": r["fn"], "false px": r["fp"],
         "IoU": round(r["tp"] / max(1, r["tp"] + r["fp"] + r["fn"]), 3)}
        for r in rows[:WORST]
    ]  # fmt: skip
