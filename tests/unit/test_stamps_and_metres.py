"""Impossible speeds: from stamps that are rounded, and from metres that are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from pyproj import Transformer

from roadfuse_core.cubes import CubeReader, cubes_path, ingest
from roadfuse_core.settings import load_city

COLUMNS = {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t", "speed": "sp"}
ATHENS = (23.73, 37.97, 23.79, 37.973)
HELSINKI = (24.90, 60.17, 24.93, 60.18)


def cars(box: tuple[float, ...], count: int, samples: int, step_s: float, speed: float) -> pd.DataFrame:
    """Cars on parallels, one every ten minutes, eastwards at a speed in m/s."""
    car, k = np.divmod(np.arange(count * samples), samples)
    metre = 1 / (111_320.0 * np.cos(np.radians(box[1])))
    lon = box[0] + 0.0005 + k * step_s * speed * metre
    lat = box[1] + (box[3] - box[1]) * (0.1 + 0.8 * (car + 0.5) / count)
    stamp = pd.Timestamp("2024-05-01 08:00", tz="UTC") + pd.to_timedelta(car * 600 + k * step_s, unit="s")
    return pd.DataFrame({"vid": car, "lon": lon, "lat": lat, "t": stamp, "sp": speed * 3.6})


def ingested(
    folder: Path, box: tuple[float, ...], frame: pd.DataFrame, crs: str | None = None, source: str = "EPSG:4326"
) -> dict[str, Any]:
    """The ledger entry of a dump."""
    folder.mkdir()
    frame.to_parquet(folder / "a.parquet")
    grid = {"bounds": list(box), "resolution_m": 4.0, "tile_px": 256} | ({"crs": crs} if crs else {})
    spec = {"name": "c", "workspace": "work", "grid": grid, "points": {"sources": ["a.parquet"], "columns": COLUMNS, "crs": source},
            "cluster": {"workers": 1, "memory_gib": 2}}  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    city = load_city(folder / "city.yaml")
    entry = ingest(city)
    assert entry is not None
    assert CubeReader(cubes_path(city)).window("count", 0, 0, *city.make_grid().shape).sum() == entry["kept"]
    return entry


@pytest.mark.parametrize("rounding", ["10s", "30s", "1min", "5min", "15min", "1h", "1D"])
@pytest.mark.parametrize("how", ["floor", "round"])
def test_samples_whose_stamps_are_rounded_are_kept(tmp_path, rounding, how):
    frame = cars(ATHENS, 6, 30, step_s=6.0 if rounding == "10s" else 10.0, speed=14.0)
    stamps = getattr(frame.t.dt, how)(rounding)
    entry = ingested(tmp_path / "d", ATHENS, frame.assign(t=stamps))
    assert (entry["kept"], entry["rejected"]) == (180, {})


def test_days_of_a_time_zone_are_days(tmp_path):
    frame = cars(ATHENS, 6, 30, step_s=10.0, speed=14.0)
    frame["t"] = frame.t.dt.tz_convert("Asia/Kolkata").dt.floor("D")
    assert ingested(tmp_path / "d", ATHENS, frame)["kept"] == 180


def test_stamps_of_whole_minutes_in_one_month_and_of_seconds_in_the_next(tmp_path):
    """The stamps around it say how a stamp is rounded, not those of another month."""
    frame = cars(ATHENS, 6, 30, step_s=10.0, speed=14.0)
    spoilt = frame.assign(t=frame.t + pd.Timedelta(days=31))
    spoilt.loc[spoilt.index % 30 == 15, "lon"] += 0.02  # 1.8 km within ten seconds
    entry = ingested(tmp_path / "d", ATHENS, pd.concat([frame.assign(t=frame.t.dt.floor("min")), spoilt]))
    assert (entry["kept"], entry["rejected"]) == (354, {"teleport": 6})


def test_what_no_rounding_explains_is_a_teleport(tmp_path):
    """2.2 km from one second to the next; and 4.6 km within a minute, between stamps of whole minutes: 276 km/h."""
    frame = cars(ATHENS, 6, 30, step_s=2.0, speed=14.0)
    frame.loc[frame.index % 30 == 20, "lon"] += 0.025
    assert ingested(tmp_path / "seconds", ATHENS, frame)["rejected"] == {"teleport": 6}
    rounded = cars(ATHENS, 6, 30, step_s=10.0, speed=4.0)
    rounded.loc[rounded.index % 30 == 20, "lon"] += 0.053
    rounded["t"] = rounded.t.dt.floor("min")
    assert ingested(tmp_path / "minutes", ATHENS, rounded)["rejected"] == {"teleport": 6}


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:32635", "EPSG:3035", None])
def test_speeds_are_of_metres_on_the_ground(tmp_path, crs):
    """Cars at 130 km/h are kept, and jumps at 300 km/h are not, whatever a metre of the grid is there."""
    frame = cars(HELSINKI, 6, 7, step_s=5.0, speed=36.0)
    kept = ingested(tmp_path / "kept", HELSINKI, frame, crs)
    assert (kept["kept"], kept["rejected"]) == (42, {})
    jumps = cars(HELSINKI, 6, 7, step_s=5.0, speed=20.0)
    jumps.loc[jumps.index % 7 == 3, "lat"] += 417 / 111_320.0 * np.where(jumps.vid[jumps.index % 7 == 3] < 3, 1, -1)
    found = ingested(tmp_path / "jumps", HELSINKI, jumps, crs)
    assert (found["kept"], found["rejected"]) == (36, {"teleport": 6})


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32635"])
def test_a_break_of_units_states_ratios_of_metres_on_the_ground(tmp_path, crs):
    days = [cars(HELSINKI, 6, 60, 2.0, 10.0).assign(day=day) for day in range(4)]
    frame = pd.concat(days, ignore_index=True)
    frame["t"] += pd.to_timedelta(frame.day, unit="D")
    frame.loc[frame.day >= 2, "sp"] /= 3.6
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(frame.lon.to_numpy(), frame.lat.to_numpy())
    entry = ingested(tmp_path / "d", HELSINKI, frame.assign(lon=x, lat=y), crs=crs if crs == "EPSG:3857" else None, source=crs)
    assert entry["speed_break"]["before"] == pytest.approx(1.0, abs=0.1)
    assert (entry["speed_break"]["wrong"], entry["speed_break"]["likely_unit"]) == ("after", "m/s")
