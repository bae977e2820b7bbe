"""Reduce: shards of a dump are added to the cube's chunks, a run of tiles at a time, each by one owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.cubes._chunks import Chunks
from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid

__all__ = ["BlockJob", "Shard", "add_block", "owned_blocks"]

Ints = NDArray[np.int64]
BLOCK_TILES = 64
BLOCK_POINTS = 4_000_000


@dataclass(frozen=True)
class Shard:
    """A shard and how its keys are made: ((tile · periods + period - first_period) · tile_px² + pixel).

    Attributes:
        path: The file.
        first_period: Smallest period number in it.
        periods: How many its keys speak of.
        sign: 1 adds it to the cube; -1 takes it out again.
    """

    path: str
    first_period: int
    periods: int
    sign: int = 1


@dataclass(frozen=True)
class BlockJob:
    """The touched tiles of one block; no other job has them.

    Attributes:
        session: A forked Icechunk session.
        tiles: Tile numbers, ascending.
        shards: All shards of the dump.
        grid: The city's grid.
        arrays: Names of the arrays to add to.
        fresh: The cube holds no dump yet, so that nothing need be read.
    """

    session: Any
    tiles: tuple[int, ...]
    shards: tuple[Shard, ...]
    grid: Grid
    arrays: tuple[str, ...]
    fresh: bool


def owned_blocks(points: dict[int, int]) -> list[tuple[int, ...]]:
    """Touched tiles cut into runs of neighbours in tile order; every tile has exactly one owner.

    Shards are sorted by tile, so that an owner decodes few of their row groups.

    Args:
        points: Points by tile number.

    Returns:
        At most 64 tiles each, and no more than 4 million points but in a single tile.
    """
    blocks: list[list[int]] = []
    held = 0
    for tile in sorted(points):
        if not blocks or len(blocks[-1]) == BLOCK_TILES or held + points[tile] > BLOCK_POINTS:
            blocks.append([])
            held = 0
        blocks[-1].append(tile)
        held += points[tile]
    return [tuple(block) for block in blocks]


def add_block(job: BlockJob) -> Any:
    """Add what the shards hold for a block's tiles to their chunks.

    Chunks without a point are not written, so that the diff of two snapshots names the changed tiles and no others.

    Returns:
        The forked session, for merging.

    Raises:
        StoreError: A count exceeds 32 bits.
    """
    chunks = Chunks(job.session.store, zarr.open_group(job.session.store))
    tile, period, pixel, values = _gather(job)
    order = np.lexsort([period, tile])
    tile, period, pixel = tile[order], period[order], pixel[order]
    values = {name: v[order] for name, v in values.items()}
    total = np.zeros(job.grid.tile_px**2, np.int64)
    for a, b in _runs(tile):
        place = divmod(int(tile[a]), job.grid.tiles_x)
        spans = [(a + c, a + d) for c, d in _runs(period[a:b])]
        for name in job.arrays:
            for c, d in spans:
                _scatter(total, pixel[c:d], values[name][c:d])
                if len(spans) > 1:
                    _add_period(chunks, job, name, (int(period[c]), *place), pixel[c:d], values[name][c:d])
                else:
                    _store(chunks, f"period/{name}", (int(period[c]), *place), total, job.fresh)
            _store(chunks, f"total/{name}", place, total, job.fresh)
            total[pixel[a:b]] = 0
    chunks.flush()
    return job.session


def _runs(sorted_values: Ints) -> list[tuple[int, int]]:
    """Half-open spans of equal values."""
    starts = np.flatnonzero(np.diff(sorted_values, prepend=sorted_values[:1] - 1) != 0)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(sorted_values)], strict=True))


def _add_period(chunks: Chunks, job: BlockJob, name: str, place: tuple[int, ...], pixel: Ints, values: Ints) -> None:
    dense = np.zeros(job.grid.tile_px**2, np.int64)
    _scatter(dense, pixel, values)
    _store(chunks, f"period/{name}", place, dense, job.fresh)


def _store(chunks: Chunks, path: str, place: tuple[int, ...], dense: Ints, fresh: bool) -> None:
    """Add to a chunk; one that is left with zeros alone is removed, as if it had never been written."""
    held = None if fresh else chunks.read(path, place)
    if held is not None:
        if not dense.any():
            return
        dense = held.astype(np.int64) + dense
    if not dense.any():
        if held is not None:
            chunks.remove(path, place)
        return
    if dense.min() < 0 and chunks.array(path).dtype == np.uint32:
        raise StoreError(f"{path}: a dump would be taken out that is not in the cube; build the cube anew")
    if chunks.array(path).dtype == np.uint32 and dense.max() > np.iinfo(np.uint32).max:
        raise StoreError(f"{path}: more than 2³² points in one pixel and period; use a shorter period")
    chunks.write(path, place, dense)


def _gather(job: BlockJob) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
    """Tile, period, pixel and sums of every row of the shards that lies in the block's tiles."""
    parts: list[list[Ints]] = []
    for shard in job.shards:
        span = shard.periods * job.grid.tile_px**2
        columns = _read_tiles(shard.path, job.tiles, span, ("key", *job.arrays))
        key = columns[0]
        within = key % span
        period = within // job.grid.tile_px**2 + shard.first_period
        parts.append([key // span, period, within % job.grid.tile_px**2, *(c * shard.sign for c in columns[1:])])
    tile, period, pixel, *values = (np.concatenate(c) for c in zip(*parts, strict=True))
    return tile, period, pixel, dict(zip(job.arrays, values, strict=True))


def _read_tiles(path: str, tiles: tuple[int, ...], span: int, names: tuple[str, ...]) -> list[Ints]:
    """Columns of a shard for some tiles: only the row groups that can hold them are decoded."""
    with pq.ParquetFile(path) as file:
        wanted = [g for g in range(file.num_row_groups) if _holds(file.metadata.row_group(g).column(0).statistics, tiles, span)]
        table = file.read_row_groups(wanted, columns=list(names), use_threads=False)
    columns = [table[n].to_numpy() for n in names]
    key = columns[0]
    # The tiles of a block are runs of neighbours: one slice a run.
    runs = np.split(np.array(tiles), np.flatnonzero(np.diff(tiles) > 1) + 1)
    cuts = [np.searchsorted(key, (int(run[0]) * span, (int(run[-1]) + 1) * span)) for run in runs]
    return [np.concatenate([c[a:b] for a, b in cuts]) for c in columns]


def _holds(statistics: Any, tiles: tuple[int, ...], span: int) -> bool:
    low, high = statistics.min // span, statistics.max // span
    first = int(np.searchsorted(tiles, low))
    return first < len(tiles) and tiles[first] <= high


@njit(cache=True, nogil=True)
def _scatter(dense, place, values):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    for i in range(len(place)):
        dense[place[i]] += values[i]
