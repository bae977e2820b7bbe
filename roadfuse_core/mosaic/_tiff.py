"""Tiled TIFF files with overviews as a cloud-optimised GeoTIFF lays them out, tile by tile of compressed bytes.

GDAL can write such a file only as a whole. Here tiles of an earlier file are copied as they are. A test opens what comes out
with GDAL and validates it with rio-cogeo.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rasterio.io import MemoryFile

from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid

__all__ = ["Level", "Tag", "TileIndexOfFile", "geo_tags", "read_levels", "write_levels"]

SHORT, LONG, LONG8 = 3, 4, 16
SIZES = {1: 1, 2: 1, SHORT: 2, LONG: 4, 5: 8, 12: 8, LONG8: 8}
WIDTH, HEIGHT, OFFSETS, LENGTHS = 256, 257, 324, 325
GEO = (33550, 33922, 34735, 34736, 34737)  # where the raster lies
DEFLATE, GREY, MASK = 8, 1, 4
CLASSIC_LIMIT = 2**32 - 2**20


@dataclass(frozen=True)
class Tag:
    """An entry of a TIFF directory.

    Attributes:
        number: Which tag.
        kind: Type of its values.
        count: How many.
        values: As bytes, little-endian.
    """

    number: int
    kind: int
    count: int
    values: bytes


@dataclass(frozen=True)
class Level:
    """One image of the file: the raster, an overview, or the mask of one of them.

    Attributes:
        width: Pixels.
        height: The same.
        tile_px: Edge of a tile.
        mask: Whether it is a mask of one bit a pixel, else of a byte.
        reduced: Whether it is of an overview.
    """

    width: int
    height: int
    tile_px: int
    mask: bool
    reduced: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.tile_px), -(-self.width // self.tile_px)


TileIndexOfFile = dict[tuple[int, int, int], tuple[int, int]]
"""(level, row, column) of a tile: where its bytes lie in a file, and how many."""


def geo_tags(grid: Grid) -> list[Tag]:
    """The tags by which GDAL states CRS and place."""
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8", crs=grid.crs, transform=grid.affine):
            pass
        raw = memory.read()
    (first,) = struct.unpack_from("<I", raw, 4)
    return [tag for tag in _directory(raw, first)[0] if tag.number in GEO]


def _directory(raw: bytes, at: int) -> tuple[list[Tag], int]:
    """Tags of a directory of a classic or big TIFF, little-endian, and where the next one lies."""
    big = raw[2] == 43
    head, entry, inline = ("<Q", "<HHQ", 8) if big else ("<H", "<HHI", 4)
    (n,) = struct.unpack_from(head, raw, at)
    at += struct.calcsize(head)
    tags = []
    for _ in range(n):
        number, kind, count = struct.unpack_from(entry, raw, at)
        place, size = at + struct.calcsize(entry), count * SIZES[kind]
        if size > inline:
            (place,) = struct.unpack_from("<Q" if big else "<I", raw, place)
        tags.append(Tag(number, kind, count, bytes(raw[place : place + size])))
        at += struct.calcsize(entry) + inline
    return tags, struct.unpack_from("<Q" if big else "<I", raw, at)[0]


def read_levels(path: Path) -> tuple[list[tuple[int, int]], TileIndexOfFile]:
    """Width and height of every image of a file that `write_levels` wrote, in its order, and where its tiles lie."""
    head_bytes = _head_size(path)
    with open(path, "rb") as file:
        raw = file.read(head_bytes)
    at = struct.unpack_from("<Q", raw, 8)[0] if raw[2] == 43 else struct.unpack_from("<I", raw, 4)[0]
    sizes: list[tuple[int, int]] = []
    index: TileIndexOfFile = {}
    while at:
        tags, at = _directory(raw, at)
        found = {tag.number: _numbers(tag) for tag in tags if tag.kind in (SHORT, LONG, LONG8)}
        (width,), (height,), (tile_px,) = found[WIDTH], found[HEIGHT], found[322]
        cols = -(-width // tile_px)
        for k, place in enumerate(zip(found[OFFSETS], found[LENGTHS], strict=True)):
            index[len(sizes), k // cols, k % cols] = place
        sizes.append((width, height))
    return sizes, index


def _head_size(path: Path) -> int:
    """Bytes before the first tile: all directories; the file itself says it in its last eight bytes."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        return int(struct.unpack("<Q", file.read(8))[0])


def _numbers(tag: Tag) -> tuple[int, ...]:
    return struct.unpack(f"<{tag.count}{ {SHORT: 'H', LONG: 'I', LONG8: 'Q'}[tag.kind] }", tag.values)


