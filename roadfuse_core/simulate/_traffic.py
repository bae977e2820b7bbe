"""Vehicles routed along the network, sampled as receivers sample, with the dirt of real dumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio import features
from rasterio.transform import from_origin
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, dijkstra
from shapely.geometry import Polygon

from roadfuse_core.simulate._config import CityKnobs
from roadfuse_core.simulate._landscape import Landscape
from roadfuse_core.simulate._noise import noise_at
from roadfuse_core.simulate._streets import CLASSES, DENSE, RESIDENTIAL, Streets

__all__ = ["Routes", "day_of_points", "plan_routes"]

Floats = NDArray[np.float64]
ROUTES = 1500
HUBS = 60
PULL_OUT_S = 300.0  # a vehicle leaves a waiting area unobserved
FIRST_DAY = np.datetime64("2026-03-29")
SCHEMA = pa.schema(
    [
        ("vehicle", pa.int32()),
        ("time", pa.timestamp("ms", tz="UTC")),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("speed", pa.float32()),
        ("bearing", pa.float32()),
        ("interval", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Routes:
    """Routes through the city, popular ones first, as vertices in driving order.

    Attributes:
        xy: (n, 2) metres, on the right-hand side of the street.
        seconds: (n,) travel time since the route's start at free speed.
        speed: (n,) km/h on the way to the next vertex.
        start: (r + 1,) first vertex of each route.
        weight: (r,) probability, a power law.
        used: Which edges any route uses.
    """

    xy: Floats
    seconds: Floats
    speed: Floats
    start: NDArray[np.int64]
    weight: Floats
    used: NDArray[np.bool_]

    @cached_property
    def reach(self) -> float:
        """More seconds than any route takes."""
        return float(self.seconds.max()) + 1

    @cached_property
    def key(self) -> Floats:
        """(n,) ascending: route number times `reach` plus seconds, to find places of all routes in one search."""
        return self.seconds + np.repeat(np.arange(len(self.weight)), np.diff(self.start)) * self.reach


def plan_routes(knobs: CityKnobs, streets: Streets) -> Routes:
    """Fastest routes between power-law hubs and random places, on the streets that have traffic."""
    rng = np.random.default_rng([knobs.seed, 21])
    minor = streets.kind >= RESIDENTIAL
    open_edges = np.flatnonzero(~(minor & (rng.random(len(streets.kind)) < knobs.untravelled)))
    speed = np.array([c.speed_kmh for c in CLASSES])[streets.kind]
    seconds = streets.lengths() / (speed / 3.6)
    graph, edge_of = _graph(streets, open_edges, seconds)
    parts = connected_components(graph, directed=False)[1]
    main = np.flatnonzero(parts == np.bincount(parts).argmax())
    hubs = rng.choice(main, min(HUBS, len(main)), replace=False)
    before = dijkstra(graph, directed=False, indices=hubs, return_predecessors=True)[1]
    share = (1.0 + np.arange(len(hubs))) ** -knobs.traffic_power
    pieces, used = [], np.zeros(len(streets.kind), bool)
    for hub in rng.choice(len(hubs), ROUTES, p=share / share.sum()):
        path = _walk(before[hub], int(rng.choice(main)))
        edges = [edge_of[a, b] for a, b in pairwise(path)]
        if not edges:
            continue
        used[[abs(e) - 1 for e in edges]] = True
        back = bool(rng.random() < 0.5)
        pieces.append(_vertices(streets, [-e for e in reversed(edges)] if back else edges, speed))
    start = np.concatenate([[0], np.cumsum([len(p[0]) for p in pieces])])
    weight = (1.0 + np.arange(len(pieces))) ** -knobs.traffic_power
    xy, seconds, pace = (np.concatenate(c) for c in zip(*pieces, strict=True))
    return Routes(xy, seconds, pace, start, weight / weight.sum(), used)


def _graph(streets: Streets, open_edges: NDArray[np.int64], seconds: Floats) -> tuple[coo_array, dict[tuple[int, int], int]]:
    """Undirected travel times, and the signed edge number (from 1) of every node pair."""
    n = len(streets.nodes)
    edge_of: dict[tuple[int, int], int] = {}
    for e in open_edges.tolist():
        a, b = streets.edges[e].tolist()
        if (a, b) not in edge_of or seconds[e] < seconds[abs(edge_of[a, b]) - 1]:
            edge_of[a, b], edge_of[b, a] = e + 1, -(e + 1)
    kept = np.array(sorted({abs(e) - 1 for e in edge_of.values()}), np.int64)
    i, j = streets.edges[kept].T
    return coo_array((seconds[kept], (i, j)), shape=(n, n)).tocsr(), edge_of


def _walk(before: NDArray[np.int32], target: int) -> list[int]:
    path = [target]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _vertices(streets: Streets, edges: list[int], speed: Floats) -> tuple[Floats, Floats, Floats]:
    lines = [streets.lines[e - 1] if e > 0 else streets.lines[-e - 1][::-1] for e in edges]
    lanes = [_right_lane(ln, CLASSES[streets.kind[abs(e) - 1]].width_m) for ln, e in zip(lines, edges, strict=True)]
    xy = np.concatenate(lanes)
    pace = np.concatenate([np.full(len(ln), speed[abs(e) - 1]) for ln, e in zip(lanes, edges, strict=True)])
    step = np.hypot(*np.diff(xy, axis=0).T) / (pace[:-1] / 3.6)
    return xy, np.concatenate([[0.0], np.cumsum(step)]), pace


def _right_lane(line: Floats, width_m: float) -> Floats:
    d = np.gradient(line, axis=0)
    d /= np.hypot(*d.T)[:, None].clip(1e-9)
    return line + width_m / 4 * np.stack([d[:, 1], -d[:, 0]], 1)


def day_of_points(
    knobs: CityKnobs,
    streets: Streets,
    land: Landscape,
    routes: Routes,
    to_lonlat: Transformer,
    origin: Floats,
    day: int,
) -> Iterator[tuple[pa.Table, dict[str, int]]]:
    """One day's rows in batches, never held together.

    Args:
        knobs: The city.
        streets: Its network.
        land: Its landscape, for waiting areas and dense quarters.
        routes: Where vehicles go.
        to_lonlat: From the grid's CRS to longitude and latitude.
        origin: (2,) metres of the local origin in the grid's CRS.
        day: 0 is the first dump.

    Yields:
        A table of `SCHEMA`, and how many of its rows are bad, by kind.
    """
    dense = _dense_mask(knobs, streets)
    left, batch = knobs.points_per_day, 0
    while left > 0:
        rng = np.random.default_rng([knobs.seed, 22, day, batch])
        rows = _trips(knobs, rng, land, routes, min(left, 250_000), batch)
        _receiver_errors(knobs, rng, rows, dense)
        table, dirt = _table(knobs, rng, rows, to_lonlat, origin, day)
        yield table, dirt
        left -= len(rows["x"])
        batch += 1


def _dense_mask(knobs: CityKnobs, streets: Streets) -> tuple[NDArray[np.bool_], float]:
    """Which 20 m cells lie in dense quarters."""
    cell = 20.0
    n = int(knobs.size_m / cell) + 1
    shapes = [Polygon(p) for p, land in streets.cells if land == DENSE]
    if not shapes:
        return np.zeros((n, n), bool), cell
    return features.rasterize(shapes, (n, n), transform=from_origin(0, n * cell, cell, cell))[::-1].astype(bool), cell


def _trips(
    knobs: CityKnobs, rng: np.random.Generator, land: Landscape, routes: Routes, rows: int, batch: int
) -> dict[str, Floats]:
    """True positions of sampled trips: exactly `rows` rows in vehicle and time order."""
    intervals = np.array(knobs.intervals_s)
    per_trip = float(np.mean(routes.seconds[routes.start[1:] - 1])) / float(np.mean(intervals)) + 2
    count = int(rows / per_trip * 1.3) + 12
    while True:
        route = rng.choice(len(routes.weight), count, p=routes.weight)
        interval = rng.choice(intervals, count)
        slow = rng.uniform(0.9, 1.7, count)
        total = routes.seconds[routes.start[route + 1] - 1] * slow
        waits = (rng.random(count) < 0.35 * knobs.parking) * rng.integers(2, 12, count) * bool(len(land.waiting))
        samples = np.maximum(1, (total / interval).astype(np.int64) + 1)
        if (samples + waits).sum() >= rows:
            break
        count *= 2
    # Four trips a vehicle and day, six hours apart, so that no two of them overlap.
    begin = (np.arange(count) % 4) * 21_600 + rng.uniform(0, 9000, count)
    vehicle = batch * 1_000_000 + np.arange(count) // 4
    trip = np.repeat(np.arange(count), samples)
    nth = np.arange(len(trip)) - np.repeat(np.cumsum(samples) - samples, samples)
    since = nth * interval[trip]
    at = since / slow[trip]
    x, y, pace, bearing = _along(routes, route[trip], at)
    leaves = begin + (waits > 0) * (waits * interval + PULL_OUT_S)
    moving = {"trip": trip, "x": x, "y": y, "t": leaves[trip] + since,
              "speed": pace / slow[trip] * rng.uniform(0.85, 1.1, len(trip)), "bearing": bearing}  # fmt: skip
    still = _waiting(rng, land, waits, begin, interval)
    out = {k: np.concatenate([moving[k], still[k]]).astype(np.float64) for k in moving}
    order = np.lexsort([out["t"], out["trip"]])[:rows]
    out = {k: v[order] for k, v in out.items()}
    number = out["trip"].astype(np.int64)
    first = np.concatenate([[True], vehicle[number][1:] != vehicle[number][:-1]])
    step = np.concatenate([[np.nan], np.diff(out["t"])])
    step[first] = np.nan
    return out | {"vehicle": vehicle[number].astype(np.float64), "interval": step}


def _along(routes: Routes, route: NDArray[np.int64], at: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Place, pace (km/h) and bearing (degrees from north) at a time since the start of each row's route."""
    low, high = routes.start[route], routes.start[route + 1] - 1
    k = np.clip(np.searchsorted(routes.key, route * routes.reach + at, side="right") - 1, low, np.maximum(low, high - 1))
    after = np.minimum(k + 1, high)
    span = routes.seconds[after] - routes.seconds[k]
    f = np.clip((at - routes.seconds[k]) / np.where(span > 0, span, 1), 0, 1)[:, None]
    d = routes.xy[after] - routes.xy[k]
    xy = routes.xy[k] + f * d
    return xy[:, 0], xy[:, 1], routes.speed[k], np.degrees(np.arctan2(d[:, 0], d[:, 1])) % 360


