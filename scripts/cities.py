"""Simulated cities on a disk, for the other scripts: drawn and ingested once, by seed."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from roadfuse_core.cubes import ingest
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import draw_knobs, simulate_city

EXTENT_M = 1280.0
FEW = (500, 12_000)  # points a day of a sparse city: as few a square kilometre as a school bus leaves


def draw_city(folder: Path, seed: int, sparse: bool = False) -> None:
    """Simulate and ingest, unless it is there."""
    done = folder / ".done"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    knobs = draw_knobs(seed, EXTENT_M)
    if sparse:
        few = np.exp(np.random.default_rng([seed, 42]).uniform(*np.log(FEW)))
        knobs = knobs.model_copy(update={"points_per_day": int(few)})
    ingest(load_city(simulate_city(folder, knobs)))
    done.touch()


def draw_cities(out: Path, splits: dict[str, range], workers: int) -> None:
    """Cities of these seeds in OUT/cities/SPLIT/cSEED; those of the split `sparse` have few points."""
    seeds = [(split, seed) for split, of in splits.items() for seed in of]
    wanted = [(out / "cities" / split / f"c{seed}", seed, split == "sparse") for split, seed in seeds]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(draw_city, *zip(*wanted, strict=True)))
