"""Reduce: shards of a dump are added to the cube's chunks, a run of tiles at a time, each by one owner."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
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

BLOCK_TILES = 64
BLOCK_POINTS = 4_000_000


@dataclass(frozen=True)
class Shard:
    """A shard, as `map_slice` writes it.

    Attributes:
        path: The file.
        sign: 1 adds it to the cube; -1 takes it out again.
    """

    path: str
    sign: int = 1


@dataclass(frozen=True)
class BlockJob:
    """The touched tiles of one block; no other job has them.

    Attributes:
        session: A forked Icechunk session.
        tiles: Tile numbers, ascending.
        shards: All shards of the dump, those that are taken out last.
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
        StoreError: A count leaves the range of 32 bits.
    """
    chunks = Chunks(job.session.store, zarr.open_group(job.session.store))
    adder, runs = _Adder(chunks, job), list[_Run]()
    for shard in job.shards:
        runs += _read_runs(shard, job)
        if sum(run.stop - run.start for run in runs) > BLOCK_POINTS:  # only a crowded single tile comes here
            adder.add(runs)
            runs.clear()
    adder.add(runs)
    return job.session


@dataclass(frozen=True)
class _Run:
    """Rows [start, stop) of a shard's columns, all of one tile and period."""

    tile: int
    period: int
    start: int
    stop: int
    sign: int
    pixel: NDArray[np.int32]
    values: dict[str, NDArray[Any]]


def _read_runs(shard: Shard, job: BlockJob) -> Iterator[_Run]:
    """The runs of a shard in the block's tiles: only the row groups that can hold them are decoded."""
    names = ["tile", "period", "pixel", *job.arrays]
    with pq.ParquetFile(shard.path) as file:
        groups = (file.metadata.row_group(g).column(0).statistics for g in range(file.num_row_groups))
        wanted = [g for g, s in enumerate(groups) if _holds(s.min, s.max, job.tiles)]
        if not wanted:
            return
        table = file.read_row_groups(wanted, columns=names, use_threads=False)
    columns = {n: table[n].combine_chunks().to_numpy() for n in names}
    tile, period = columns.pop("tile"), columns.pop("period")
    starts = _starts(tile, period)
    owned = set(job.tiles)
    for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(tile)], strict=True):
        if tile[a] in owned:
            yield _Run(int(tile[a]), int(period[a]), a, b, shard.sign, columns["pixel"], columns)


def _holds(low: int, high: int, tiles: tuple[int, ...]) -> bool:
    first = int(np.searchsorted(tiles, low))
    return first < len(tiles) and tiles[first] <= high


class _Adder:
    """Adds runs to chunks through two dense tiles of each dtype, which are all zeros between uses."""

    def __init__(self, chunks: Chunks, job: BlockJob) -> None:
        self.chunks, self.job, self.fresh = chunks, job, job.fresh
        pixels = job.grid.tile_px**2
        self.dense = {np.dtype(t): (np.zeros(pixels, t), np.zeros(pixels, t)) for t in (np.uint32, np.int64)}

    def add(self, runs: list[_Run]) -> None:
        """Add runs of any tiles, and store the chunks."""
        runs = sorted(runs, key=lambda run: (run.tile, run.period))
        for tile, of_tile in groupby(runs, key=lambda run: run.tile):
            self.add_tile(divmod(tile, self.job.grid.tiles_x), list(of_tile))
        self.chunks.flush()
        self.fresh = False

    def add_tile(self, place: tuple[int, int], runs: list[_Run]) -> None:
        """Add all runs of one tile to its period chunks and to its total."""
        periods = [(p, list(group)) for p, group in groupby(runs, key=lambda run: run.period)]
        for name in self.job.arrays:
            period, total = self.dense[self.chunks.array(f"total/{name}").dtype]
            held = self._begin(f"total/{name}", place, total)
            for number, of_period in periods:
                where = f"period/{name}", (number, *place)
                self._store(*where, of_period, name, period, self._begin(*where, period))
            self._store(f"total/{name}", place, runs, name, total, held)

    def _begin(self, path: str, place: tuple[int, ...], dense: NDArray[Any]) -> bool:
        """Bring what a chunk holds into the dense tile; whether there is such a chunk."""
        held = None if self.fresh else self.chunks.read(path, place)
        if held is not None:
            dense[:] = held
        return held is not None

    def _store(
        self, path: str, place: tuple[int, ...], runs: list[_Run], name: str, dense: NDArray[Any], held: bool
    ) -> None:  # fmt: skip
        """Add runs and write the chunk; one that is left with zeros alone is removed, as if it had never been written."""
        limits = np.iinfo(dense.dtype)
        for run in runs:
            values = run.values[name]
            if not _add(dense, run.pixel, values, run.start, run.stop, run.sign, int(limits.min), int(limits.max)):
                raise StoreError(f"{path}: a pixel's sum leaves {dense.dtype}; use a shorter period, or build the cube anew")
        if any(_some(dense, run.pixel, run.start, run.stop) for run in runs) or (held and dense.any()):
            self.chunks.write(path, place, dense)
        elif held:
            self.chunks.remove(path, place)
        if held:
            dense[:] = 0
        for run in runs:
            _clear(dense, run.pixel, run.start, run.stop)


@njit(cache=True, nogil=True)
def _starts(tile, period):
    out = np.empty(len(tile), np.int64)
    n = 0
    for k in range(len(tile)):
        if k == 0 or tile[k] != tile[k - 1] or period[k] != period[k - 1]:
            out[n] = k
            n += 1
    return out[:n].copy()


@njit(cache=True, nogil=True)
def _add(dense, pixel, values, start, stop, sign, low, high):
    """Add values to pixels; False where a sum leaves the limits."""
    for k in range(start, stop):
        new = np.int64(dense[pixel[k]]) + sign * np.int64(values[k])
        if new < low or new > high:
            return False
        dense[pixel[k]] = new
    return True


@njit(cache=True, nogil=True)
def _some(dense, pixel, start, stop):
    for k in range(start, stop):  # noqa: SIM110 - generators are not compiled
        if dense[pixel[k]] != 0:
            return True
    return False


@njit(cache=True, nogil=True)
def _clear(dense, pixel, start, stop):
    for k in range(start, stop):
        dense[pixel[k]] = 0
