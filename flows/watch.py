"""A poll for new dumps, cheap enough to run every few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.refresh import CityFile, city_of_run, refresh, run_name
from roadfuse_core.cubes import plan_ingest
from roadfuse_core.locks import TURN, holder_of
from tasks import stages

__all__ = ["watch"]


@flow(name="watch", flow_run_name=run_name)
def watch(city_file: CityFile) -> dict[str, Any] | None:
    """Refresh the city if there are files that its ledger does not know; a poll that costs next to nothing.

    While another run of the city is under way, the poll ends at once: the next one looks again.

    Args:
        city_file: Path of city.yaml, as the worker sees it.

    Returns:
        What `refresh` returned, or None.
    """
    city = city_of_run(Path(city_file))
    if busy := holder_of(city.workspace_path, TURN):
        get_run_logger().info("not looking for new dumps: %s is under way", busy)
        return None
    plan = plan_ingest(city)
    stages.warn_of_skipped(plan.skipped)
    return refresh(city_file) if plan.files else None
