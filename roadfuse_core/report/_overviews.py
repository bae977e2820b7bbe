"""Reduced pictures of a city, kept with what decided them, so that a later report reads only what changed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.cubes import changed_tiles
from roadfuse_core.errors import StoreError
from roadfuse_core.files import DamagedFileError, digest_of, read_record, replacing, write_record
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.inference import changed_map_tiles
from roadfuse_core.settings import City

__all__ = ["Basis", "Overview", "Overviews"]

FORM = 1  # of the reduction; raised when other values come out


@dataclass(frozen=True)
class Basis:
    """What decides the values of a picture.

    Attributes:
        fixed: In words or digests, what all of it depends on.
        map: Snapshot of the maps, if it shows one.
        points: Snapshot of the cube, if it shows points.
    """

    fixed: str
    map: str | None = None
    points: str | None = None


@dataclass(frozen=True)
class Overview:
    """An earlier picture of the same kind.

    Attributes:
        values: (C, h, w) float32, as it was reduced.
        changed: Tiles that may look otherwise now.
    """

    values: NDArray[np.float32]
    changed: set[TileIndex]

    def touches(self, grid: Grid, row: int, col: int, height: int, width: int) -> bool:
        """Whether a pixel rectangle holds a pixel of a changed tile."""
        px = grid.tile_px
        rows, cols = range(row // px, -(-(row + height) // px)), range(col // px, -(-(col + width) // px))
        return any(TileIndex(r, c) in self.changed for r in rows for c in cols)


class Overviews:
    """Reduced pictures of a city in its workspace.

    Args:
        city: The city.
        name: Of the file that keeps them.
    """

    def __init__(self, city: City, name: str) -> None:
        self.city, folder = city, city.workspace_path / "outputs"
        self.file, self.note = folder / f"{name}.npz", folder / f"{name}.json"
        self.bases: dict[str, dict[str, Any]] = {}
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self.old_bases, self.old_arrays = self._load()
        self.map_changes: Callable[[str, str], set[TileIndex] | None] = cache(
            lambda since, now: changed_map_tiles(city, "map", since, now)
        )

    def _load(self) -> tuple[dict[str, dict[str, Any]], dict[str, NDArray[np.float32]]]:
        """What an earlier report left; nothing if it is not as it was written."""
        try:
            record = read_record(self.note)
            content = self.file.read_bytes()
        except (FileNotFoundError, DamagedFileError):
            return {}, {}
        if (record.get("form"), record.get("grid"), record.get("digest")) != (FORM, self._grid(), digest_of(content)):
            return {}, {}
        with np.load(io.BytesIO(content)) as arrays:
            return record["bases"], dict(arrays)

    def _grid(self) -> str:
        return repr(self.city.make_grid())

    def find(self, title: str, basis: Basis) -> Overview | None:
        """An earlier picture and the tiles that changed since; None where it cannot be used."""
        if title not in self.old_bases or title not in self.old_arrays:
            return None
        before = Basis(**self.old_bases[title])
        if (before.fixed, before.map is None, before.points is None) != (basis.fixed, basis.map is None, basis.points is None):
            return None
        changed: set[TileIndex] = set()
        if before.map and basis.map:
            moved = self.map_changes(before.map, basis.map)
            if moved is None:
                return None
            changed |= moved
        if before.points and before.points != basis.points:
            try:
                changed |= changed_tiles(self.city, before.points)
            except StoreError:  # expired
                return None
        return Overview(self.old_arrays[title], changed)

    def put(self, title: str, basis: Basis, values: NDArray[np.float32]) -> None:
        """Keep a picture for the next report."""
        self.bases[title], self.arrays[title] = asdict(basis), values.astype(np.float32)

    def save(self) -> None:
        """Write what was put, for the next report."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays)  # type: ignore[arg-type]
        with replacing(self.file) as part:
            part.write_bytes(buffer.getvalue())
        write_record(
            self.note, {"form": FORM, "grid": self._grid(), "digest": digest_of(buffer.getvalue()), "bases": self.bases}
        )
