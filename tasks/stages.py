"""The stages of a refresh as Prefect tasks: keys in, small records out, work on Dask.

A task gets the path of the city file and the address of a Dask scheduler, and connects there itself. Retries are
set only where a second try can help; every stage is safe to run again.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.distributed import Client
from prefect import get_run_logger, task

from roadfuse_core import publication
from roadfuse_core.check import check_refresh
from roadfuse_core.cluster import ClusterLostError, on_cores
from roadfuse_core.cubes import SkippedFile, files_between, ingest, plan_ingest, read_skipped
from roadfuse_core.errors import NothingPublishedError, RoadFuseError
from roadfuse_core.files import write_whole
from roadfuse_core.inference import MapReader, infer, map_key, split_of_map
from roadfuse_core.metrics import MapScores, Verdict, tune_kde
from roadfuse_core.publication import export_published, record_run, score_map
from roadfuse_core.report import Stage, write_report
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import CityKnobs, simulate_city
from roadfuse_core.training import load_recipe
from roadfuse_core.training import train as train_network
from tasks.artifacts import ProgressArtifact
from tasks.progress import ConsoleProgress, LogProgress, SafeProgress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "backfill_dumps", "check", "decide", "export_maps", "ingest_dumps", "plan_backfill", "predict", "remember", "report",
    "score", "simulate", "train", "tune_baseline", "warn_of_skipped",
]  # fmt: skip


@contextmanager
def _tell(name: str) -> Iterator[Any]:
    """Progress on the terminal, in Prefect's log, and as artifacts whose keys begin with the name."""
    log = get_run_logger()
    with ConsoleProgress() as bars:
        yield SafeProgress(bars, LogProgress(log), ProgressArtifact(name), log=log)


@task(name="simulate")
def simulate(out: Path, knobs: CityKnobs, workers: int) -> Path:
    """Write a simulated city; returns its city file."""
    with _tell(f"simulated-{knobs.seed}") as tell:
        return simulate_city(out, knobs, workers, tell)


@task(name="check")
def check(city_file: Path) -> list[str]:
    """Validate the city file against the data, but for what the ingest will check."""
    found = check_refresh(load_city(city_file))
    for line in found:
        get_run_logger().info(line)
    return found


@task(name="ingest dumps")
def ingest_dumps(city_file: Path, scheduler: str) -> dict[str, Any] | None:
    """Bring new dumps into the cube; the ledger entry without its file list, or None."""
    city = on_cores(load_city(city_file))
    with Client(scheduler) as client, _tell(city.name) as tell:
        entry = ingest(city, client=client, tell=tell)
    warn_of_skipped(read_skipped(city))
    if entry:
        for warning in entry["time_warnings"]:
            get_run_logger().warning(f"dump {entry['dump']}: {warning}")
    return {k: v for k, v in entry.items() if k != "files"} if entry else None


def warn_of_skipped(skipped: Sequence[SkippedFile]) -> None:
    """Say in the run's log which files are left out, and why."""
    for file in skipped:
        get_run_logger().warning("left out: %s", file.reason)


@task(name="tune baseline")
def tune_baseline(city_file: Path, scheduler: str) -> Path:
    """Tune kernel density on the training tiles of the published map's model; returns the model file."""
    city = load_city(city_file)
    with Client(scheduler) as client, _tell(city.name) as tell:
        model = tune_kde(city, tell, split_of_map(city, MapReader(city).record), client)
    return write_whole(city.workspace_path / "kde.json", model.model_dump_json(indent=1))


def _worth_another_try(task: Any, run: Any, state: Any) -> bool:
    """Only what may go away by itself: wrong settings and damaged data do not."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, RoadFuseError) or isinstance(error, ClusterLostError)


@task(name="predict", retries=1, retry_delay_seconds=5, retry_condition_fn=_worth_another_try)
def predict(
    city_file: Path, scheduler: str, group: str = "map", weights: Path | None = None, full: bool = False,
    allow_incomplete: bool = False, hold: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Predict what changed and publish the map; returns its record."""
    city = load_city(city_file)
    if group == "baseline":  # kernel density, which no GPU helps
        city = on_cores(city)
    with Client(scheduler) as client, _tell(f"{city.name}-{group}") as tell:
        return infer(city, str(weights) if weights else None, group, client, tell, full, allow_incomplete, hold)


@task(name="export")
def export_maps(city_file: Path) -> dict[str, Path]:
    """The published map as cloud-optimised GeoTIFF, with a STAC item; what shows it already stays. Nothing without a map."""
    try:
        return export_published(load_city(city_file))
    except NothingPublishedError:
        return {}


@task(name="score")
def score(city_file: Path, scheduler: str, group: str = "map", held: bool = False) -> MapScores:
    """Scores against the labels; of the candidate, where it is held. Equal map, labels and points are not counted again."""
    city = load_city(city_file)
    with Client(scheduler) as client, _tell(city.name) as tell:
        return score_map(city, group, tell, client, held)


@task(name="decide")
def decide(city_file: Path, scheduler: str, record: dict[str, Any], scored: MapScores | None) -> Verdict:
    """Publish the candidate that was scored, or say why it is held back."""
    city = load_city(city_file)
    with Client(scheduler) as client, _tell(city.name) as tell:
        verdict = publication.decide(city, map_key(record), scored, tell, client)
    for note in verdict.notes:
        get_run_logger().warning("gate: %s", note)
    return verdict


@task(name="remember")
def remember(
    city_file: Path, record: dict[str, Any], scored: dict[str, MapScores], reasons: tuple[str, ...], seconds: float
) -> None:
    """Add the run to the city's history."""
    record_run(load_city(city_file), record, scored, reasons, seconds)


@task(name="backfill dumps")
def backfill_dumps(
    city_file: Path, scheduler: str, since: datetime | None, until: datetime | None, replace: str | None
) -> dict[str, Any] | None:
    """Bring new files that hold times of a range into the cube as one dump; the ledger entry, or None."""
    city = on_cores(load_city(city_file))
    chosen = None
    if since and until:
        chosen = files_between(city, plan_ingest(city, None, replace), since, until)
        if not chosen:
            return None
    with Client(scheduler) as client, _tell(city.name) as tell:
        entry = ingest(city, chosen, client, tell, replace)
    warn_of_skipped(read_skipped(city))
    return {k: v for k, v in entry.items() if k != "files"} if entry else None


@task(name="plan backfill")
def plan_backfill(city_file: Path, since: datetime | None, until: datetime | None, replace: str | None) -> dict[str, Any]:
    """What a backfill would read."""
    city = load_city(city_file)
    plan = plan_ingest(city, None, replace)
    chosen = files_between(city, plan, since, until) if since and until else plan.sources
    return {"files": [f.label for f in chosen], "rows": plan.rows, "slices": plan.slices}


@task(name="train")
def train(recipe_file: Path, out: Path | None) -> dict[str, Any]:
    """Train by a recipe; a run that was stopped goes on."""
    recipe = load_recipe(recipe_file)
    with _tell(recipe.name) as tell:
        done = train_network(recipe, out or recipe.root / "runs" / recipe.name, tell)
    return asdict(done)


@task(name="report")
def report(city_file: Path, scored: dict[str, MapScores], stages: list[Stage], files: dict[str, Path]) -> Path:
    """The HTML page."""
    return write_report(load_city(city_file), scored, stages, files)
