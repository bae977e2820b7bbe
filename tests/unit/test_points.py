"""Judging, sampling and adding up: laws on any split, and the dirt that real dumps hold."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid, fit_projection
from roadfuse_core.points import (
    METRES_PER_SECOND,
    Collector,
    Part,
    Reason,
    Rows,
    Samples,
    ShardFile,
    Shuffle,
    Slice,
    SpeedRatios,
    cut_buckets,
    find_speed_break,
    from_wgs84,
    judge_rows,
    judge_vehicles,
    map_slice,
    period_of,
    shuffle_slice,
    to_wgs84,
    write_shard,
)
from roadfuse_core.settings import CleanSpec, PointsSpec

GRID = Grid("EPSG:32633", 1.0, 64, 5000, 82_000, 4, 4)
SPEC = PointsSpec(
    sources=("x",),
    columns={"vehicle": "v", "lon": "lon", "lat": "lat", "time": "t", "speed": "s", "bearing": "b", "interval": "i"},
)
BACK = Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True)


def place(col, row):
    """Longitude and latitude of fractional pixels."""
    return BACK.transform(*(GRID.affine @ (np.asarray(col, float), np.asarray(row, float))))


def make_rows(seed, n=200):
    rng = np.random.default_rng(seed)
    lon, lat = place(rng.uniform(-20, 276, n), rng.uniform(-20, 276, n))
    lon[rng.random(n) < 0.05] = np.nan
    return Rows(
        vehicle=rng.integers(0, 9, n),
        x=lon,
        y=lat,
        time_us=rng.integers(1.6e15, 1.62e15, n),
        speed=np.where(rng.random(n) < 0.1, np.nan, rng.uniform(0, 90, n)),
        bearing=np.where(rng.random(n) < 0.1, np.nan, rng.uniform(-10, 370, n)),
        interval=np.where(rng.random(n) < 0.1, np.nan, rng.uniform(0, 99, n)),
    )


def take(rows, index):
    return Rows(*(getattr(rows, f)[index] for f in Rows.__dataclass_fields__))


def judged(rows):
    return judge_rows(rows, SPEC.clean, GRID, fit_projection(GRID))


def sample(rows, capacity=1000):
    """Samples of rows, by the places that judging gave them."""
    collector, placed = Collector(SPEC, GRID, capacity), judged(rows)
    collector.add(rows, placed, rows.interval)
    return collector.samples()


def map_part(spec, part, path, capacity=1_000_000):
    return map_slice(Slice(spec, GRID, part, str(path), capacity))


def samples_of(shard):
    """A shard as a whole, put together from its tiles."""
    file = ShardFile(Path(shard))
    parts = [file.samples(tile) for tile in file.tiles]
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in file.names}
    return Samples(np.concatenate([p.runs for p in parts]), columns)


def totals(parts):
    """Sums by (tile, period, pixel) over parts, each in memory or on disk with its report; the reference of the reduce."""
    out = {}
    for part in parts:
        for samples in [part] if isinstance(part, Samples) else map(samples_of, part.shards):
            places = [(t, p) for t, p, _ in samples.runs.tolist()]
            assert places == sorted(set(places))
            assert samples.runs[:, 2].sum() == len(samples.columns["pixel"])
            owners = [place for place, n in zip(places, samples.runs[:, 2]) for _ in range(n)]
            for k, owner in enumerate(owners):
                add_sample(out, owner, {n: int(v[k]) for n, v in samples.columns.items()})
    return out


def add_sample(out, owner, sample):
    names = ("count", "speed_sum", "speed_count", "sin_sum", "cos_sum", "bearing_count", "interval_sum", "interval_count")
    e = out.setdefault((*owner, sample["pixel"]), dict.fromkeys(names, 0))
    e["count"] += 1
    for name in ("speed", "interval"):
        if sample.get(name, -1) >= 0:
            e[f"{name}_sum"] += sample[name]
            e[f"{name}_count"] += 1
    if sample.get("bearing", -1) >= 0:
        angle = np.radians(sample["bearing"] / 100)
        e["sin_sum"] += round(np.sin(angle) * 10_000)
        e["cos_sum"] += round(np.cos(angle) * 10_000)
        e["bearing_count"] += 1


@given(st.integers(0, 500), st.lists(st.integers(0, 3), min_size=200, max_size=200))
@settings(max_examples=25)
def test_row_local_sums_are_the_same_for_any_split(seed, owner):
    rows = make_rows(seed)
    whole = sample(rows)
    parts = []
    for k in range(4):
        part = take(rows, np.flatnonzero(np.array(owner) == k))
        parts.append(sample(part))
    assert totals(parts) == totals([whole])


@given(st.integers(0, 500))
@settings(max_examples=25)
def test_rows_read_are_kept_or_rejected_and_kept_are_counted(seed):
    rows = make_rows(seed)
    placed = judged(rows)
    table = sample(rows)
    assert np.bincount(placed.reason).sum() == len(rows.x)
    assert table.runs[:, 2].sum() == len(table.columns["pixel"]) == (placed.reason == Reason.KEPT).sum()


def test_samples_keep_the_order_in_which_they_came():
    """Within a tile and period, and for periods far apart."""
    rows = make_rows(3)
    rows.time_us[::3] -= 40_000_000_000_000_000
    got, p = sample(rows), fit_projection(GRID)
    col, row = (np.floor(v) for v in p.pixels(rows.x, rows.y))
    kept = np.flatnonzero(judged(rows).reason == Reason.KEPT)
    key = np.stack([row // 64 * 4 + col // 64, period_of(rows.time_us, "month"), np.arange(len(row))])[:, kept]
    order = kept[np.lexsort(key[::-1])]
    assert len(set(key[1])) > 5
    assert got.columns["pixel"].tolist() == (row % 64 * 64 + col % 64)[order].astype(int).tolist()
    speed = np.nan_to_num(np.rint(rows.speed[order] * 1000), nan=-1)
    assert got.columns["speed"].tolist() == speed.astype(int).tolist()


def test_a_shard_holds_its_samples_and_some_tiles_of_it_are_those_tiles(tmp_path):
    rows = make_rows(5)
    rows.time_us[::3] -= 40_000_000_000_000_000
    whole = sample(rows)
    write_shard(whole, tmp_path / "a.samples")
    read = samples_of(tmp_path / "a.samples")
    assert read.runs.tolist() == whole.runs.tolist()
    assert {k: v.tolist() for k, v in read.columns.items()} == {k: v.tolist() for k, v in whole.columns.items()}
    some, every = ShardFile(tmp_path / "a.samples", (3, 9)), ShardFile(tmp_path / "a.samples")
    assert some.tiles == tuple(t for t in every.tiles if 3 <= t <= 9)
    for tile in range(16):
        assert len(some.samples(tile).runs) == (whole.runs[:, 0] == tile).sum() * (3 <= tile <= 9)
        for name, column in some.samples(tile).columns.items():
            assert column.tolist() == (every.samples(tile).columns[name].tolist() if 3 <= tile <= 9 else [])


@pytest.mark.parametrize("where", ["frame", "index", "end"])
def test_a_damaged_shard_is_named(tmp_path, where):
    path = tmp_path / "a.samples"
    write_shard(sample(make_rows(6)), path)
    whole = path.read_bytes()
    at = {"frame": 150, "index": len(whole) - 40, "end": len(whole) - 9}[where]
    path.write_bytes(whole[:at] if where == "end" else whole[:at] + b"\xff" * 12 + whole[at + 12 :])
    with pytest.raises(StoreError, match=r"a\.samples: is damaged"):
        samples_of(path)


def test_sums_equal_a_plain_loop():
    rows = make_rows(1)
    expected = {}
    p = fit_projection(GRID)
    for k in range(len(rows.x)):
        if not np.isfinite(rows.x[k]):
            continue
        col, row = (float(a[0]) for a in p.pixels(rows.x[k : k + 1], rows.y[k : k + 1]))
        if not (0 <= col < 256 and 0 <= row < 256) or rows.speed[k] > 250 / 3.6:
            continue
        key = (
            int(row) // 64 * 4 + int(col) // 64,
            int(period_of(rows.time_us[k : k + 1], "month")[0]),
            int(row) % 64 * 64 + int(col) % 64,
        )
        e = expected.setdefault(key, dict.fromkeys(("count", "speed_sum", "speed_count", "sin_sum", "cos_sum", "bearing_count",
                                                    "interval_sum", "interval_count"), 0))  # fmt: skip
        e["count"] += 1
        if np.isfinite(rows.speed[k]):
            e["speed_sum"] += round(rows.speed[k] * 1000)
            e["speed_count"] += 1
        if rows.bearing[k] <= 360:
            angle = np.radians(round(rows.bearing[k] * 100) % 36_000 / 100)
            e["sin_sum"] += round(np.sin(angle) * 10_000)
            e["cos_sum"] += round(np.cos(angle) * 10_000)
            e["bearing_count"] += 1
        if np.isfinite(rows.interval[k]):
            e["interval_sum"] += round(rows.interval[k] * 1000)
            e["interval_count"] += 1
    assert totals([sample(rows)]) == expected


def one(x=None, y=None, t=1.6e15, speed=10.0):
    lon, lat = place([100.5], [100.5])
    return Rows(np.zeros(1, np.int64), np.array([lon[0] if x is None else x]), np.array([lat[0] if y is None else y]),
                np.array([t], np.int64), np.array([speed]), np.full(1, np.nan), np.full(1, np.nan))  # fmt: skip


LON, LAT = (float(v[0]) for v in place([100.5], [100.5]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (one(), Reason.KEPT),
        (one(x=np.nan), Reason.NOT_FINITE),
        (one(y=np.inf), Reason.NOT_FINITE),
        (one(x=0.0, y=0.0), Reason.NULL_ISLAND),
        (one(x=LAT, y=LON), Reason.SWAPPED),
        (one(x=LON + 1), Reason.OUTSIDE),
        (one(speed=70.0), Reason.SPEED),
        (one(t=np.iinfo(np.int64).min), Reason.TIME),
        (one(t=-5), Reason.TIME),
    ],
)
def test_reasons(row, reason):
    assert judged(row).reason[0] == reason


@pytest.mark.parametrize(
    ("off", "row", "reason"),
    [
        ({"null_island": None}, one(x=0.0, y=0.0), Reason.OUTSIDE),
        ({"swapped": False}, one(x=LAT, y=LON), Reason.OUTSIDE),
        ({"max_speed_kmh": None}, one(speed=70.0), Reason.KEPT),
        ({"time_range": (datetime(2021, 1, 1), datetime(2021, 2, 1))}, one(), Reason.TIME),
    ],
)
def test_rules_can_be_switched(off, row, reason):
    assert judge_rows(row, CleanSpec(**off), GRID, fit_projection(GRID)).reason[0] == reason


def test_edges_are_half_open():
    p = fit_projection(GRID)
    rng = np.random.default_rng(0)
    lon, lat = place(rng.uniform(-1, 257, 20_000), rng.uniform(-1, 257, 20_000))
    n = len(lon)
    nothing = np.full(n, np.nan)
    rows = Rows(np.zeros(n, np.int64), lon, lat, np.full(n, 10**15), nothing, nothing, nothing)
    col, row = p.pixels(lon, lat)
    inside = (np.floor(col) >= 0) & (np.floor(col) < 256) & (np.floor(row) >= 0) & (np.floor(row) < 256)
    assert np.array_equal(judged(rows).reason == Reason.KEPT, inside)


def drive(cols, seconds, vehicle=None, row=100.0):
    n = len(cols)
    lon, lat = place(cols, np.full(n, row))
    nothing = np.full(n, np.nan)
    ids = np.zeros(n, np.int64) if vehicle is None else np.array(vehicle)
    return Rows(ids, lon, lat, (1.6e15 + np.array(seconds) * 1e6).astype(np.int64), nothing, nothing, nothing)


def vehicle_reasons(rows, **clean):
    placed = judged(rows)
    interval = judge_vehicles(rows, placed, CleanSpec(**clean), (1.0, 1.0), True)
    return placed.reason.tolist(), interval.tolist()


def test_a_lone_spike_is_a_teleport():
    reason, interval = vehicle_reasons(drive([10, 20, 250, 30, 40], [0, 1, 2, 3, 4]))
    assert reason == [0, 0, 8, 0, 0]
    assert interval[3] == 2.0
    assert np.isnan(interval[0])


def test_a_jump_that_the_next_sample_confirms_is_kept_without_an_interval():
    reason, interval = vehicle_reasons(drive([10, 20, 240, 245, 250], [0, 1, 2, 3, 4]))
    assert reason == [0] * 5
    assert np.isnan(interval[2])
    assert interval[3] == 1.0


def test_a_first_sample_elsewhere_is_a_teleport():
    assert vehicle_reasons(drive([250, 10, 15, 20], [0, 1, 2, 3]))[0] == [8, 0, 0, 0]


def test_repetitions_are_rejected_once_and_other_vehicles_are_not():
    reason, _ = vehicle_reasons(drive([10, 10, 10, 10], [0, 0, 0, 0], [1, 1, 1, 2]))
    assert reason == [0, 7, 7, 0]
    assert vehicle_reasons(drive([10, 10], [0, 0]), duplicates=False)[0] == [0, 0]


def test_long_gaps_give_no_interval():
    _, interval = vehicle_reasons(drive([10, 12, 14], [0, 599, 1300]))
    assert interval[1] == 599
    assert np.isnan(interval[2])


def write_dump(folder: Path, table: pa.Table, parts: int, seed: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    table = table.take(rng.permutation(table.num_rows))
    cuts = np.sort(rng.integers(0, table.num_rows, parts - 1))
    paths = []
    for k, (a, b) in enumerate(zip([0, *cuts], [*cuts, table.num_rows], strict=True)):
        paths.append(str(folder / f"{seed}-{k}.parquet"))
        pq.write_table(table.slice(a, b - a), paths[-1])
    return tuple(paths)


def driven_table():
    rng = np.random.default_rng(4)
    n = 3000
    vehicle = np.sort(rng.integers(0, 30, n))
    col = 20 + np.cumsum(rng.uniform(0, 3, n)) % 200
    lon, lat = place(col, 100 + vehicle)
    spoilt = rng.random(n) < 0.02
    lon = np.where(spoilt, lon + 0.002, lon)
    stamps = np.datetime64("2026-03-31T23:30:00", "ms") + (np.arange(n) * 2000).astype("timedelta64[ms]")
    table = pa.table(
        {"v": vehicle, "lon": lon, "lat": lat, "t": pa.array(stamps), "s": rng.uniform(0, 50, n), "b": rng.uniform(0, 360, n)}
    )
    return pa.concat_tables([table, table.slice(100, 50)])


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("rows", [10_000, 700])
def test_vehicle_rules_do_not_see_how_a_dump_is_split(tmp_path, parts, rows):
    spec = SPEC.model_copy(update={"columns": SPEC.columns.model_copy(update={"interval": None})})
    whole = map_part(spec, Part(write_dump(tmp_path, driven_table(), 1, 0)), tmp_path / "w.json")
    paths = write_dump(tmp_path, driven_table(), parts, 9)
    jobs = [Shuffle(spec, Part((p,)), str(tmp_path / f"shuffle-{k}.parquet")) for k, p in enumerate(paths)]
    cut = cut_buckets([shuffle_slice(j) for j in jobs], rows)
    pieces = [map_part(spec, part, tmp_path / f"p{k}.json") for k, part in enumerate(cut)]
    assert len(pieces) == 1 if rows > 3050 else len(pieces) > 4
    assert max(p.rows for p in pieces) <= rows
    assert totals(pieces) == totals([whole])
    assert 40 <= whole.reasons["duplicate"] <= 50  # fewer where the repeated row was spoilt
    assert whole.reasons["teleport"] > 20
    for name, count in whole.reasons.items():
        assert sum(p.reasons[name] for p in pieces) == count


def test_a_finished_shard_is_taken_as_it_is(tmp_path):
    job = Slice(SPEC.model_copy(update={"columns": SPEC.columns.model_copy(update={"interval": None})}), GRID,
                Part(write_dump(tmp_path, driven_table(), 1, 0)), str(tmp_path / "s.json"), 10_000)  # fmt: skip
    first = map_slice(job)
    stamp = Path(first.shards[0]).stat().st_mtime_ns
    assert map_slice(job) == first
    assert Path(first.shards[0]).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("step", [700, 1000, 5000])
def test_pieces_of_one_file_are_the_file(tmp_path, step):
    spec = SPEC.model_copy(update={"columns": SPEC.columns.model_copy(update={"interval": None, "vehicle": None})})
    table = driven_table()
    (path,) = write_dump(tmp_path, table, 1, 0)
    whole = map_part(spec, Part((path,)), tmp_path / "w.json")
    spans = [(a, min(a + step, table.num_rows)) for a in range(0, table.num_rows, step)]
    pieces = [map_part(spec, Part((path,), rows=s), tmp_path / f"{s[0]}.json") for s in spans]
    assert totals(pieces) == totals([whole])
    assert sum(p.rows for p in pieces) == table.num_rows


@pytest.mark.parametrize("vehicle", [None, "v"])
def test_a_part_larger_than_memory_becomes_several_shards(tmp_path, monkeypatch, vehicle):
    monkeypatch.setattr("roadfuse_core.points._read.BATCH_ROWS", 2048)
    spec = SPEC.model_copy(update={"columns": SPEC.columns.model_copy(update={"interval": None, "vehicle": vehicle})})
    part = Part(write_dump(tmp_path, pa.concat_tables([driven_table()] * 3), 1, 0))
    whole, pieces = map_part(spec, part, tmp_path / "w.json"), map_part(spec, part, tmp_path / "p.json", capacity=2500)
    assert len(whole.shards) == 1
    assert len(pieces.shards) == (1 if vehicle else 5)  # a vehicle is seen whole, whatever it takes
    assert totals([pieces]) == totals([whole])
    assert (pieces.rows, pieces.tiles, pieces.reasons) == (whole.rows, whole.tiles, whole.reasons)


def test_chinese_datums_come_back_to_wgs84():
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(80, 130, 2000), rng.uniform(20, 50, 2000)
    for datum in ("gcj02", "bd09"):
        shown = from_wgs84(lon, lat, datum)
        back = to_wgs84(*shown, datum)
        assert np.abs(np.subtract(back, (lon, lat))).max() < 1e-9
        metres = np.hypot((shown[0] - lon) * 111_320 * np.cos(np.radians(lat)), (shown[1] - lat) * 110_574)
        assert 50 < np.median(metres) < 1500


def test_gcj02_of_a_published_place():
    """Tiananmen: WGS-84 116.39123, 39.90632 is shown by GCJ-02 maps about 116.39747, 39.90772."""
    lon, lat = from_wgs84(np.array([116.39123]), np.array([39.90632]), "gcj02")
    assert lon[0] == pytest.approx(116.39747, abs=2e-5)
    assert lat[0] == pytest.approx(39.90772, abs=2e-5)


def test_a_dump_in_gcj02_falls_where_the_same_dump_in_wgs84_does(tmp_path):
    grid = Grid("EPSG:32650", 1.0, 64, 6980, 69_060, 4, 4)
    back = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    rng = np.random.default_rng(1)
    lon, lat = back.transform(*(grid.affine @ (rng.integers(0, 256, 500) + 0.5, rng.integers(0, 256, 500) + 0.5)))
    sums = []
    for datum in ("wgs84", "gcj02", "bd09"):
        x, y = from_wgs84(lon, lat, datum)
        pq.write_table(pa.table({"x": x, "y": y}), tmp_path / f"{datum}.parquet")
        spec = PointsSpec(sources=("-",), columns={"lon": "x", "lat": "y"}, period="all", datum=datum)
        report = map_slice(
            Slice(spec, grid, Part((str(tmp_path / f"{datum}.parquet"),)), str(tmp_path / f"s-{datum}.json"), 1000)
        )
        sums.append(totals([report]))
    assert sums[0] == sums[1] == sums[2]
    assert sum(e["count"] for e in sums[0].values()) == 500


@pytest.mark.parametrize("unit", METRES_PER_SECOND)
def test_a_change_of_the_unit_of_speed_is_found(unit):
    """Ten days at 5 to 20 m/s, the first six written in another unit than the one stated."""
    rng, ratios, n = np.random.default_rng(2), SpeedRatios(), 400
    for day in range(20_000, 20_010):
        step = rng.uniform(5, 20, n)
        lon, lat = place(np.cumsum(step), np.full(n, 100.0))
        time = day * 86_400_000_000 + np.arange(n) * 1_000_000
        speed = step / METRES_PER_SECOND[unit if day < 20_006 else "m/s"]
        rows = Rows(np.zeros(n, np.int64), lon, lat, time, speed, np.zeros(0), np.zeros(0))
        ratios.add(rows, judged(rows), None)
    found = find_speed_break(ratios.by_day, "m/s")
    if unit == "m/s":
        assert found is None
    else:
        assert (found.wrong, found.likely_unit, found.day) == ("before", unit, str(np.datetime64(20_006, "D")))
