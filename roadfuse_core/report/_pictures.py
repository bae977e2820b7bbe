"""Overviews of a city, reduced block by block so that a large one needs no more memory than a small one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from roadfuse_core.cubes import CubeReader, cubes_path
from roadfuse_core.files import digest_of
from roadfuse_core.grid import Grid
from roadfuse_core.imagery import ImageryReader, find_imagery, identify
from roadfuse_core.inference import MapReader
from roadfuse_core.labels import labels_digest, open_map
from roadfuse_core.report._overviews import Basis, Overview, Overviews
from roadfuse_core.settings import City

__all__ = ["Picture", "map_preview", "overview_pictures"]

LONGEST_PX = 1024
PREVIEW_PX = 512
BLOCK_PX = 1024
SAMPLES = 8  # of a picture's pixel, along each edge: more cannot be seen
HEAT = np.array([[8, 8, 20], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], float)
SLACK_M = 10.0
Floats = NDArray[np.float32]
Where = tuple[int, int, int, int]
Paint = Callable[[Where, int], Floats]


@dataclass(frozen=True)
class Picture:
    """A captioned picture.

    Attributes:
        title: A few words.
        caption: What the colours mean.
        source: A data URI.
    """

    title: str
    caption: str
    source: str


def map_preview(city: City, held: bool = False) -> str:
    """The road probability of a map as a data URI, small enough for an artifact (at most 512 px)."""
    grid, read, kept = city.make_grid(), MapReader(city, held=held), Overviews(city, "preview")
    basis = Basis("", map=read.snapshot)
    values = _reduce(grid, lambda w, step: _grey(read, w, step), np.mean, PREVIEW_PX, old=kept.find("Probability", basis))
    kept.put("Probability", basis, values)
    kept.save()
    return _encode(values, "JPEG", quality=80)


def overview_pictures(city: City) -> list[Picture]:
    """Image, points, probability, truth, errors, and the change against the existing map, as far as the city has them.

    What they were reduced from is kept in the workspace: only blocks whose map, points or files changed are read again.
    """
    grid, kept, out = city.make_grid(), Overviews(city, "overviews"), []
    for one in _sketches(city):
        values = _reduce(grid, one.paint, one.how, samples=one.samples, old=kept.find(one.title, one.basis))
        kept.put(one.title, one.basis, values)
        out.append(Picture(one.title, one.caption, _encode(one.finish(values))))
    kept.save()
    return out


@dataclass(frozen=True)
class _Sketch:
    """A picture before its pixels are made.

    Attributes:
        title: A few words.
        caption: What the colours mean.
        paint: Values of a pixel rectangle.
        basis: What decides them.
        how: How pixels become one.
        samples: Of a picture's pixel, along each edge; None for all.
        finish: From reduced values to colours.
    """

    title: str
    caption: str
    paint: Paint
    basis: Basis
    how: Callable[..., Floats] = np.mean
    samples: int | None = SAMPLES
    finish: Callable[[Floats], Floats] = lambda values: values


def _sketches(city: City) -> Iterator[_Sketch]:
    yield from _evidence(city)
    read, grid = MapReader(city), city.make_grid()
    caption = f"Of {city.target}: black 0, white 1; blue where nothing is known."
    yield _Sketch("Probability", caption, lambda w, step: _grey(read, w, step), Basis("", map=read.snapshot))
    if city.truth:
        labels, fixed = open_map(city, *city.truth, grid), str(labels_digest(city))
        yield _Sketch("Truth", f"White: {city.target}; blue: unknown.",
                      lambda w, step: _truth(*_thin(step, *labels.window(*w))), Basis(fixed))  # fmt: skip
        yield _Sketch("Errors", "Green found, red claimed but not there, blue missed.",
                      lambda w, step: _errors(*_thin(step, read.window("road", *w), *labels.window(*w))),
                      Basis(fixed, map=read.snapshot))  # fmt: skip
    if city.existing_map:
        old, slack_px = open_map(city, city.existing_map, "existing_map", grid), SLACK_M / grid.resolution_m
        caption = f"Grey in both, orange new, purple perhaps gone (more than {SLACK_M:.0f} m from the other)."
        path = city.path(city.existing_map.path)
        fixed = f"{city.existing_map.model_dump_json()} {digest_of(path)}"
        yield _Sketch("Against the existing map", caption,
                      lambda w, step: _change(slack_px / step, *_thin(step, read.window("road", *w), old.window(*w)[0])),
                      Basis(fixed, map=read.snapshot))  # fmt: skip


def _evidence(city: City) -> Iterator[_Sketch]:
    """Pictures of what maps are made from."""
    grid = city.make_grid()
    if city.imagery:
        paths = find_imagery(city)
        images = ImageryReader(city.imagery, paths, grid)
        yield _Sketch("Image", "What the camera saw; black where there is none.", lambda w, step: _shown(images, w, step),
                      Basis(f"{city.imagery.model_dump_json()} {identify(paths)}"))  # fmt: skip
    if city.lidar:
        paths = find_imagery(city, "lidar")
        heights = ImageryReader(city.lidar, paths, grid, "lidar")
        yield _Sketch("Lidar", "Low values black, high ones white; black where there are none.",
                      lambda w, step: _shown(heights, w, step),
                      Basis(f"{city.lidar.model_dump_json()} {identify(paths)}"))  # fmt: skip
    if city.points:
        cube = CubeReader(cubes_path(city))
        yield _Sketch("Vehicles", "Points per pixel, dark to light on a logarithmic scale.",
                      lambda w, _: cube.window("count", *w)[None].astype(np.float32), Basis("", points=cube.snapshot),
                      np.max, None, _heat)  # fmt: skip


def _reduce(
    grid: Grid, paint: Paint, how: Callable[..., Floats], longest_px: int = LONGEST_PX, samples: int | None = SAMPLES,
    old: Overview | None = None,
) -> Floats:  # fmt: skip
    """(C, h, w), at most `longest_px`: every factor² pixels, or so many samples of them, become one, by blocks.

    Blocks without a changed tile are taken from an earlier picture.
    """
    (height, width), rows = grid.shape, []
    factor = -(-max(height, width) // longest_px)
    step = max(1, factor // samples) if samples else 1
    cell = -(-factor // step)
    px = step * cell * max(1, BLOCK_PX // (step * cell))

    def block(row: int, col: int) -> Floats:
        h, w = min(px, height - row), min(px, width - col)
        if old and not old.touches(grid, row, col, h, w):
            r, c = row // (step * cell), col // (step * cell)
            return old.values[:, r : r - (-h // (step * cell)), c : c - (-w // (step * cell))]
        return _cells(paint((row, col, h, w), step), cell, how)

    for r in range(0, height, px):
        rows.append(np.concatenate([block(r, c) for c in range(0, width, px)], 2))
    return np.concatenate(rows, 1)


def _cells(values: Floats, cell: int, how: Callable[..., Floats]) -> Floats:
    """Every cell² values become one; an incomplete cell at the city's rim repeats its last values."""
    c, height, width = values.shape
    padded = np.pad(values, ((0, 0), (0, -height % cell), (0, -width % cell)), mode="edge")
    return how(padded.reshape(c, padded.shape[1] // cell, cell, padded.shape[2] // cell, cell), axis=(2, 4))


def _thin(step: int, *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    return tuple(a[::step, ::step] for a in arrays)


def _heat(count: Floats) -> Floats:
    top = np.log1p(max(float(np.quantile(count[count > 0], 0.995)) if (count > 0).any() else 1.0, 1.0))
    level = (np.log1p(count[0]) / top).clip(0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(level, np.arange(len(HEAT)), HEAT[:, k]) for k in range(3)]).astype(np.float32)


def _colours(shape: tuple[int, ...], *pairs: tuple[NDArray[np.bool_], tuple[int, int, int]]) -> Floats:
    out = np.full((3, *shape), 14, np.float32)
    for mask, colour in pairs:
        out[:, mask] = np.array(colour, np.float32)[:, None]
    return out


def _shown(images: ImageryReader, where: Where, step: int) -> Floats:
    return images.window(*where)[0][:, ::step, ::step].astype(np.float32)


def _grey(read: MapReader, where: Where, step: int) -> Floats:
    p = read.window("probability", *where)[::step, ::step]
    out = np.repeat(p[None].astype(np.float32), 3, 0)
    out[:, p == 255] = np.array([[24], [34], [60]])
    return out


def _truth(road: NDArray[np.bool_], known: NDArray[np.bool_]) -> Floats:
    return _colours(road.shape, (road, (240, 240, 240)), (~known, (24, 34, 60)))


def _errors(found: NDArray[np.uint8], road: NDArray[np.bool_], known: NDArray[np.bool_]) -> Floats:
    p = (found == 1) & known
    return _colours(
        road.shape,
        (p & road, (70, 200, 110)),
        (p & ~road, (235, 70, 60)),
        (~p & road, (70, 130, 250)),
        (~known, (24, 34, 60)),
    )


def _change(slack: float, found: NDArray[np.uint8], old: NDArray[np.bool_]) -> Floats:
    new = found == 1
    near_old, near_new = (ndimage.distance_transform_edt(~m) <= slack if m.any() else m for m in (old, new))
    return _colours(
        old.shape, (old | new, (110, 110, 110)), (new & ~near_old, (250, 160, 40)), (old & ~near_new, (170, 90, 230))
    )


def _encode(rgb: Floats, kind: str = "WEBP", quality: int = 82) -> str:
    buffer = io.BytesIO()
    values = np.ascontiguousarray(rgb.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    Image.fromarray(values).save(buffer, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
