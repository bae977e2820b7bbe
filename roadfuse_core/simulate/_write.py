"""A simulated city on disk: what a real user has, and the truth beside it."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import rasterio
import yaml
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio import features
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_translate
from rio_cogeo.profiles import cog_profiles
from shapely.geometry import LineString

from roadfuse_core.grid import Grid, make_grid
from roadfuse_core.simulate._aerial import Painter
from roadfuse_core.simulate._config import CityKnobs
from roadfuse_core.simulate._landscape import Landscape, grow_landscape
from roadfuse_core.simulate._streets import CLASSES, RESIDENTIAL, Streets, lay_streets
from roadfuse_core.simulate._traffic import FIRST_DAY, SCHEMA, Routes, day_of_points, plan_routes

__all__ = ["SimulatedCity", "simulate_city"]

log = logging.getLogger(__name__)
BLOCK_PX = 1024
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SimulatedCity:
    """A city in memory: network, landscape, routes; images and points come in pieces on demand."""

    knobs: CityKnobs

    @cached_property
    def grid(self) -> Grid:
        """The grid that the city fills, in the UTM zone of its centre."""
        k = self.knobs
        tile_m = k.tile_px * k.resolution_m
        reach = 1e-6
        at_centre = make_grid((k.lon - reach, k.lat - reach, k.lon + reach, k.lat + reach), k.resolution_m, k.tile_px)  # type: ignore[arg-type]
        tiles = max(1, int(-(-k.size_m // tile_m)))
        return Grid(at_centre.crs, k.resolution_m, k.tile_px, at_centre.left_tile - tiles // 2,
                    at_centre.top_tile + (tiles - 1) // 2, tiles, tiles)  # fmt: skip

    @property
    def origin(self) -> NDArray[np.float64]:
        """(2,) metres of the lower left corner in the grid's CRS."""
        return np.array([self.grid.bounds.left, self.grid.bounds.bottom])

    @cached_property
    def streets(self) -> Streets:
        """The true network, local metres."""
        return lay_streets(self._filled)

    @cached_property
    def landscape(self) -> Landscape:
        """Buildings, trees and the rest."""
        return grow_landscape(self._filled, self.streets)

    @cached_property
    def painter(self) -> Painter:
        """Draws the aerial image."""
        return Painter(self._filled, self.streets, self.landscape)

    @cached_property
    def routes(self) -> Routes:
        """Where the vehicles go."""
        return plan_routes(self._filled, self.streets)

    @property
    def _filled(self) -> CityKnobs:
        return self.knobs.model_copy(update={"size_m": self.grid.shape[0] * self.grid.resolution_m})

    def image(self, row: int, col: int, px: int) -> NDArray[np.uint8]:
        """(3, px, px) uint8 of the aerial image, from a pixel on."""
        res = self.knobs.resolution_m
        return self.painter.block(col * res, (self.grid.shape[0] - row) * res, px)

    def truth(self) -> NDArray[np.uint8]:
        """(height, width) uint8, 1 on roads drawn at their width, pixel centres decide."""
        shapes = self.road_lines().geometry.buffer(self.road_lines().width_m / 2)
        return features.rasterize(list(shapes), self.grid.shape, transform=self.grid.affine, dtype="uint8")

    def road_lines(self) -> gpd.GeoDataFrame:
        """The true roads as lines in the grid's CRS, with class, width_m and whether vehicles use them."""
        lines = [LineString(line + self.origin) for line in self.streets.lines]
        kinds = [CLASSES[k] for k in self.streets.kind]
        table = {"class": [k.name for k in kinds], "width_m": [k.width_m for k in kinds], "travelled": self.routes.used}
        return gpd.GeoDataFrame(table, geometry=lines, crs=self.grid.crs)

    def old_map(self) -> gpd.GeoDataFrame:
        """The outdated map: some minor roads missing, and some that are gone."""
        rng = np.random.default_rng([self.knobs.seed, 31])
        roads = self.road_lines()
        minor = self.streets.kind >= RESIDENTIAL
        missing = minor & (rng.random(len(roads)) < self.knobs.outdated_missing)
        count = round(self.knobs.outdated_gone * int(minor.sum()))
        outlines = [p for p, _ in self.streets.parts if ((p > 0) & (p < self.knobs.size_m)).all()]
        chosen = rng.permutation(len(outlines))[:count]
        ends = [np.stack([outlines[k][[3, 4]].mean(0), outlines[k][[19, 20]].mean(0)]) for k in chosen]
        gone = [LineString(pair + self.origin) for pair in ends]
        kept = roads[~missing].assign(gone=False)
        old = gpd.GeoDataFrame(
            {"class": "residential", "width_m": CLASSES[RESIDENTIAL].width_m, "travelled": False, "gone": True},
            geometry=gone, crs=self.grid.crs, index=range(len(gone)),
        )  # fmt: skip
        return gpd.GeoDataFrame(pd.concat([kept, old], ignore_index=True), crs=self.grid.crs)

    def points(self, day: int) -> Iterator[tuple[object, dict[str, int]]]:
        """Batches of one day's rows (pyarrow tables) and their bad rows by kind."""
        back = Transformer.from_crs(self.grid.crs, "EPSG:4326", always_xy=True)
        yield from day_of_points(self._filled, self.streets, self.landscape, self.routes, back, self.origin, day)


