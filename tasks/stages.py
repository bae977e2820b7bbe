"""The stages of a refresh as Prefect tasks: keys in, small records out, work on Dask.

A task gets the path of the city file and the address of a Dask scheduler, and connects there itself. Retries are
set only where a second try can help; every stage is safe to run again.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dask.distributed import Client
from prefect import get_run_logger, task

from roadfuse_core.check import check_city
from roadfuse_core.cluster import ClusterLostError
from roadfuse_core.cubes import ingest
from roadfuse_core.errors import RoadFuseError
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.metrics import CityScores, score_city, tune_kde
from roadfuse_core.mosaic import NODATA, write_cog, write_item
from roadfuse_core.report import Stage, write_report
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import CityKnobs, simulate_city
from tasks.progress import ConsoleProgress, LogProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS: tuple[tuple[str, Literal["average", "mode"]], ...] = (("probability", "average"), ("road", "mode"))
__all__ = ["check", "export_maps", "ingest_dumps", "predict", "report", "score", "simulate", "tune_baseline"]


@contextmanager
def _tell() -> Iterator[Any]:
    """Progress on the terminal and in Prefect's log."""
    log = LogProgress(get_run_logger())
    with ConsoleProgress() as bars:

        def both(what: str, done: int, total: int) -> None:
            bars(what, done, total)
            log(what, done, total)

        yield both


@task(name="simulate")
def simulate(out: Path, knobs: CityKnobs, workers: int) -> Path:
    """Write a simulated city; returns its city file."""
    with _tell() as tell:
        return simulate_city(out, knobs, workers, tell)


@task(name="check")
def check(city_file: Path) -> list[str]:
    """Validate the city file against the data."""
    found = check_city(load_city(city_file))
    for line in found:
        get_run_logger().info(line)
    return found


@task(name="ingest dumps")
def ingest_dumps(city_file: Path, scheduler: str) -> dict[str, Any] | None:
    """Bring new dumps into the cube; the ledger entry without its file list, or None."""
    with Client(scheduler) as client, _tell() as tell:
        entry = ingest(load_city(city_file), client=client, tell=tell)
    return {k: v for k, v in entry.items() if k != "files"} if entry else None


@task(name="tune baseline")
def tune_baseline(city_file: Path) -> Path:
    """Tune kernel density on the training tiles; returns the model file."""
    city = load_city(city_file)
    with _tell() as tell:
        model = tune_kde(city, tell)
    path = city.workspace_path / "kde.json"
    path.write_text(model.model_dump_json(indent=1))
    return path


def _worth_another_try(task: Any, run: Any, state: Any) -> bool:
    """Only what may go away by itself: wrong settings and damaged data do not."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, RoadFuseError) or isinstance(error, ClusterLostError)


@task(name="predict", retries=1, retry_delay_seconds=5, retry_condition_fn=_worth_another_try)
def predict(
    city_file: Path, scheduler: str, group: str = "map", weights: Path | None = None, full: bool = False,
    allow_incomplete: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Predict what changed and publish the map; returns its record."""
    with Client(scheduler) as client, _tell() as tell:
        return infer(load_city(city_file), str(weights) if weights else None, group, client, tell, full, allow_incomplete)


@task(name="export")
def export_maps(city_file: Path) -> dict[str, Path]:
    """Probability and road as cloud-optimised GeoTIFF, and a STAC item beside them."""
    city = load_city(city_file)
    reader, grid = MapReader(city), city.make_grid()
    out = city.workspace_path / "export"
    files = {
        name: write_cog(out / f"{city.name}-{name}.tif", grid, lambda *w, n=name: reader.window(n, *w), "uint8", NODATA, how)
        for name, how in LAYERS
    }
    facts = {"roadfuse:model": reader.record["model_digest"], "roadfuse:cubes_snapshot": reader.record["cubes_snapshot"]}
    item = write_item(out / f"{city.name}.json", city.name, grid, files, datetime.fromisoformat(reader.record["made"]), facts)
    return {**files, "stac item": item}


@task(name="score")
def score(city_file: Path, scheduler: str, group: str = "map") -> CityScores:
    """Scores against the labels."""
    with Client(scheduler) as client, _tell() as tell:
        return score_city(load_city(city_file), group, tell, client)


@task(name="report")
def report(city_file: Path, scored: dict[str, CityScores], stages: list[Stage], files: dict[str, Path]) -> Path:
    """The HTML page."""
    return write_report(load_city(city_file), scored, stages, files)
