"""Shard files: samples packed tile by tile, so that any tile is one read, and whoever walks through many shards holds little.

A line with the name of the format and of the columns; then for each tile the columns, one after the other, as a Blosc frame
(bytes of equal weight together, LZ4); then a zlib frame of int64: the number of runs, the runs, and where each tile's frame
ends; last the length of that frame, 8 bytes, little-endian.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from roadfuse_core.errors import StoreError
from roadfuse_core.points._samples import Samples

__all__ = ["ShardFile", "write_shard"]

_PACK = Blosc("lz4", clevel=1, shuffle=Blosc.SHUFFLE)
_HEAD = b"roadfuse samples 1 "
_LENGTH = 8


@dataclass(frozen=True)
class _Index:
    names: tuple[str, ...]
    runs: NDArray[np.int64]
    ends: NDArray[np.int64]


def write_shard(samples: Samples, path: Path) -> None:
    """Write samples under a temporary name, and rename the file when it is whole."""
    part = path.with_suffix(".part")
    stops = np.cumsum(samples.runs[:, 2])
    last = np.flatnonzero(np.r_[samples.runs[1:, 0] != samples.runs[:-1, 0], True])
    ends, start = [], 0
    with part.open("wb") as file:
        file.write(_HEAD + ",".join(samples.columns).encode() + b"\n")
        for stop in stops[last].tolist():
            file.write(_PACK.encode(np.stack([column[start:stop] for column in samples.columns.values()])))
            ends.append(file.tell())
            start = stop
        index = zlib.compress(np.r_[len(samples.runs), samples.runs.ravel(), ends].astype("<i8").tobytes(), 1)
        file.write(index + len(index).to_bytes(_LENGTH, "little"))
    part.rename(path)


class ShardFile:
    """The samples of some tiles of a shard, read a tile at a time; no file stays open.

    Args:
        path: What `write_shard` wrote.
        tiles: First and last tile of interest; by default all.

    Raises:
        StoreError: The file is of a version that wrote sums.
    """

    def __init__(self, path: Path, tiles: tuple[int, int] | None = None) -> None:
        self.path = path
        index, start = self._read_index()
        self.names = index.names
        first = np.flatnonzero(np.r_[True, index.runs[1:, 0] != index.runs[:-1, 0]])
        low, high = np.searchsorted(index.runs[first, 0], [tiles[0], tiles[1] + 1]) if tiles else (0, len(first))
        starts, bounds = np.r_[start, index.ends].tolist(), np.r_[first, len(index.runs)].tolist()
        self._places: dict[int, tuple[int, int, NDArray[np.int64]]] = {}
        for k in range(low, high):
            runs = index.runs[bounds[k] : bounds[k + 1]].copy()
            self._places[int(runs[0, 0])] = (starts[k], starts[k + 1], runs)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of interest that have samples, ascending."""
        return tuple(self._places)

    def samples(self, tile: int) -> Samples:
        """The samples of one tile; none where it has none."""
        if tile not in self._places:
            return Samples(np.zeros((0, 3), np.int64), {name: np.zeros(0, np.int32) for name in self.names})
        start, stop, runs = self._places[tile]
        with self.path.open("rb", buffering=0) as file:
            packed = os.pread(file.fileno(), stop - start, start)
        columns = np.frombuffer(_PACK.decode(packed), np.int32).reshape(len(self.names), -1)
        return Samples(runs, dict(zip(self.names, columns, strict=True)))

    def _read_index(self) -> tuple[_Index, int]:
        """The index, and where the first tile's frame begins."""
        with self.path.open("rb") as file:
            head = file.readline(200)
            if not head.startswith(_HEAD):
                raise StoreError("a dump's kept contributions are in an older form; build the cube anew in another workspace")
            length = int.from_bytes(os.pread(file.fileno(), _LENGTH, (size := self.path.stat().st_size) - _LENGTH), "little")
            numbers = np.frombuffer(zlib.decompress(os.pread(file.fileno(), length, size - _LENGTH - length)), "<i8")
        runs, ends = numbers[1 : 1 + 3 * numbers[0]].reshape(-1, 3), numbers[1 + 3 * numbers[0] :]
        return _Index(tuple(head[len(_HEAD) : -1].decode().split(",")), runs, ends), len(head)
