"""A published map against the city's labels, tile by tile."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from dask.distributed import Client
from numpy.typing import NDArray
from scipy import ndimage

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import CubeReader, Layer, cubes_path, halo_px, open_repository, render
from roadfuse_core.errors import ConfigError, NothingPublishedError, StoreError
from roadfuse_core.files import replacing
from roadfuse_core.grid import ImpliedSplit, SplitRule, TaughtCity, TileIndex, split_tiles
from roadfuse_core.inference import KdeModel, MapReader, split_of_map
from roadfuse_core.labels import RoadMap, labels_digest, open_map
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.settings import City

__all__ = [
    "NEAR_M", "CityScores", "MapScores", "ScoredOn", "current_scores", "describe_tiles", "read_scores", "score_city",
    "tune_kde",
]  # fmt: skip

NEAR_M = 20.0
TILES = 16  # that one job counts
CityScores = dict[str, dict[str, float]]
FACTS = b"roadfuse"  # key of a file's metadata
SIGMAS_M = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


@dataclass(frozen=True)
class ScoredOn:
    """Which map was scored, and against what.

    Attributes:
        map: Key of the map.
        labels: Digest of the labels.
        basis: Digest of the labels and the test tiles: scores of equal ones can be compared.
        tiles_from: Why these are the test tiles, in words.
        overlap: Test tiles that lie where the map's model learnt.
        points: Snapshot of the cube that decided what is near a point; None for a city without points.
    """

    map: str
    labels: str
    basis: str
    tiles_from: str
    overlap: int
    points: str | None


@dataclass(frozen=True)
class MapScores:
    """Scores of a map.

    Attributes:
        subsets: Scores by subset: "test" (the test tiles), "all", and, where the city has points, "test_near" and "all_near":
            only pixels within 20 m of a point. NaN where there is nothing to divide by.
        on: Which map, and against what.
    """

    subsets: CityScores
    on: ScoredOn


def score_city(
    city: City, group: str = "map", tell: Progress = quiet, client: Client | None = None, held: bool = False,
    split: ImpliedSplit | None = None,
) -> MapScores:  # fmt: skip
    """Scores of a published map, and the confusion counts of every tile in a Parquet file.

    Args:
        city: With labels.
        group: Which map.
        tell: Progress.
        client: Dask, on which runs of tiles are counted; None counts here.
        held: Score the candidate that is held back.
        split: Which tiles are for the test; by default those that the map's own model implies. Kernel density beside a map
            ("baseline") is scored on the tiles of the map.

    Returns:
        The scores.

    Raises:
        ConfigError: The city has no labels.
        StoreError: There is no such map yet, or it was replaced while it was scored.
    """
    _labels(city)
    scored = MapReader(city, group, held)
    split = split or _split_of(city, group, scored)
    tiles = city.make_grid().tiles()
    jobs = [_ScoreJob(city, group, held, split.tiles, tuple(tiles[k : k + TILES])) for k in range(0, len(tiles), TILES)]
    rows = [row for found in run_jobs(client, _count_tiles, jobs, f"scoring {group}", tell) for row in found]
    if MapReader(city, group, held).key != scored.key:
        raise StoreError(f"{group} {scored.key} was replaced while it was scored; run again")
    on = _scored_on(city, scored.key, split)
    _write(_scores_path(city, group), rows, on)
    return _summarise(rows, on)


def describe_tiles(found: MapScores) -> str:
    """A sentence on the test tiles of scores, with a warning where the map's model learnt from them."""
    tiles = int(found.subsets["test"]["tiles"])
    line = f"{tiles} test tiles with labels: {found.on.tiles_from}."
    if found.on.overlap:
        line += f" {found.on.overlap} test tiles lie where the model learnt, so that these scores flatter it."
    elif not tiles:
        line += " Scores on all tiles flatter the model where it learnt from them."
    return line


def read_scores(city: City, group: str = "map") -> MapScores | None:
    """The newest scores, as `score_city` stored them; None where there are none, or none that can be read."""
    try:
        table = pq.read_table(_scores_path(city, group))
        return _summarise(table.to_pylist(), ScoredOn(**json.loads(table.schema.metadata[FACTS])))
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None  # they are counted again


