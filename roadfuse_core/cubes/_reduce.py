"""Reduce: shards of a dump are added to the cube's chunks, a run of tiles at a time, each by one owner."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.cubes._chunks import Chunks
from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid
from roadfuse_core.points import ADDENDS, Samples, ShardFile, addend_table

__all__ = ["BlockJob", "Shard", "add_block", "owned_blocks"]

BLOCK_TILES = 32
# Most rows of one tile that are held at a time, but for the last shard's.
TILE_ROWS = 4_000_000


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
        shards: All shards of the dump; those that are taken out come last.
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


def owned_blocks(tiles: Iterable[int]) -> list[tuple[int, ...]]:
    """Touched tiles cut into runs of at most 32 neighbours in tile order; every tile has exactly one owner.

    Raises:
        ValueError: A tile is named twice, so that it would have two owners.
    """
    ordered = sorted(tiles)
    if len(set(ordered)) < len(ordered):
        raise ValueError("a tile must have one owner")
    return [tuple(ordered[k : k + BLOCK_TILES]) for k in range(0, len(ordered), BLOCK_TILES)]


def add_block(job: BlockJob) -> Any:
    """Add what the shards hold for a block's tiles to their chunks.

    All shards are read tile by tile, so that memory grows neither with the points nor with the shards, and a sample goes
    straight to its pixel. Chunks without a point are not written, so that the diff of two snapshots names the changed
    tiles and no others.

    Returns:
        The forked session, for merging.

    Raises:
        StoreError: A sum leaves the range of its array.
    """
    chunks = Chunks(job.session.store, zarr.open_group(job.session.store))
    adder, wanted = _Adder(chunks, job), (job.tiles[0], job.tiles[-1])
    files = [(ShardFile(Path(shard.path), wanted), shard.sign) for shard in job.shards]
    for tile in job.tiles:
        adder.add(tile, (run for file, sign in files for run in _runs(file.samples(tile), sign)))
    chunks.flush()
    return job.session


@dataclass(frozen=True)
class _Run:
    """Samples of one tile and period."""

    period: int
    sign: int
    columns: dict[str, NDArray[np.int32]]


def _runs(samples: Samples, sign: int) -> Iterator[_Run]:
    start = 0
    for _, period, rows in samples.runs.tolist():
        yield _Run(period, sign, {name: column[start : start + rows] for name, column in samples.columns.items()})
        start += rows


class _Adder:
    """Adds runs to chunks through two dense tiles of each dtype, which are all zeros between uses."""

    def __init__(self, chunks: Chunks, job: BlockJob) -> None:
        self.chunks, self.job, self.fresh, self.written = chunks, job, job.fresh, set[int]()
        pixels = job.grid.tile_px**2
        self.dense = {np.dtype(t): (np.zeros(pixels, t), np.zeros(pixels, t)) for t in (np.uint32, np.int64)}
        self.tables = {what: addend_table(what) for _, what in ADDENDS.values()}

    def add(self, tile: int, runs: Iterable[_Run]) -> None:
        """Add runs to the period chunks and the total of their tile; many of them in several steps."""
        step, held = list[_Run](), 0
        for run in runs:
            step.append(run)
            held += len(run.columns["pixel"])
            if held > TILE_ROWS:
                self._add(tile, step)
                step, held = [], 0
        if step:
            self._add(tile, step)

    def _add(self, tile: int, runs: list[_Run]) -> None:
        place = divmod(tile, self.job.grid.tiles_x)
        if tile in self.written:
            self.chunks.flush()  # what waits to be stored cannot be read yet
        self.fresh = self.job.fresh and tile not in self.written
        self.written.add(tile)
        runs.sort(key=lambda run: run.period)
        periods = [(p, list(group)) for p, group in groupby(runs, key=lambda run: run.period)]
        counted: dict[tuple[str, tuple[int, ...]], bytes] = {}
        for name in self.job.arrays:
            # Encoding takes longer than all adding: where every sample has a quantity, its count is the count.
            if self.fresh and name.endswith("_count") and counted and all(_equals_count(run, name) for run in runs):
                for (kind, where), encoded in counted.items():
                    self.chunks.write_encoded(f"{kind}/{name}", where, encoded)
                continue
            stored = self._add_array(name, place, runs, periods)
            counted = stored if name == "count" else counted

    def _add_array(
        self, name: str, place: tuple[int, int], runs: list[_Run], periods: list[tuple[int, list[_Run]]]
    ) -> dict[tuple[str, tuple[int, ...]], bytes]:
        """Add runs to one array's chunks; returns those that were encoded."""
        period, total = self.dense[self.chunks.array(f"total/{name}").dtype]
        held = self._begin(f"total/{name}", place, total)
        stored: dict[tuple[str, tuple[int, ...]], bytes | None] = {}
        for number, of_period in periods:
            where = (number, *place)
            held_too = self._begin(f"period/{name}", where, period)
            stored["period", where] = self._store(f"period/{name}", where, of_period, name, period, held_too)
        if self.fresh and len(periods) == 1:  # the tile's only period is its total
            (encoded,) = stored.values()
            if encoded is not None:
                self.chunks.write_encoded(f"total/{name}", place, encoded)
            stored["total", place] = encoded
        else:
            stored["total", place] = self._store(f"total/{name}", place, runs, name, total, held)
        return {where: encoded for where, encoded in stored.items() if encoded is not None}

    def _begin(self, path: str, place: tuple[int, ...], dense: NDArray[Any]) -> bool:
        """Bring what a chunk holds into the dense tile; whether there is such a chunk."""
        held = None if self.fresh else self.chunks.read(path, place)
        if held is not None:
            dense[:] = held
        return held is not None

    def _store(
        self, path: str, place: tuple[int, ...], runs: list[_Run], name: str, dense: NDArray[Any], held: bool
    ) -> bytes | None:  # fmt: skip
        """Add runs and write the chunk; one that is left with zeros alone is removed, as if it had never been written.

        Returns:
            The encoded chunk; None where there is none.
        """
        encoded = None
        (column, what), limits = ADDENDS[name], np.iinfo(dense.dtype)
        how = what != "one", self.tables[what], int(limits.min), int(limits.max)
        for run in runs:
            if not _add(dense, run.columns["pixel"], run.columns[column], run.sign, *how):
                raise StoreError(f"{path}: a pixel's sum leaves {dense.dtype}; use a shorter period, or build the cube anew")
        if any(_some(dense, run.columns["pixel"]) for run in runs) or (held and dense.any()):
            encoded = self.chunks.write(path, place, dense)
        elif held:
            self.chunks.remove(path, place)
        if held:
            dense[:] = 0
        for run in runs:
            _clear(dense, run.columns["pixel"])
        return encoded


def _equals_count(run: _Run, name: str) -> bool:
    """Whether every sample has the quantity that is counted."""
    return bool(run.columns[ADDENDS[name][0]].min() >= 0)


@njit(cache=True, nogil=True)
def _add(dense, pixel, values, sign, summed, table, low, high):
    """Add known values, or what a table holds for them, or ones, to pixels; False where a sum leaves the limits."""
    for k in range(len(pixel)):
        value = np.int64(values[k])
        if value < 0:
            continue
        amount = np.int64(1)
        if summed:
            amount = table[value] if len(table) else value
        new = np.int64(dense[pixel[k]]) + sign * amount
        if new < low or new > high:
            return False
        dense[pixel[k]] = new
    return True


@njit(cache=True, nogil=True)
def _some(dense, pixel):
    for k in range(len(pixel)):  # noqa: SIM110 - generators are not compiled
        if dense[pixel[k]] != 0:
            return True
    return False


@njit(cache=True, nogil=True)
def _clear(dense, pixel):
    for k in range(len(pixel)):
        dense[pixel[k]] = 0