def _waiting(
    rng: np.random.Generator, land: Landscape, waits: NDArray[np.int64], begin: Floats, interval: Floats
) -> dict[str, Floats]:
    trip = np.repeat(np.arange(len(waits)), waits)
    nth = np.arange(len(trip)) - np.repeat(np.cumsum(waits) - waits, waits)
    place = rng.integers(0, max(1, len(land.waiting)), len(waits))[trip]
    xy = land.waiting[place] if len(trip) else np.zeros((0, 2))
    nothing = np.full(len(trip), np.nan)
    t = begin[trip] + nth * interval[trip]
    return {"trip": trip, "x": xy[:, 0], "y": xy[:, 1], "t": t, "speed": np.zeros(len(trip)), "bearing": nothing}


def _receiver_errors(
    knobs: CityKnobs, rng: np.random.Generator, rows: dict[str, Floats], dense: tuple[NDArray[np.bool_], float]
) -> None:
    """Noise everywhere; between high buildings a shift that is the same for the same place and trip."""
    x, y, n = rows["x"], rows["y"], len(rows["x"])
    mask, cell = dense
    ij = np.stack([y, x]) / cell
    i, j = ij.astype(np.int64).clip(0, mask.shape[0] - 1)
    canyon = mask[i, j] * knobs.canyon_bias_m
    trips = rows["trip"].astype(np.int64)
    strength = rng.normal(1.0, 0.5, int(trips.max(initial=0)) + 1)[trips]
    unit = rng.standard_normal((2, n))
    for axis, name in enumerate("xy"):
        shift = noise_at(knobs.seed + 300 + axis, x, y, 150.0)
        rows[name] = rows[name] + canyon * 1.6 * shift * strength + knobs.gps_noise_m * unit[axis]
    rows["bearing"] = (rows["bearing"] + rng.normal(0, 4, n)) % 360