def current_scores(city: City, group: str = "map", held: bool = False) -> MapScores | None:
    """The newest scores, where they are those of the map as it is, against the labels as they are; else None."""
    found = read_scores(city, group)
    if found is None:
        return None
    scored = MapReader(city, group, held)
    return found if found.on == _scored_on(city, scored.key, _split_of(city, group, scored)) else None


def _split_of(city: City, group: str, scored: MapReader) -> ImpliedSplit:
    if group == "baseline":
        try:
            return split_of_map(city, MapReader(city).record)
        except NothingPublishedError:  # kernel density by itself
            pass
    return split_of_map(city, scored.record)


def _scored_on(city: City, key: str, split: ImpliedSplit) -> ScoredOn:
    labels = labels_digest(city) or ""
    test = [[tile.row, tile.col] for tile in split.named("test")]
    basis = blake3(json.dumps([labels, test]).encode()).hexdigest(8)
    points = open_repository(cubes_path(city)).lookup_branch("main") if city.points else None
    return ScoredOn(key, labels, basis, split.source, split.overlap, points)


def _summarise(rows: list[dict[str, object]], on: ScoredOn) -> MapScores:
    near = ("test_near", "all_near") if on.points else ()
    return MapScores({name: asdict(_score(rows, name)) for name in ("test", "all", *near)}, on)


def _scores_path(city: City, group: str) -> Path:
    return city.workspace_path / "scores" / f"{group}.parquet"


@dataclass(frozen=True)
class _ScoreJob:
    city: City
    group: str
    held: bool
    splits: dict[TileIndex, str]
    tiles: tuple[TileIndex, ...]


def _count_tiles(job: _ScoreJob) -> list[dict[str, object]]:
    """Confusion counts of some tiles, for every subset of their pixels."""
    city = job.city
    grid, labels, reader = city.make_grid(), _labels(city), MapReader(city, job.group, job.held)
    px = grid.tile_px
    cube = CubeReader(cubes_path(city)) if city.points else None
    rows: list[dict[str, object]] = []
    for tile in job.tiles:
        where = (tile.row * px, tile.col * px, px, px)
        road, known = labels.window(*where)
        if known.any():
            predicted = reader.window("road", *where) == 1
            for subset, mask in _subsets(known, cube, where, grid.resolution_m):
                counts = confusion(predicted, road, mask)
                rows.append({"row": tile.row, "col": tile.col, "split": job.splits[tile], "subset": subset, **counts._asdict()})
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


def _write(path: Path, rows: list[dict[str, object]], on: ScoredOn) -> None:
    fields = [("row", pa.int32()), ("col", pa.int32()), ("split", pa.string()), ("subset", pa.string())]
    metadata = {FACTS: json.dumps(asdict(on)).encode()}
    schema = pa.schema(fields + [(k, pa.int64()) for k in Confusion._fields], metadata)
    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)


def tune_kde(city: City, tell: Progress = quiet, split: ImpliedSplit | None = None) -> KdeModel:
    """Kernel and threshold with the best global IoU on the city's training tiles; no other tile is read.

    Args:
        city: With points, ingested, and labels.
        tell: Progress.
        split: Which tiles are for training; by default those of seed 0, and the model says so.

    Returns:
        The tuned model.

    Raises:
        ConfigError: The city lacks points or labels, or its training tiles hold no road.
    """
    if city.points is None:
        raise ConfigError("points", None, "is missing", "kernel density needs trajectories")
    grid, labels, cube = city.make_grid(), _labels(city), CubeReader(cubes_path(city))
    tiles = (split or ImpliedSplit(split_tiles(grid), "")).named("train")
    edges = np.concatenate([[-np.inf], np.linspace(math.log(1e-7), math.log(1e2), 400), [np.inf]])
    counts = np.zeros((len(SIGMAS_M), 2, len(edges) - 1), np.int64)
    models = [KdeModel(sigma_m=s, threshold_per_m2=1, tuned_on="-").layer(grid.resolution_m) for s in SIGMAS_M]
    for done, tile in enumerate(tiles, start=1):
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
    taught = None if split else (TaughtCity(city.name, grid, SplitRule()),)
    threshold = float(np.exp(edges[edge + 1]))
    return KdeModel(sigma_m=SIGMAS_M[kernel], threshold_per_m2=threshold, tuned_on=what, taught=taught)


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
