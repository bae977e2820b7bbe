"""Networks under worse and worse evidence: curves for people, figures for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from bokeh.embed import file_html
from bokeh.layouts import gridplot
from bokeh.palettes import Category10
from bokeh.plotting import figure
from bokeh.resources import INLINE

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.cubes import Layer
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import split_tiles
from roadfuse_core.models import load_checkpoint
from roadfuse_core.settings import City
from roadfuse_core.training._ground import lay_ground
from roadfuse_core.training._recipe import View
from roadfuse_core.training._score import SUITE, score_network

__all__ = ["run_suite", "write_curves"]

# Undamaged evidence stands at this level of each curve.
WHOLE = {"fog": 0.0, "GPS volume": 1.0, "sub-resolution": 1.0, "GPS noise, px": 0.0}


def run_suite(cities: Sequence[City], checkpoints: Sequence[Path], out: Path, tell: Progress = quiet) -> pd.DataFrame:
    """Score checkpoints on the test tiles of cities under every damage.

    Args:
        cities: Ingested, with labels; each is scored by itself, so that another city is another row.
        checkpoints: Networks.
        out: Folder for `suite.csv` and `suite.html`.
        tell: Progress.

    Returns:
        A row for each network, city and damage: g_iou, a_iou, and the relative drop of g_iou.

    Raises:
        ConfigError: Two checkpoints have one name, or one was made for another pixel size than a city's.
    """
    names = {p.stem if p.stem != "checkpoint" else p.parent.name: p for p in checkpoints}
    if len(names) < len(checkpoints):
        raise ConfigError("--weights", [str(p) for p in checkpoints], "have equal names", "rename one")
    rows = []
    for name, path in names.items():
        network, info = load_checkpoint(path)
        layers = tuple(Layer.model_validate(x) for x in info.layers)
        view = View(layers, "image" in info.network.modalities, info.window_px, 8, bf16=False)
        for city in cities:
            if city.grid.resolution_m != info.resolution_m:
                raise ConfigError("grid.resolution_m", city.grid.resolution_m, f"is not the {info.resolution_m} of {path.name}",
                                  "train for this city's pixels")  # fmt: skip
            tiles = sorted(t for t, split in split_tiles(city.make_grid()).items() if split == "test")
            ground = lay_ground(city, tiles, "roads", view, city.workspace_path / "ground", tell)
            for damage in SUITE:
                found = score_network(network, view, [ground], damage, tell).scores
                rows.append({"network": name, "city": city.name, "family": damage.family, "level": damage.level,
                             "g_iou": found.g_iou, "a_iou": found.a_iou})  # fmt: skip
    table = pd.DataFrame(rows)
    whole = table[table.family == "none"].set_index(["network", "city"]).g_iou
    table["drop"] = 1 - table.g_iou / whole.reindex(pd.MultiIndex.from_frame(table[["network", "city"]])).to_numpy()
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "suite.csv", index=False)
    write_curves(table, out / "suite.html")
    return table


def write_curves(table: pd.DataFrame, path: Path) -> None:
    """One page of curves, mean over cities; it opens without a network."""
    mean = table.groupby(["network", "family", "level"], sort=False).g_iou.mean().reset_index()
    networks = list(dict.fromkeys(mean.network))
    colours = dict(zip(networks, Category10[10] * (1 + len(networks) // 10), strict=False))
    plots = []
    for family, whole in WHOLE.items():
        axis = "log" if family in ("GPS volume", "sub-resolution") else "linear"
        plot = figure(title=family, width=430, height=320, x_axis_type=axis, y_range=(0, 1), y_axis_label="g_iou")
        for name in networks:
            own = mean[mean.network == name]
            points = pd.concat([own[own.family == "none"].assign(level=whole), own[own.family == family]]).sort_values("level")
            plot.line(points.level, points.g_iou, color=colours[name], legend_label=name, line_width=2)
            plot.scatter(points.level, points.g_iou, color=colours[name], size=6)
        plot.legend.label_text_font_size, plot.legend.location = "8pt", "bottom_left"
        plots.append(plot)
    plots.append(_bars(mean, networks, colours))
    path.write_text(file_html(gridplot(plots, ncols=2), INLINE, "Robustness"))


def _bars(mean: pd.DataFrame, networks: list[str], colours: dict[str, str]) -> figure:
    """What has no curve: the attack, and each modality missing."""
    kinds = ["none", "information loss", "no image", "no GPS"]
    places = [(kind, name) for kind in kinds for name in networks]
    value = mean.drop_duplicates(["network", "family"]).set_index(["family", "network"]).g_iou
    from bokeh.models import FactorRange

    plot = figure(title="information loss, missing modality", x_range=FactorRange(*places), width=860, height=320,
                  y_range=(0, 1), y_axis_label="g_iou")  # fmt: skip
    plot.vbar(x=places, top=[value[p] for p in places], width=0.85, color=[colours[n] for _, n in places])
    plot.xaxis.major_label_orientation = 0.9
    return plot
