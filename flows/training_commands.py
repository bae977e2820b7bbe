"""The commands `train` and `compare`; they need no server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.console import console
from roadfuse_core.settings import parse_assignments

__all__ = ["app"]

app = typer.Typer()
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]


@app.command()
def train(
    recipe_file: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; by default runs/NAME beside the recipe.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field, such as seed=2.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and its data, say what would run, and stop.")
    ] = False,
) -> None:
    """Train a network; run again after a crash, it goes on."""
    from roadfuse_core.models import describe
    from roadfuse_core.training import check_recipe, estimate_seconds, load_recipe
    from roadfuse_core.training import train as train_network
    from tasks.progress import ConsoleProgress

    recipe = load_recipe(recipe_file, parse_assignments("--set", settings or [], "seed=2"))
    splits, size = check_recipe(recipe), describe(recipe.network_config())
    counts = ", ".join(f"{sum(map(len, getattr(splits, k).values()))} {k}" for k in ("train", "validation", "test"))
    steps = sum(s.epochs for s in recipe.stages) * recipe.epoch_steps
    console.print(
        f"{recipe.network.preset}: {size.parameters:,} parameters; tiles: {counts}; {steps:,} steps of {recipe.batch}"
    )
    if dry_run:
        console.print(f"about {_duration(estimate_seconds(recipe, splits))} on this machine, besides reading the tiles once")
        return
    folder = out or recipe.root / "runs" / recipe.name
    with ConsoleProgress() as tell:
        done = train_network(recipe, folder, tell)
    console.print(f"validation g_iou {done.validation_g_iou:.4f} after {done.epochs} epochs")
    console.print(f"checkpoint  {done.checkpoint}\nsplits      {done.splits}\nlog         {folder / 'log'}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def compare(
    recipe_file: RecipeFile,
    vary: Annotated[list[str], typer.Option(metavar="KEY=V,V", help="A field and its values, such as network.preset=a,b.")],
    out: Annotated[Path | None, typer.Option(help="Folder; by default compare/NAME beside the recipe.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side, each on a GPU or a thread of its own; by default as many.")
    ] = None,
    suite: Annotated[bool, typer.Option("--suite", help="Also score under every damage of the robustness suite.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
) -> None:
    """Train every combination of some fields' values, on the same data and seeds, and make a table."""
    from roadfuse_core.cluster import open_cluster
    from roadfuse_core.settings import ClusterSpec
    from roadfuse_core.training import compare as compare_runs
    from roadfuse_core.training import parse_vary, plan_runs
    from tasks.progress import ConsoleProgress

    folder, values = out or recipe_file.parent / "compare" / recipe_file.stem, parse_vary(vary)
    for line in plan_runs(recipe_file, values, folder, suite):
        console.print(line)
    if dry_run:
        return
    with open_cluster(ClusterSpec(workers=workers)) as client, ConsoleProgress() as tell:
        made = compare_runs(recipe_file, values, folder, client, tell, suite)
    table = Table(
        "variant", "seeds", "g_iou", "± std", "a_iou", "batch of 8", "f1", "lost by attack", "parameters", "GFLOPs", box=None
    )
    for name, r in made.table.iterrows():
        figures = [f"{r[k]:.4f}" for k in ("g_iou", "g_iou_std", "a_iou", "a_iou_batch8", "f1", "attack_drop")]
        table.add_row(str(name), f"{r.seeds:.0f}", *figures, f"{r.parameters:,.0f}", f"{r.gflops:.1f}")
    console.print(table)
    console.print(f"report  {folder / 'compare.html'}\nruns    {folder / 'runs.csv'}\npairs   {folder / 'pairs.csv'}")
