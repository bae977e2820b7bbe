"""Reduce: shards of a dump are added to the cube's chunks, block by block, each block by one owner."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid

__all__ = ["BlockJob", "Shard", "add_block", "owned_blocks"]

Ints = NDArray[np.int64]
BLOCK_PX = 2048


@dataclass(frozen=True)
class Shard:
    """A shard and how its keys are made: ((tile · periods + period - first_period) · tile_px² + pixel)."""

    path: str
    first_period: int
    periods: int


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


def owned_blocks(grid: Grid, tiles: set[int]) -> list[tuple[int, ...]]:
    """Touched tiles by block, row-major; every tile has exactly one owner."""
    side = max(1, BLOCK_PX // grid.tile_px)
    blocks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for tile in sorted(tiles):
        row, col = divmod(tile, grid.tiles_x)
        blocks[row // side, col // side].append(tile)
    return [tuple(members) for _, members in sorted(blocks.items())]


def add_block(job: BlockJob) -> Any:
    """Add what the shards hold for a block's tiles to their chunks.

    Chunks without a point are not written, so that the diff of two snapshots names the changed tiles and no others.

    Returns:
        The forked session, for merging.

    Raises:
        StoreError: A count exceeds 32 bits.
    """
    root = zarr.open_group(job.session.store)
    tile, period, pixel, values = _gather(job)
    px, side = job.grid.tile_px, max(1, BLOCK_PX // job.grid.tile_px)
    row, col = tile // job.grid.tiles_x, tile % job.grid.tiles_x
    if not len(tile):
        return job.session
    origin = int(row[0]) // side * side, int(col[0]) // side * side
    extent = min(side, job.grid.tiles_y - origin[0]) * px, min(side, job.grid.tiles_x - origin[1]) * px
    flat = ((row - origin[0]) * px + pixel // px) * extent[1] + (col - origin[1]) * px + pixel % px
    for name in job.arrays:
        total = np.zeros(extent, np.int64)
        for number in np.unique(period):
            here = period == number
            dense = np.zeros(extent, np.int64)
            _scatter(dense.reshape(-1), flat[here], values[name][here])
            _add(root[f"period/{name}"], (int(number),), origin, dense, px, job.fresh)
            total += dense
        _add(root[f"total/{name}"], (), origin, total, px, job.fresh)
    return job.session


def _gather(job: BlockJob) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
    """Tile, period, pixel and sums of every row of the shards that lies in the block's tiles."""
    parts: list[list[Ints]] = []
    for shard in job.shards:
        span = shard.periods * job.grid.tile_px**2
        columns = _read_tiles(shard.path, job.tiles, span, ("key", *job.arrays))
        key = columns[0]
        within = key % span
        period = within // job.grid.tile_px**2 + shard.first_period
        parts.append([key // span, period, within % job.grid.tile_px**2, *columns[1:]])
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


def _add(array: zarr.Array, lead: tuple[int, ...], origin: tuple[int, int], dense: Ints, px: int, fresh: bool) -> None:
    """Add a block to an array; one write where every tile is touched, else tile by tile."""
    rows, cols = dense.shape[0] // px, dense.shape[1] // px
    touched = dense.reshape(rows, px, cols, px).any((1, 3))
    if touched.all():
        _add_region(array, lead, origin[0] * px, origin[1] * px, dense, fresh)
        return
    for r, c in np.argwhere(touched):
        tile = dense[r * px : (r + 1) * px, c * px : (c + 1) * px]
        _add_region(array, lead, (origin[0] + r) * px, (origin[1] + c) * px, tile, fresh)


def _add_region(array: zarr.Array, lead: tuple[int, ...], row: int, col: int, dense: Ints, fresh: bool) -> None:
    where = (*lead, slice(row, row + dense.shape[0]), slice(col, col + dense.shape[1]))
    total = dense if fresh else array[where].astype(np.int64) + dense
    if array.dtype == np.uint32 and total.max() > np.iinfo(np.uint32).max:
        raise StoreError(f"{array.path}: more than 2³² points in one pixel and period; use a shorter period")
    array[where] = total.astype(array.dtype, copy=False)


@njit(cache=True, nogil=True)
def _scatter(dense, place, values):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    for i in range(len(place)):
        dense[place[i]] += values[i]