def _table(
    knobs: CityKnobs,
    rng: np.random.Generator,
    rows: dict[str, Floats],
    to_lonlat: Transformer,
    origin: Floats,
    day: int,
) -> tuple[pa.Table, dict[str, int]]:
    lon, lat = (np.asarray(v) for v in to_lonlat.transform(rows["x"] + origin[0], rows["y"] + origin[1]))
    if knobs.coordinate_step_deg:
        lon, lat = (np.rint(v / knobs.coordinate_step_deg) * knobs.coordinate_step_deg for v in (lon, lat))
    speed = np.rint(rows["speed"] / knobs.speed_step_kmh) * knobs.speed_step_kmh
    bearing = np.rint(rows["bearing"] / knobs.bearing_step_deg) * knobs.bearing_step_deg % 360
    lon, lat, again, counts = _dirt(knobs, rng, rows, lon, lat)
    # Vehicle numbers repeat every day; days begin at midnight UTC.
    ms = (FIRST_DAY + day).astype("datetime64[ms]").astype(np.int64) + np.rint(rows["t"] * 1000).astype(np.int64)
    take = np.sort(np.concatenate([np.arange(len(lon)), again]))
    columns = [
        pa.array(rows["vehicle"].astype(np.int32)[take]),
        pa.array(ms[take], pa.timestamp("ms", tz="UTC")),
        pa.array(lon[take]),
        pa.array(lat[take]),
        pa.array(speed.astype(np.float32)[take]),
        pa.array(bearing.astype(np.float32)[take], from_pandas=True),
        pa.array(rows["interval"].astype(np.float32)[take], from_pandas=True),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA), counts


