"""Kernel density tuned on a city's training tiles; after a change only tiles that see it are counted again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from dask.distributed import Client
from numpy.typing import NDArray

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import CubeReader, changed_tiles, cubes_path, halo_px, open_repository, render
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.files import DamagedFileError, read_record, write_record
from roadfuse_core.grid import ImpliedSplit, SplitRule, TaughtCity, TileIndex, split_tiles, tiles_near
from roadfuse_core.inference import KdeModel, software_versions
from roadfuse_core.labels import labels_digest, open_map
from roadfuse_core.settings import City

__all__ = ["tune_kde"]

log = logging.getLogger(__name__)
TILES = 8  # that one job counts
SIGMAS_M = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
# Logarithms of the thresholds that are tried, points a square metre.
EDGES = np.concatenate([[-np.inf], np.linspace(math.log(1e-7), math.log(1e2), 400), [np.inf]])
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class _TuneJob:
    """Some training tiles to count.

    Attributes:
        city: The city.
        snapshot: Which state of its cube.
        tiles: Which.
        sign: 1, or -1 where they are taken out of a sum.
    """

    city: City
    snapshot: str
    tiles: tuple[TileIndex, ...]
    sign: int


def tune_kde(city: City, tell: Progress = quiet, split: ImpliedSplit | None = None, client: Client | None = None) -> KdeModel:
    """Kernel and threshold with the best global IoU on the city's training tiles; no other tile is read.

    What was counted is kept in the workspace. Where labels, tiles and software are the same, only tiles whose points changed
    since are counted again, as they were and as they are; the result equals that of counting all.

    Args:
        city: With points, ingested, and labels.
        tell: Progress.
        split: Which tiles are for training; by default those of seed 0, and the model says so.
        client: Dask, on which tiles are counted; None counts here.

    Returns:
        The tuned model.

    Raises:
        ConfigError: The city lacks points or labels, or its training tiles hold no road.
    """
    if city.points is None:
        raise ConfigError("points", None, "is missing", "kernel density needs trajectories")
    if city.truth is None:
        raise ConfigError(f"labels.{city.target}", None, "is missing", f"name a mask or a map of {city.target} to tune on")
    grid = city.make_grid()
    tiles = (split or ImpliedSplit(split_tiles(grid), "")).named("train")
    counts = _count(city, tiles, client, tell)
    # Pixels at or above each edge: true and false positives of a threshold there.
    above = counts[:, :, ::-1].cumsum(2)[:, :, ::-1]
    road = counts[:, 1].sum(1, keepdims=True)
    iou = above[:, 1, 1:] / np.maximum(road + above[:, 0, 1:], 1)
    kernel, edge = np.unravel_index(int(iou.argmax()), iou.shape)
    if not iou[kernel, edge] > 0:
        spec, key = city.truth
        raise ConfigError(key, spec.path, f"has no {city.target} near points on the training tiles", "check both")
    what = f"{len(tiles)} training tiles of {city.name}, g_iou {iou[kernel, edge]:.4f}"
    taught = None if split else (TaughtCity(city.name, grid, SplitRule()),)
    threshold = float(np.exp(EDGES[edge + 1]))
    return KdeModel(sigma_m=SIGMAS_M[kernel], threshold_per_m2=threshold, tuned_on=what, taught=taught)


def _count(city: City, tiles: Sequence[TileIndex], client: Client | None, tell: Progress) -> Counts:
    """Pixels of the training tiles by kernel, truth and logarithm of the density."""
    basis, snapshot = _basis(city, tiles), str(open_repository(cubes_path(city)).lookup_branch("main"))
    counts, jobs = _empty(), _jobs(city, snapshot, tiles, 1)
    kept = _read_kept(_file(city), basis)
    if kept is not None:
        since, before = kept
        seen = _changed(city, since, snapshot, tiles)
        if seen is not None and 2 * len(seen) < len(tiles):
            counts, jobs = before, [*_jobs(city, since, seen, -1), *_jobs(city, snapshot, seen, 1)]
    for found in run_jobs(client, _count_tiles, jobs, "tuning kernel density", tell):
        counts = counts + found
    if (counts < 0).any():
        raise StoreError(f"{_file(city)}: does not fit the cube; remove it and run again")
    write_record(_file(city), {"basis": basis, "snapshot": snapshot, "counts": counts.tolist()})
    return counts


def _empty() -> Counts:
    return np.zeros((len(SIGMAS_M), 2, len(EDGES) - 1), np.int64)


def _file(city: City) -> Path:
    return city.workspace_path / "scores/tuning.json"


def _basis(city: City, tiles: Sequence[TileIndex]) -> str:
    """Digest of all that decides the counts beside the points."""
    parts = [city.make_grid(), labels_digest(city), [tuple(t) for t in tiles], SIGMAS_M, EDGES.tolist(), software_versions()]
    return blake3(repr(parts).encode()).hexdigest(16)


def _read_kept(path: Path, basis: str) -> tuple[str, Counts] | None:
    """The snapshot and the counts of an earlier tuning on the same basis."""
    try:
        record: dict[str, Any] = read_record(path)
    except (FileNotFoundError, DamagedFileError):
        return None
    return (record["snapshot"], np.array(record["counts"], np.int64)) if record["basis"] == basis else None


def _changed(city: City, since: str, now: str, tiles: Iterable[TileIndex]) -> list[TileIndex] | None:
    """Training tiles whose densities see a change of the points; None where that cannot be told."""
    if since == now:
        return []
    try:
        changed = changed_tiles(city, since)
    except StoreError:
        log.info("the points behind the last tuning were expired; all training tiles are counted")
        return None
    grid = city.make_grid()
    seen = tiles_near(grid, changed, halo_px(_layers(grid.resolution_m)))
    return sorted(seen.intersection(tiles))


def _jobs(city: City, snapshot: str, tiles: Sequence[TileIndex], sign: int) -> list[_TuneJob]:
    return [_TuneJob(city, snapshot, tuple(tiles[k : k + TILES]), sign) for k in range(0, len(tiles), TILES)]


def _layers(resolution_m: float) -> list[Any]:
    return [KdeModel(sigma_m=s, threshold_per_m2=1, tuned_on="-").layer(resolution_m) for s in SIGMAS_M]


def _count_tiles(job: _TuneJob) -> Counts:
    """Counts of some tiles, with the job's sign."""
    city, counts = job.city, _empty()
    grid, cube = city.make_grid(), CubeReader(cubes_path(city), job.snapshot)
    assert city.truth is not None
    labels, layers, px = open_map(city, *city.truth, grid), _layers(grid.resolution_m), grid.tile_px
    halo = halo_px(layers)
    for tile in job.tiles:
        row, col = tile.row * px, tile.col * px
        road, known = labels.window(row, col, px, px)
        if not known.any():
            continue
        sums = cube.sums(layers, row - halo, col - halo, px + 2 * halo, px + 2 * halo)
        with np.errstate(divide="ignore"):
            density = np.log(render(sums, layers, halo))
        for k in range(len(layers)):
            for truth in (0, 1):
                counts[k, truth] += np.histogram(density[k][known & (road == bool(truth))], EDGES)[0]
    return job.sign * counts
