"""The drawn aerial photograph: ground, streets, roofs, shadows, trees, cars, fog, the camera."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray
from rasterio import features
from rasterio.transform import from_origin
from scipy import ndimage
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

from roadfuse_core.simulate._config import CityKnobs
from roadfuse_core.simulate._landscape import Landscape
from roadfuse_core.simulate._noise import fractal_grid, noise_grid
from roadfuse_core.simulate._streets import (
    CLASSES,
    DENSE,
    FIELD,
    HOUSES,
    MOTORWAY,
    PARK,
    TRACK,
    Streets,
)

__all__ = ["Painter"]

Image = NDArray[np.float32]
SUPERSAMPLE = 2
RIM_PX = 12
GROUND = np.array([[128, 122, 112], [112, 122, 82], [150, 145, 134], [92, 118, 62], [128, 132, 80], [48, 66, 40]], np.float32)
FIELDS = np.array([[116, 130, 82], [164, 154, 116], [134, 116, 96], [98, 116, 70], [174, 168, 132]], np.float32)


class _Shapes:
    """Geometries with one value each, burnt where they touch a block."""

    def __init__(self, shapes: Sequence[BaseGeometry] | NDArray[np.object_]) -> None:
        self.shapes = np.asarray(shapes, dtype=object)
        self.tree = shapely.STRtree(self.shapes)

    def burn(self, canvas: _Canvas) -> NDArray[np.int32]:
        """Raster of shape numbers, -1 where none; later shapes lie on top."""
        hit = np.sort(self.tree.query(shapely.box(*canvas.box)))
        if not len(hit):
            return np.full(canvas.shape, -1, np.int32)
        pairs = [(self.shapes[k], int(k)) for k in hit]
        return features.rasterize(pairs, canvas.shape, fill=-1, transform=canvas.affine, dtype="int32")


class _Canvas:
    """A block at supersampled resolution, in local metres."""

    def __init__(self, left: float, top: float, px: int, resolution_m: float) -> None:
        self.step = resolution_m / SUPERSAMPLE
        self.rim = RIM_PX * SUPERSAMPLE
        n = px * SUPERSAMPLE + 2 * self.rim
        self.shape = (n, n)
        self.left, self.top = left - self.rim * self.step, top + self.rim * self.step
        self.affine = from_origin(self.left, self.top, self.step, self.step)
        self.box = (self.left, self.top - n * self.step, self.left + n * self.step, self.top)
        self.x = np.asarray(self.left + (np.arange(n) + 0.5) * self.step, np.float64)
        self.y = np.asarray(self.box[1] + (np.arange(n) + 0.5) * self.step, np.float64)

    def noise(self, seed: int, wavelength: float, octaves: int = 1) -> Image:
        """Noise of this block, north up; the same at the same place whatever the block."""
        grid = (
            fractal_grid(seed, self.x, self.y, wavelength, octaves)
            if octaves > 1
            else noise_grid(seed, self.x, self.y, wavelength)
        )
        return np.ascontiguousarray(grid[::-1])


class Painter:
    """Draws any block of a city's aerial image; neighbouring blocks fit."""

    def __init__(self, knobs: CityKnobs, streets: Streets, land: Landscape) -> None:
        self.knobs, self.streets, self.land = knobs, streets, land
        rng = np.random.default_rng([knobs.seed, 17])
        order = np.argsort(-streets.kind, kind="stable")
        lines = [LineString(streets.lines[k]) for k in order]
        self.kind = streets.kind[order]
        width = np.array([c.width_m for c in CLASSES])[self.kind]
        self.roads = _Shapes(shapely.buffer(lines, width / 2))
        self.walks = _Shapes(shapely.buffer(lines, width / 2 + np.where(self.kind == TRACK, 0.0, 2.2)))
        self.grey = np.array([c.grey for c in CLASSES])[self.kind] + rng.normal(0, 9, len(lines))
        self.marks = _Shapes(_markings(lines, self.kind))
        self.medians = _Shapes(shapely.buffer([ln for ln, k in zip(lines, self.kind, strict=True) if k == MOTORWAY], 1.6))
        self.cells = _Shapes([Polygon(p) for p, _ in streets.cells])
        self.cell_land = np.array([land_use for _, land_use in streets.cells])
        self.blocks = _Shapes([Polygon(p) for p, _ in streets.parts])
        self.block_tone = rng.normal(0, 7, len(streets.parts)).astype(np.float32)
        self.block_field = rng.integers(0, len(FIELDS), len(streets.parts))
        self.block_angle = rng.uniform(0, np.pi, len(streets.parts)).astype(np.float32)
        self.rails = _Shapes([r.buffer(4.2) for r in land.rails])
        self.tracks = _Shapes([r.parallel_offset(d).buffer(0.35) for r in land.rails for d in (-2.6, -1.2, 1.2, 2.6)])
        self.parking, self.ponds = _Shapes(land.parking), _Shapes(land.ponds)
        self.roofs = _Shapes(shapely.polygons(land.roofs) if len(land.roofs) else [])
        self.ridge = _Shapes(_lit_halves(land))
        self.shadows = _Shapes(_shadow_shapes(land))
        self.cars = _Shapes(shapely.polygons(land.cars) if len(land.cars) else [])
        self.cast = rng.normal(1, 0.035, 3).astype(np.float32)

    def block(self, left: float, top: float, px: int) -> NDArray[np.uint8]:
        """A square of the image.

        Args:
            left: Local metres of the left edge.
            top: Local metres of the upper edge.
            px: Edge in pixels of the knobs' resolution.

        Returns:
            (3, px, px) uint8, red, green, blue.
        """
        canvas = _Canvas(left, top, px, self.knobs.resolution_m)
        rgb = self._ground(canvas)
        self._streets(canvas, rgb)
        self._roofs(canvas, rgb)
        self._vegetation(canvas, rgb)
        return self._camera(canvas, rgb, px)

    def _ground(self, canvas: _Canvas) -> Image:
        seed = self.knobs.seed * 64
        cell = self.cells.burn(canvas)
        land = np.where(cell >= 0, self.cell_land[cell], FIELD)
        block = self.blocks.burn(canvas)
        rgb = GROUND[land]
        field = (land == FIELD) & (block >= 0)
        rgb[field] = FIELDS[self.block_field[block[field]]]
        patch = canvas.noise(seed + 1, 14, 3)
        broad = canvas.noise(seed + 2, 120, 3)
        fine = canvas.noise(seed + 3, 2.2)
        lawn = ((land == HOUSES) | (land == PARK)) & (patch > 0.12)
        rgb[lawn] = rgb[lawn] * 0.35 + np.array([96, 124, 62], np.float32) * 0.65
        court = (land == DENSE) & (patch + broad > 0.25)
        rgb[court] = rgb[court] * 0.4 + np.array([88, 108, 66], np.float32) * 0.6
        rough = np.array([9, 11, 10, 9, 6, 12], np.float32)[land]
        light = 16 * broad + rough * patch + 5 * fine + np.where(block >= 0, self.block_tone[block], 0)
        light += np.where(field, self._stripes(canvas, block), 0)
        rgb += light[..., None]
        water = self.ponds.burn(canvas) >= 0
        rgb[water] = np.array([46, 66, 74], np.float32) + (3 * fine[water] + 5 * broad[water])[:, None]
        return rgb

    def _stripes(self, canvas: _Canvas, block: NDArray[np.int32]) -> Image:
        angle = self.block_angle[block]
        along = np.cos(angle) * canvas.x[None, :] + np.sin(angle) * canvas.y[::-1, None]
        return (5 * np.sin(along * (2 * np.pi / 4.6)) * (block >= 0)).astype(np.float32)

    def _streets(self, canvas: _Canvas, rgb: Image) -> None:
        seed, contrast = self.knobs.seed * 64, 0.12 + 0.88 * self.knobs.road_contrast
        fine, broad = canvas.noise(seed + 5, 1.6), canvas.noise(seed + 6, 45, 2)
        grain = (5 * fine + 7 * broad)[..., None]
        rail = self.rails.burn(canvas) >= 0
        rgb[rail] = np.array([128, 118, 108], np.float32) + 2.2 * grain[rail]
        rgb[self.tracks.burn(canvas) >= 0] = np.array([84, 74, 70], np.float32)
        lot = self.parking.burn(canvas) >= 0
        rgb[lot] = np.array([126, 125, 124], np.float32) + grain[lot]
        walk = self.walks.burn(canvas)
        paved = (walk >= 0) & (self.kind[walk] != TRACK)
        rgb[paved] += contrast * (np.array([160, 155, 146], np.float32) + grain[paved] - rgb[paved])
        road = self.roads.burn(canvas)
        asphalt = road >= 0
        colour = np.repeat(self.grey[road][..., None], 3, -1) + np.array([1.5, 0, -1.5])
        colour[self.kind[road] == TRACK] = (162, 146, 118)
        colour = (colour + grain).astype(np.float32)
        rgb[asphalt] += contrast * (colour[asphalt] - rgb[asphalt])
        mark = self.marks.burn(canvas) >= 0
        rgb[mark] += 0.75 * contrast * (np.array([222, 222, 218], np.float32) - rgb[mark])
        median = self.medians.burn(canvas) >= 0
        rgb[median] = np.array([104, 116, 76], np.float32) + grain[median]
        self._paint(canvas, rgb, self.cars, self.land.car_rgb)

    @staticmethod
    def _paint(canvas: _Canvas, rgb: Image, shapes: _Shapes, colours: NDArray[np.float64]) -> NDArray[np.int32]:
        number = shapes.burn(canvas)
        hit = number >= 0
        if hit.any():
            rgb[hit] = colours[number[hit]]
        return number

    def _roofs(self, canvas: _Canvas, rgb: Image) -> None:
        dark = self.shadows.burn(canvas) >= 0
        depth = 1 - 0.62 * self.knobs.shadow
        rgb[dark] *= np.array([depth, depth, depth * 1.06 + 0.03], np.float32).clip(0, 1)
        number = self._paint(canvas, rgb, self.roofs, self.land.roof_rgb)
        roof = number >= 0
        if not roof.any():
            return
        gabled = self.land.gabled[number] & roof
        lit = self.ridge.burn(canvas) >= 0
        rgb[gabled & lit] *= 1.14
        rgb[gabled & ~lit] *= 0.82
        rgb[roof] += 4 * canvas.noise(self.knobs.seed * 64 + 7, 2.6)[roof][:, None]
        flat = roof & ~gabled
        plant = flat & (canvas.noise(self.knobs.seed * 64 + 8, 5.0) > 0.62)
        rgb[plant] *= 0.84

    def _vegetation(self, canvas: _Canvas, rgb: Image) -> None:
        x0, y0, x1, y1 = canvas.box
        t = self.land.trees
        near = (t[:, 0] > x0 - 12) & (t[:, 0] < x1 + 12) & (t[:, 1] > y0 - 12) & (t[:, 1] < y1 + 12)
        trees = t[near]
        if not len(trees):
            return
        # Tone by place, so that a tree looks the same in every block.
        tone = np.modf(np.abs(trees[:, 0] * 12.9898 + trees[:, 1] * 78.233))[0]
        wobble = canvas.noise(self.knobs.seed * 64 + 9, 1.9)
        sun = self.land.sun
        _draw_trees(rgb, wobble, trees, tone, canvas.left, canvas.top, canvas.step, sun[0], sun[1], self.knobs.shadow)

    def _camera(self, canvas: _Canvas, rgb: Image, px: int) -> NDArray[np.uint8]:
        rgb *= self.cast
        if self.knobs.fog > 0:
            veil = (self.knobs.fog * (0.82 + 0.3 * canvas.noise(self.knobs.seed * 64 + 10, 380, 3))).clip(0, 0.97)[..., None]
            rgb = rgb * (1 - veil) + np.array([222, 224, 226], np.float32) * veil
        n = canvas.shape[0] // SUPERSAMPLE
        small = rgb.reshape(n, SUPERSAMPLE, n, SUPERSAMPLE, 3).mean((1, 3))
        small = ndimage.gaussian_filter(small, (0.55, 0.55, 0))[RIM_PX:-RIM_PX, RIM_PX:-RIM_PX]
        place = [self.knobs.seed, 18, round(canvas.left * 4) & 0xFFFFFFFF, round(canvas.top * 4) & 0xFFFFFFFF]
        small = small + np.random.default_rng(place).normal(0, 2.6, (px, px, 3)).astype(np.float32)
        return np.ascontiguousarray(np.rint(small).clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


def _markings(lines: list[LineString], kinds: NDArray[np.int8]) -> list[BaseGeometry]:
    """Dashed centre lines; lane lines and edge lines on the motorway and primaries."""
    out: list[BaseGeometry] = []
    for line, kind in zip(lines, kinds, strict=True):
        if kind >= 4:
            continue
        offsets = {0: (-10.6, -6.6, 6.6, 10.6), 1: (-3.6, 0.0, 3.6)}.get(int(kind), (0.0,))
        for offset in offsets:
            curve = line.parallel_offset(offset) if offset else line
            solid = abs(offset) > 10 or (kind == 1 and offset == 0)
            out += [curve.buffer(0.16)] if solid else _dashes(curve)
    return out


def _dashes(curve: BaseGeometry) -> list[BaseGeometry]:
    at = np.arange(6.0, max(curve.length - 6, 0), 9.0)
    if not len(at):
        return []
    ends = [shapely.get_coordinates(shapely.line_interpolate_point(curve, at + d)) for d in (0.0, 3.5)]
    return list(shapely.buffer(shapely.linestrings(np.stack(ends, 1)), 0.16, cap_style="flat"))


def _lit_halves(land: Landscape) -> NDArray[np.object_] | list[BaseGeometry]:
    """The half of every roof that faces the sun, cut along its ridge."""
    if not len(land.roofs):
        return []
    r = land.roofs
    middle = (r[:, [0, 1]] + r[:, [3, 2]]) / 2
    first = np.stack([r[:, 0], r[:, 1], middle[:, 1], middle[:, 0]], 1)
    second = np.stack([middle[:, 0], middle[:, 1], r[:, 2], r[:, 3]], 1)
    faces = ((first.mean(1) - r.mean(1)) @ land.sun) < 0
    return shapely.polygons(np.where(faces[:, None, None], first, second))


def _shadow_shapes(land: Landscape) -> NDArray[np.object_] | list[BaseGeometry]:
    if not len(land.roofs):
        return []
    moved = land.roofs + (land.heights[:, None] * land.sun)[:, None, :]
    return shapely.convex_hull(shapely.multipoints(np.concatenate([land.roofs, moved], 1)))


@njit(cache=True)
def _draw_trees(rgb, wobble, trees, tone, left, top, step, sun_x, sun_y, shadow):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Shadow first, then crowns lit from one side; in place."""
    height, width = rgb.shape[0], rgb.shape[1]
    for shade in (True, False):
        for k in range(len(trees)):
            r = trees[k, 2]
            x, y = trees[k, 0], trees[k, 1]
            if shade:
                x += sun_x * r * 1.1
                y += sun_y * r * 1.1
            cj, ci, rp = (x - left) / step, (top - y) / step, r / step
            for i in range(max(0, int(ci - 1.3 * rp)), min(height, int(ci + 1.3 * rp) + 2)):
                for j in range(max(0, int(cj - 1.3 * rp)), min(width, int(cj + 1.3 * rp) + 2)):
                    di, dj = (i - ci) / rp, (j - cj) / rp
                    d = (di * di + dj * dj) * (1 + 0.45 * wobble[i, j])
                    if d > 1:
                        continue
                    if shade:
                        f = 1 - 0.5 * shadow
                        for c in range(3):
                            rgb[i, j, c] *= f
                    else:
                        light = 1 + 0.34 * (di * sun_y - dj * sun_x) / (0.3 + abs(sun_x) + abs(sun_y)) + 0.3 * wobble[i, j]
                        light *= 1.08 - 0.42 * d
                        a = 0.94
                        rgb[i, j, 0] += a * ((52 + 26 * tone[k]) * light - rgb[i, j, 0])
                        rgb[i, j, 1] += a * ((76 + 24 * tone[k]) * light - rgb[i, j, 1])
                        rgb[i, j, 2] += a * ((40 + 12 * tone[k]) * light - rgb[i, j, 2])
