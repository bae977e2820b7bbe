"""Draw the comparison's cities and train its networks: python scripts/compare_networks.py OUT [--only NAME,…] [--seeds 1,2,3].

The seeds of the cities were fixed before the first training. What is done stays done: run it again after a crash. Rows in
docs/comparison/rows count as done; `--table` adds those of OUT to them, measures the networks' speed on one core and writes the
tables of docs/networks.md.
"""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from cities import draw_cities
from rich.console import Console

from roadfuse_core.cluster import open_cluster
from roadfuse_core.files import write_whole
from roadfuse_core.settings import ClusterSpec
from roadfuse_core.training import compare, load_recipe, measure_speeds, paired_differences, tabulate

CITIES = {"train": range(1000, 1016), "validation": range(1900, 1901), "test": range(2000, 2004)}
NETWORKS = (
    "roadfuse", "cmmpnet-d-linknet34", "deepdualmapper-d-linknet34", "d-linknet34", "d-linknet34-image", "d-linknet34-gps",
    "d-linknet34-1d", "pp-linknet34", "e-road-18",
)  # fmt: skip
SEEDS = (1, 2, 3)
DOCS = Path(__file__).parents[1] / "docs"
ROWS, SPEEDS, PAGE = DOCS / "comparison/rows", DOCS / "comparison/speeds.json", DOCS / "networks.md"
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


class Experiment(NamedTuple):
    """Recipes of docs/comparison, and the networks that each of them trains; together a table."""

    recipes: tuple[str, ...]
    networks: tuple[str, ...]


EXPERIMENTS = {
    "comparison": Experiment(("recipe",), NETWORKS),
    "stages": Experiment(("one-stage", "two-stages"), ("roadfuse",)),
    "dropout": Experiment(("recipe", "dropout", "no-blanks"), ("roadfuse", "d-linknet34")),
}


def recipe_file(stem: str) -> Path:
    """A recipe in the repository."""
    return DOCS / "comparison" / f"{stem}.yaml"


def row_files(experiment: Experiment) -> dict[tuple[str, str, int], Path]:
    """Where the row of each recipe, network and seed lies, or will lie."""
    runs = itertools.product(experiment.recipes, experiment.networks, SEEDS)
    return {
        (stem, n, seed): ROWS / f"{load_recipe(recipe_file(stem), {'seed': seed, 'network.preset': n}).digest()}.json"
        for stem, n, seed in runs
    }


def keep_rows(out: Path) -> None:
    """Rows of finished runs, into the repository; those that belong to no experiment any more leave it."""
    wanted = {path for experiment in EXPERIMENTS.values() for path in row_files(experiment).values()}
    for row in out.glob("*/runs/*/row.json"):
        write_whole(ROWS / f"{row.parent.name}.json", row.read_text())
    for path in set(ROWS.glob("*.json")) - wanted:
        path.unlink()


def rows_of(experiment: Experiment) -> pd.DataFrame:
    """The finished runs of an experiment, each named by its network, and by its recipe where there are several."""
    rows = []
    for (stem, network, _), path in row_files(experiment).items():
        if path.is_file():
            several = f", {load_recipe(recipe_file(stem)).name}" if len(experiment.recipes) > 1 else ""
            row = json.loads(path.read_text())
            rows.append(row | {"variant": f"`{network}`{several}", "network": network})
    return pd.DataFrame(rows)


def page(name: str) -> str:
    """An experiment as Markdown: means over seeds, every seed, and differences between neighbours paired by seed."""
    experiment = EXPERIMENTS[name]
    runs, wanted = rows_of(experiment), row_files(experiment)
    if runs.empty:
        return f"0 of {len(wanted)} runs are done."
    runs["windows_per_s"] = runs.network.map(json.loads(SPEEDS.read_text()))
    table = tabulate(runs)
    told = f"{len(runs)} of {len(wanted)} runs are done."
    lines = [told, "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for variant, row in table.iterrows():
        seeds = ", ".join(f"{v:.3f}" for v in runs[runs.variant == variant].sort_values("seed").g_iou)
        spread = f"{row.g_iou:.3f}" if row.seeds < 2 else f"{row.g_iou:.3f} ± {row.g_iou_std:.3f}"
        figures = [f"{row[k]:.3f}" for k in ("a_iou", "a_iou_batch8", "f1", "attack_drop")]
        costs = [f"{row.parameters / 1e6:.2f} M", f"{row.gflops:.2f}", f"{row.windows_per_s:.0f}"]
        lines.append(f"| {' | '.join([variant, seeds, spread, *figures, *costs])} |")
    lines += ["", "| better | worse | difference of g_iou, paired by seed | 95 % interval |", "| --- | --- | --- | --- |"]
    neighbours = set(itertools.pairwise(table.index))
    for _, p in paired_differences(runs, list(table.index)).iterrows():
        if (p.better, p.worse) in neighbours:
            interval = f"{p.low:+.3f} … {p.high:+.3f}, {p.seeds} seeds" if p.seeds > 1 else "one seed: none"
            lines.append(f"| {p.better} | {p.worse} | {p.difference:+.3f} | {interval} |")
    return "\n".join(lines)


def write_tables() -> None:
    """All experiments into the page, between their marks."""
    text = PAGE.read_text()
    for name in EXPERIMENTS:
        between = re.compile(f"(<!-- {name} -->).*(<!-- /{name} -->)", re.DOTALL)
        text = between.sub(lambda m, name=name: f"{m[1]}\n{page(name)}\n{m[2]}", text)
    write_whole(PAGE, text)


def train_all(out: Path, experiments: list[str], seeds: list[int], workers: int) -> None:
    """Every run that has no row yet, some at a time."""
    console = Console(stderr=True, markup=False)
    wanted: dict[str, dict[str, None]] = {}
    for name in experiments:
        for stem in EXPERIMENTS[name].recipes:
            wanted.setdefault(stem, {}).update(dict.fromkeys(EXPERIMENTS[name].networks))
    with open_cluster(ClusterSpec(workers=workers, memory_gib=6)) as client:
        for stem, networks in wanted.items():
            for row in ROWS.glob("*.json"):
                write_whole(out / stem / "runs" / row.stem / "row.json", row.read_text())
            recipe = out / f"{stem}.yaml"
            write_whole(recipe, recipe_file(stem).read_text())
            vary = {"seed": seeds, "network.preset": list(networks)}
            made = compare(recipe, vary, out / stem, client, lambda what, k, n: console.print(f"{what}: {k} of {n}"))
            console.print(made.table)


def main() -> None:
    """Cities, then runs, or the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--only", default=",".join(EXPERIMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing: gather rows and write the tables")
    a = parser.parse_args()
    if a.table:
        keep_rows(a.out)
        recipes = {n: load_recipe(recipe_file("recipe"), {"network.preset": n}) for n in NETWORKS}
        write_whole(SPEEDS, json.dumps(measure_speeds(recipes), indent=1) + "\n")
        write_tables()
    else:
        draw_cities(a.out, CITIES, a.workers)
        train_all(a.out, a.only.split(","), [int(s) for s in a.seeds.split(",")], a.workers)


if __name__ == "__main__":
    main()
