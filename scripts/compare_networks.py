"""Draw the comparison's cities and train its networks: python scripts/compare_networks.py OUT [--seeds 1,2,3] [--only A,B].

The seeds of the cities were fixed before the first training. What is done stays done: run it again after a crash. Rows in
docs/comparison/rows count as done; `--table` adds those of OUT to them, measures the networks' speed on one core and writes the
table of docs/networks.md.
"""

import argparse
import itertools
import json
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
from rich.console import Console

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import ingest
from roadfuse_core.files import write_whole
from roadfuse_core.settings import ClusterSpec, load_city
from roadfuse_core.simulate import simulate_city
from roadfuse_core.training import compare, draw_knobs, load_recipe, measure_speeds, paired_differences, tabulate

CITIES = {"train": range(1000, 1016), "validation": range(1900, 1901), "test": range(2000, 2004)}
EXTENT_M = 1280.0
NETWORKS = (
    "roadfuse", "cmmpnet-d-linknet34", "deepdualmapper-d-linknet34", "d-linknet34", "d-linknet34-image", "d-linknet34-gps",
    "d-linknet34-1d", "pp-linknet34", "e-road-18",
)  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"
RECIPE, ROWS, SPEEDS = (DOCS / "comparison" / name for name in ("recipe.yaml", "rows", "speeds.json"))
PAGE = DOCS / "networks.md"
HEAD = (
    "network",
    "g_iou, each seed",
    "mean ± std",
    "a_iou",
    "a_iou_batch8",
    "F1",
    "attack drop",
    "parameters",
    "GFLOPs",
    "windows/s",
)
MARKS = ("<!-- comparison -->", "<!-- /comparison -->")


def draw_city(folder: Path, seed: int) -> None:
    """Simulate and ingest, unless it is there."""
    done = folder / ".done"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    ingest(load_city(simulate_city(folder, draw_knobs(seed, EXTENT_M))))
    done.touch()


def keep_rows(out: Path) -> None:
    """Rows of finished runs, into the repository."""
    for row in out.glob("runs/*/row.json"):
        write_whole(ROWS / f"{row.parent.name}.json", row.read_text())


def page() -> str:
    """The rows as Markdown: means over seeds, every seed, and differences between neighbours paired by seed."""
    runs = pd.DataFrame([json.loads(p.read_text()) for p in sorted(ROWS.glob("*.json"))])
    runs["windows_per_s"] = runs.variant.map(json.loads(SPEEDS.read_text()))
    table = tabulate(runs)
    missing = [f"`{n}`" for n in NETWORKS if n not in table.index]
    told = f"{len(runs)} of {3 * len(NETWORKS)} runs are done" + (f"; {', '.join(missing)} are missing." if missing else ".")
    lines = [told, "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for name, row in table.iterrows():
        seeds = ", ".join(f"{v:.3f}" for v in runs[runs.variant == name].sort_values("seed").g_iou)
        spread = f"{row.g_iou:.3f}" if row.seeds < 2 else f"{row.g_iou:.3f} ± {row.g_iou_std:.3f}"
        figures = [f"{row[k]:.3f}" for k in ("a_iou", "a_iou_batch8", "f1", "attack_drop")]
        costs = [f"{row.parameters / 1e6:.2f} M", f"{row.gflops:.2f}", f"{row.windows_per_s:.0f}"]
        lines.append(f"| {' | '.join([f'`{name}`', seeds, spread, *figures, *costs])} |")
    lines += ["", "| better | worse | difference of g_iou, paired by seed | 95 % interval |", "| --- | --- | --- | --- |"]
    neighbours = set(itertools.pairwise(table.index))
    for _, p in paired_differences(runs, list(table.index)).iterrows():
        if (p.better, p.worse) in neighbours:
            interval = f"{p.low:+.3f} … {p.high:+.3f}, {p.seeds} seeds" if p.seeds > 1 else "one seed: none"
            lines.append(f"| `{p.better}` | `{p.worse}` | {p.difference:+.3f} | {interval} |")
    return "\n".join(lines)


def main() -> None:
    """Cities, then runs, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing: gather rows and write the table")
    a = parser.parse_args()
    if a.table:
        keep_rows(a.out)
        speeds = measure_speeds({n: load_recipe(RECIPE, {"network.preset": n}) for n in NETWORKS})
        write_whole(SPEEDS, json.dumps(speeds, indent=1) + "\n")
        text = re.sub(
            f"{MARKS[0]}.*{MARKS[1]}", lambda _: f"{MARKS[0]}\n{page()}\n{MARKS[1]}", PAGE.read_text(), flags=re.DOTALL
        )
        PAGE.write_text(text)
        return
    wanted = [(a.out / "cities" / split / f"c{seed}", seed) for split, seeds in CITIES.items() for seed in seeds]
    with ProcessPoolExecutor(a.workers) as pool:
        list(pool.map(draw_city, *zip(*wanted, strict=True)))
    for row in ROWS.glob("*.json"):
        write_whole(a.out / "runs" / row.stem / "row.json", row.read_text())
    recipe = a.out / "recipe.yaml"
    recipe.write_text(RECIPE.read_text())
    vary = {"seed": [int(s) for s in a.seeds.split(",")], "network.preset": a.only.split(",")}
    console = Console(stderr=True)
    with open_cluster(ClusterSpec(workers=a.workers, memory_gib=6)) as client:
        made = compare(recipe, vary, a.out, client, lambda what, k, n: console.print(f"{what}: {k} of {n}"))
    console.print(made.table)


if __name__ == "__main__":
    main()
