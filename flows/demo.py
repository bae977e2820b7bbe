"""The demo: a simulated city, refreshed from nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow

from flows.refresh import refresh
from roadfuse_core.simulate import CityKnobs
from tasks import stages

__all__ = ["DEMO_SEED", "demo"]

# A city that no shipped weights were trained on: training seeds start at 1000.
DEMO_SEED = 7


@flow(name="demo", flow_run_name="demo-{seed}")
def demo(out: Path, seed: int = DEMO_SEED, size_m: float = 2048.0) -> dict[str, Any]:
    """Simulate a city and refresh it.

    Args:
        out: Folder for the city and its workspace.
        seed: Another seed, another city.
        size_m: Its edge, metres.

    Returns:
        What `refresh` returns.
    """
    city_file = stages.simulate(out, CityKnobs(seed=seed, size_m=size_m), os.cpu_count() or 1)
    return refresh(city_file)
