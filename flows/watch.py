"""A poll for new dumps, cheap enough to run every few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.refresh import CityFile, city_of_run, refresh, run_name
from roadfuse_core.cubes import plan_ingest
from tasks import stages

__all__ = ["watch"]


@flow(name="watch", flow_run_name=run_name)
def watch(city_file: CityFile) -> dict[str, Any] | None:
    """Refresh the city if there are files that its ledger does not know; a poll that costs next to nothing.

    Args:
        city_file: Path of city.yaml, as the worker sees it.

    Returns:
        What `refresh` returned, or None.
    """
    plan = plan_ingest(city_of_run(Path(city_file)))
    stages.warn_of_skipped(plan.skipped)
    return refresh(city_file) if plan.files else None
