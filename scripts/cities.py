"""Simulated cities on a disk, for the other scripts: drawn and ingested once, by seed."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from roadfuse_core.cubes import ingest
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import draw_knobs, simulate_city

EXTENT_M = 1280.0


def draw_city(folder: Path, seed: int) -> None:
    """Simulate and ingest, unless it is there."""
    done = folder / ".done"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    ingest(load_city(simulate_city(folder, draw_knobs(seed, EXTENT_M))))
    done.touch()


def draw_cities(out: Path, splits: dict[str, range], workers: int) -> None:
    """Cities of these seeds in OUT/cities/SPLIT/cSEED."""
    wanted = [(out / "cities" / split / f"c{seed}", seed) for split, seeds in splits.items() for seed in seeds]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(draw_city, *zip(*wanted, strict=True)))
