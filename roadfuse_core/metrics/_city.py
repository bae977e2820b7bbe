"""A published map against the city's labels, tile by tile."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from dask.distributed import Client
from numpy.typing import NDArray
from scipy import ndimage

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import CubeReader, changed_tiles, cubes_path, open_repository
from roadfuse_core.errors import ConfigError, NothingPublishedError, StoreError
from roadfuse_core.files import digest_of, replacing
from roadfuse_core.grid import ImpliedSplit, TileIndex, tiles_near
from roadfuse_core.inference import MapReader, changed_map_tiles, software_versions, split_of_map
from roadfuse_core.labels import labels_digest, open_map
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.settings import City

__all__ = [
    "NEAR_M", "CityScores", "MapScores", "ScoredOn", "current_scores", "describe_tiles", "read_scores", "rescore",
    "score_city",
]  # fmt: skip

NEAR_M = 20.0
TILES = 16  # that one job counts
CityScores = dict[str, dict[str, float]]
FACTS, COUNTED = b"roadfuse", b"roadfuse-counted"  # keys of a file's metadata
Row = dict[str, Any]


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

    Counts of the file before stand where neither the map nor points near the tile changed, if the labels are the same.

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
    if city.truth is None:
        raise ConfigError(
            f"labels.{city.target}", None, "is missing", f"name a mask or a map of {city.target} to score against"
        )
    split = split or _split_of(city, group, MapReader(city, group, held))
    rows, on, basis = _count(city, group, held, split, tell, client)
    _write(_scores_path(city, group), rows, on, basis)
    return _summarise(rows, on)


def rescore(city: City, split: ImpliedSplit, tell: Progress = quiet, client: Client | None = None) -> MapScores:
    """Scores of the published map on other test tiles than its own, to compare it; they are not stored.

    Args:
        city: With labels.
        split: Which tiles are for the test.
        tell: Progress.
        client: Dask; None counts here.
    """
    rows, on, _ = _count(city, "map", False, split, tell, client)
    return _summarise(rows, on)


def _count(
    city: City, group: str, held: bool, split: ImpliedSplit, tell: Progress, client: Client | None
) -> tuple[list[Row], ScoredOn, _Basis]:
    """Confusion counts of every tile with labels, and of what they are; counts that stand are taken from the file before."""
    scored = MapReader(city, group, held)
    basis, kept = _basis_of(city, scored), _read_counts(_scores_path(city, group))
    again = _to_count(city, group, kept[0] if kept else None, basis)
    jobs = [_ScoreJob(city, group, held, basis.points, tuple(again[k : k + TILES])) for k in range(0, len(again), TILES)]
    rows = [row for found in run_jobs(client, _count_tiles, jobs, f"scoring {group}", tell) for row in found]
    if MapReader(city, group, held).key != scored.key:
        raise StoreError(f"{group} {scored.key} was replaced while it was scored; run again")
    stand = set(again)
    rows += [row for row in (kept[1] if kept else []) if (row["row"], row["col"]) not in stand]
    return _in_order(rows, split), _scored_on(city, scored.key, split, basis.points), basis


def _in_order(rows: list[Row], split: ImpliedSplit) -> list[Row]:
    """Rows of tiles row-major, each with the tile's split as it is now."""
    rows.sort(key=lambda row: (row["row"], row["col"], row["subset"] == "near"))
    return [row | {"split": split.tiles[TileIndex(row["row"], row["col"])]} for row in rows]


@dataclass(frozen=True)
class _Basis:
    """What decided the counts of all tiles.

    Attributes:
        maps: Snapshot of the maps.
        points: Snapshot of the cube that decided what is near a point; None for a city without points.
        fixed: Digest of what all tiles depend on: labels, grid, software.
    """

    maps: str
    points: str | None
    fixed: str


def _basis_of(city: City, scored: MapReader) -> _Basis:
    points = str(open_repository(cubes_path(city)).lookup_branch("main")) if city.points else None
    fixed = repr([labels_digest(city), city.make_grid(), NEAR_M, software_versions()])
    return _Basis(scored.snapshot, points, digest_of(fixed.encode()))


