"""Reduce: shards of a dump are added to the cube's chunks, a run of tiles at a time, each by one owner."""

# Numba infers the types of its kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
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
# Most rows of one tile that are held at a time, and most shards that are open at a time.
TILE_ROWS = 4_000_000
OPEN_SHARDS = 256


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
    """Touched tiles cut into runs of at most 64 neighbours in tile order; every tile has exactly one owner.

    Raises:
        ValueError: A tile is named twice, so that it would have two owners.
    """
    ordered = sorted(tiles)
    if len(set(ordered)) < len(ordered):
        raise ValueError("a tile must have one owner")
    return [tuple(ordered[k : k + BLOCK_TILES]) for k in range(0, len(ordered), BLOCK_TILES)]


def add_block(job: BlockJob) -> Any:
    """Add what the shards hold for a block's tiles to their chunks.

    Shards are sorted by tile: all of them are read side by side, tile by tile, each row group once, so that memory
    grows neither with the points nor with the shards. Chunks without a point are not written, so that the diff of two
    snapshots names the changed tiles and no others.

    Returns:
        The forked session, for merging.

    Raises:
        StoreError: A sum leaves the range of its array.
    """
    chunks = Chunks(job.session.store, zarr.open_group(job.session.store))
    adder = _Adder(chunks, job)
    for k in range(0, len(job.shards), OPEN_SHARDS):
        with ExitStack() as stack:
            cursors = [stack.enter_context(_Cursor(shard, job)) for shard in job.shards[k : k + OPEN_SHARDS]]
            for tile in job.tiles:
                adder.add(tile, (run for cursor in cursors for run in cursor.take(tile)))
    chunks.flush()
    return job.session


@dataclass(frozen=True)
class _Run:
    """Rows [start, stop) of some columns, all of one tile and period."""

    tile: int
    period: int
    start: int
    stop: int
    sign: int
    pixel: NDArray[np.int32]
    values: dict[str, NDArray[Any]]


class _Cursor:
    """Walks through a shard in tile order; of its row groups, those that can hold the block's tiles are decoded."""

    def __init__(self, shard: Shard, job: BlockJob) -> None:
        self.sign, self.names = shard.sign, ["tile", "period", "pixel", *job.arrays]
        self.file = pq.ParquetFile(shard.path)
        bounds = (self.file.metadata.row_group(g).column(0).statistics for g in range(self.file.num_row_groups))
        self.groups = deque(g for g, s in enumerate(bounds) if s.min <= job.tiles[-1] and s.max >= job.tiles[0])
        self.runs: deque[_Run] = deque()

    def __enter__(self) -> _Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def take(self, tile: int) -> Iterator[_Run]:
        """The runs of a tile; earlier tiles are passed over."""
        while self.runs or self.groups:
            while self.runs and self.runs[0].tile <= tile:
                run = self.runs.popleft()
                if run.tile == tile:
                    yield run
            if self.runs:
                return
            if self.groups:
                self._decode(self.groups.popleft())

    def _decode(self, group: int) -> None:
        table = self.file.read_row_group(group, columns=self.names, use_threads=False)
        columns = {n: table[n].chunk(0).to_numpy() for n in self.names}
        tile, period = columns.pop("tile"), columns.pop("period")
        pixel, starts = columns.pop("pixel"), _starts(tile, period).tolist()
        for a, b in zip(starts, [*starts[1:], len(tile)], strict=True):
            self.runs.append(_Run(int(tile[a]), int(period[a]), a, b, self.sign, pixel, columns))


class _Adder:
    """Adds runs to chunks through two dense tiles of each dtype, which are all zeros between uses."""

    def __init__(self, chunks: Chunks, job: BlockJob) -> None:
        self.chunks, self.job, self.fresh, self.written = chunks, job, job.fresh, set[int]()
        pixels = job.grid.tile_px**2
        self.dense = {np.dtype(t): (np.zeros(pixels, t), np.zeros(pixels, t)) for t in (np.uint32, np.int64)}

    def add(self, tile: int, runs: Iterable[_Run]) -> None:
        """Add runs to the period chunks and the total of their tile; many of them in several steps."""
        step, held = list[_Run](), 0
        for run in runs:
            step.append(run)
            held += run.stop - run.start
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
        limits = np.iinfo(dense.dtype)
        for run in runs:
            values = run.values[name]
            if not _add(dense, run.pixel, values, run.start, run.stop, run.sign, int(limits.min), int(limits.max)):
                raise StoreError(f"{path}: a pixel's sum leaves {dense.dtype}; use a shorter period, or build the cube anew")
        if any(_some(dense, run.pixel, run.start, run.stop) for run in runs) or (held and dense.any()):
            encoded = self.chunks.write(path, place, dense)
        elif held:
            self.chunks.remove(path, place)
        if held:
            dense[:] = 0
        for run in runs:
            _clear(dense, run.pixel, run.start, run.stop)
        return encoded


def _equals_count(run: _Run, name: str) -> bool:
    of = slice(run.start, run.stop)
    return np.array_equal(run.values[name][of], run.values["count"][of])


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
