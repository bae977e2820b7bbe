"""What a refresh reads: where it lies, what it is, and rectangles of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from roadfuse_core.cubes import CubeReader, Layer, cubes_path, halo_px, open_repository, render
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Block, Bounds, Grid
from roadfuse_core.imagery import ImageFile, ImageryReader, RasterKey, find_imagery, identify
from roadfuse_core.settings import City, ImagerySpec

__all__ = ["Evidence", "Region", "files_of", "reach_px", "read_evidence", "read_region", "readers_of"]


@dataclass(frozen=True)
class Evidence:
    """Where a refresh reads from; small, and the same on every worker.

    Attributes:
        grid: The city's grid.
        cubes: Path of the cube repository; None without points.
        snapshot: Which snapshot of it.
        imagery: Imagery settings; None without images.
        images: Its files as they are now, so that readers of a file that was rewritten are not used again.
        lidar: Settings of the lidar; None without.
        heights: Its files.
    """

    grid: Grid
    cubes: str | None
    snapshot: str | None
    imagery: ImagerySpec | None
    images: tuple[ImageFile, ...]
    lidar: ImagerySpec | None = None
    heights: tuple[ImageFile, ...] = ()


class Readers(NamedTuple):
    """What is open of a city."""

    cube: CubeReader | None
    imagery: ImageryReader | None
    lidar: ImageryReader | None


@dataclass(frozen=True)
class Region:
    """A rectangle of evidence.

    Attributes:
        inputs: "image" (H, W, 4) uint8, red, green, blue and 255 where known; "lidar" (H, W, 2) uint8, the same of one band;
            "gps" (H, W, layers) float32.
        evident: (H, W) bool, where there is a point or a valid image pixel.
        known: (H, W) bool, where a map may say something: valid image, or a point within reach.
    """

    inputs: dict[str, NDArray[np.generic]]
    evident: NDArray[np.bool_]
    known: NDArray[np.bool_]


def read_evidence(city: City) -> Evidence:
    """What the city's refresh would read now.

    Raises:
        ConfigError: Imagery or lidar is missing or lies elsewhere.
        StoreError: The city has points but no cube yet.
    """
    snapshot = str(open_repository(cubes_path(city)).lookup_branch("main")) if city.points else None
    cubes = str(cubes_path(city)) if city.points else None
    evidence = Evidence(city.make_grid(), cubes, snapshot, city.imagery, identify(find_imagery(city)),
                        city.lidar, identify(find_imagery(city, "lidar")))  # fmt: skip
    for reader in readers_of(evidence)[1:]:
        if reader and not reader.covers():
            raise ConfigError(f"{reader.key}.sources", reader.spec.sources, "lies outside the city's bounds",
                              "correct grid.bounds or the files")  # fmt: skip
    return evidence


def files_of(evidence: Evidence, key: RasterKey) -> list[tuple[ImageFile, Bounds]]:
    """Every image, or every raster of the lidar: what it is, and where it reaches."""
    files, reader = (evidence.images if key == "imagery" else evidence.heights), getattr(readers_of(evidence), key)
    return list(zip(files, reader.boxes(), strict=True)) if reader else []


def reach_px(window_px: int) -> int:
    """How far from a point a map may say something: a quarter of a window."""
    return window_px // 4


@lru_cache(maxsize=2)
def readers_of(evidence: Evidence) -> Readers:
    """A worker's own readers."""
    cube = CubeReader(Path(evidence.cubes), evidence.snapshot) if evidence.cubes else None
    grid, images, heights = evidence.grid, [f.path for f in evidence.images], [f.path for f in evidence.heights]
    imagery = ImageryReader(evidence.imagery, images, grid) if evidence.imagery else None
    lidar = ImageryReader(evidence.lidar, heights, grid, "lidar") if evidence.lidar else None
    return Readers(cube, imagery, lidar)


def read_region(
    evidence: Evidence, layers: tuple[Layer, ...], rasters: tuple[str, ...], at: Block, reach_px: int = 0
) -> Region:
    """Every input over a rectangle, which may reach past the grid.

    Args:
        evidence: What to read.
        layers: GPS layers.
        rasters: Which are read, of "image" and "lidar".
        at: The rectangle.
        reach_px: How far from a point, along rows and columns, a map may still say something.
    """
    cube, images, lidar = readers_of(evidence)
    height, width = at.row1 - at.row0, at.col1 - at.col0
    inputs: dict[str, NDArray[np.generic]] = {}
    evident, known = np.zeros((height, width), bool), np.zeros((height, width), bool)
    if lidar and "lidar" in rasters:
        grey, seen = lidar.window(at.row0, at.col0, height, width)
        inputs["lidar"] = _with_mask(grey[:1], seen)
    if images and "image" in rasters:
        rgb, valid = images.window(at.row0, at.col0, height, width)
        inputs["image"] = _with_mask(rgb, valid)
        evident |= valid
        known |= valid
    if cube:
        halo = halo_px(layers) if known.all() else max(halo_px(layers), reach_px)
        sums = cube.sums(layers, at.row0 - halo, at.col0 - halo, height + 2 * halo, width + 2 * halo)
        inner = (slice(halo, halo + height), slice(halo, halo + width))
        points = sums["count"] > 0
        evident |= points[inner]
        if not known.all():
            known |= ndimage.maximum_filter(points, 2 * reach_px + 1)[inner]
        if layers:
            inputs["gps"] = np.stack(list(render(sums, layers, halo)), 2)
    return Region(inputs, evident, known)


def _with_mask(bands: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(C, H, W) → (H, W, C + 1): the bands side by side, and 255 where they are known."""
    out = np.empty((*valid.shape, len(bands) + 1), np.uint8)
    for k, band in enumerate(bands):
        out[..., k] = band
    out[..., -1] = valid * np.uint8(255)
    return out
