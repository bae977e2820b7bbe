"""A street network: arterials on a warped lattice, local streets by recursive division of its cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.simulate._config import CityKnobs
from roadfuse_core.simulate._noise import noise_at

__all__ = ["CLASSES", "LAND", "RoadClass", "Streets", "lay_streets", "warp"]

Floats = NDArray[np.float64]


class RoadClass(NamedTuple):
    """A road class: paved width in metres, free speed in km/h, grey level of its asphalt (0 … 255)."""

    name: str
    width_m: float
    speed_kmh: float
    grey: int


CLASSES = (
    RoadClass("motorway", 23.0, 95.0, 142),
    RoadClass("primary", 15.0, 55.0, 112),
    RoadClass("secondary", 11.0, 48.0, 122),
    RoadClass("tertiary", 8.5, 40.0, 128),
    RoadClass("residential", 6.5, 30.0, 134),
    RoadClass("track", 4.0, 18.0, 158),
)
MOTORWAY, PRIMARY, SECONDARY, TERTIARY, RESIDENTIAL, TRACK = range(6)
LAND = ("dense", "residential", "industrial", "park", "field", "forest")
DENSE, HOUSES, INDUSTRY, PARK, FIELD, FOREST = range(6)
# Longest side of a block in metres before it is divided, by land use.
BLOCK_M = {DENSE: 104.0, HOUSES: 140.0, INDUSTRY: 250.0, PARK: 420.0, FIELD: 520.0, FOREST: 600.0}
MARGIN_M = 260.0


@dataclass(frozen=True)
class Streets:
    """The network in local metres: x east, y north, origin at the lower left corner of the city.

    Attributes:
        nodes: (n, 2) float64, metres.
        edges: (m, 2) int64, node numbers.
        kind: (m,) int8, index into CLASSES.
        lines: m arrays (k, 2) float64 from first to second node, metres.
        cells: Land-use polygons with their index into LAND, metres.
        parts: Divided blocks, for buildings, as polygons with their index into LAND.
    """

    nodes: Floats
    edges: NDArray[np.int64]
    kind: NDArray[np.int8]
    lines: list[Floats]
    cells: list[tuple[Floats, int]]
    parts: list[tuple[Floats, int]]

    def lengths(self) -> Floats:
        """(m,) metres along each edge."""
        return np.array([np.hypot(*np.diff(line, axis=0).T).sum() for line in self.lines])


@dataclass
class _Line:
    """An axis-parallel street in the unwarped plane, with the places where others meet it."""

    vertical: bool
    at: float
    low: float
    high: float
    kind: int
    cuts: set[float] = field(default_factory=set)


class _Rect(NamedTuple):
    u0: float
    u1: float
    v0: float
    v1: float
    left: _Line
    right: _Line
    bottom: _Line
    top: _Line


def warp(knobs: CityKnobs, uv: Floats) -> Floats:
    """Unwarped to local metres: a rotation about the centre and smooth displacements.

    Args:
        knobs: The city.
        uv: (..., 2) metres.

    Returns:
        (..., 2) metres.
    """
    rng = np.random.default_rng([knobs.seed, 11])
    angle = rng.uniform(-0.7, 0.7)
    centre = knobs.size_m / 2
    d = uv - centre
    x = d[..., 0] * np.cos(angle) - d[..., 1] * np.sin(angle)
    y = d[..., 0] * np.sin(angle) + d[..., 1] * np.cos(angle)
    s = knobs.seed * 16
    for k, (wave, amplitude) in enumerate(((1900.0, 150.0), (520.0, 26.0))):
        dx, dy = (noise_at(s + 2 * k + a, x, y, wave) * amplitude for a in (0, 1))
        x, y = x + dx, y + dy
    return np.stack([x + centre, y + centre], -1)


def lay_streets(knobs: CityKnobs) -> Streets:
    """The network of a city; depends on seed and size alone."""
    rng = np.random.default_rng([knobs.seed, 12])
    half = knobs.size_m * 0.75 + MARGIN_M
    centre = knobs.size_m / 2
    us, vs = (_arterial_places(rng, centre - half, centre + half) for _ in range(2))
    ranks_u, ranks_v = _arterial_classes(rng, len(us), True), _arterial_classes(rng, len(vs), False)
    columns = [_Line(True, u, vs[0], vs[-1], k, set(vs)) for u, k in zip(us, ranks_u, strict=True)]
    rows = [_Line(False, v, us[0], us[-1], k, set(us)) for v, k in zip(vs, ranks_v, strict=True)]
    lines: list[_Line] = [*columns, *rows]
    parts: list[tuple[_Rect, int]] = []
    cells: list[tuple[_Rect, int]] = []
    for i in range(len(us) - 1):
        for j in range(len(vs) - 1):
            rect = _Rect(us[i], us[i + 1], vs[j], vs[j + 1], columns[i], columns[i + 1], rows[j], rows[j + 1])
            land = _land_use(knobs, rng, (us[i] + us[i + 1]) / 2 - centre, (vs[j] + vs[j + 1]) / 2 - centre)
            cells.append((rect, land))
            _divide(rng, rect, land, 0, lines, parts)
    return _assemble(knobs, lines, _outlines(knobs, cells), _outlines(knobs, parts))


def _arterial_places(rng: np.random.Generator, low: float, high: float) -> list[float]:
    places = [low]
    while places[-1] < high:
        places.append(places[-1] + float(np.clip(rng.normal(430, 90), 280, 620)))
    return [round(p, 2) for p in places]


def _arterial_classes(rng: np.random.Generator, count: int, with_motorway: bool) -> list[int]:
    kinds = rng.choice([PRIMARY, SECONDARY, TERTIARY], count, p=[0.22, 0.43, 0.35]).tolist()
    if with_motorway:
        kinds[int(rng.integers(count // 4, max(count // 4 + 1, 3 * count // 4)))] = MOTORWAY
    return kinds


def _land_use(knobs: CityKnobs, rng: np.random.Generator, du: float, dv: float) -> int:
    away = np.hypot(du, dv) / (knobs.size_m * 0.6)
    green = float(noise_at(knobs.seed + 91, np.array([du]), np.array([dv]), 900)[0])
    weights = np.array(
        [
            1.6 * max(0.0, 1 - 1.6 * away),
            1.3,
            0.45 + 0.3 * away,
            0.28 + 0.25 * max(green, 0),
            max(0.0, 1.5 * (away - 0.35)),
            max(0.0, 0.9 * (away - 0.3) + 0.4 * green),
        ]
    ).clip(0.02)
    return int(rng.choice(6, p=weights / weights.sum()))


def _divide(
    rng: np.random.Generator, r: _Rect, land: int, depth: int, lines: list[_Line], parts: list[tuple[_Rect, int]]
) -> None:
    """Split a block by a street across its longer side until it is as small as its land use asks."""
    wide, high = r.u1 - r.u0, r.v1 - r.v0
    longest, shortest = max(wide, high), min(wide, high)
    limit = BLOCK_M[land] * rng.uniform(0.8, 1.35)
    if longest < limit or (shortest < limit * 0.42 and longest < 1.6 * limit):
        parts.append((r, land))
        return
    vertical = bool(wide > high * rng.uniform(0.85, 1.2))
    share = float(rng.uniform(0.36, 0.64))
    kind = TERTIARY if depth == 0 and land in (DENSE, HOUSES, INDUSTRY) else RESIDENTIAL
    kind = TRACK if land in (PARK, FIELD, FOREST) else kind
    if vertical:
        at = round(r.u0 + share * wide, 2)
        line = _Line(True, at, r.v0, r.v1, kind, {r.v0, r.v1})
        r.bottom.cuts.add(at)
        r.top.cuts.add(at)
        halves = r._replace(u1=at, right=line), r._replace(u0=at, left=line)
    else:
        at = round(r.v0 + share * high, 2)
        line = _Line(False, at, r.u0, r.u1, kind, {r.u0, r.u1})
        r.left.cuts.add(at)
        r.right.cuts.add(at)
        halves = r._replace(v1=at, top=line), r._replace(v0=at, bottom=line)
    lines.append(line)
    for half in halves:
        _divide(rng, half, land, depth + 1, lines, parts)


def _outlines(knobs: CityKnobs, rects: list[tuple[_Rect, int]]) -> list[tuple[Floats, int]]:
    """Warped outlines of 32 vertices each, eight a side."""
    warped = warp(knobs, np.stack([_outline(r) for r, _ in rects]))
    return [(outline, land) for outline, (_, land) in zip(warped, rects, strict=True)]


def _outline(r: _Rect) -> Floats:
    t = np.linspace(0, 1, 9)[:-1]
    u, v = r.u0 + t * (r.u1 - r.u0), r.v0 + t * (r.v1 - r.v0)
    low_u, high_u, low_v, high_v = (np.full(8, x) for x in (r.u0, r.u1, r.v0, r.v1))
    back_u, back_v = r.u1 - t * (r.u1 - r.u0), r.v1 - t * (r.v1 - r.v0)
    return np.stack([np.concatenate([u, high_u, back_u, low_u]), np.concatenate([low_v, v, high_v, back_v])], 1)


def _assemble(
    knobs: CityKnobs, lines: list[_Line], cells: list[tuple[Floats, int]], parts: list[tuple[Floats, int]]
) -> Streets:
    pieces = [(line, a, b) for line in lines for a, b in pairwise(sorted(c for c in line.cuts if line.low <= c <= line.high))]
    straight = [_straight(*piece) for piece in pieces]
    # One warp for all vertices: a large city has a million of them.
    curves = np.split(warp(knobs, np.concatenate(straight)), np.cumsum([len(s) for s in straight])[:-1])
    low, high = -MARGIN_M, knobs.size_m + MARGIN_M
    numbers: dict[tuple[float, float], int] = {}
    edges, kinds, kept = [], [], []
    for (line, a, b), curve in zip(pieces, curves, strict=True):
        if not ((curve > low) & (curve < high)).all():
            continue
        ends = [(line.at, c) if line.vertical else (c, line.at) for c in (a, b)]
        edges.append([numbers.setdefault(e, len(numbers)) for e in ends])
        kinds.append(line.kind)
        kept.append(curve)
    nodes = warp(knobs, np.array(list(numbers)))
    return Streets(nodes, np.array(edges, np.int64), np.array(kinds, np.int8), kept, cells, parts)


def _straight(line: _Line, a: float, b: float) -> Floats:
    """Vertices of a street between two cuts, unwarped, about 14 m apart."""
    t = np.linspace(a, b, max(2, int((b - a) / 14) + 1))
    fixed = np.full(len(t), line.at)
    return np.stack([fixed, t] if line.vertical else [t, fixed], 1)
