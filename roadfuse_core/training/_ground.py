"""What training reads of a city: chosen tiles of image, label and points, once, into files that map into memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.cubes import CubeReader, Layer
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.inference import Evidence, read_evidence, readers_of
from roadfuse_core.labels import RoadMap, open_map
from roadfuse_core.settings import City, MapSpec
from roadfuse_core.training._recipe import View

__all__ = ["NOT_ROAD", "ROAD", "UNKNOWN", "Cells", "Ground", "arrays_of_layers", "lay_ground"]

# Unknown is zero, so that tiles which were not chosen take no room on the disk.
UNKNOWN, NOT_ROAD, ROAD = 0, 1, 2


@dataclass(frozen=True)
class Cells:
    """Pixels with points, of one tile or of a window.

    Attributes:
        row: (m,) int32 of the grid.
        col: (m,) int32.
        sums: (m, arrays) int64, the count first.
    """

    row: NDArray[np.int32]
    col: NDArray[np.int32]
    sums: NDArray[np.int64]


@dataclass(frozen=True)
class Ground:
    """Chosen tiles of a city; everything else is unknown, without image and without points.

    Attributes:
        folder: Where the files lie.
        shape: (height, width) of the grid, pixels.
        tile_px: Tile edge.
        tiles: The chosen tiles.
        arrays: Cube arrays of the cells, the count first; empty without points.
        road: Road pixels of each chosen tile.
        known: Pixels with a known label of each chosen tile.
        lidar: Whether the image has lidar behind it.
    """

    folder: Path
    shape: tuple[int, int]
    tile_px: int
    tiles: tuple[TileIndex, ...]
    arrays: tuple[str, ...]
    road: tuple[int, ...]
    known: tuple[int, ...]
    lidar: bool = False

    @cached_property
    def _image(self) -> NDArray[np.uint8]:
        return np.memmap(self.folder / "image.u8", np.uint8, "r", shape=(6 if self.lidar else 4, *self.shape))

    @cached_property
    def _label(self) -> NDArray[np.uint8]:
        return np.memmap(self.folder / "label.u8", np.uint8, "r", shape=self.shape)

    @cached_property
    def _cells(self) -> dict[TileIndex, Cells]:
        held = [np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("place", "sums", "ends")]
        place, sums, ends = held
        starts = [0, *ends[:-1]]
        return {t: Cells(place[a:b, 0], place[a:b, 1], sums[a:b]) for t, a, b in zip(self.tiles, starts, ends, strict=True)}

    def __getstate__(self) -> dict[str, object]:
        """Without the mapped files: each process maps its own."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def window(self, row: int, col: int, px: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Cells]:
        """A square that may reach past the grid.

        Returns:
            (4, px, px) uint8 red, green, blue and 255 where they are known, or (6, px, px) with lidar and 255 where that
            is known; (px, px) uint8 label, `UNKNOWN`,
            `NOT_ROAD` or `ROAD`; cells with row and column counted from the square's corner.
        """
        image, label = np.zeros((6 if self.lidar else 4, px, px), np.uint8), np.zeros((px, px), np.uint8)
        r0, r1, c0, c1 = max(row, 0), min(row + px, self.shape[0]), max(col, 0), min(col + px, self.shape[1])
        if r0 < r1 and c0 < c1:
            at = (slice(r0 - row, r1 - row), slice(c0 - col, c1 - col))
            image[:, at[0], at[1]] = self._image[:, r0:r1, c0:c1]
            label[at] = self._label[r0:r1, c0:c1]
        return image, label, self._gather(row, col, px)

    def _gather(self, row: int, col: int, px: int) -> Cells:
        t = self.tile_px
        found = []
        for r in range(row // t, (row + px - 1) // t + 1):
            for c in range(col // t, (col + px - 1) // t + 1):
                cells = self._cells.get(TileIndex(r, c))
                if cells is not None:
                    y, x = cells.row - row, cells.col - col
                    inside = (y >= 0) & (y < px) & (x >= 0) & (x < px)
                    found.append(Cells(y[inside], x[inside], cells.sums[inside]))
        if not found:
            return Cells(np.empty(0, np.int32), np.empty(0, np.int32), np.empty((0, len(self.arrays)), np.int64))
        return Cells(*(np.concatenate([getattr(f, k) for f in found]) for k in ("row", "col", "sums")))


def arrays_of_layers(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """The cube arrays that layers read, the count first."""
    others = sorted({n for layer in layers for n in layer.arrays} - {"count"})
    return ("count", *others) if layers else ()


def lay_ground(city: City, tiles: list[TileIndex], labels: str, view: View, out: Path, tell: Progress = quiet) -> Ground:
    """Read tiles of a city once; no pixel of another tile is touched.

    Args:
        city: Ingested, with labels.
        tiles: Which.
        labels: A class of the city's labels, or "existing_map".
        view: Which layers will be rendered, and whether images are needed.
        out: Folder of such files; what lies there of the same data is used again.
        tell: Progress.

    Raises:
        ConfigError: The city lacks the labels, points or images, or they do not cover any of the tiles.
    """
    evidence = read_evidence(city)
    _require(city, evidence, labels, view)
    arrays = arrays_of_layers(view.layers)
    folder = out / f"{city.name}-{_digest(city, evidence, tiles, labels, arrays, view)}"
    grid = evidence.grid
    if not (folder / "ground.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        road_map = _open_labels(city, labels, grid)
        _write_tiles(part, evidence, road_map, tiles, arrays, view, tell)
        try:
            part.rename(folder)
        except OSError:  # another run was faster; its files are the same
            shutil.rmtree(part)
    facts = json.loads((folder / "ground.json").read_text())
    counts = (tuple(facts["road"]), tuple(facts["known"]))
    ground = Ground(folder, grid.shape, grid.tile_px, tuple(tiles), arrays, *counts, view.lidar)
    if not sum(ground.known):
        raise ConfigError("cities", city.name, f"has no known label on {len(tiles)} of its tiles", f"check labels: {labels}")
    if not facts["evident"]:
        raise ConfigError("cities", city.name, f"has neither image nor points on the {len(tiles)} tiles", "check its bounds")
    return ground


def require_ground(city: City, labels: str, view: View) -> None:
    """Refuse a city that cannot teach, before its tiles are read.

    Args:
        city: The city.
        labels: A class of its labels, or "existing_map".
        view: Which layers will be rendered, and whether images are needed.

    Raises:
        ConfigError: It lacks the labels, points or images, its cube lacks a quantity, or the labels lie elsewhere.
    """
    evidence = read_evidence(city)
    _require(city, evidence, labels, view)
    if not _open_labels(city, labels, evidence.grid).covers():
        raise ConfigError("cities", city.name, f"lies elsewhere than its {_key_of(labels)}", "correct grid.bounds or the map")


def _require(city: City, evidence: Evidence, labels: str, view: View) -> None:
    if _map_of(city, labels) is None:
        raise ConfigError("cities", city.name, f"has no {_key_of(labels)}", "name such a map in its city file")
    if view.layers and evidence.cubes is None:
        raise ConfigError("cities", city.name, "has no points, and the network needs them", "choose another preset")
    if view.image and evidence.imagery is None:
        raise ConfigError("cities", city.name, "has no imagery, and the network needs it", "choose another preset")
    if view.lidar and evidence.lidar is None:
        raise ConfigError("cities", city.name, "has no lidar, and the network needs it", "choose another preset")
    if view.layers and evidence.cubes:
        CubeReader(Path(evidence.cubes), evidence.snapshot).require(view.layers, "layers")


def _map_of(city: City, labels: str) -> MapSpec | None:
    return city.existing_map if labels == "existing_map" else city.labels.get(labels)


def _key_of(labels: str) -> str:
    return labels if labels == "existing_map" else f"labels.{labels}"


def _open_labels(city: City, labels: str, grid: Grid) -> RoadMap:
    spec = _map_of(city, labels)
    assert spec is not None
    return open_map(city, spec, _key_of(labels), grid)


def _digest(city: City, evidence: Evidence, tiles: list[TileIndex], labels: str, arrays: tuple[str, ...], view: View) -> str:
    spec = _map_of(city, labels)
    assert spec is not None
    rasters = (*(evidence.images if view.image else ()), *(evidence.heights if view.lidar else ()))
    files = [city.path(spec.path), *(Path(f.path) for f in rasters)]
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    lidar = evidence.lidar if view.lidar else None
    text = repr([evidence.grid, evidence.snapshot, spec, evidence.imagery, lidar, stamps, tiles, arrays])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _write_tiles(
    part: Path,
    evidence: Evidence,
    road_map: RoadMap,
    tiles: list[TileIndex],
    arrays: tuple[str, ...],
    view: View,
    tell: Progress,
) -> None:
    grid, px = evidence.grid, evidence.grid.tile_px
    pictures = np.memmap(part / "image.u8", np.uint8, "w+", shape=(6 if view.lidar else 4, *grid.shape))
    labels = np.memmap(part / "label.u8", np.uint8, "w+", shape=grid.shape)
    readers = readers_of(evidence)
    cube = readers.cube if arrays else None
    images, lidar = readers.imagery if view.image else None, readers.lidar if view.lidar else None
    place, sums, road, known = [np.empty((0, 2), np.int32)], [np.empty((0, len(arrays)), np.int64)], [], []
    evident = False
    for done, tile in enumerate(tiles, start=1):
        row, col = tile.row * px, tile.col * px
        at = (slice(row, row + px), slice(col, col + px))
        if images:
            rgb, seen = images.window(row, col, px, px)
            pictures[:3, at[0], at[1]], pictures[3][at] = rgb, np.where(seen, 255, 0)
            evident |= bool(seen.any())
        if lidar:
            grey, seen = lidar.window(row, col, px, px)
            pictures[4][at], pictures[5][at] = grey[0], np.where(seen, 255, 0)
        is_road, is_known = road_map.window(row, col, px, px)
        labels[at] = np.where(is_known, np.where(is_road, ROAD, NOT_ROAD), UNKNOWN)
        road.append(int((is_road & is_known).sum()))
        known.append(int(is_known.sum()))
        places, values = _cells_of(cube, arrays, row, col, px) if cube else (place[0], sums[0])
        evident |= len(places) > 0
        place.append(places)
        sums.append(values)
        tell("reading tiles", done, len(tiles))
    pictures.flush()
    labels.flush()
    np.save(part / "place.npy", np.concatenate(place))
    np.save(part / "sums.npy", np.concatenate(sums))
    np.save(part / "ends.npy", np.cumsum([len(p) for p in place[1:]]))
    (part / "ground.json").write_text(json.dumps({"road": road, "known": known, "evident": evident}))


def _cells_of(
    cube: CubeReader, arrays: tuple[str, ...], row: int, col: int, px: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    count = cube.window("count", row, col, px, px)
    y, x = np.nonzero(count)
    sums = np.stack([cube.window(name, row, col, px, px)[y, x] for name in arrays], 1)
    return np.stack([y + row, x + col], 1).astype(np.int32), sums