def _dirt(
    knobs: CityKnobs, rng: np.random.Generator, rows: dict[str, Floats], lon: Floats, lat: Floats
) -> tuple[Floats, Floats, NDArray[np.int64], dict[str, int]]:
    """Spoil disjoint rows; a teleport only where the step to both neighbours is short enough to betray it."""
    n = len(lon)
    shuffled = rng.permutation(n)
    counts = {k: round(getattr(knobs.dirt, k) * n) for k in ("null_island", "not_finite", "swapped", "duplicate")}
    ends = np.cumsum(list(counts.values()))
    null, broken, swapped, again = np.split(shuffled[: ends[-1]], ends[:-1])
    spoilt = np.isin(np.arange(n), shuffled[: ends[-1]])
    lon, lat = lon.copy(), lat.copy()
    step = rows["interval"]
    shift = 0.45 * knobs.size_m
    quick = np.flatnonzero((step < shift / 90) & (np.append(step[1:], np.nan) < shift / 90) & ~spoilt)
    quick = quick[(quick > 1) & (quick < n - 2)]
    quick = quick[~(spoilt[quick - 1] | spoilt[quick + 1])]
    moved = rng.permutation(quick[::4])[: round(knobs.dirt.teleport * n)]
    east = np.where(rows["x"][moved] < knobs.size_m / 2, shift, -shift)
    lon[moved] += east / (111_320 * np.cos(np.radians(lat[moved])))
    lon[null], lat[null] = 0.0, 0.0
    lat[broken] = np.nan
    lon[swapped], lat[swapped] = lat[swapped], lon[swapped]
    return lon, lat, again, counts | {"teleport": len(moved)}
