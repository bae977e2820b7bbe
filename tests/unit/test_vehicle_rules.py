"""Vehicle rules on the ids that files hold: missing ones, of any type, in files of any size, in as many slices as there may be."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import CubeReader, _plan, cubes_path, ingest, ledger
from roadfuse_core.errors import ConfigError
from roadfuse_core.points import read_report
from roadfuse_core.settings import City, load_city

BOUNDS = [23.73, 37.97, 23.734, 37.973]
COLUMNS = {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t", "speed": "sp", "bearing": "br"}
MERIDIAN_M, PARALLEL_M = 111_000.0, 111_320.0 * np.cos(np.radians(37.97))


def cars(count: int, samples: int, step_s: float = 1.0, speed: float = 9.0) -> pd.DataFrame:
    """Cars on parallels, one every ten minutes, eastwards at a speed in m/s."""
    car, k = np.divmod(np.arange(count * samples), samples)
    lon = BOUNDS[0] + 0.0002 + k * step_s * speed / PARALLEL_M
    lat = BOUNDS[1] + 0.0003 + 0.0024 * (car + 0.5) / count
    stamp = pd.Timestamp("2024-05-01 08:00", tz="UTC") + pd.to_timedelta(car * 600 + k * step_s, unit="s")
    return pd.DataFrame({"vid": car + 100, "lon": lon.round(7), "lat": lat.round(7), "t": stamp, "sp": speed * 3.6, "br": 90.0})


@dataclass(frozen=True)
class Result:
    """What an ingest made of a dump."""

    rows: int
    kept: int
    rejected: dict[str, int]
    slices: int
    sums: dict[str, list[Any]] = field(repr=False)


def city_of(folder: Path, workspace: str = "work", **points: Any) -> City:
    spec = {
        "name": "c", "workspace": workspace, "grid": {"bounds": BOUNDS, "resolution_m": 1.0, "tile_px": 256},
        "points": {"sources": ["*.parquet"], "columns": COLUMNS} | points, "cluster": {"workers": 1, "memory_gib": 2},
    }  # fmt: skip
    path = folder / f"{workspace}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return load_city(path)


def result_of(city: City) -> Result:
    """Ingest a city and read its cube."""
    entry = ingest(city)
    assert entry is not None
    assert entry["rows"] == entry["kept"] + sum(entry["rejected"].values())
    cube, shape = CubeReader(cubes_path(city)), city.make_grid().shape
    names = ("count", "speed_sum", "speed_count", "sin_sum", "cos_sum", "bearing_count", "interval_sum", "interval_count")
    sums = {name: cube.window(name, 0, 0, *shape).tolist() for name in names}
    assert np.sum(sums["count"]) == entry["kept"]
    slices = len(list((city.workspace_path / "shards").rglob("shard-*.json")))
    return Result(entry["rows"], entry["kept"], entry["rejected"], slices, sums)


def ingest_frames(folder: Path, frames: list[pd.DataFrame], suffix: str = ".parquet", **points: Any) -> Result:
    """A dump of one file a frame."""
    folder.mkdir()
    for number, frame in enumerate(frames):
        path = folder / f"part-{number}{suffix}"
        if suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, date_format="%Y-%m-%dT%H:%M:%S.%fZ")
    return result_of(city_of(folder, sources=[f"*{suffix}"], **points))


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 700 rows, so that a dump of thousands is shuffled."""
    monkeypatch.setattr(_plan, "ROWS_PER_SLICE", 700)
    monkeypatch.setattr(_plan, "LEAST_ROWS_PER_SLICE", 700)


def together(count: int = 3) -> pd.DataFrame:
    """Cars at once, side by side, none with an id."""
    frame = cars(count, 30)
    frame["t"] = pd.Timestamp("2024-05-01 08:00", tz="UTC") + pd.to_timedelta(np.tile(np.arange(30), count), unit="s")
    return frame.assign(vid=pd.Series([None] * len(frame), dtype="string"))


@pytest.mark.parametrize("written", ["parquet", "", "NA", "None"])
def test_rows_without_a_vehicle_are_judged_row_by_row(tmp_path, written):
    frame = together()
    if written != "parquet":
        frame["vid"] = written
    result = ingest_frames(tmp_path / "d", [frame], ".parquet" if written == "parquet" else ".csv")
    assert (result.kept, result.rejected) == (90, {})
    assert np.sum(result.sums["interval_count"]) == 0


