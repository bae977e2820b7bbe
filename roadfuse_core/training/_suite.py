"""Networks under worse and worse evidence: curves for people, figures for scripts."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from bokeh.embed import file_html
from bokeh.layouts import column, gridplot
from bokeh.models import Div, FactorRange
from bokeh.palettes import Category10
from bokeh.plotting import figure
from bokeh.resources import INLINE

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.cubes import Layer
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import ImpliedSplit, TileIndex
from roadfuse_core.models import CheckpointInfo, Network, load_checkpoint, read_checkpoint_info
from roadfuse_core.settings import City
from roadfuse_core.training._ground import lay_ground
from roadfuse_core.training._recipe import View
from roadfuse_core.training._score import SUITE, score_network, to_device

__all__ = ["run_suite", "write_curves"]

# Of each curve: the level at which undamaged evidence stands, and what a level is.
CURVES = {
    "fog": (0.0, "opacity of the fog"),
    "GPS volume": (1.0, "share of the points that is left"),
    "sub-resolution": (1.0, "resolution of the positions, of the grid's own"),
    "GPS noise, px": (0.0, "standard deviation of what is added to a position, px"),
}
# What has no levels.
KINDS = ("none", "information loss", "no image", "no GPS")
ABOUT = """<h1>Robustness</h1>
<p>g_iou on the test tiles of {cities}, the mean over cities where there are several; the further right, the worse the
evidence. <b>Information loss</b> blanks a quarter of each image and another quarter of the points. Rows of every city, with
a_iou and the drop against undamaged evidence: <code>suite.csv</code>.</p><p>{tiles}</p>"""
STYLE = {"font-family": "sans-serif", "width": "900px"}


def run_suite(cities: Sequence[City], checkpoints: Sequence[Path], out: Path, tell: Progress = quiet) -> pd.DataFrame:
    """Score checkpoints on the test tiles of cities under every damage.

    Args:
        cities: Ingested, with labels; each is scored by itself, so that another city is another row.
        checkpoints: Networks.
        out: Folder for `suite.csv` and `suite.html`.
        tell: Progress.

    Returns:
        A row for each network, city and damage: g_iou, a_iou, the relative drop of g_iou, how many tiles score the city,
        and where they come from in words. They are test tiles of every network's own training, the same for all networks.

    Raises:
        ConfigError: Two checkpoints have one name, one is no network, or was made for another pixel size than a city's, or
            the networks learnt from all tiles of a city.
    """
    names = {p.stem if p.stem != "checkpoint" else p.parent.name: p for p in checkpoints}
    if len(names) < len(checkpoints):
        raise ConfigError("--weights", [str(p) for p in checkpoints], "have equal names", "rename one")
    if densities := [p.name for p in checkpoints if p.suffix != ".safetensors"]:
        raise ConfigError("--weights", densities[0], "is no network, and the suite is for networks", "leave it out")
    infos = {name: read_checkpoint_info(path) for name, path in names.items()}
    for name, info in infos.items():
        _require_resolution(cities, info, names[name])
    chosen = [_choose_tiles(city, infos) for city in cities]
    rows = []
    for name, path in names.items():
        network, info = to_device(load_checkpoint(path)[0]), infos[name]
        for city, tiles in zip(cities, chosen, strict=True):
            for row in _score_city(city, network, info, tiles.tiles, tell):
                rows.append({"network": name, **row, "tiles": len(tiles.tiles), "tiles_from": tiles.source[name]})
    table = pd.DataFrame(rows)
    whole = table[table.family == "none"].set_index(["network", "city"]).g_iou
    table["drop"] = 1 - table.g_iou / whole.reindex(pd.MultiIndex.from_frame(table[["network", "city"]])).to_numpy()
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "suite.csv", index=False)
    write_curves(table, out / "suite.html")
    return table


@dataclass(frozen=True)
class _TestTiles:
    """Tiles of a city that score all networks of a suite.

    Attributes:
        tiles: Which.
        source: Why these, in words, by network.
    """

    tiles: list[TileIndex]
    source: dict[str, str]


def _choose_tiles(city: City, networks: dict[str, CheckpointInfo]) -> _TestTiles:
    """Test tiles of all networks at once: a network that learnt elsewhere has no say, unless all did."""
    grid = city.make_grid()
    splits = {name: info.split_of(city.name, grid) for name, info in networks.items()}
    bound = [split for split in splits.values() if not split.free] or list(splits.values())
    shared = set.intersection(*(set(split.named("test")) for split in bound))
    if not shared:
        raise ConfigError(
            "--suite", city.name, f"has no tile that is a test tile of {', '.join(networks)}: they learnt from the others",
            "name a city that they did not learn from, or fewer networks",
        )  # fmt: skip
    return _TestTiles(sorted(shared), {name: _source(split) for name, split in splits.items()})


def _source(split: ImpliedSplit) -> str:
    return f"{split.source} ({split.overlap} of these tiles)" if split.overlap else split.source


def _require_resolution(cities: Sequence[City], info: CheckpointInfo, path: Path) -> None:
    for city in cities:
        if city.grid.resolution_m != info.resolution_m:
            raise ConfigError("grid.resolution_m", city.grid.resolution_m, f"is not the {info.resolution_m} of {path.name}",
                              "train for this city's pixels")  # fmt: skip


def _score_city(
    city: City, network: Network, info: CheckpointInfo, tiles: list[TileIndex], tell: Progress
) -> Iterator[dict[str, str | float]]:
    """A row for each damage."""
    layers = tuple(Layer.model_validate(x) for x in info.layers)
    modalities = info.network.modalities
    view = View(layers, "image" in modalities, info.window_px, 8, bf16=False, lidar="lidar" in modalities)
    ground = lay_ground(city, tiles, info.target, view, city.workspace_path / "ground", tell)
    for damage in SUITE:
        found = score_network(network, view, [ground], damage, tell).scores
        yield {"city": city.name, "family": damage.family, "level": damage.level, "g_iou": found.g_iou, "a_iou": found.a_iou}


def write_curves(table: pd.DataFrame, path: Path) -> None:
    """One page of curves and a table, means over cities; it opens without a network."""
    mean = table.groupby(["network", "family", "level"], sort=False).g_iou.mean().reset_index()
    networks = list(dict.fromkeys(mean.network))
    colours = dict(zip(networks, Category10[10] * (1 + len(networks) // 10), strict=False))
    about = Div(text=_about(table), styles=STYLE)
    curves = gridplot([_curve(mean, family, colours) for family in CURVES], ncols=2, toolbar_location=None)
    named = mean.assign(damage=[f if f in KINDS else f"{f} {v:g}" for f, v in zip(mean.family, mean.level, strict=True)])
    wide = named.pivot(index="damage", columns="network", values="g_iou").loc[list(dict.fromkeys(named.damage)), networks]
    shown = wide.rename_axis(index=None, columns=None).to_html(float_format="{:.3f}".format, border=0, col_space=90)
    figures = Div(text=shown, styles=STYLE | {"text-align": "right"})
    path.write_text(file_html(column(about, _bars(mean, networks, colours), curves, figures), INLINE, "Robustness"))


def _about(table: pd.DataFrame) -> str:
    """What the page shows, and on which tiles."""
    cities = html.escape(", ".join(dict.fromkeys(table.city)))
    each = table.drop_duplicates(["city", "network"])
    lines = [f"{r.city}, {r.network}: {r.tiles} tiles, {r.tiles_from}" for r in each.itertuples()]
    return ABOUT.format(cities=cities, tiles="<br>".join(map(html.escape, lines)))


def _curve(mean: pd.DataFrame, family: str, colours: dict[str, str]) -> figure:
    """g_iou over the levels of a damage, undamaged on the left."""
    whole, what = CURVES[family]
    levels = sorted({whole, *mean[mean.family == family].level}, reverse=whole > 0)
    # Levels stand at equal distances, each under its own value.
    plot = figure(title=family, width=450, height=320, x_range=FactorRange(*[f"{v:g}" for v in levels]), y_range=(0, 1),
                  x_axis_label=what, y_axis_label="g_iou")  # fmt: skip
    for name, colour in colours.items():
        own = mean[(mean.network == name) & mean.family.isin(["none", family])]
        points = own.assign(level=own.level.where(own.family == family, whole)).set_index("level").g_iou.reindex(levels)
        plot.line([f"{v:g}" for v in levels], points, color=colour, legend_label=name, line_width=2)
        plot.scatter([f"{v:g}" for v in levels], points, color=colour, size=6)
    plot.legend.label_text_font_size, plot.legend.location = "8pt", "bottom_left"
    return plot


def _bars(mean: pd.DataFrame, networks: list[str], colours: dict[str, str]) -> figure:
    """What has no curve: the attack, and each modality missing."""
    places = [(kind, name) for kind in KINDS for name in networks]
    value = mean.drop_duplicates(["network", "family"]).set_index(["family", "network"]).g_iou
    plot = figure(title="undamaged, information loss, missing modality", x_range=FactorRange(*places), width=900, height=340,
                  y_range=(0, 1), y_axis_label="g_iou", toolbar_location=None)  # fmt: skip
    plot.vbar(x=places, top=[value[p] for p in places], width=0.85, color=[colours[n] for _, n in places])
    plot.xaxis.major_label_orientation = 0.9
    return plot
