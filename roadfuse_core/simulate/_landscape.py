"""What stands between the streets: buildings, trees, parking lots, ponds, railways, cars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray
from rasterio import features
from rasterio.transform import from_origin
from shapely.geometry import LineString, Polygon

from roadfuse_core.simulate._config import CityKnobs
from roadfuse_core.simulate._noise import noise_at
from roadfuse_core.simulate._streets import (
    CLASSES,
    DENSE,
    FIELD,
    FOREST,
    HOUSES,
    INDUSTRY,
    MARGIN_M,
    PARK,
    TRACK,
    Streets,
    warp,
)

__all__ = ["Landscape", "grow_landscape"]

Floats = NDArray[np.float64]
ROOFS = {
    HOUSES: np.array([[150, 78, 60], [128, 66, 54], [104, 92, 88], [88, 84, 84], [168, 104, 80], [138, 126, 116]]),
    DENSE: np.array([[142, 82, 66], [122, 112, 106], [152, 146, 140], [108, 102, 100], [176, 168, 158], [96, 90, 92]]),
    INDUSTRY: np.array([[196, 198, 200], [172, 176, 178], [150, 156, 164], [214, 212, 206], [120, 134, 150]]),
}
CARS = np.array([[226, 226, 226], [60, 62, 66], [120, 124, 130], [150, 40, 38], [44, 62, 110], [188, 186, 180]])


@dataclass(frozen=True)
class Landscape:
    """Everything but ground and streets, in local metres.

    Attributes:
        roofs: (n, 4, 2) corners; the first edge runs along the street.
        roof_rgb: (n, 3) float64, 0 … 255.
        heights: (n,) metres.
        gabled: (n,) bool.
        parking: Polygons of paved lots.
        waiting: (k, 2) places where vehicles stand, inside the lots.
        ponds: Polygons of water.
        rails: Centre lines of railways.
        trees: (t, 3) x, y and radius.
        cars: (c, 4, 2) corners.
        car_rgb: (c, 3) float64.
        sun: Unit vector (east, north) towards which shadows fall, times shadow metres per metre of height.
    """

    roofs: Floats
    roof_rgb: Floats
    heights: Floats
    gabled: NDArray[np.bool_]
    parking: list[Polygon]
    waiting: Floats
    ponds: list[Polygon]
    rails: list[LineString]
    trees: Floats
    cars: Floats
    car_rgb: Floats
    sun: Floats


@njit(cache=True)
def _place(
    centres: Floats, angles: Floats, sizes: Floats, occupied: NDArray[np.uint8], cell: float, origin: float
) -> NDArray[np.bool_]:
    """Greedily accept rectangles that cover no occupied cell, and occupy them; first come, first served."""
    out = np.zeros(len(centres), np.bool_)
    for n in range(len(centres)):
        c, s = np.cos(angles[n]), np.sin(angles[n])
        nu, nv = int(sizes[n, 0] / cell) + 2, int(sizes[n, 1] / cell) + 2
        free = True
        for mark in (False, True):
            if mark and not free:
                break
            for a in range(nu):
                for b in range(nv):
                    du = (a / (nu - 1) - 0.5) * sizes[n, 0]
                    dv = (b / (nv - 1) - 0.5) * sizes[n, 1]
                    i = int((centres[n, 1] + du * s + dv * c - origin) / cell)
                    j = int((centres[n, 0] + du * c - dv * s - origin) / cell)
                    if i < 0 or j < 0 or i >= occupied.shape[0] or j >= occupied.shape[1]:
                        free = False
                    elif mark:
                        occupied[i, j] = 1
                    elif occupied[i, j]:
                        free = False
        out[n] = free
    return out


class _Occupancy:
    """A raster of what is taken, about 1 m (2 m for large cities); south-up, row 0 at the origin."""

    def __init__(self, knobs: CityKnobs) -> None:
        self.cell = 1.0 if knobs.size_m <= 8192 else 2.0
        self.origin = -MARGIN_M
        self.n = int((knobs.size_m + 2 * MARGIN_M) / self.cell) + 1
        self.raster: NDArray[np.uint8] = np.zeros((self.n, self.n), np.uint8)

    def burn(self, shapes: list[Polygon]) -> None:
        """Take the area of polygons."""
        if shapes:
            top = self.origin + self.n * self.cell
            north_up = features.rasterize(
                shapes, (self.n, self.n), transform=from_origin(self.origin, top, self.cell, self.cell), dtype="uint8"
            )
            self.raster |= north_up[::-1]

    def place(self, centres: Floats, angles: Floats, sizes: Floats) -> NDArray[np.bool_]:
        """Which rectangles were free; these are taken."""
        return _place(centres, angles, sizes, self.raster, self.cell, self.origin)

    def taken(self, xy: Floats) -> NDArray[np.bool_]:
        """Whether places are taken or outside."""
        ij = ((xy - self.origin) / self.cell).astype(np.int64).clip(0, self.n - 1)
        return self.raster[ij[:, 1], ij[:, 0]] > 0


def rectangles(centres: Floats, angles: Floats, sizes: Floats) -> Floats:
    """(n, 4, 2) corners of rotated rectangles."""
    unit = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    local = unit[None] * sizes[:, None, :]
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    x = local[..., 0] * c - local[..., 1] * s
    y = local[..., 0] * s + local[..., 1] * c
    return np.stack([x, y], -1) + centres[:, None, :]


def grow_landscape(knobs: CityKnobs, streets: Streets) -> Landscape:
    """The landscape of a city; with fewer trees or parking lots the rest stays where it is."""
    rng = np.random.default_rng([knobs.seed, 13])
    space = _Occupancy(knobs)
    half = np.array([k.width_m / 2 + 2.5 for k in CLASSES])[streets.kind]
    space.burn(list(shapely.buffer([LineString(line) for line in streets.lines], half, cap_style="flat")))
    rails = _rails(knobs)
    space.burn([r.buffer(6.5) for r in rails])
    lots, waiting = _parking(knobs, rng, streets, space)
    ponds = _ponds(rng, streets)
    space.burn(ponds)
    roofs, rgb, heights, gabled = _buildings(knobs, rng, streets, space)
    trees = _trees(knobs, streets, space)
    cars, car_rgb = _cars(rng, streets, lots)
    azimuth = rng.uniform(0.2, 1.0) * np.pi
    sun = np.array([np.cos(azimuth), np.sin(azimuth)]) * (0.25 + 0.9 * knobs.shadow)
    return Landscape(roofs, rgb, heights, gabled, lots, waiting, ponds, rails, trees, cars, car_rgb, sun)


def _rails(knobs: CityKnobs) -> list[LineString]:
    rng = np.random.default_rng([knobs.seed, 14])
    t = np.linspace(-0.6, 1.6, 400) * knobs.size_m
    out = []
    for _ in range(round(3 * knobs.lookalikes)):
        at, phase, vertical = rng.uniform(0.1, 0.9) * knobs.size_m, rng.uniform(0, 6), rng.random() < 0.5
        side = at + 60 * np.sin(t / 700 + phase)
        out.append(LineString(warp(knobs, np.stack([side, t] if vertical else [t, side], 1))))
    return out


def _parking(knobs: CityKnobs, rng: np.random.Generator, streets: Streets, space: _Occupancy) -> tuple[list[Polygon], Floats]:
    lots: list[Polygon] = []
    waiting = [np.zeros((0, 2))]
    for outline, land in streets.parts:
        draw, size = rng.random(), rng.uniform([28, 22], [70, 42])
        if land not in (DENSE, HOUSES, INDUSTRY) or draw > knobs.parking * (0.5 if land == INDUSTRY else 0.16):
            continue
        edge = outline[8] - outline[0] if len(outline) > 8 else outline[1] - outline[0]
        angle = np.array([np.arctan2(edge[1], edge[0])])
        inner = Polygon(outline).buffer(-26)
        if inner.is_empty:
            continue
        spot = np.array(inner.representative_point().coords)
        if space.place(spot, angle, size[None]).all():
            corners = rectangles(spot, angle, size[None])[0]
            lots.append(Polygon(corners))
            waiting.append(corners.mean(0) + (rng.random((6, 1)) - 0.5) * (corners[1] - corners[0])
                           + (rng.random((6, 1)) - 0.5) * (corners[3] - corners[0]))  # fmt: skip
    return lots, np.concatenate(waiting)


def _ponds(rng: np.random.Generator, streets: Streets) -> list[Polygon]:
    out = []
    for outline, land in streets.parts:
        draw, radius = rng.random(), rng.uniform(20, 60)
        bumps = rng.normal(0, 0.2, 5) / (2 + np.arange(5))
        if land != PARK or draw > 0.5:
            continue
        room = Polygon(outline).buffer(-30)
        if room.is_empty:
            continue
        t = np.linspace(0, 2 * np.pi, 60)
        r = radius * (1 + sum(b * np.cos((k + 2) * t + 5 * b) for k, b in enumerate(bumps)))
        centre = room.representative_point()
        out.append(
            Polygon(np.stack([centre.x + 1.4 * r * np.cos(t), centre.y + r * np.sin(t)], 1)).buffer(0).intersection(room)
        )
    return [p for g in out for p in getattr(g, "geoms", [g]) if p.area > 200]


# Per land use: lot width, building width, building depth (metres, from … to), setback from the street's edge.
_LOTS = {
    DENSE: ((14, 24), (13, 24), (12, 17), 2.5),
    HOUSES: ((15, 23), (9, 14), (8, 11), 7.5),
    INDUSTRY: ((45, 95), (34, 80), (18, 48), 13.0),
}


def _buildings(
    knobs: CityKnobs, rng: np.random.Generator, streets: Streets, space: _Occupancy
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
    rows = [_building_row(rng, outline, land) for outline, land in streets.parts if land in _LOTS]
    rows += [_flat_roofs(knobs, rng, outline) for outline, land in streets.parts if land == INDUSTRY]
    if not rows:
        return np.zeros((0, 4, 2)), np.zeros((0, 3)), np.zeros(0), np.zeros(0, bool)
    centres, angles, sizes, heights, rgb, gabled = (np.concatenate(c) for c in zip(*rows, strict=True))
    # Long roofs first, so that they find room.
    order = np.argsort(-sizes[:, 0] / sizes[:, 1] * (sizes[:, 0] > 55), kind="stable")
    keep = np.zeros(len(order), bool)
    keep[order] = space.place(centres[order], angles[order], sizes[order] + np.where(heights[order] > 9.5, 0.2, 2.5)[:, None])
    return rectangles(centres[keep], angles[keep], sizes[keep]), rgb[keep], heights[keep], gabled[keep]


_Row = tuple[Floats, Floats, Floats, Floats, Floats, NDArray[np.bool_]]


def _building_row(rng: np.random.Generator, outline: Floats, land: int) -> _Row:
    """Candidates along the inside of a block's outline, and a second row behind it."""
    lot, width, depth, setback = _LOTS[land]
    places, angles, depths = [], [], []
    for ring in (0, 1):
        inset = 8.0 + setback + ring * (26 if land == HOUSES else 30)
        shape = Polygon(outline).buffer(-inset)
        for part in getattr(shape, "geoms", [shape]):
            if part.is_empty or (ring and land == HOUSES):
                continue
            border = part.exterior
            at = np.cumsum(rng.uniform(*lot, int(border.length / lot[0]) + 1))
            at = at[at < border.length]
            ends = shapely.get_coordinates(shapely.line_interpolate_point(border, np.concatenate([at - 3, at + 3])))
            first, last = ends[: len(at)], ends[len(at) :]
            angle = np.arctan2(*(last - first).T[::-1])
            deep = rng.uniform(*depth, len(at))
            # The exterior runs clockwise after buffer(): the block lies to the right of its direction.
            inward = np.stack([np.sin(angle), -np.cos(angle)], 1)
            places.append((first + last) / 2 + inward * (deep / 2)[:, None])
            angles.append(angle)
            depths.append(deep)
    n = sum(len(p) for p in places)
    if n == 0:
        return np.zeros((0, 2)), np.zeros(0), np.zeros((0, 2)), np.zeros(0), np.zeros((0, 3)), np.zeros(0, bool)
    sizes = np.stack([rng.uniform(*width, n), np.concatenate(depths)], 1)
    low, high = {DENSE: (10, 26), HOUSES: (5, 9), INDUSTRY: (7, 12)}[land]
    rgb = ROOFS[land][rng.integers(0, len(ROOFS[land]), n)] + rng.normal(0, 3, (n, 3)) + rng.normal(0, 12, (n, 1))
    gabled = rng.random(n) < {DENSE: 0.5, HOUSES: 0.93, INDUSTRY: 0.08}[land]
    return np.concatenate(places), np.concatenate(angles), sizes, rng.uniform(low, high, n), rgb, gabled


