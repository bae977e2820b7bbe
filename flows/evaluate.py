"""Scoring the published map again, for those who start it in the UI."""

from __future__ import annotations

from prefect import flow

from flows.refresh import CityFile, city_of_run, run_name
from roadfuse_core.cluster import open_cluster
from roadfuse_core.metrics import MapScores
from tasks import stages

__all__ = ["evaluate"]


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(city_file: CityFile) -> MapScores:
    """Score the published map against the labels again.

    Args:
        city_file: Path of city.yaml, as the worker sees it.

    Returns:
        Scores by subset, and the tiles that they are of.
    """
    with open_cluster(city_of_run(city_file).cluster) as client:
        return stages.score(city_file, client.scheduler_info(n_workers=0)["address"])
