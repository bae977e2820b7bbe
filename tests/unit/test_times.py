"""What times of dumps mean: units, forms, zones, and what cannot be is asked about or said aloud."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.check import check_city
from roadfuse_core.cubes import ingest, ledger
from roadfuse_core.errors import ConfigError, RoadFuseError
from roadfuse_core.settings import City, InvalidCityError, load_city

BEGIN = datetime(2024, 5, 1, 23, 50, tzinfo=UTC)
ROWS = 61
RIGHT = ["2024-05-01T23:50:00", "2024-05-02T00:10:00"]


def stamps() -> pd.Series:
    """A time every 20 s over midnight in UTC."""
    return pd.Series(pd.date_range(BEGIN, periods=ROWS, freq="20s"))


def since(origin: str, unit: str) -> pd.Series:
    return (stamps() - pd.Timestamp(origin, tz="UTC")) / pd.Timedelta(1, unit)


def write(path: Path, times) -> None:
    rng = np.random.default_rng(1)
    lon, lat = 13 + 0.01 * rng.random(len(times)), 47 + 0.01 * rng.random(len(times))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"lon": lon, "lat": lat, "t": pa.array(times)}), path)
    else:
        pd.DataFrame({"lon": lon, "lat": lat, "t": times}).to_csv(path, index=False)


def city(folder: Path, source: str, **points) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": [source], "columns": {"lon": "lon", "lat": "lat", "time": "t"}} | points,
        "model": {"weights": "kde"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def text(form: str, zone: str = "UTC") -> list[str]:
    return stamps().dt.tz_convert(zone).dt.strftime(form).tolist()


SHANGHAI = {"time_zone": "Asia/Shanghai"}
READ = {
    "digits of a date and time": (text("%Y%m%d%H%M%S"), {}, RIGHT),
    "digits of a date": (text("%Y%m%d"), {}, ["2024-05-01T00:00:00", "2024-05-02T00:00:00"]),
    "digits down to minutes": (text("%Y%m%d%H%M"), {}, RIGHT),
    "whole numbers that are dates": (pd.Series(text("%Y%m%d")).astype("int64"), {}, ["2024-05-01T00:00:00", "2024-05-02T00:00:00"]),
    "whole numbers that are dates and times": (pd.Series(text("%Y%m%d%H%M%S")).astype("int64"), {}, RIGHT),
    "dates of a zone": (text("%Y%m%d%H%M%S", "Asia/Shanghai"), SHANGHAI, RIGHT),
    "basic ISO 8601": (text("%Y%m%dT%H%M%SZ"), {}, RIGHT),
    "lower-case ISO 8601": (text("%Y-%m-%dt%H:%M:%Sz"), SHANGHAI, RIGHT),
    "an offset behind a space": (text("%Y-%m-%d %H:%M:%S %z", "Asia/Shanghai"), {}, RIGHT),
    "a comma before milliseconds": ([f"{t},000" for t in text("%Y-%m-%d %H:%M:%S")], {}, RIGHT) ,
    "milliseconds": (since("1970-01-01", "ms").astype("int64"), {"time_unit": "ms"}, RIGHT),
    "microseconds": (since("1970-01-01", "us").astype("int64"), {"time_unit": "us"}, RIGHT),
    "nanoseconds": (since("1970-01-01", "ns").astype("int64"), {"time_unit": "ns"}, RIGHT),
    "a spreadsheet's days": (since("1899-12-30", "D"), {"time_unit": "days"}, RIGHT),
    "a spreadsheet's days in Shanghai": (since("1899-12-30", "D") + 8 / 24, {"time_unit": "days"} | SHANGHAI, RIGHT),
    "CST of Shanghai": (text("%Y-%m-%d %H:%M:%S CST", "Asia/Shanghai"), SHANGHAI, RIGHT),
    "CDT of Chicago": (text("%Y-%m-%d %H:%M:%S CDT", "America/Chicago"), {"time_zone": "America/Chicago"}, RIGHT),
    "EDT and nothing": (text("%Y-%m-%d %H:%M:%S EDT", "America/New_York"), {"time_zone": "America/New_York"}, RIGHT),
    "UTC in Shanghai": (text("%Y-%m-%d %H:%M:%S UTC"), SHANGHAI, RIGHT),
    "names of zones": (text("%Y-%m-%d %H:%M:%S Asia/Tokyo", "Asia/Tokyo"), SHANGHAI, RIGHT),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", READ)
def test_times_that_are_read_rightly(tmp_path, kind, ending):
    times, settings, span = READ[kind]
    write(tmp_path / f"a{ending}", times)
    c = city(tmp_path, f"a{ending}", period="day", **settings)
    entry = ingest(c)
    assert (entry["kept"], entry["time"], entry["time_warnings"]) == (ROWS, span, [])


def test_two_writers_in_one_file(tmp_path):
    """ISO stamps, then seconds, then digits, beyond the rows that are looked at first."""
    seconds = since("1970-01-01", "s").astype("int64").astype(str).tolist()
    write(tmp_path / "a.csv", [*text("%Y-%m-%d %H:%M:%S") * 7, *seconds, *text("%Y%m%d%H%M%S")])
    entry = ingest(city(tmp_path, "a.csv"))
    assert (entry["kept"], entry["time"]) == (9 * ROWS, RIGHT)


def test_a_zone_that_comes_late_and_is_not_known_is_no_time(tmp_path):
    write(tmp_path / "a.csv", [*text("%Y-%m-%d %H:%M:%S") * 7, *text("%Y-%m-%d %H:%M:%S CST")])
    entry = ingest(city(tmp_path, "a.csv"))
    assert (entry["kept"], entry["rejected"], entry["time"]) == (7 * ROWS, {"time": ROWS}, RIGHT)


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "America/Chicago"])
def test_int96_are_instants(tmp_path, zone):
    frame = pa.table({"lon": [13.001] * ROWS, "lat": [47.001] * ROWS, "t": pa.array(stamps().dt.tz_localize(None))})
    pq.write_table(frame, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    assert ingest(city(tmp_path, "a.parquet", time_zone=zone))["time"] == RIGHT


ASKED = {
    "milliseconds": (since("1970-01-01", "ms").astype("int64"), {}, "points.time_unit: 's'", "set it to ms"),
    "microseconds": (since("1970-01-01", "us").astype("int64"), {}, "points.time_unit: 's'", "set it to us"),
    "nanoseconds": (since("1970-01-01", "ns").astype("int64"), {"time_unit": "ms"}, "points.time_unit: 'ms'", "set it to ns"),
    "seconds as milliseconds": (since("1970-01-01", "s").astype("int64"), {"time_unit": "ms"}, "points.time_unit: 'ms'", "set it to s"),
    "a spreadsheet's days": (since("1899-12-30", "D"), {}, "points.time_unit: 's'", "set it to days"),
    "CST of nobody": (text("%Y-%m-%d %H:%M:%S CST"), {}, "points.time_zone: 'UTC' does not say what 'CST' means", "set it to the zone"),
    "CST of Berlin": (text("%Y-%m-%d %H:%M:%S CST"), {"time_zone": "Europe/Berlin"}, "points.time_zone: 'Europe/Berlin'", "set it to the zone"),
    "days first": (text("%d.%m.%Y %H:%M:%S"), {}, "points.columns.time: 't' holds '01.05.2024 23:50:00'", "write 2024-05-01 08:00:00"),
    "months first": (text("%m/%d/%Y %I:%M %p"), {}, "points.columns.time: 't' holds '05/01/2024 11:50 PM'", "write 2024-05-01 08:00:00"),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ASKED)
def test_times_that_cannot_be_are_asked_about(tmp_path, kind, ending):
    times, settings, problem, fix = ASKED[kind]
    write(tmp_path / f"a{ending}", times)
    c = city(tmp_path, f"a{ending}", **settings)
    for way in (check_city, ingest):
        with pytest.raises(RoadFuseError) as caught:
            way(c)
        assert caught.value.exit_code == 2
        assert problem in str(caught.value)
        assert fix in str(caught.value)
        assert "\n" not in str(caught.value)
    assert ledger(c) == {}


def test_one_wild_value_does_not_change_what_a_file_means(tmp_path):
    """The range in a footer is not the values."""
    seconds = since("1970-01-01", "s").astype("int64").tolist()
    write(tmp_path / "a.parquet", [1_714_550_400_000, *seconds, 0])
    entry = ingest(city(tmp_path, "a.parquet"))
    assert (entry["kept"], entry["rejected"]) == (ROWS + 1, {"time": 1})


def test_seconds_from_a_start_of_their_own_are_read_and_named(tmp_path):
    """Published trajectories count so; nothing tells them from a wrong unit but their owner."""
    write(tmp_path / "a.csv", [f"{49_039 + 0.5 * k}" for k in range(ROWS)])
    c = city(tmp_path, "a.csv", period="all")
    assert "61 of 61 times lie before 1980-01-06, when GPS began" in " ".join(check_city(c))
    entry = ingest(c)
    assert (entry["kept"], entry["time"]) == (ROWS, ["1970-01-01T13:37:19", "1970-01-01T13:37:49"])
    assert len(entry["time_warnings"]) == 1


def test_weeks_that_rolled_over_are_suspected_aloud(tmp_path):
    """Some rows 1,024 weeks before the others, as a receiver gives them whose week number began again."""
    now = datetime.now(UTC).replace(microsecond=0)
    right = [now - timedelta(days=9, seconds=k) for k in range(40)]
    early = [t - timedelta(weeks=1024) for t in right[:13]]
    write(tmp_path / "a.csv", [t.isoformat() for t in (*right, *early)])
    c = city(tmp_path, "a.csv")
    assert "13 of 53 times lie more than 1,024 weeks ago" in " ".join(check_city(c))
    (warning,) = ingest(c)["time_warnings"]
    assert warning.startswith("13 of 53 times lie more than 1,024 weeks ago: a receiver whose week number rolled over")
    done = CliRunner().invoke(app, ["status", str(tmp_path / "city.yaml")])
    assert done.exit_code == 0
    assert "13 of 53 times lie more than 1,024 weeks ago" in done.output.replace("\n", " ")
    assert "[yellow]" not in done.output, "the style is no part of the text"


def test_times_of_these_years_are_not_suspected(tmp_path):
    now = datetime.now(UTC)
    write(tmp_path / "a.csv", [(now - timedelta(weeks=k)).isoformat() for k in range(0, 1024, 3)])
    assert ingest(city(tmp_path, "a.csv"))["time_warnings"] == []


@pytest.mark.parametrize("zone", ["CST", "IST", "Mars/Olympus", "", "+08:00", "localtime"])
def test_a_zone_that_is_none_is_refused_at_once(tmp_path, zone):
    with pytest.raises(InvalidCityError, match=r"^points\.time_zone: .* give a name such as"):
        city(tmp_path, "a.csv", time_zone=zone)


def test_a_unit_that_is_none_names_those_that_are(tmp_path):
    with pytest.raises(
        InvalidCityError, match=r"points\.time_unit: 'minutes' is not a known value; use 's', 'ms', 'us', 'ns' or 'days'"
    ):
        city(tmp_path, "a.csv", time_unit="minutes")


def test_config_errors_travel_from_worker_to_user(tmp_path):
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("points.time_unit", "s", "cannot be", "set it to ms")))
    assert str(error) == "points.time_unit: 's' cannot be; set it to ms"