def _flat_roofs(knobs: CityKnobs, rng: np.random.Generator, outline: Floats) -> _Row:
    """Long grey roofs as wide as a street: the look-alikes of industrial areas."""
    n = 24
    inner = Polygon(outline).buffer(-16)
    shift = rng.random((n, 2))
    length, wide = rng.uniform(60, 130, n), rng.uniform(6.5, 10.5, n)
    grey = rng.uniform(104, 150, (n, 1)) + rng.normal(0, 3, (n, 3))
    keep = rng.random(n) < knobs.lookalikes * 0.8
    if inner.is_empty:
        keep[:] = False
    box = np.array(inner.bounds if not inner.is_empty else (0, 0, 1, 1))
    places = box[:2] + shift * (box[2:] - box[:2])
    edge = outline[8] - outline[0] if len(outline) > 8 else outline[1] - outline[0]
    angles = np.full(n, np.arctan2(edge[1], edge[0]))
    sizes = np.stack([length, wide], 1)
    corners = rectangles(places, angles, sizes)
    keep &= shapely.contains(inner, shapely.polygons(corners))
    return (
        places[keep],
        angles[keep],
        sizes[keep],
        np.full(int(keep.sum()), 5.0),
        grey[keep],
        np.zeros(int(keep.sum()), bool),
    )


