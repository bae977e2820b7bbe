"""The refresh of a city: new dumps in, a new map, its scores and its report out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from pydantic import Field

from roadfuse_core.cluster import open_cluster, open_cores
from roadfuse_core.errors import RoadFuseError
from roadfuse_core.inference import map_key
from roadfuse_core.locks import TURN, waiting_lock
from roadfuse_core.metrics import MapScores, Verdict
from roadfuse_core.report import Stage
from roadfuse_core.settings import City, load_city
from roadfuse_core.workspace import require_workspace
from tasks import artifacts, stages

__all__ = ["CityFile", "city_of_run", "refresh", "run_name"]

CityFile = Annotated[Path, Field(title="City file", description="Path of city.yaml, as the worker sees it.")]


class Stopwatch:
    """Names and times the stages of a run."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        began = time.perf_counter()
        yield
        self.stages.append(Stage(name, time.perf_counter() - began))


def run_name() -> str:
    """City, flow and minute, for a list that a person can read."""
    path = Path(flow_run.parameters["city_file"])
    try:
        name = load_city(path).name
    except RoadFuseError:
        name = path.stem
    return f"{name} {flow_run.flow_name} {datetime.now(UTC):%Y-%m-%d %H:%M}"


def city_of_run(city_file: Path) -> City:
    """The city of a flow run; one that a deployment started wants a workspace that exists.

    Raises:
        ConfigError: The run is scheduled or served, and the workspace is missing or was never used.
    """
    city = load_city(city_file)
    if deployment.id:
        require_workspace(city.workspace_path)
    return city


@flow(name="refresh", flow_run_name=run_name)
def refresh(
    city_file: CityFile,
    baseline: Annotated[bool, Field(description="Also score kernel density, tuned on the training tiles.")] = True,
    full: Annotated[bool, Field(description="Predict everything anew, not only what changed.")] = False,
    allow_incomplete: Annotated[bool, Field(description="Publish although windows failed; they are no data.")] = False,
) -> dict[str, Any]:
    """Bring a city up to date with its dumps, images and model.

    One run of a city at a time, whatever started it: a later one waits. Every stage is idempotent: a crashed refresh run
    again takes what is done. A map that fails the city's gate is held back; the run ends as "Held back".

    Args:
        city_file: Path of city.yaml, as the worker sees it.
        baseline: Also predict by kernel density, where there are points and labels.
        full: Predict everything anew.
        allow_incomplete: Publish although windows could not be predicted.

    Returns:
        Scores by map, the files made, the map's record, and why it is held back, if it is.
    """
    city, watch = city_of_run(city_file), Stopwatch()
    with watch.stage("check"):
        stages.check(city_file)
    with waiting_lock(city.workspace_path, TURN, f"refresh of {city.name}"):
        return _refresh(city, city_file, baseline, full, allow_incomplete, watch)


def _refresh(city: City, city_file: Path, baseline: bool, full: bool, allow_incomplete: bool, watch: Stopwatch) -> Any:
    """All stages behind the check."""
    with watch.stage("start workers"), open_cluster(city.cluster) as client, open_cores(city, client) as cores:
        scheduler, of_cores = (str(one.scheduler_info(n_workers=0)["address"]) for one in (client, cores))
        dashboard, workers = client.dashboard_link, len(client.scheduler_info(n_workers=-1)["workers"])
        if city.points:
            with watch.stage("ingest dumps"):
                stages.ingest_dumps(city_file, of_cores)
        with watch.stage("predict"):
            record = stages.predict(city_file, scheduler, full=full, allow_incomplete=allow_incomplete, hold=True)
        held = bool(record.pop("held", False))
        scored, verdict = _score(city, city_file, of_cores, record, held, baseline, watch)
    # The workers' stage was timed around all stages that ran on them: keep its own share.
    watch.stages[:] = _own_share(watch.stages)
    with watch.stage("export"):
        exported = stages.export_maps(city_file)  # of the published map, also where the new one is held back
    files: dict[str, Path] = {}
    if verdict.passed:
        files = exported | {"report": stages.report(city_file, scored, watch.stages, exported)}
    artifacts.summarise(city_file, record, scored, watch.stages, files, verdict, workers, dashboard)
    stages.remember(city_file, record, scored, verdict.reasons, sum(s.seconds for s in watch.stages))
    result = {
        "scores": {group: found.subsets for group, found in scored.items()},
        "files": files,
        "record": record,
        "held": list(verdict.reasons),
    }
    return result if verdict.passed else _held_state(result)


def _held_state(result: dict[str, Any]) -> Any:
    """An end that stands out in a list of runs."""
    how = f"`roadfuse release CITY.yaml --candidate {map_key(result['record'])}` publishes it"
    return Completed(name="Held back", message="; ".join([*result["held"], how]), data=result)


def _score(
    city: City, city_file: Path, scheduler: str, record: dict[str, Any], held: bool, baseline: bool, watch: Stopwatch
) -> tuple[dict[str, MapScores], Verdict]:
    """Score what is new, let the gate decide, and score kernel density beside what is published."""
    labelled, scored = bool(city.labels), {}
    if labelled:
        with watch.stage("score"):
            scored["map"] = stages.score(city_file, scheduler, held=held)
    verdict: Verdict = stages.decide(city_file, scheduler, record, scored.get("map")) if held else Verdict(())
    if labelled and city.points and baseline and verdict.passed:
        with watch.stage("kernel density"):
            stages.predict(city_file, scheduler, "baseline", stages.tune_baseline(city_file, scheduler))
            scored["baseline"] = stages.score(city_file, scheduler, "baseline")
    return scored, verdict


def _own_share(timed: list[Stage]) -> list[Stage]:
    outer = next(s for s in timed if s.name == "start workers")
    inner = [s for s in timed if s.name not in ("check", "start workers")]
    own = Stage("workers start and stop", outer.seconds - sum(s.seconds for s in inner))
    return [s for s in timed if s.name == "check"] + [own, *inner]
