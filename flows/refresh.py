"""The refresh of a city: new dumps in, a new map, its scores and its report out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from roadfuse_core.cluster import open_cluster
from roadfuse_core.errors import RoadFuseError
from roadfuse_core.metrics import CityScores
from roadfuse_core.report import Stage
from roadfuse_core.settings import City, load_city
from tasks import stages

__all__ = ["refresh"]


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
    """City and day, for a list that a person can read."""
    path = Path(flow_run.parameters["city_file"])
    try:
        name = load_city(path).name
    except RoadFuseError:
        name = path.stem
    return f"{name} {datetime.now(UTC):%Y-%m-%d %H:%M}"


@flow(name="refresh", flow_run_name=run_name)
def refresh(city_file: Path, baseline: bool = True, full: bool = False, allow_incomplete: bool = False) -> dict[str, Any]:
    """Bring a city up to date with its dumps, images and model.

    Every stage is idempotent: a crashed refresh run again takes what is done.

    Args:
        city_file: The city file.
        baseline: Also predict by kernel density, tuned on the training tiles, where there are points and labels.
        full: Predict everything anew, not only what changed.
        allow_incomplete: Publish although windows could not be predicted; they are no data.

    Returns:
        Scores by map, the files made, and the map's record.
    """
    city = load_city(city_file)
    watch = Stopwatch()
    with watch.stage("check"):
        stages.check(city_file)
    with watch.stage("start workers"), open_cluster(city.cluster) as client:
        scheduler: str = client.scheduler_info(n_workers=0)["address"]
        if city.points:
            with watch.stage("ingest dumps"):
                stages.ingest_dumps(city_file, scheduler)
        with watch.stage("predict"):
            record = stages.predict(city_file, scheduler, full=full, allow_incomplete=allow_incomplete)
        scored = _score(city, city_file, scheduler, baseline, watch)
    # The workers' stage was timed around all stages that ran on them: keep its own share.
    watch.stages[:] = _own_share(watch.stages)
    with watch.stage("export"):
        files = stages.export_maps(city_file)
    page = stages.report(city_file, scored, watch.stages, files)
    return {"scores": scored, "files": {**files, "report": page}, "record": record}


def _score(city: City, city_file: Path, scheduler: str, baseline: bool, watch: Stopwatch) -> dict[str, CityScores]:
    if "roads" not in city.labels:
        return {}
    with watch.stage("score"):
        scored = {"map": stages.score(city_file, scheduler)}
    if city.points and baseline:
        with watch.stage("kernel density"):
            stages.predict(city_file, scheduler, "baseline", stages.tune_baseline(city_file))
            scored["baseline"] = stages.score(city_file, scheduler, "baseline")
    return scored


def _own_share(timed: list[Stage]) -> list[Stage]:
    outer = next(s for s in timed if s.name == "start workers")
    inner = [s for s in timed if s.name not in ("check", "start workers")]
    own = Stage("workers start and stop", outer.seconds - sum(s.seconds for s in inner))
    return [s for s in timed if s.name == "check"] + [own, *inner]
