"""Shard files: samples packed tile by tile, so that any tile is one read, and whoever walks through many shards holds little.

A line with the name of the format and of the columns; then for each tile the columns, one after the other, as a Blosc frame
(bytes of equal weight together, LZ4); then a zlib frame of int64: the number of runs, the runs, where the
frames begin and the last one ends, and their CRC-32; last the length of the zlib frame, 8 bytes, little-endian.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from roadfuse_core.errors import StoreError
from roadfuse_core.files import DamagedFileError, replacing
from roadfuse_core.points._samples import Samples

__all__ = ["ShardFile", "write_shard"]

_PACK = Blosc("lz4", clevel=1, shuffle=Blosc.SHUFFLE)
_HEAD = b"roadfuse samples 1 "
_OLDER = (b"PAR1", b"roadfuse ")
_LENGTH = 8


def write_shard(samples: Samples, path: Path) -> None:
    """Write samples under a temporary name, and rename the file when it is complete and on the disk."""
    stops = np.cumsum(samples.runs[:, 2])
    last = np.flatnonzero(np.r_[samples.runs[1:, 0] != samples.runs[:-1, 0], True])
    checks, start = list[int](), 0
    with replacing(path) as part, part.open("wb") as file:
        file.write(_HEAD + ",".join(samples.columns).encode() + b"\n")
        edges = [file.tell()]
        for stop in stops[last].tolist():
            packed = _PACK.encode(np.stack([column[start:stop] for column in samples.columns.values()]))
            file.write(packed)
            edges.append(file.tell())
            checks.append(zlib.crc32(packed))
            start = stop
        index = zlib.compress(np.r_[len(samples.runs), samples.runs.ravel(), edges, checks].astype("<i8").tobytes(), 1)
        file.write(index + len(index).to_bytes(_LENGTH, "little"))


class ShardFile:
    """The samples of some tiles of a shard, read a tile at a time; no file stays open.

    Args:
        path: What `write_shard` wrote.
        tiles: First and last tile of interest; by default all.

    Raises:
        StoreError: The file is of a version that wrote sums, or damaged.
    """

    def __init__(self, path: Path, tiles: tuple[int, int] | None = None) -> None:
        self.path = path
        self.names, every, edges, checks = self._read_index()
        first = np.flatnonzero(np.r_[True, every[1:, 0] != every[:-1, 0]])
        low, high = np.searchsorted(every[first, 0], [tiles[0], tiles[1] + 1]) if tiles else (0, len(first))
        bounds = np.r_[first, len(every)]
        self._places: dict[int, tuple[int, int, int, NDArray[np.int64]]] = {}
        for k in range(low, high):
            runs = every[bounds[k] : bounds[k + 1]].copy()
            self._places[int(runs[0, 0])] = (int(edges[k]), int(edges[k + 1]), int(checks[k]), runs)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of interest that have samples, ascending."""
        return tuple(self._places)

    def samples(self, tile: int) -> Samples:
        """The samples of one tile; none where it has none.

        Raises:
            StoreError: The file is damaged.
        """
        if tile not in self._places:
            return Samples(np.zeros((0, 3), np.int64), {name: np.zeros(0, np.int32) for name in self.names})
        start, stop, check, runs = self._places[tile]
        with self.path.open("rb", buffering=0) as file, self._whole():
            packed = os.pread(file.fileno(), stop - start, start)
            if zlib.crc32(packed) != check:
                raise ValueError(f"tile {tile} is not what was written")
            columns = np.frombuffer(_PACK.decode(packed), np.int32).reshape(len(self.names), runs[:, 2].sum())
        return Samples(runs, dict(zip(self.names, columns, strict=True)))

    def _read_index(self) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Names of the columns, runs, edges of the frames, and what they are checked by."""
        with self.path.open("rb") as file:
            head = file.readline(200)
            if not head.startswith(_HEAD):
                if head.startswith(_OLDER):
                    raise StoreError(f"{self.path}: a dump's kept contributions are in an older form; build the cube again "
                                     "in another workspace")  # fmt: skip
                raise DamagedFileError(f"{self.path}: is damaged (it does not begin as a shard)")
            with self._whole():
                at = self.path.stat().st_size - _LENGTH
                length = int.from_bytes(os.pread(file.fileno(), _LENGTH, at), "little")
                if not 0 < length < at:
                    raise ValueError("it was cut off")
                numbers = np.frombuffer(zlib.decompress(os.pread(file.fileno(), length, at - length)), "<i8")
                runs = numbers[1 : 1 + 3 * numbers[0]].reshape(-1, 3)
                edges, checks = np.array_split(numbers[1 + 3 * numbers[0] :], 2)  # the first half has one more
        return tuple(head[len(_HEAD) : -1].decode().split(",")), runs, edges, checks

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What cannot be unpacked was damaged after it was written."""
        try:
            yield
        except (zlib.error, ValueError, RuntimeError, OSError) as error:
            raise DamagedFileError(f"{self.path}: is damaged ({error})") from error
