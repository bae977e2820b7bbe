"""The report page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from roadfuse_core.cubes import ledger
from roadfuse_core.files import write_whole
from roadfuse_core.inference import MapReader
from roadfuse_core.metrics import MapScores, describe_tiles
from roadfuse_core.report._pictures import overview_pictures
from roadfuse_core.settings import City

__all__ = ["Stage", "write_report"]

SUBSETS = {
    "test": "test tiles",
    "all": "all tiles",
    "test_near": "test tiles, within 20 m of a point",
    "all_near": "all tiles, within 20 m of a point",
}


@dataclass(frozen=True)
class Stage:
    """A finished stage of a run."""

    name: str
    seconds: float


def write_report(city: City, scored: dict[str, MapScores], stages: list[Stage], files: dict[str, Path]) -> Path:
    """One self-contained HTML page: pictures, scores, ledger, time by stage.

    Args:
        city: The city, refreshed.
        scored: Scores by map ("map", "baseline"); empty without labels.
        stages: What took how long.
        files: Where other outputs lie, by name.

    Returns:
        The page's path, `report/index.html` in the workspace.
    """
    record = MapReader(city).record
    source = resources.files("roadfuse_core.report").joinpath("page.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = lambda v: "–" if isinstance(v, float) and math.isnan(v) else f"{v:.3f}"
    grid = city.make_grid()
    page = environment.from_string(source).render(
        city=city, grid=grid, record=record, pictures=overview_pictures(city), subsets=SUBSETS,
        scored={group: found.subsets for group, found in scored.items()},
        tiles=describe_tiles(scored["map"]) if "map" in scored else "", stages=stages,
        longest=max((s.seconds for s in stages), default=1) or 1, dumps=ledger(city), files=files,
        km2=grid.shape[0] * grid.shape[1] * grid.resolution_m**2 / 1e6, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_whole(city.workspace_path / "report/index.html", page)
