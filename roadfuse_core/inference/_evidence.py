"""What a refresh reads: where it lies, what it is, and rectangles of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from roadfuse_core.cubes import CubeReader, Layer, cubes_path, halo_px, open_repository, render
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Block, Bounds, Grid
from roadfuse_core.imagery import ImageFile, ImageryReader, find_imagery, identify
from roadfuse_core.settings import City, ImagerySpec

__all__ = ["Evidence", "Region", "images_of", "reach_px", "read_evidence", "read_region", "readers_of"]


@dataclass(frozen=True)
class Evidence:
    """Where a refresh reads from; small, and the same on every worker.

    Attributes:
        grid: The city's grid.
        cubes: Path of the cube repository; None without points.
        snapshot: Which snapshot of it.
        imagery: Imagery settings; None without images.
        images: Its files as they are now, so that readers of a file that was rewritten are not used again.
    """

    grid: Grid
    cubes: str | None
    snapshot: str | None
    imagery: ImagerySpec | None
    images: tuple[ImageFile, ...]


@dataclass(frozen=True)
class Region:
    """A rectangle of evidence.

    Attributes:
        inputs: "image" (H, W, 4) uint8, red, green, blue and 255 where known; "gps" (H, W, layers) float32.
        evident: (H, W) bool, where there is a point or a valid image pixel.
        known: (H, W) bool, where a map may say something: valid image, or a point within reach.
    """

    inputs: dict[str, NDArray[np.generic]]
    evident: NDArray[np.bool_]
    known: NDArray[np.bool_]


def read_evidence(city: City) -> Evidence:
    """What the city's refresh would read now.

    Raises:
        ConfigError: Imagery is missing or lies elsewhere.
        StoreError: The city has points but no cube yet.
    """
    snapshot = str(open_repository(cubes_path(city)).lookup_branch("main")) if city.points else None
    cubes = str(cubes_path(city)) if city.points else None
    evidence = Evidence(city.make_grid(), cubes, snapshot, city.imagery, identify(find_imagery(city)))
    _, images = readers_of(evidence)
    if images and not images.covers():
        assert city.imagery
        raise ConfigError("imagery.sources", city.imagery.sources, "lies outside the city's bounds",
                          "correct grid.bounds or the files")  # fmt: skip
    return evidence


def images_of(evidence: Evidence) -> list[tuple[ImageFile, Bounds]]:
    """Every image: what it is, and where it reaches."""
    _, images = readers_of(evidence)
    return list(zip(evidence.images, images.boxes(), strict=True)) if images else []


def reach_px(window_px: int) -> int:
    """How far from a point a map may say something: a quarter of a window."""
    return window_px // 4


@lru_cache(maxsize=2)
def readers_of(evidence: Evidence) -> tuple[CubeReader | None, ImageryReader | None]:
    """A worker's own readers."""
    cube = CubeReader(Path(evidence.cubes), evidence.snapshot) if evidence.cubes else None
    images = ImageryReader(evidence.imagery, [f.path for f in evidence.images], evidence.grid) if evidence.imagery else None
    return cube, images


def read_region(evidence: Evidence, layers: tuple[Layer, ...], uses_image: bool, at: Block, reach_px: int = 0) -> Region:
    """Every input over a rectangle, which may reach past the grid.

    Args:
        evidence: What to read.
        layers: GPS layers.
        uses_image: Whether images are read.
        at: The rectangle.
        reach_px: How far from a point, along rows and columns, a map may still say something.
    """
    cube, images = readers_of(evidence)
    height, width = at.row1 - at.row0, at.col1 - at.col0
    inputs: dict[str, NDArray[np.generic]] = {}
    evident, known = np.zeros((height, width), bool), np.zeros((height, width), bool)
    if images and uses_image:
        rgb, valid = images.window(at.row0, at.col0, height, width)
        rgba = np.empty((height, width, 4), np.uint8)
        for band in range(3):
            rgba[..., band] = rgb[band]
        rgba[..., 3] = valid * np.uint8(255)
        inputs["image"] = rgba
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
