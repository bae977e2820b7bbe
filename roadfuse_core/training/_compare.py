"""Many trainings that differ in a few fields of one recipe, and the table that they make."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from dask.distributed import Client
from scipy import stats

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.errors import ConfigError
from roadfuse_core.files import write_whole
from roadfuse_core.models import build_network, describe, load_checkpoint
from roadfuse_core.settings import load_city
from roadfuse_core.training._fit import check_recipe, train
from roadfuse_core.training._ground import require_ground
from roadfuse_core.training._pictures import panel, to_png, window_inputs
from roadfuse_core.training._recipe import Recipe, load_recipe
from roadfuse_core.training._score import SUITE, measure_speed, score_network, to_device
from roadfuse_core.training._splits import lay_split, split_recipe

__all__ = [
    "FIGURES",
    "Comparison",
    "compare",
    "measure_speeds",
    "paired",
    "paired_differences",
    "plan_runs",
    "tabulate",
]

FIGURES = ("g_iou", "a_iou", "a_iou_batch8", "f1", "attack_drop", "parameters", "gflops", "windows_per_s", "minutes")


@dataclass(frozen=True)
class Comparison:
    """What a comparison made.

    Attributes:
        runs: A row for each run: its variant, seed and figures.
        table: A row for each variant: mean and standard deviation over seeds, the best first.
        pairs: Differences of g_iou between neighbours of the table, paired by seed, with their 95 % interval.
    """

    runs: pd.DataFrame
    table: pd.DataFrame
    pairs: pd.DataFrame


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    variant: str
    out: str
    suite: bool

    @property
    def row_file(self) -> Path:
        """Where its scores lie once it is done."""
        return Path(self.out) / ("suite.json" if self.suite else "row.json")


def compare(
    path: Path, vary: dict[str, list[Any]], out: Path, client: Client | None = None, tell: Progress = quiet, suite: bool = False
) -> Comparison:
    """Train and score every combination; what is done stays done, and a killed comparison goes on.

    Every run sees the same cities, splits and test tiles; runs of one seed see the same windows and draws.

    Args:
        path: The recipe.
        vary: Values by dotted key; `seed` makes repetitions.
        out: Folder for runs, `runs.csv`, `table.csv`, `pairs.csv` and `compare.html`.
        client: Dask; runs go side by side, each on one thread. None runs them here, one after the other.
        tell: Progress.
        suite: Also score every network on all damages of the robustness suite.

    Raises:
        ConfigError: A variant does not fit; said before the first training.
    """
    jobs = _plan(path, vary, out, suite)
    for job in jobs:
        _check(job)
    rows = run_jobs(client, _train_and_score if client is None else _on_one_thread, jobs, "training runs", tell)
    runs = pd.DataFrame(rows)
    # When nothing else runs any more.
    runs["windows_per_s"] = runs.variant.map(measure_speeds({job.variant: job.recipe for job in jobs}))
    table = tabulate(runs)
    made = Comparison(runs, table, paired_differences(runs, list(table.index)))
    out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "runs.csv", index=False)
    table.to_csv(out / "table.csv")
    made.pairs.to_csv(out / "pairs.csv", index=False)
    (out / "compare.html").write_text(_page(jobs[0].recipe.name, made, _picture(jobs, list(table.index), out)))
    return made


def measure_speeds(recipes: dict[str, Recipe]) -> dict[str, float]:
    """Windows a second of each recipe's network, one after the other; weights do not matter to it."""
    return {k: measure_speed(to_device(build_network(r.network_config()).eval()), r.view()) for k, r in recipes.items()}


def plan_runs(path: Path, vary: dict[str, list[Any]], out: Path, suite: bool = False) -> list[str]:
    """A line for each run of a comparison, and whether it is done; a run that does not fit is refused."""
    jobs = _plan(path, vary, out, suite)
    for job in jobs:
        _check(job)
    return [f"{j.variant}, seed {j.recipe.seed}{', done' if j.row_file.is_file() else ''}" for j in jobs]


def _check(job: _Run) -> None:
    """Refuse a run that does not fit, unless it is done."""
    if (job.recipe.ranks or 1) > 1:
        raise ConfigError(
            "ranks", job.recipe.ranks, "is for one training; a comparison runs its trainings side by side, each on one worker",
            "leave it out",
        )  # fmt: skip
    if not job.row_file.is_file():
        splits = check_recipe(job.recipe)
        for city in splits.test:
            require_ground(load_city(Path(city)), job.recipe.target, job.recipe.view())


def _plan(path: Path, vary: dict[str, list[Any]], out: Path, suite: bool) -> list[_Run]:
    jobs = []
    for values in itertools.product(*vary.values()):
        changes = dict(zip(vary, values, strict=True))
        recipe = load_recipe(path, changes)
        name = (
            ", ".join(str(v) if k.endswith("preset") else f"{k}={v}" for k, v in changes.items() if k != "seed") or recipe.name
        )
        jobs.append(_Run(recipe, name, str(out / "runs" / recipe.digest()), suite))
    return jobs


def _on_one_thread(job: _Run) -> dict[str, Any]:
    return _train_and_score(job, threads=1)