def test_rows_without_a_vehicle_are_rejected_for_what_they_say_themselves(tmp_path):
    frame = together()
    frame.loc[3, "sp"] = 700.0
    frame.loc[50, "lon"] = np.nan
    result = ingest_frames(tmp_path / "d", [frame])
    assert (result.kept, result.rejected) == (88, {"not_finite": 1, "speed": 1})


def test_rows_without_a_vehicle_are_spread_over_the_slices(tmp_path, small_slices):
    result = ingest_frames(tmp_path / "d", [together(40), together(41)])
    assert result.kept == 2430
    shards = sorted((tmp_path / "d/work/shards").rglob("shard-*.json"))
    assert len(shards) >= 4
    assert max(read_report(s).rows for s in shards) < 1000


def test_the_known_vehicles_beside_unknown_ones_are_judged_by_their_neighbours(tmp_path):
    known, unknown = cars(3, 30), together()
    known.loc[40, "lon"] += 0.02 / 10  # 176 m within a second
    result = ingest_frames(tmp_path / "d", [pd.concat([known.astype({"vid": "string"}), unknown])])
    assert (result.kept, result.rejected) == (179, {"teleport": 1})
    assert np.sum(result.sums["interval_count"]) == 29 + 28 + 29


ID_FORMS = {
    "int64": lambda v: v, "uint8": lambda v: v.astype("uint8"), "text": lambda v: v.astype(str),
    "double": lambda v: v.astype("float64"), "float": lambda v: v.astype("float32"),
    "double as text": lambda v: v.astype("float64").astype(str),
    "padded text": lambda v: v.astype(str) + "  ",
    "decimal": lambda v: pd.Series(pa.array(v.tolist(), pa.decimal128(9, 2)).to_pylist(), index=v.index),
    "bytes": lambda v: pd.Series([str(x).encode() for x in v], index=v.index),
}  # fmt: skip


@pytest.mark.parametrize(("form", "sliced"), [("text", False), ("bytes", False), *((form, True) for form in ID_FORMS)])
def test_an_id_means_the_same_vehicle_whatever_its_type_in_a_file(tmp_path, request, form, sliced):
    """The same rows twice, with ids of two types: half of them are repetitions, in one slice and in many."""
    if sliced:
        request.getfixturevalue("small_slices")
    frame = cars(60, 30)
    result = ingest_frames(tmp_path / "d", [frame, frame.assign(vid=ID_FORMS[form](frame.vid))[::-1]])
    assert (result.kept, result.rejected) == (1800, {"duplicate": 1800})
    assert result.slices > 1 if sliced else result.slices == 1


@pytest.mark.parametrize("ids", [[2**53 + 1, 2**53, 2**53 + 3], [10**17, 10**17 + 2, 3 * 10**17]])
def test_large_ids_are_not_rounded_by_another_file(tmp_path, ids):
    """A file of doubles beside one of integers: DuckDB's common type would make one vehicle of two."""
    whole = cars(3, 30).assign(vid=np.repeat(ids, 30))
    whole["t"] = whole.t - pd.to_timedelta(np.repeat([0, 600, 1200], 30), unit="s")
    other = cars(1, 30).assign(vid=0.5)
    other["t"] += pd.Timedelta(days=1)
    result = ingest_frames(tmp_path / "d", [whole, other])
    assert (result.kept, result.rejected) == (120, {})


def test_a_large_id_printed_as_a_double_is_the_integer(tmp_path, small_slices):
    frame = cars(40, 30).assign(vid=np.repeat(np.arange(1, 41) * 10**16, 30))
    result = ingest_frames(tmp_path / "d", [frame, frame.assign(vid=frame.vid.astype("float64").astype(str))])
    assert result.rejected == {"duplicate": 1200}


def test_ids_that_only_look_like_numbers_stay_apart(tmp_path):
    frame = together().assign(vid=np.repeat(["7", "07", "7e1"], 30))
    assert ingest_frames(tmp_path / "d", [frame, together(1).assign(vid="70")]).kept == 120


