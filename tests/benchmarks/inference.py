"""City throughput against the bare forward pass of the same network, batch and threads."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from roadfuse_core.cubes import ingest
from roadfuse_core.inference import infer, load_predictor, resolve_weights
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import CityKnobs, simulate_city

RUNS = 5


def main() -> None:
    """Print windows per second of both, and their ratio, as medians of paired runs."""
    with tempfile.TemporaryDirectory() as folder:
        city = load_city(simulate_city(Path(folder), CityKnobs(seed=8, size_m=1024, days=2, points_per_day=20_000)))
        ingest(city)
        predictor = load_predictor(resolve_weights("default", city.root), 1.0)
        size = predictor.window_px
        batch = {"image": np.zeros((city.model.batch, 3, size, size), np.float32),
                 "gps": np.zeros((city.model.batch, len(predictor.layers), size, size), np.float32)}  # fmt: skip
        predictor.predict(batch)
        bare, whole = [], []
        for run in range(RUNS):
            began = time.perf_counter()
            windows = infer(city, group=f"run-{run}")["windows"]
            whole.append(windows / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in range(-(-windows // city.model.batch)):
                predictor.predict(batch)
            bare.append(windows / (time.perf_counter() - began))
    ratios = [w / b for w, b in zip(whole, bare, strict=True)]
    print(f"inference, compact network, one thread, {RUNS} paired runs")
    print(f"  bare forward pass  {statistics.median(bare):7.1f} windows/s")
    print(f"  city               {statistics.median(whole):7.1f} windows/s, ratio {statistics.median(ratios):.2f}")