def _train_and_score(job: _Run, threads: int | None = None) -> dict[str, Any]:
    """One run, unless its row is there."""
    out = Path(job.out)
    if job.row_file.is_file():
        return dict(json.loads(job.row_file.read_text()))
    train(job.recipe, out, threads=threads)
    network = to_device(load_checkpoint(out / "checkpoint.safetensors")[0])
    minutes = json.loads((out / "done.json").read_text())["seconds"] / 60
    grounds = lay_split(job.recipe, split_recipe(job.recipe).test, job.recipe.target, out.parent / "ground")
    damages = SUITE if job.suite else SUITE[:2]
    found = {(d.family, d.level): score_network(network, job.recipe.view(), grounds, d) for d in damages}
    plain, attacked = found["none", 0].scores, found["information loss", 1].scores
    described = describe(network.config)
    row = {"variant": job.variant, "seed": job.recipe.seed} | {k: v for k, v in asdict(plain).items()}
    row |= {
        "attack_drop": 1 - attacked.g_iou / plain.g_iou if plain.g_iou > 0 else math.nan, "minutes": minutes,
        "parameters": described.parameters, "gflops": described.gflops,
        "by_city": found["none", 0].by_city,
    }  # fmt: skip
    if job.suite:
        row["suite"] = [[d.family, d.level, found[d.family, d.level].scores.g_iou] for d in damages]
    write_whole(job.row_file, json.dumps(row))
    return row


def tabulate(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each variant: mean and standard deviation over seeds, the best g_iou first."""
    grouped = runs.groupby("variant")
    out = pd.DataFrame({"seeds": grouped.size()})
    for name in FIGURES:
        out[name] = grouped[name].mean()
        if name in ("g_iou", "a_iou", "a_iou_batch8", "f1", "attack_drop"):
            out[f"{name}_std"] = grouped[name].std()
    return out.sort_values("g_iou", ascending=False)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b and its 95 % interval by Student's t, paired; the interval of one pair is without bounds."""
    d = np.asarray(a, float) - np.asarray(b, float)
    mean = float(d.mean())
    if len(d) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return mean, mean - half, mean + half


def paired_differences(runs: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Each variant against all that stand below it."""
    by = runs.pivot_table(index="seed", columns="variant", values="g_iou")
    rows = []
    for a, b in itertools.combinations(order, 2):
        both = by[[a, b]].dropna()
        if len(both):
            mean, low, high = paired(both[a].to_list(), both[b].to_list())
            rows.append({"better": a, "worse": b, "difference": mean, "low": low, "high": high, "seeds": len(both)})
    return pd.DataFrame(rows, columns=["better", "worse", "difference", "low", "high", "seeds"])


def _picture(jobs: list[_Run], order: list[str], out: Path) -> str:
    """A test window with much road: what there is, what is true, and what each variant says; a PNG in base64."""
    # A row that came from elsewhere has no weights here.
    first = {job.variant: job for job in reversed(jobs) if (Path(job.out) / "checkpoint.safetensors").is_file()}
    panels, fullest = [], None
    for name in (n for n in order if n in first):
        job = first[name]
        grounds = lay_split(job.recipe, split_recipe(job.recipe).test, job.recipe.target, out / "runs" / "ground")
        made = window_inputs(job.recipe.view(), grounds, SUITE[0])
        network = load_checkpoint(Path(job.out) / "checkpoint.safetensors")[0]
        with torch.inference_mode():
            panels.append(panel(name, made, network(made.inputs, made.present).logits))
        fullest = made if fullest is None or len(made.inputs) > len(fullest.inputs) else fullest
    return to_png(panels, fullest) if fullest is not None else ""


def _page(name: str, made: Comparison, picture: str) -> str:
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222}div{overflow-x:auto}img{max-width:100%}"
        "td,th{padding:.2rem .7rem;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}"
        "table{border-collapse:collapse}tr:nth-child(even){background:#f4f4f4}"
    )
    pairs = made.pairs.map(lambda v: f"{v:+.4f}" if isinstance(v, float) else v)
    runs = made.runs.drop(columns=[c for c in ("suite", "by_city") if c in made.runs])
    window = f'<img alt="test window" src="data:image/png;base64,{picture}">' if picture else "Its weights are elsewhere."
    parts = [
        f"<h1>{html.escape(name)}</h1><p>Scores on the test tiles: mean over seeds ± standard deviation. attack drop: "
        "the share of g_iou that is lost when a quarter of the image and another quarter of the points are gone.</p>",
        _wide(_told(made.table)), "<h2>One test window</h2><p>With each network's IoU in this window; white: road found, red: "
        "road that is none, blue: road that was missed.</p>", window,
        "<h2>Differences of g_iou, paired by seed, with 95 % intervals</h2>", _wide(pairs.to_html(border=0, index=False)),
        "<h2>Every run</h2>", _wide(runs.to_html(border=0, index=False, float_format=lambda v: f"{v:.4f}")),
    ]  # fmt: skip
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(name)}</title><style>{style}</style>' + "".join(parts)


def _wide(table: str) -> str:
    return f"<div>{table}</div>"


def _told(table: pd.DataFrame) -> str:
    """The table with mean and deviation in one cell."""
    out = pd.DataFrame({"variant": table.index, "seeds": table.seeds.to_numpy()})
    for name in FIGURES:
        spread = table.get(f"{name}_std")
        digits = 3 if spread is not None else 0 if table[name].max() >= 100 else 1
        means = [f"{v:,.{digits}f}" for v in table[name]]
        out[name.replace("_", " ")] = means if spread is None else [
            m if np.isnan(s) else f"{m} ± {s:.3f}" for m, s in zip(means, spread, strict=True)
        ]  # fmt: skip
    return out.to_html(border=0, index=False)
