"""Draw the comparison's cities and train its networks: python scripts/compare_networks.py OUT [--seeds 1,2,3] [--only A,B].

The seeds of the cities were fixed before the first training. What is done stays done: run it again after a crash. The table
is in docs/networks.md.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import ingest
from roadfuse_core.settings import ClusterSpec, load_city
from roadfuse_core.simulate import simulate_city
from roadfuse_core.training import compare, draw_knobs

CITIES = {"train": range(1000, 1016), "validation": range(1900, 1901), "test": range(2000, 2004)}
EXTENT_M = 1280.0
NETWORKS = (
    "roadfuse", "cmmpnet-d-linknet34", "deepdualmapper-d-linknet34", "d-linknet34", "d-linknet34-image", "d-linknet34-gps",
    "d-linknet34-1d", "pp-linknet34", "e-road-18",
)  # fmt: skip
RECIPE = Path(__file__).parents[1] / "docs" / "comparison" / "recipe.yaml"


def draw_city(folder: Path, seed: int) -> None:
    """Simulate and ingest, unless it is there."""
    done = folder / ".done"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    ingest(load_city(simulate_city(folder, draw_knobs(seed, EXTENT_M))))
    done.touch()


def main() -> None:
    """Cities, then runs, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--suite", action="store_true", help="also the damages of the robustness suite")
    a = parser.parse_args()
    wanted = [(a.out / "cities" / split / f"c{seed}", seed) for split, seeds in CITIES.items() for seed in seeds]
    with ProcessPoolExecutor(a.workers) as pool:
        list(pool.map(draw_city, *zip(*wanted, strict=True)))
    recipe = a.out / "recipe.yaml"
    recipe.write_text(RECIPE.read_text())
    vary = {"seed": [int(s) for s in a.seeds.split(",")], "network.preset": a.only.split(",")}
    console = Console(stderr=True)
    with open_cluster(ClusterSpec(workers=a.workers, memory_gib=6)) as client:
        made = compare(recipe, vary, a.out, client, lambda what, k, n: console.print(f"{what}: {k} of {n}"), suite=a.suite)
    console.print(made.table)


if __name__ == "__main__":
    main()
