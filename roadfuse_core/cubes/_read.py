"""Windows of a cube, whole snapshots only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from roadfuse_core.cubes._render import Layer
from roadfuse_core.cubes._repository import open_repository, read_group
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import TileIndex

__all__ = ["CubeReader"]


class CubeReader:
    """Reads the total over all periods, or one period, of one snapshot.

    Args:
        path: The cube repository.
        snapshot: Which snapshot; the newest if None.

    Raises:
        StoreError: There is no cube.
    """

    def __init__(self, path: Path, snapshot: str | None = None) -> None:
        repository = open_repository(path)
        self.snapshot = snapshot or str(repository.lookup_branch("main"))
        self.root: zarr.Group = read_group(repository, snapshot=self.snapshot)
        self.arrays: list[str] = list(self.root.attrs["arrays"])

    def require(self, layers: Sequence[Layer], key: str) -> None:
        """Refuse layers that this cube cannot render.

        Args:
            layers: What will be rendered.
            key: The setting that asks for them.

        Raises:
            ConfigError: A layer needs an array that was never ingested.
        """
        for layer in layers:
            for name in layer.arrays:
                if name not in self.arrays:
                    fix = "name the column and ingest anew"
                    raise ConfigError(key, layer.kind, f"needs {name}, which this cube lacks", fix)

    def window(self, name: str, row: int, col: int, height: int, width: int) -> NDArray[np.int64]:
        """Sums of a pixel rectangle, which may reach past the grid; zeros there.

        Returns:
            (height, width) int64.
        """
        array = self.root[f"total/{name}"]
        out = np.zeros((height, width), np.int64)
        r0, r1 = max(row, 0), min(row + height, array.shape[0])
        c0, c1 = max(col, 0), min(col + width, array.shape[1])
        if r0 < r1 and c0 < c1:
            out[r0 - row : r1 - row, c0 - col : c1 - col] = array[r0:r1, c0:c1]
        return out

    def sums(self, layers: Sequence[Layer], row: int, col: int, height: int, width: int) -> dict[str, NDArray[np.int64]]:
        """The arrays that some layers read, and always the count."""
        names = sorted({"count", *(n for layer in layers for n in layer.arrays)})
        return {n: self.window(n, row, col, height, width) for n in names}

    def occupied(self) -> list[TileIndex]:
        """Tiles that hold a point, row-major; found by the chunks that there are, without reading them."""

        async def listed() -> list[TileIndex]:
            return [TileIndex(*place) async for place in self.root.store.session.chunk_coordinates("/total/count")]

        return sorted(sync(listed()))