def _trees(knobs: CityKnobs, streets: Streets, space: _Occupancy) -> Floats:
    """Street trees by the canopy knob; garden, park and forest trees by land use."""
    out = [_street_trees(knobs, streets)]
    rng = np.random.default_rng([knobs.seed, 16])
    density = {DENSE: 0.0012, HOUSES: 0.0040, INDUSTRY: 0.0004, PARK: 0.0048, FIELD: 0.00012, FOREST: 0.021}
    for outline, land in streets.cells:
        shape = Polygon(outline)
        x0, y0, x1, y1 = shape.bounds
        n = rng.poisson(density[land] * (x1 - x0) * (y1 - y0))
        xy = rng.uniform((x0, y0), (x1, y1), (n, 2))
        radius = rng.gamma(9, (0.36 if land != FOREST else 0.42), n).clip(1.4, 7.5)
        clump = noise_at(knobs.seed + 77, xy[:, 0], xy[:, 1], 60.0)
        keep = shapely.contains_xy(shape, xy) & ~space.taken(xy)
        if land in (PARK, HOUSES):
            keep &= clump > (0.0 if land == PARK else -0.35)
        out.append(np.column_stack([xy, radius])[keep])
    trees = np.concatenate(out)
    inside = ((trees[:, :2] > -20) & (trees[:, :2] < knobs.size_m + 20)).all(1)
    return trees[inside]


