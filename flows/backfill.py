"""A backfill: dumps of a range of time into the cube, then the map that follows."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from flows.refresh import CityFile, city_of_run, refresh, run_name
from roadfuse_core.cluster import on_cores, open_cluster
from roadfuse_core.locks import TURN, waiting_lock
from tasks import stages

__all__ = ["backfill"]


@flow(name="backfill", flow_run_name=run_name)
def backfill(
    city_file: CityFile,
    since: Annotated[datetime | None, Field(title="From", description="First time; without it all new files.")] = None,
    until: Annotated[datetime | None, Field(title="To", description="First time after the range.")] = None,
    replace: Annotated[str | None, Field(description="A dump that leaves the cube in the same step.")] = None,
    dry_run: Annotated[bool, Field(description="List the files and stop.")] = False,
    then_refresh: Annotated[bool, Field(description="Bring the map up to date afterwards.")] = True,
) -> dict[str, Any]:
    """Bring new files that hold times of a range into the cube, as one dump; files are taken whole.

    Args:
        city_file: Path of city.yaml, as the worker sees it.
        since: First time.
        until: First time after the range.
        replace: A dump that leaves the cube in the same step.
        dry_run: List the files and stop.
        then_refresh: Bring the map up to date afterwards.

    Returns:
        The plan of a dry run, or the ledger entry and what `refresh` returned.
    """
    city = city_of_run(city_file)
    if dry_run:
        return stages.plan_backfill(city_file, since, until, replace)
    turn = waiting_lock(city.workspace_path, TURN, f"backfill of {city.name}")
    with turn, open_cluster(on_cores(city).cluster) as client:
        entry = stages.backfill_dumps(city_file, client.scheduler_info(n_workers=0)["address"], since, until, replace)
    return {"entry": entry, "refresh": refresh(city_file) if then_refresh else None}