def test_files_and_ids_together_name_a_vehicle(tmp_path):
    """Two fleets that both have a car 7, side by side."""
    fleets = [cars(2, 30)[part].assign(vid=7) for part in (slice(0, 30), slice(30, 60))]
    fleets[1] = fleets[1].assign(t=fleets[0].t.to_numpy(), lat=37.9727)
    spoilt = ingest_frames(tmp_path / "one", fleets)
    assert spoilt.rejected == {"teleport": 30}
    apart = ingest_frames(tmp_path / "two", fleets, columns=COLUMNS | {"vehicle": ["filename", "vid"]})
    assert (apart.kept, apart.rejected) == (60, {})
    named = [f.assign(fleet=name) for f, name in zip(fleets, "ab", strict=True)]
    columns = ingest_frames(tmp_path / "three", [pd.concat(named)], columns=COLUMNS | {"vehicle": ["fleet", "vid"]})
    assert columns.sums == apart.sums
    lacking = [named[0], named[1].assign(vid=np.nan)]
    assert ingest_frames(tmp_path / "four", lacking, columns=COLUMNS | {"vehicle": ["fleet", "vid"]}).kept == 60


def test_a_column_of_a_joint_id_that_is_absent_is_named(tmp_path):
    cars(1, 30).to_parquet(tmp_path / "a.parquet")
    city_of(tmp_path, columns=COLUMNS | {"vehicle": ["fleet", "vid"]})
    refused = CliRunner().invoke(app, ["ingest", str(tmp_path / "work.yaml")]).exception
    assert isinstance(refused, ConfigError)
    assert "points.columns.vehicle: 'fleet' is not a column of" in str(refused)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_file_of_no_rows_is_no_obstacle(tmp_path, suffix, alone):
    frame = cars(3, 30)
    whole = ingest_frames(tmp_path / "one", [frame], suffix)
    assert whole.kept == 90
    if alone:
        city = load_city(tmp_path / "one/work.yaml")
        frame[:0].to_csv(tmp_path / "one/later.csv", index=False)
        frame[:0].to_parquet(tmp_path / "one/later.parquet")
        assert ingest(city, [f"later{suffix}"])["rows"] == 0
        assert len(ledger(city)) == 2
    else:
        assert ingest_frames(tmp_path / "two", [frame[:0], frame], suffix).sums == whole.sums


@pytest.mark.parametrize("vehicles", [1, 2])
def test_fewer_vehicles_than_slices(tmp_path, monkeypatch, vehicles):
    frame = cars(60, 30)
    frame["vid"] = np.arange(1800) // (1800 // vehicles)
    whole = ingest_frames(tmp_path / "one", [frame])
    monkeypatch.setattr(_plan, "ROWS_PER_SLICE", 100)
    result = ingest_frames(tmp_path / "two", [frame[:1000], frame[1000:]])
    assert (result.kept, result.rejected, result.sums) == (whole.kept, whole.rejected, whole.sums)


def test_unknown_bearings_count_for_nothing(tmp_path):
    """511 (AIS, trackers), -1 (iOS), 65535 and 3600 stand for unknown; 360 is north, -90 is west."""
    frame = cars(7, 30)
    frame["br"] = np.repeat([511.0, -1.0, 360.0, 90.0, -90.0, 65535.0, 3600.0], 30)
    result = ingest_frames(tmp_path / "d", [frame])
    assert np.sum(result.sums["bearing_count"]) == 90
    assert np.sum(result.sums["sin_sum"]) == 0
    assert np.sum(result.sums["cos_sum"]) == 300_000


@pytest.mark.parametrize(("column", "sliced"), [("sp", False), ("t", False), ("vid", True), ("br", True), ("t", True)])
def test_a_column_without_values_in_one_file_is_unknown_there(tmp_path, request, column, sliced):
    if sliced:
        request.getfixturevalue("small_slices")
    frame = cars(60, 30)
    later = frame.assign(t=frame.t + pd.Timedelta(days=1)).assign(**{column: None})
    result = ingest_frames(tmp_path / "d", [frame, later])
    assert pq.read_schema(tmp_path / "d/part-1.parquet").field(column).type == pa.null()
    assert result.rows == 3600
    assert result.kept == (1800 if column == "t" else 3600)
    assert np.sum(result.sums["speed_count"]) == (1800 if column in ("sp", "t") else 3600)
