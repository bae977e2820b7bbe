"""Training windows from simulated cities held in memory, augmented on image and on points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer
from scipy import ndimage

from roadfuse_core.cubes import Layer, render
from roadfuse_core.simulate import CityKnobs, SimulatedCity

__all__ = ["TrainingCity", "draw_city", "window_batch"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TrainingCity:
    """A city in memory.

    Attributes:
        image: (3, H, W) uint8.
        truth: (H, W) uint8, 1 on roads.
        points: (n, 2) float32 pixel row and column, ascending by row.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    points: Floats


def draw_city(knobs: CityKnobs) -> TrainingCity:
    """Image, truth and point positions of a simulated city; points are projected by PROJ itself."""
    city = SimulatedCity(knobs)
    height, width = city.grid.shape
    side = -(-max(height, width) // 256) * 256
    image = city.image(0, 0, side)[:, :height, :width]
    to_grid = Transformer.from_crs("EPSG:4326", city.grid.crs, always_xy=True)
    pieces = []
    for table, _ in city.points(0):
        east, north = to_grid.transform(table["lon"].to_numpy(), table["lat"].to_numpy())  # type: ignore[index]
        col, row = ~city.grid.affine @ (east, north)
        inside = (row >= 0) & (col >= 0) & (row < height) & (col < width)
        pieces.append(np.stack([row, col], 1)[inside].astype(np.float32))
    points: Floats = np.concatenate(pieces)
    return TrainingCity(image, city.truth(), points[np.argsort(points[:, 0], kind="stable")])


def window_batch(
    cities: list[TrainingCity], layers: list[Layer], window_px: int, count: int, rng: np.random.Generator
) -> tuple[dict[str, Floats], Floats]:
    """A batch of augmented windows.

    Returns:
        Inputs by modality, (count, C, window, window) float32, normalised as at inference; and (count, 1, window,
        window) labels.
    """
    images, layer_stacks, masks = zip(*(_window(rng, cities, layers, window_px) for _ in range(count)), strict=True)
    return {"image": np.stack(images), "gps": np.stack(layer_stacks)}, np.stack(masks)[:, None]


def _window(
    rng: np.random.Generator, cities: list[TrainingCity], layers: list[Layer], px: int
) -> tuple[Floats, Floats, Floats]:
    city = cities[int(rng.integers(len(cities)))]
    scale = float(np.exp(rng.uniform(np.log(0.65), np.log(1.35))))
    side = min(round(px * scale), min(city.truth.shape))
    row, col = (int(rng.integers(0, n - side + 1)) for n in city.truth.shape)
    turn = int(rng.integers(8))
    image = _resize(city.image[:, row : row + side, col : col + side].astype(np.float32), px, 1)
    mask = _resize(city.truth[None, row : row + side, col : col + side].astype(np.float32), px, 1)[0] > 0.5
    low = np.array([row, col], np.float32)
    rows = city.points[slice(*np.searchsorted(city.points[:, 0], (row, row + side)))]
    points = (rows[(rows[:, 1] >= col) & (rows[:, 1] < col + side)] - low) * (px / side)
    image = _camera(rng, image)
    points = _receivers(rng, points, px)
    cell = np.floor(points).astype(np.int64)
    cell = cell[((cell >= 0) & (cell < px)).all(1)]
    counts = np.bincount(cell[:, 0] * px + cell[:, 1], minlength=px * px).reshape(px, px)
    gps = render({"count": counts}, layers, halo=0)
    image = ((image / 255 - 0.5) / 0.25).astype(np.float32)
    image, gps = _drop(rng, image, gps)
    stack = [_d4(a, turn) for a in (image, gps, mask[None].astype(np.float32))]
    return stack[0], stack[1], stack[2][0]


def _resize(x: Floats, px: int, order: int) -> Floats:
    if x.shape[-1] == px:
        return x
    return ndimage.zoom(x, (1, px / x.shape[-2], px / x.shape[-1]), order=order, grid_mode=True, mode="nearest")


def _d4(x: Floats, turn: int) -> Floats:
    x = np.rot90(x, turn % 4, (1, 2))
    return np.ascontiguousarray(x[:, :, ::-1] if turn >= 4 else x)


def _camera(rng: np.random.Generator, image: Floats) -> Floats:
    """Other cameras, seasons and resolutions: tone curve, colour balance, saturation, blur, noise, fog, grey."""
    x = image / 255
    x = x ** np.exp(rng.normal(0, 0.28))
    x = x * np.exp(rng.normal(0, 0.09, (3, 1, 1))) * np.exp(rng.normal(0, 0.16)) + rng.normal(0, 0.05)
    grey = x.mean(0, keepdims=True)
    x = grey + (x - grey) * rng.uniform(0.2, 1.5)
    middle = x.mean()
    x = middle + (x - middle) * np.exp(rng.normal(0, 0.22))
    if rng.random() < 0.5:
        x = ndimage.gaussian_filter(x, (0, *[rng.uniform(0.3, 1.3)] * 2))
    if rng.random() < 0.12:
        veil = rng.uniform(0.2, 0.7)
        x = x * (1 - veil) + 0.87 * veil
    x = x + rng.normal(0, rng.uniform(0, 0.035), x.shape)
    return (x.clip(0, 1) * 255).astype(np.float32)


def _receivers(rng: np.random.Generator, points: Floats, px: int) -> Floats:
    """GPS augmentation on points (Sun et al. 2019, section 3.3): subsample, sub-resolution, perturb, omit."""
    if rng.random() < 0.5:
        points = points[rng.random(len(points)) < rng.uniform(0.01, 1)]
    if rng.random() < 0.2:
        r = rng.uniform(0.1, 1)
        points = np.floor(np.floor(points * r) / r).astype(np.float32)
    if rng.random() < 0.3:
        points = points + rng.normal(0, 10 * rng.uniform(0, 0.6), points.shape).astype(np.float32)
    if rng.random() < 0.15:
        origin = rng.uniform(-px / 2, px, 2)
        points = points[~((points >= origin) & (points < origin + px / 2)).all(1)]
    return points


def _drop(rng: np.random.Generator, image: Floats, gps: Floats) -> tuple[Floats, Floats]:
    """Modality dropout, and a blank rectangle now and then, so that neither source is trusted blindly."""
    draw = rng.random()
    if draw < 0.12:
        image = np.zeros_like(image)
    elif draw < 0.24:
        gps = np.zeros_like(gps)
    elif draw < 0.40:
        n = image.shape[-1]
        r, c = rng.integers(-n // 4, 3 * n // 4, 2)
        image = image.copy()
        image[:, max(r, 0) : r + n // 2, max(c, 0) : c + n // 2] = 0
    return image, gps