def write_levels(
    path: Path, levels: Sequence[Level], geo: Iterable[Tag], length: Callable[[int, int, int], int],
    copy: Callable[[BinaryIO, int, int, int], None], same: Callable[[int, int, int], object],
) -> None:  # fmt: skip
    """Write a whole file: directories of all images, then the tiles, those of the smallest overview first.

    Args:
        path: Where to.
        levels: The raster, its mask, the largest overview, its mask, and so on.
        geo: `geo_tags`.
        length: Bytes of a tile by level, row and column.
        copy: Writes these bytes to the file.
        same: Something that is equal for tiles of one level with equal bytes, which are stored once.
    """
    order = [k for pair in reversed(range(0, len(levels), 2)) for k in (pair, pair + 1) if k < len(levels)]
    places: TileIndexOfFile = {}
    first: list[tuple[int, int, int]] = []
    at = 0
    for k in order:
        seen: dict[object, tuple[int, int]] = {}
        rows, cols = levels[k].shape
        for row in range(rows):
            for col in range(cols):
                key = same(k, row, col)
                if key not in seen:
                    seen[key] = (at, length(k, row, col))
                    first.append((k, row, col))
                    at += seen[key][1]
                places[k, row, col] = seen[key]
    big = at + 64 * len(places) > CLASSIC_LIMIT
    head = _head(levels, geo, places, big)
    with open(path, "wb") as file:
        file.write(head)
        for tile in first:
            copy(file, *tile)
        if file.tell() != len(head) + at:
            raise StoreError(f"{path}: a tile has another length than expected; remove the export and run again")
        file.write(struct.pack("<Q", len(head)))


def _head(levels: Sequence[Level], geo: Iterable[Tag], places: TileIndexOfFile, big: bool) -> bytes:
    """Header and directories; offsets of tiles begin behind them, so that their length is found first."""
    geo = list(geo)
    length = len(_directories(levels, geo, places, big, 0))
    return _directories(levels, geo, places, big, length)


def _directories(levels: Sequence[Level], geo: list[Tag], places: TileIndexOfFile, big: bool, shift: int) -> bytes:
    out = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) if big else struct.pack("<2sHI", b"II", 42, 8))
    for k, level in enumerate(levels):
        tiles = [places[k, row, col] for row in range(level.shape[0]) for col in range(level.shape[1])]
        tags = [*_tags(level, [a + shift for a, _ in tiles], [n for _, n in tiles], big), *([] if k else geo)]
        _append(out, sorted(tags, key=lambda tag: tag.number), big, last=k == len(levels) - 1)
    return bytes(out)


def _tags(level: Level, offsets: list[int], lengths: list[int], big: bool) -> list[Tag]:
    bits, colour = (1, MASK) if level.mask else (8, GREY)
    plain = {254: (LONG, level.reduced + 4 * level.mask), WIDTH: (LONG, level.width), HEIGHT: (LONG, level.height),
             258: (SHORT, bits), 259: (SHORT, DEFLATE), 262: (SHORT, colour), 277: (SHORT, 1), 284: (SHORT, 1),
             322: (SHORT, level.tile_px), 323: (SHORT, level.tile_px), 339: (SHORT, 1)}  # fmt: skip
    codes = {SHORT: "<H", LONG: "<I"}
    kind, code = (LONG8, "Q") if big else (LONG, "I")
    return [*(Tag(number, kind, 1, struct.pack(codes[kind], value)) for number, (kind, value) in plain.items()),
            Tag(OFFSETS, kind, len(offsets), struct.pack(f"<{len(offsets)}{code}", *offsets)),
            Tag(LENGTHS, LONG, len(lengths), struct.pack(f"<{len(lengths)}I", *lengths))]  # fmt: skip


def _append(out: bytearray, tags: list[Tag], big: bool, last: bool) -> None:
    """A directory, and behind it the values that do not fit into its entries."""
    head, entry, inline, pointer = ("<Q", "<HHQ", 8, "<Q") if big else ("<H", "<HHI", 4, "<I")
    behind = len(out) + struct.calcsize(head) + len(tags) * (struct.calcsize(entry) + inline) + struct.calcsize(pointer)
    entries, values = bytearray(struct.pack(head, len(tags))), bytearray()
    for tag in tags:
        entries += struct.pack(entry, tag.number, tag.kind, tag.count)
        if len(tag.values) <= inline:
            entries += tag.values.ljust(inline, b"\0")
        else:
            entries += struct.pack(pointer, behind + len(values))
            values += tag.values + b"\0" * (len(tag.values) % 2)
    after = behind + len(values)
    entries += struct.pack(pointer, 0 if last else after)
    out += entries + values
