"""A map as a cloud-optimised GeoTIFF that is brought up to date: only tiles that changed are read and compressed again."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.errors import StoreError
from roadfuse_core.files import replacing
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.mosaic._blend import NODATA
from roadfuse_core.mosaic._tiff import Level, TileIndexOfFile, geo_tags, read_levels, write_levels

__all__ = ["export_map"]

TILE_PX = (512, 256, 128, 64, 32)
DEFLATE_LEVEL = 6
Bytes = NDArray[np.uint8]
Reduce = Literal["average", "mode"]
Key = tuple[int, int, int]


def export_map(
    path: Path, grid: Grid, read: Callable[[int, int, int, int], Bytes], how: Reduce, changed: Iterable[TileIndex] | None = None
) -> int:
    """Write one array of a map as a cloud-optimised GeoTIFF with a mask; it appears under its name when it is complete.

    Args:
        path: Where to. With `changed` there must be what an earlier call left there.
        grid: The city's grid.
        read: Values of a pixel rectangle (row, column, height, width); 255 where nothing is known.
        how: Overviews: the mean of what is known, or the value that most pixels have, of two the larger.
        changed: Tiles of the grid that may differ from the file's; None writes all. The bytes are the same either way.

    Returns:
        Number of tiles of the file, of all sizes, that were compressed.

    Raises:
        StoreError: It cannot be written; what was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            old = None if changed is None else opened.enter_context(open(path, "rb"))
            there = read_levels(path)[1] if old else {}
            made = _Pyramid(grid, read, how, old, there, opened.enter_context(TemporaryFile(dir=path.parent)))
            made.make(_blocks(grid, changed))
            with replacing(path) as part:
                write_levels(part, made.levels, geo_tags(grid), made.length, made.copy, made.same)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error}); what was there stays: make room and run again") from error
    return made.compressed


def _tile_px(grid: Grid) -> int:
    """Edge of the file's tiles: 512 px, less where a tile would be as wide as the raster, which does not count as tiled."""
    height, width = grid.shape
    return TILE_PX[0] if max(height, width) <= TILE_PX[0] else next(px for px in TILE_PX if px < width)