def simulate_city(out: Path, knobs: CityKnobs, workers: int = 1, progress: Progress | None = None) -> Path:
    """Write a city: imagery, daily dumps, truth, an old map and a city file that runs as it is.

    Files appear under their names when they are whole; a second run overwrites them with equal bytes.

    Args:
        out: Folder, made if missing.
        knobs: The city.
        workers: Processes that draw the image.
        progress: Called with (what, done, total).

    Returns:
        The path of `city.yaml`.
    """
    city = SimulatedCity(knobs)
    for folder in ("imagery", "dumps", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda what, done, total: None)
    _write_vectors(out, city)
    _write_truth(out / "truth/roads.tif", city)
    dirt = [_write_dump(out, city, day, tell) for day in range(knobs.days)] if knobs.points_per_day else []
    _write_image(out / "imagery/aerial.tif", city, workers, tell)
    (out / "simulation.json").write_text(
        json.dumps({"knobs": knobs.model_dump(mode="json"), "dirt": dict(sum(map(Counter, dirt), Counter[str]()))}, indent=1)
    )
    return _write_city_file(out, city)


def _write_vectors(out: Path, city: SimulatedCity) -> None:
    for name, table in (("truth/roads.gpkg", city.road_lines()), ("old_map.gpkg", city.old_map())):
        (out / name).unlink(missing_ok=True)
        table.to_file(out / name, driver="GPKG", layer="roads")


def _write_truth(path: Path, city: SimulatedCity) -> None:
    height, width = city.grid.shape
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8", compress="deflate",
                       tiled=True, crs=city.grid.crs, transform=city.grid.affine) as dst:  # fmt: skip
        dst.write(city.truth(), 1)


def _write_dump(out: Path, city: SimulatedCity, day: int, tell: Progress) -> dict[str, int]:
    name = f"dumps/{FIRST_DAY + day}.parquet"
    total, done = Counter[str](), 0
    with pq.ParquetWriter(out / f"{name}.part", SCHEMA, compression="zstd") as writer:
        for table, dirt in city.points(day):
            writer.write_table(table)
            total.update(dirt)
            done += table.num_rows  # type: ignore[attr-defined]
            tell("points", day * city.knobs.points_per_day + done, city.knobs.days * city.knobs.points_per_day)
    shutil.move(out / f"{name}.part", out / name)
    return dict(total)


_painter_of: dict[CityKnobs, SimulatedCity] = {}


def _draw(job: tuple[CityKnobs, int, int]) -> NDArray[np.uint8]:
    """One block, in a worker process that builds the city once."""
    knobs, row, col = job
    if knobs not in _painter_of:
        _painter_of.clear()
        _painter_of[knobs] = SimulatedCity(knobs)
    return _painter_of[knobs].image(row, col, BLOCK_PX)


def _write_image(path: Path, city: SimulatedCity, workers: int, tell: Progress) -> None:
    height, width = city.grid.shape
    jobs = [(city.knobs, r, c) for r in range(0, height, BLOCK_PX) for c in range(0, width, BLOCK_PX)]
    plain = path.with_suffix(".part.tif")
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8", "tiled": True,
               "crs": city.grid.crs, "transform": city.grid.affine, "photometric": "rgb", "BIGTIFF": "IF_SAFER"}  # fmt: skip
    with ExitStack() as stack:
        dst = stack.enter_context(rasterio.open(plain, "w", **profile))
        if workers > 1 and len(jobs) > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            drawn = pool.map(_draw, jobs)
        else:
            drawn = map(_draw, jobs)
        for k, ((_, r, c), block) in enumerate(zip(jobs, drawn, strict=True)):
            h, w = min(BLOCK_PX, height - r), min(BLOCK_PX, width - c)
            dst.write(block[:, :h, :w], window=Window(c, r, w, h))
            tell("image blocks", k + 1, len(jobs))
    cog_translate(plain, path, cog_profiles.get("jpeg") | {"JPEG_QUALITY": 90}, in_memory=False, quiet=True)
    plain.unlink()


def _write_city_file(out: Path, city: SimulatedCity) -> Path:
    k, b = city.knobs, city.grid.bounds
    pad = city.grid.tile_m * 0.45
    to_lonlat = Transformer.from_crs(city.grid.crs, "EPSG:4326", always_xy=True)
    box = to_lonlat.transform_bounds(b.left + pad, b.bottom + pad, b.right - pad, b.top - pad)
    names = {n: n for n in ("vehicle", "lon", "lat", "time", "speed", "bearing", "interval")}
    spec = {
        "name": f"simulated-{k.seed}",
        "workspace": "work",
        "grid": {
            "bounds": [round(v, 6) for v in box],
            "crs": city.grid.crs,
            "resolution_m": k.resolution_m,
            "tile_px": k.tile_px,
        },
        "points": {"sources": ["dumps/*.parquet"], "columns": names, "speed_unit": "km/h", "period": "month"},
        "imagery": {"sources": ["imagery/*.tif"]},
        "labels": {"roads": {"path": "truth/roads.tif"}},
        "existing_map": {"path": "old_map.gpkg", "width": "width_m"},
        "model": {"weights": "default"},
        "cluster": {"kind": "auto"},
    }
    if not k.points_per_day:
        del spec["points"]
    path = out / "city.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path
