"""Files as they come: text and archives, times and speeds of every kind, and periods."""

import gzip
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.points import METRES_PER_SECOND, Part, check_columns, find_sources, materialise, period_of, read_batches
from roadfuse_core.settings import City


def city(tmp_path, **points) -> City:
    base = {"sources": ["*"], "columns": {"lon": "x", "lat": "y"}, "period": "all"}
    return City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, points=base | points, root=tmp_path)


def read(c: City, tmp_path, name):
    paths = materialise(find_sources(c, [name]), tmp_path / "scratch")
    return next(iter(read_batches(c.points, Part(tuple(paths)), True, tmp_path / "spill")))


TEXT = "x,y,t\n13.01,47.01,1600000000\nNone,47.02,\n13.03,oops,1600000060\n"


def test_text_plain_gzip_and_zip_read_alike(tmp_path):
    (tmp_path / "a.csv").write_text(TEXT)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(TEXT.encode()))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("trips/1.csv", TEXT)
        archive.writestr("__MACOSX/trips/._1.csv", "litter")
        archive.writestr("trips/.DS_Store", "litter")
        archive.writestr("LICENSE.txt", "words")
    c = city(tmp_path, columns={"lon": "x", "lat": "y", "time": "t"})
    for name in ("a.csv", "b.csv.gz", "c.zip::trips/*"):
        rows = read(c, tmp_path, name)
        order = np.argsort(rows.time_us)
        assert np.allclose(rows.x[order], [np.nan, 13.01, 13.03], equal_nan=True)
        assert np.allclose(rows.y[order], [47.02, 47.01, np.nan], equal_nan=True)
        assert rows.time_us[order].tolist()[1:] == [1600000000_000000, 1600000060_000000]


def test_a_file_without_a_header_and_one_vehicle_a_file(tmp_path):
    for k in range(2):
        (tmp_path / f"trip_{k}.txt").write_text("482785.9 4216659.1 49039.0\n483396.7 4216956.2 49069.0\n")
    c = city(tmp_path, columns={"vehicle": "filename", "lon": "x", "lat": "y", "time": "t"},
             csv={"delimiter": " ", "header": False, "names": ["x", "y", "t"]})  # fmt: skip
    rows = read(c, tmp_path, "trip_*.txt")
    assert len(set(rows.vehicle.tolist())) == 2
    assert rows.time_us[0] == 49_039_000_000


@pytest.mark.parametrize(
    ("column", "unit", "zone", "expected"),
    [
        (pa.array([1600000000, None]), "s", "UTC", 1600000000),
        (pa.array([1600000000.5, None]), "s", "UTC", 1600000000.5),
        (pa.array([1600000000500, None]), "ms", "UTC", 1600000000.5),
        (pa.array(["2020-09-13T12:26:40+00:00", None]), "s", "America/Chicago", 1600000000),
        (pa.array(["2020-09-13 07:26:40", None]), "s", "America/Chicago", 1600000000),
        (pa.array([1600000000 * 10**9, None], pa.timestamp("ns")), "s", "UTC", 1600000000),
        (pa.array([1600000000 - 5 * 3600, None], pa.timestamp("s")), "s", "America/Chicago", 1600000000),
        (pa.array([1600000000, None], pa.timestamp("s", tz="Asia/Shanghai")), "s", "UTC", 1600000000),
    ],
)
def test_times_of_every_kind(tmp_path, column, unit, zone, expected):
    pq.write_table(pa.table({"x": [13.0, 13.0], "y": [47.0, 47.0], "t": column}), tmp_path / "a.parquet")
    c = city(tmp_path, columns={"lon": "x", "lat": "y", "time": "t"}, time_unit=unit, time_zone=zone)
    rows = read(c, tmp_path, "a.parquet")
    assert sorted(rows.time_us.tolist()) == [np.iinfo(np.int64).min, round(expected * 1e6)]


@pytest.mark.parametrize("unit", METRES_PER_SECOND)
def test_speeds_become_metres_per_second(tmp_path, unit):
    pq.write_table(pa.table({"x": [13.0], "y": [47.0], "s": [36.0]}), tmp_path / "a.parquet")
    c = city(tmp_path, columns={"lon": "x", "lat": "y", "speed": "s"}, speed_unit=unit)
    factor = {"km/h": 10.0, "m/s": 36.0, "mph": 16.09344, "m/min": 0.6, "knots": 18.52}
    assert read(c, tmp_path, "a.parquet").speed[0] == pytest.approx(factor[unit])


@pytest.mark.parametrize(
    ("stamp", "day", "week", "month"),
    [
        ("1970-01-01", 0, 0, 0),
        ("1970-01-05", 4, 1, 0),
        ("2026-03-31T23:59:59", 20_543, 2935, 674),
        ("2026-04-01", 20_544, 2935, 675),
    ],
)
def test_periods(stamp, day, week, month):
    at = np.array([np.datetime64(stamp, "us").astype(np.int64)])
    assert [int(period_of(at, p)[0]) for p in ("day", "week", "month", "all")] == [day, week, month, 0]


def test_sources_that_match_nothing_or_are_something_else(tmp_path):
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ConfigError, match=r"points\.sources: 'no\*' matches no file"):
        find_sources(city(tmp_path), ["no*"])
    with pytest.raises(ConfigError, match="neither Parquet nor text"):
        find_sources(city(tmp_path), ["a.xyz"])
    (tmp_path / "b.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match="not a readable zip"):
        check_columns(city(tmp_path), find_sources(city(tmp_path), ["b.zip"]))