def _blocks(grid: Grid, changed: Iterable[TileIndex] | None) -> set[tuple[int, int]]:
    """Tiles of the file that share a pixel with some tiles of the grid."""
    (height, width), size = grid.shape, _tile_px(grid)
    rows, cols = -(-height // size), -(-width // size)
    if changed is None:
        return {(r, c) for r in range(rows) for c in range(cols)}
    px, out = grid.tile_px, set()
    for row, col in changed:
        for r in range(row * px // size, -(-(row + 1) * px // size)):
            out |= {(r, c) for c in range(col * px // size, -(-(col + 1) * px // size))}
    return {(r, c) for r, c in out if r < rows and c < cols}


def _levels(grid: Grid) -> list[Level]:
    """The raster, its mask, an overview of half the size, its mask, and so on, until one tile holds all."""
    (height, width), size = grid.shape, _tile_px(grid)
    sizes = [(height, width)]
    while max(sizes[-1]) > size:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return [Level(w, h, size, mask, reduced=k > 0) for k, (h, w) in enumerate(sizes) for mask in (False, True)]


@dataclass
class _Pyramid:
    """Tiles of all sizes: those that are made, and those of an earlier file.

    Attributes:
        grid: The city's grid.
        read: Values of a pixel rectangle.
        how: Overviews.
        old: An earlier file, or None.
        there: Where its tiles lie.
        spool: File that takes compressed tiles in the order in which they are made.
        spooled: Where they lie in it.
        compressed: How many there are.
    """

    grid: Grid
    read: Callable[[int, int, int, int], Bytes]
    how: Reduce
    old: BinaryIO | None
    there: TileIndexOfFile
    spool: BinaryIO
    spooled: TileIndexOfFile = field(default_factory=dict)
    compressed: int = 0

    def __post_init__(self) -> None:
        """Sizes of all levels."""
        self.levels, self.tile_px = _levels(self.grid), _tile_px(self.grid)
        self.waiting: deque[tuple[Key, Future[bytes]]] = deque()

    def make(self, blocks: set[tuple[int, int]]) -> None:
        """Make tiles of the raster and all overviews above them; from the top down, so that few are held at a time."""
        changed = [blocks]
        while len(changed) < len(self.levels) // 2:
            changed.append({(r // 2, c // 2) for r, c in changed[-1]})
        with ThreadPoolExecutor(os.cpu_count() or 1, "compress") as pool:
            for row, col in sorted(changed[-1]):
                self._pixels(len(changed) - 1, row, col, changed, pool)
            self._drain(0)

    def _pixels(self, level: int, row: int, col: int, changed: list[set[tuple[int, int]]], pool: ThreadPoolExecutor) -> Bytes:
        """(tile_px, tile_px) of a tile, beyond the raster 255; made and compressed if it changed, else of the earlier file."""
        rows, cols = self.levels[2 * level].shape
        if row >= rows or col >= cols:
            return np.full((self.tile_px, self.tile_px), NODATA, np.uint8)
        if (row, col) not in changed[level]:
            return np.frombuffer(zlib.decompress(self._old(2 * level, row, col)), np.uint8).reshape(self.tile_px, -1)
        if level == 0:
            out = self._read(row, col)
        else:
            parts = [[self._pixels(level - 1, 2 * row + i, 2 * col + j, changed, pool) for j in (0, 1)] for i in (0, 1)]
            out = _halve(np.block(parts), self.how)
        self.waiting.append(((2 * level, row, col), pool.submit(zlib.compress, out.tobytes(), DEFLATE_LEVEL)))
        mask = np.packbits(out != NODATA, axis=1).tobytes()
        self.waiting.append(((2 * level + 1, row, col), pool.submit(zlib.compress, mask, DEFLATE_LEVEL)))
        self._drain(64)
        return out

    def _read(self, row: int, col: int) -> Bytes:
        (height, width), r, c = self.grid.shape, row * self.tile_px, col * self.tile_px
        h, w = min(self.tile_px, height - r), min(self.tile_px, width - c)
        out = np.full((self.tile_px, self.tile_px), NODATA, np.uint8)
        out[:h, :w] = self.read(r, c, h, w)
        return out

    def _drain(self, most: int) -> None:
        """Write what is compressed until no more than some tiles wait."""
        while len(self.waiting) > most:
            key, made = self.waiting.popleft()
            content = made.result()
            self.spooled[key] = (self.spool.tell(), len(content))
            self.spool.write(content)
            self.compressed += 1

    def _old(self, *key: int) -> bytes:
        assert self.old is not None
        at, length = self.there[key[0], key[1], key[2]]
        self.old.seek(at)
        return self.old.read(length)

    def content(self, level: int, row: int, col: int) -> bytes:
        """A tile's compressed bytes."""
        if (level, row, col) not in self.spooled:
            return self._old(level, row, col)
        at, length = self.spooled[level, row, col]
        self.spool.seek(at)
        return self.spool.read(length)

    def length(self, level: int, row: int, col: int) -> int:
        """Of its compressed bytes."""
        return (self.spooled.get((level, row, col)) or self.there[level, row, col])[1]

    def copy(self, file: BinaryIO, level: int, row: int, col: int) -> None:
        """Write a tile's compressed bytes."""
        file.write(self.content(level, row, col))

    def same(self, level: int, row: int, col: int) -> object:
        """Small tiles by their bytes: those without data, or full of one value, are stored once."""
        return self.content(level, row, col) if self.length(level, row, col) < 1024 else (row, col)


def _halve(x: Bytes, how: Reduce) -> Bytes:
    """Two by two pixels become one; unknown where all four are."""
    four = np.stack([x[0::2, 0::2], x[0::2, 1::2], x[1::2, 0::2], x[1::2, 1::2]])
    known = four != NODATA
    n = known.sum(0, dtype=np.uint16)
    if how == "average":
        total = np.where(known, four, 0).sum(0, dtype=np.uint16)
        values = (2 * total + n) // np.maximum(2 * n, 1)
    else:  # of the values 0 and 1
        ones = ((four == 1) & known).sum(0, dtype=np.uint16)
        values = (2 * ones >= n).astype(np.uint16)
    return np.where(n > 0, values, NODATA).astype(np.uint8)
