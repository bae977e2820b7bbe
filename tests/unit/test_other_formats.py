"""What users bring and is not read: one true line that leads to the fix, and nothing passed over in silence."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.cubes import ingest, plan_ingest
from roadfuse_core.errors import ConfigError, RoadFuseError
from roadfuse_core.settings import City, load_city

ROWS = 51


def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    stamps = pd.Timestamp("2026-03-02 08:00") + pd.to_timedelta(np.arange(ROWS), unit="s")
    return pd.DataFrame({"vid": "V", "lon": 13 + 0.01 * rng.random(ROWS), "lat": 47 + 0.01 * rng.random(ROWS), "t": stamps})


def city(folder: Path, source: str, columns: dict[str, str] | None = None, **points) -> City:
    named = {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t"} | (columns or {})
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": [source], "columns": named} | points, "model": {"weights": "kde"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


@pytest.mark.parametrize(("name", "fix"), [
    ("a.gpx", "ogr2ogr -f CSV points.csv a.gpx track_points -lco GEOMETRY=AS_XY"),
    ("a.GeoJSON", "ogr2ogr -f CSV points.csv a.GeoJSON -lco"), ("a.plt", "cut off its first six lines"), ("a.fit", "gpsbabel"),
    ("a.xlsx", "save its sheet as CSV"), ("a.feather", "write it as Parquet"), ("a.csv.zst", "pack each file with gzip"),
    ("a.xyz", "use .parquet, .pq, .csv"),
])  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_files_of_other_kinds(tmp_path, name, fix, folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("x")
    c = city(tmp_path, "in" if folder else f"in/{name}")
    with pytest.raises(ConfigError, match=r"^points\.sources: ") as caught:
        plan_ingest(c)
    assert name in str(caught.value)
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_lies_beside_data_in_a_folder_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    table().to_csv(tmp_path / "in" / "a.csv", index=False)
    for name in ("README.md", "b.gpx", "_SUCCESS", ".hidden"):
        (tmp_path / "in" / name).write_text("x")
    c = city(tmp_path, "in")
    assert "points: 2 other files below the sources are not read: README.md, b.gpx" in check_city(c)
    assert ingest(c)["rows"] == ROWS


def test_geolife_is_read_as_its_message_says(tmp_path):
    days = (table().t - pd.Timestamp("1899-12-30")) / pd.Timedelta("1D")
    head = "Geolife trajectory\nWGS 84\nAltitude is in Feet\nReserved 3\n0,2,255,My Track,0,0,2,8421376\n0\n"
    rows = [f"{r.lat},{r.lon},0,100,{d!r},2026-03-02,08:00:00\n" for r, d in zip(table().itertuples(), days.tolist())]
    text = head + "".join(rows)
    (tmp_path / "a.csv").write_text("".join(text.splitlines(keepends=True)[6:]))
    names = ["lat", "lon", "zero", "altitude", "days", "date", "time"]
    entry = ingest(
        city(
            tmp_path,
            "a.csv",
            {"vehicle": "filename", "time": "days"},
            clean={"teleport_kmh": None},
            time_unit="days",
            csv={"header": False, "names": names},
        )
    )
    assert (entry["rows"], entry["time"]) == (ROWS, ["2026-03-02T08:00:00", "2026-03-02T08:00:50"])


def nested(folder):
    pq.write_table(pa.table({"vid": ["V"], "pos": [{"lon": 13.0, "lat": 47.0}], "t": [0]}), folder / "a.parquet")
    return "a.parquet", {"lon": "pos.lon"}


def geoparquet(folder):
    pq.write_table(pa.table({"vid": ["V"], "t": [0], "geometry": [b"\x01"]}), folder / "a.parquet")
    return "a.parquet", {}


def hive(folder):
    (folder / "hive" / "vid=V1").mkdir(parents=True)
    table().drop(columns="vid").to_parquet(folder / "hive" / "vid=V1" / "part-0.parquet")
    return "hive", {}


def porto(folder):
    (folder / "a.csv").write_text('"TRIP_ID","TIMESTAMP","POLYLINE"\n"1","1372636858","[[-8.6,41.1],[-8.7,41.2]]"\n')
    return "a.csv", {"vehicle": "TRIP_ID", "time": "TIMESTAMP"}


def other_case(folder):
    table().rename(columns={"lon": "Lon"}).to_csv(folder / "a.csv", index=False)
    return "a.csv", {}


@pytest.mark.parametrize(("make", "fix"), [
    (nested, "'pos.lon' is not a column .*; a column within another is not read; write it as a column of its own"),
    (geoparquet, "'lon' is not a column .*; positions within 'geometry' are not read; write their x and y"),
    (hive, "'vid' is not a column .*; a key in the names of folders is not read; write it into the files"),
    (porto, "'lon' is not a column .*; a trip a row, as in 'POLYLINE', is not read; write one row a position"),
    (other_case, r"'lon' is not a column .*; did you mean 'Lon'\? Names are taken exactly"),
])  # fmt: skip
def test_columns_that_are_not_there_as_they_are(tmp_path, make, fix):
    with pytest.raises(ConfigError, match=fix):
        plan_ingest(city(tmp_path, *make(tmp_path)))


@pytest.mark.parametrize("digits", [6, 7])
def test_degrees_in_whole_numbers(tmp_path, digits):
    frame = table()
    frame[["lon", "lat"]] = (frame[["lon", "lat"]] * 10**digits).round().astype("int64")
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(RoadFuseError, match=rf"no position inside grid\.bounds in its first rows; divide them by 10\^{digits}"):
        check_city(city(tmp_path, "a.csv"))


def test_a_date_without_its_time_of_day_is_said(tmp_path):
    frame = table()
    frame["date"] = [f"2026-03-{1 + k % 9:02d}" for k in range(ROWS)]
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert any("all times are of one time of the day" in line for line in check_city(city(tmp_path, "a.csv", {"time": "date"})))
    assert not any("one time of the day" in line for line in check_city(city(tmp_path, "a.csv")))
