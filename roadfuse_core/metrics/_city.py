"""A published map against the city's labels, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dask.distributed import Client
from numpy.typing import NDArray
from scipy import ndimage

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import CubeReader, Layer, cubes_path, halo_px, render
from roadfuse_core.errors import ConfigError
from roadfuse_core.files import replacing
from roadfuse_core.grid import TileIndex, split_tiles
from roadfuse_core.inference import KdeModel, MapReader
from roadfuse_core.labels import RoadMap, open_map
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.settings import City

__all__ = ["NEAR_M", "CityScores", "score_city", "tune_kde"]

NEAR_M = 20.0
TILES = 16  # that one job counts
CityScores = dict[str, dict[str, float]]
SIGMAS_M = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def score_city(
    city: City, group: str = "map", tell: Progress = quiet, client: Client | None = None, held: bool = False
) -> CityScores:
    """Scores of a published map, and the confusion counts of every tile in a Parquet file.

    Args:
        city: With labels.
        group: Which map.
        tell: Progress.
        client: Dask, on which runs of tiles are counted; None counts here.
        held: Score the candidate that is held back.

    Returns:
        Scores by subset: "test" (the tiles of the test split), "all", and, where the city has points, "test_near" and
        "all_near": only pixels within 20 m of a point.

    Raises:
        ConfigError: The city has no labels.
        StoreError: There is no such map yet.
    """
    _labels(city)
    MapReader(city, group, held)
    tiles = city.make_grid().tiles()
    jobs = [_ScoreJob(city, group, held, tuple(tiles[k : k + TILES])) for k in range(0, len(tiles), TILES)]
    rows = [row for found in run_jobs(client, _count_tiles, jobs, f"scoring {group}", tell) for row in found]
    _write(city.workspace_path / "scores" / f"{group}.parquet", rows)
    near = ("test_near", "all_near") if city.points else ()
    return {name: asdict(_score(rows, name)) for name in ("test", "all", *near)}


@dataclass(frozen=True)
class _ScoreJob:
    city: City
    group: str
    held: bool
    tiles: tuple[TileIndex, ...]


def _count_tiles(job: _ScoreJob) -> list[dict[str, object]]:
    """Confusion counts of some tiles, for every subset of their pixels."""
    city = job.city
    grid, labels, reader = city.make_grid(), _labels(city), MapReader(city, job.group, job.held)
    splits, px = split_tiles(grid), grid.tile_px
    cube = CubeReader(cubes_path(city)) if city.points else None
    rows: list[dict[str, object]] = []
    for tile in job.tiles:
        where = (tile.row * px, tile.col * px, px, px)
        road, known = labels.window(*where)
        if known.any():
            predicted = reader.window("road", *where) == 1
            for subset, mask in _subsets(known, cube, where, grid.resolution_m):
                counts = confusion(predicted, road, mask)
                rows.append({"row": tile.row, "col": tile.col, "split": splits[tile], "subset": subset, **counts._asdict()})
    return rows


def _labels(city: City) -> RoadMap:
    if city.truth is None:
        raise ConfigError(
            f"labels.{city.target}", None, "is missing", f"name a mask or a map of {city.target} to score against"
        )
    return open_map(city, *city.truth, city.make_grid())


def _subsets(
    known: NDArray[np.bool_], cube: CubeReader | None, where: tuple[int, int, int, int], resolution_m: float
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "known", known
    if cube is None:
        return
    halo = math.ceil(NEAR_M / resolution_m)
    row, col, height, width = where
    points = cube.window("count", row - halo, col - halo, height + 2 * halo, width + 2 * halo) > 0
    near = np.zeros_like(known)
    if points.any():
        distance_m = ndimage.distance_transform_edt(~points) * resolution_m
        near = distance_m[halo : halo + height, halo : halo + width] <= NEAR_M
    yield "near", known & near


def _score(rows: list[dict[str, object]], name: str) -> Scores:
    subset, only_test = ("near" if name.endswith("near") else "known"), name.startswith("test")
    chosen = [r for r in rows if r["subset"] == subset and (r["split"] == "test" or not only_test)]
    return scores([Confusion(*(int(str(r[k])) for k in Confusion._fields)) for r in chosen])


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [("row", pa.int32()), ("col", pa.int32()), ("split", pa.string()), ("subset", pa.string())]
    schema = pa.schema(fields + [(k, pa.int64()) for k in Confusion._fields])
    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)


def tune_kde(city: City, tell: Progress = quiet) -> KdeModel:
    """Kernel and threshold with the best global IoU on the city's training tiles; no other tile is read.

    Args:
        city: With points, ingested, and labels.
        tell: Progress.

    Returns:
        The tuned model.

    Raises:
        ConfigError: The city lacks points or labels, or its training tiles hold no road.
    """
    if city.points is None:
        raise ConfigError("points", None, "is missing", "kernel density needs trajectories")
    grid, labels, cube = city.make_grid(), _labels(city), CubeReader(cubes_path(city))
    tiles = [t for t, split in split_tiles(grid).items() if split == "train"]
    edges = np.concatenate([[-np.inf], np.linspace(math.log(1e-7), math.log(1e2), 400), [np.inf]])
    counts = np.zeros((len(SIGMAS_M), 2, len(edges) - 1), np.int64)
    models = [KdeModel(sigma_m=s, threshold_per_m2=1, tuned_on="-").layer(grid.resolution_m) for s in SIGMAS_M]
    for done, tile in enumerate(sorted(tiles), start=1):
        _count_tile(counts, edges, models, cube, labels, tile, grid.tile_px)
        tell("tuning kernel density", done, len(tiles))
    # Pixels at or above each edge: true and false positives of a threshold there.
    above = counts[:, :, ::-1].cumsum(2)[:, :, ::-1]
    road = counts[:, 1].sum(1, keepdims=True)
    iou = above[:, 1, 1:] / np.maximum(road + above[:, 0, 1:], 1)
    kernel, edge = np.unravel_index(int(iou.argmax()), iou.shape)
    if not iou[kernel, edge] > 0:
        spec, key = city.truth or (None, "labels")
        raise ConfigError(key, spec and spec.path, f"has no {city.target} near points on the training tiles", "check both")
    what = f"{len(tiles)} training tiles of {city.name}, g_iou {iou[kernel, edge]:.4f}"
    return KdeModel(sigma_m=SIGMAS_M[kernel], threshold_per_m2=float(np.exp(edges[edge + 1])), tuned_on=what)


def _count_tile(
    counts: NDArray[np.int64], edges: NDArray[np.float64], models: list[Layer], cube: CubeReader, labels: RoadMap,
    tile: TileIndex, px: int,
) -> None:  # fmt: skip
    row, col = tile.row * px, tile.col * px
    road, known = labels.window(row, col, px, px)
    if not known.any():
        return
    halo = halo_px(models)
    sums = cube.sums(models, row - halo, col - halo, px + 2 * halo, px + 2 * halo)
    with np.errstate(divide="ignore"):
        density = np.log(render(sums, models, halo))
    for k in range(len(models)):
        for truth in (0, 1):
            counts[k, truth] += np.histogram(density[k][known & (road == bool(truth))], edges)[0]