def _street_trees(knobs: CityKnobs, streets: Streets) -> Floats:
    rng = np.random.default_rng([knobs.seed, 15])
    out = [np.zeros((0, 3))]
    for line, kind in zip(streets.lines, streets.kind, strict=True):
        length = float(np.hypot(*np.diff(line, axis=0).T).sum())
        n = int(length / 7.5)
        draws, lined = rng.random((2, n)), rng.random(2)
        jitter, radius = rng.normal(0, 1.1, (2, n, 2)), rng.gamma(12, 0.36, (2, n)).clip(2.2, 7.5)
        if n < 2 or kind == 0:
            continue
        at = np.linspace(4, length - 4, n)
        curve = LineString(line)
        here, ahead = (shapely.get_coordinates(shapely.line_interpolate_point(curve, at + d)) for d in (-1, 1))
        tangent = (ahead - here) / np.hypot(*(ahead - here).T)[:, None].clip(1e-9)
        for side, sign in enumerate((-1.0, 1.0)):
            # Some sides are avenues, others bare; the knob raises both shares, so that more canopy only adds trees.
            share = (0.9 if lined[side] < knobs.canopy else 0.22) * knobs.canopy
            off = CLASSES[kind].width_m / 2 + 1.6
            xy = (here + ahead) / 2 + sign * off * np.stack([-tangent[:, 1], tangent[:, 0]], 1) + jitter[side]
            out.append(np.column_stack([xy, radius[side] * (0.8 + 0.5 * knobs.canopy)])[draws[side] < share])
    return np.concatenate(out)


def _cars(rng: np.random.Generator, streets: Streets, lots: list[Polygon]) -> tuple[Floats, Floats]:
    centres, angles = [np.zeros((0, 2))], [np.zeros(0)]
    for line, kind in zip(streets.lines, streets.kind, strict=True):
        length = float(np.hypot(*np.diff(line, axis=0).T).sum())
        n = rng.poisson(length * (0.012 if kind != TRACK else 0.001))
        at, side = rng.uniform(0, length, n), rng.choice([-0.25, 0.25, -0.42, 0.42], n) * CLASSES[kind].width_m
        if n == 0:
            continue
        curve = LineString(line)
        here, ahead = (shapely.get_coordinates(shapely.line_interpolate_point(curve, at + d)) for d in (-2, 2))
        angle = np.arctan2(*(ahead - here).T[::-1])
        centres.append((here + ahead) / 2 + side[:, None] * np.stack([-np.sin(angle), np.cos(angle)], 1))
        angles.append(angle)
    for lot in lots:
        corners = np.array(lot.exterior.coords)[:4]
        along, across = corners[1] - corners[0], corners[3] - corners[0]
        nu, nv = int(np.hypot(*along) / 2.9), max(1, int(np.hypot(*across) / 8.5))
        u, v = (g.ravel() for g in np.meshgrid((np.arange(nu) + 0.5) / nu, (np.arange(nv) + 0.5) / nv))
        full = rng.random(len(u)) < 0.62
        centres.append((corners[0] + u[:, None] * along + v[:, None] * across)[full])
        angles.append(np.full(int(full.sum()), np.arctan2(across[1], across[0])))
    where, turn = np.concatenate(centres), np.concatenate(angles)
    rgb = CARS[rng.integers(0, len(CARS), len(where))] + rng.normal(0, 8, (len(where), 3))
    return rectangles(where, turn, np.broadcast_to([4.5, 1.9], (len(where), 2))), rgb