def _to_count(city: City, group: str, kept: _Basis | None, now: _Basis) -> list[TileIndex]:
    """Tiles whose counts may differ from those that are kept, row-major."""
    grid = city.make_grid()
    if kept is None or kept.fixed != now.fixed or (kept.points is None) != (now.points is None):
        return grid.tiles()
    changed = changed_map_tiles(city, group, kept.maps, now.maps)
    if changed is None:
        return grid.tiles()
    if kept.points and kept.points != now.points:
        try:
            moved = changed_tiles(city, kept.points)
        except StoreError:  # expired
            return grid.tiles()
        changed |= tiles_near(grid, moved, math.ceil(NEAR_M / grid.resolution_m))
    return sorted(changed)


def _read_counts(path: Path) -> tuple[_Basis, list[Row]] | None:
    """What an earlier scoring counted, and on which basis; None if there is none, or none that is as it was written."""
    try:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[COUNTED])
        rows = table.to_pylist()
        return (_Basis(**facts["basis"]), rows) if facts["digest"] == _digest(rows) else None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None  # all is counted again


def _digest(rows: list[Row]) -> str:
    return digest_of(json.dumps([list(row.values()) for row in rows]).encode())


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
    points = str(open_repository(cubes_path(city)).lookup_branch("main")) if city.points else None
    return found if found.on == _scored_on(city, scored.key, _split_of(city, group, scored), points) else None


def _split_of(city: City, group: str, scored: MapReader) -> ImpliedSplit:
    if group == "baseline":
        try:
            return split_of_map(city, MapReader(city).record)
        except NothingPublishedError:  # kernel density by itself
            pass
    return split_of_map(city, scored.record)


def _scored_on(city: City, key: str, split: ImpliedSplit, points: str | None) -> ScoredOn:
    labels = labels_digest(city) or ""
    test = [[tile.row, tile.col] for tile in split.named("test")]
    basis = blake3(json.dumps([labels, test]).encode()).hexdigest(8)
    return ScoredOn(key, labels, basis, split.source, split.overlap, points)


def _summarise(rows: list[Row], on: ScoredOn) -> MapScores:
    near = ("test_near", "all_near") if on.points else ()
    return MapScores({name: asdict(_score(rows, name)) for name in ("test", "all", *near)}, on)


def _scores_path(city: City, group: str) -> Path:
    return city.workspace_path / "scores" / f"{group}.parquet"


@dataclass(frozen=True)
class _ScoreJob:
    city: City
    group: str
    held: bool
    points: str | None
    tiles: tuple[TileIndex, ...]


def _count_tiles(job: _ScoreJob) -> list[Row]:
    """Confusion counts of some tiles, for every subset of their pixels."""
    city, grid = job.city, job.city.make_grid()
    assert city.truth is not None
    labels, reader, px = open_map(city, *city.truth, grid), MapReader(city, job.group, job.held), grid.tile_px
    cube = CubeReader(cubes_path(city), job.points) if job.points else None
    rows: list[Row] = []
    for tile in job.tiles:
        where = (tile.row * px, tile.col * px, px, px)
        road, known = labels.window(*where)
        if known.any():
            predicted = reader.window("road", *where) == 1
            for subset, mask in _subsets(known, cube, where, grid.resolution_m):
                counts = confusion(predicted, road, mask)
                rows.append({"row": tile.row, "col": tile.col, "split": "", "subset": subset, **counts._asdict()})
    return rows


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


def _score(rows: list[Row], name: str) -> Scores:
    subset, only_test = ("near" if name.endswith("near") else "known"), name.startswith("test")
    chosen = [r for r in rows if r["subset"] == subset and (r["split"] == "test" or not only_test)]
    return scores([Confusion(*(int(r[k]) for k in Confusion._fields)) for r in chosen])


def _write(path: Path, rows: list[Row], on: ScoredOn, basis: _Basis) -> None:
    fields = [("row", pa.int32()), ("col", pa.int32()), ("split", pa.string()), ("subset", pa.string())]
    counted = {"basis": asdict(basis), "digest": _digest(rows)}
    metadata = {FACTS: json.dumps(asdict(on)).encode(), COUNTED: json.dumps(counted).encode()}
    schema = pa.schema(fields + [(k, pa.int64()) for k in Confusion._fields], metadata)
    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
