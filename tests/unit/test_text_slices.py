"""Text of any size in slices of bounded size: how many rows a file has is estimated by its head, and known once it was read."""

import gzip
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from pyarrow import csv

from roadfuse_core.cubes import CubeReader, _plan, cubes_path, ingest, plan_ingest
from roadfuse_core.points import read_report
from roadfuse_core.settings import City, load_city

COLUMNS = {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t", "speed": "sp"}
NAMES = ("count", "speed_sum", "speed_count", "interval_sum", "interval_count")


def driven(rows: int, vehicles: int = 37, seed: int = 5) -> pd.DataFrame:
    """Vehicles that wander about the city, a sample every two seconds, some repeated, some spoilt, in no order."""
    rng = np.random.default_rng(seed)
    vehicle = np.sort(rng.integers(0, vehicles, rows))
    step = rng.uniform(-2e-5, 2e-5, (2, rows)).cumsum(1)
    lon, lat = 13.005 + 0.004 * np.sin(step[0] * 900), 47.005 + 0.004 * np.sin(step[1] * 900)
    lon[rng.random(rows) < 0.01] += 0.004
    stamps = pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta(np.arange(rows) * 2, unit="s")
    frame = pd.DataFrame({"vid": vehicle, "lon": lon, "lat": lat, "t": stamps, "sp": rng.uniform(0, 60, rows).round(2)})
    repeated = frame.iloc[:: rows // 50]
    return pd.concat([frame, repeated]).sample(frac=1, random_state=seed)


def text_of(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, date_format="%Y-%m-%dT%H:%M:%S.%fZ").encode()


def write(frame: pd.DataFrame, folder: Path, form: str) -> str:
    """A dump in one file; its name as a source."""
    folder.mkdir(exist_ok=True)
    if form == "parquet":
        frame.to_parquet(folder / "a.parquet")
        return "a.parquet"
    if form == "csv":
        (folder / "a.csv").write_bytes(text_of(frame))
        return "a.csv"
    if form == "gzip":
        (folder / "a.csv.gz").write_bytes(gzip.compress(text_of(frame)))
        return "a.csv.gz"
    if form == "gzip in members":
        text = text_of(frame)
        members = [gzip.compress(text[k : k + 60_000]) for k in range(0, len(text), 60_000)]
        (folder / "b.csv.gz").write_bytes(b"".join(members))
        return "b.csv.gz"
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trips/a.csv.gz" if form == "gzip in zip" else "trips/a.csv",
                         gzip.compress(text_of(frame)) if form == "gzip in zip" else text_of(frame))  # fmt: skip
    return "a.zip::trips/*"


FORMS = ("csv", "gzip", "gzip in members", "zip", "gzip in zip")


def city_of(folder: Path, source: str, columns: dict[str, str] = COLUMNS, workspace: str = "work", **cluster: float) -> City:
    spec = {
        "name": "c", "workspace": workspace, "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 2.0, "tile_px": 256},
        "points": {"sources": [source], "columns": columns}, "cluster": {"workers": 1, "memory_gib": 2} | cluster,
    }  # fmt: skip
    (folder / f"{workspace}.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / f"{workspace}.yaml")


def slices_of(city: City) -> list[int]:
    """Rows of each slice."""
    return [read_report(p).rows for p in sorted((city.workspace_path / "shards").rglob("shard-*.json"))]


def sums_of(city: City) -> dict[str, list[list[int]]]:
    cube, shape = CubeReader(cubes_path(city)), city.make_grid().shape
    return {name: cube.window(name, 0, 0, *shape).tolist() for name in NAMES}


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(_plan, "ROWS_PER_SLICE", 700)
    monkeypatch.setattr(_plan, "LEAST_ROWS_PER_SLICE", 700)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, object], dict[str, list[list[int]]]]:
    """Entry and sums of the dump as one slice of Parquet."""
    folder = tmp_path_factory.mktemp("whole")
    city = city_of(folder, write(driven(5000), folder, "parquet"))
    entry = ingest(city)
    assert slices_of(city) == [5050]
    assert {"duplicate", "teleport"} <= set(entry["rejected"])
    return entry, sums_of(city)


@pytest.mark.parametrize("form", ["parquet", *FORMS])
def test_one_file_with_vehicles_in_many_slices_is_the_file(tmp_path, small_slices, whole, form):
    city = city_of(tmp_path, write(driven(5000), tmp_path, form))
    entry = ingest(city)
    rows = slices_of(city)
    assert sum(rows) == 5050
    assert max(rows) <= 700
    assert (entry["kept"], entry["rejected"]) == (whole[0]["kept"], whole[0]["rejected"])
    assert sums_of(city) == whole[1]


def test_parquet_and_text_of_the_same_vehicles_are_one_dump(tmp_path, small_slices, whole):
    frame = driven(5000)
    frame[:2000].to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_bytes(text_of(frame[2000:]))
    city = city_of(tmp_path, "*.[pc]*")
    entry = ingest(city)
    assert (entry["kept"], entry["rejected"]) == (whole[0]["kept"], whole[0]["rejected"])
    assert sums_of(city) == whole[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [3, 40_000])
def test_the_plan_states_the_rows_of_text(tmp_path, form, rows):
    frame = driven(3000)[:3] if rows == 3 else driven(rows)
    plan = plan_ingest(city_of(tmp_path, write(frame, tmp_path, form)))
    assert plan.rows == 3 if rows == 3 else plan.rows == pytest.approx(len(frame), rel=0.05)


def test_slices_stay_small_where_the_head_of_a_file_misleads(tmp_path, small_slices):
    """Long rows of noise first, then short ones that pack well: the file has far more rows than its head lets expect."""
    rng = np.random.default_rng(0)
    noise = ["".join(chr(c) for c in rng.integers(97, 123, 2000)) for _ in range(400)]
    long = driven(400).iloc[:400].assign(note=noise)
    short = driven(9000, vehicles=90, seed=6).round({"lon": 4, "lat": 4}).assign(note="")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text_of(pd.concat([long, short]))))
    city = city_of(tmp_path, "a.csv.gz")
    plan = plan_ingest(city)
    assert plan.rows < 4000
    assert ingest(city)["rows"] == 400 + len(short)
    assert max(slices_of(city)) <= 700


PEAK = """
import sys
from pathlib import Path
from roadfuse_core.cubes import ingest
from roadfuse_core.settings import load_city
ingest(load_city(Path(sys.argv[1])))
print(next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peak_bytes(city_file: Path) -> int:
    """Most memory that a process held which ingested a city, all in itself."""
    told = subprocess.run([sys.executable, "-c", PEAK, str(city_file)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return int(told.stdout) * 1024


def write_large(path: Path, rows: int) -> None:
    """Text of so many rows, written piece by piece."""
    rng = np.random.default_rng(1)
    piece = 250_000
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(b"vid,lon,lat,t,sp\n")
        for k in range(0, rows, piece):
            table = pa.table({
                "vid": rng.integers(0, 50_000, piece), "lon": 13 + 0.01 * rng.random(piece), "lat": 47 + 0.01 * rng.random(piece),
                "t": 1_772_000_000 + k // 10 + rng.integers(0, 3000, piece), "sp": np.full(piece, 30),
            })  # fmt: skip
            csv.write_csv(table, file, csv.WriteOptions(include_header=False))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_memory_does_not_grow_with_a_text_file(tmp_path, suffix):
    """Where a worker has 1 GiB, 9 million rows take about as much as 4 million, in slices of less than a million."""
    peaks = []
    for rows in (4_000_000, 9_000_000):
        write_large(tmp_path / f"{rows}{suffix}", rows)
        city = city_of(tmp_path, f"{rows}{suffix}", workspace=f"w{rows}", memory_gib=1)
        peaks.append(peak_bytes(tmp_path / f"w{rows}.yaml"))
        assert sum(slices_of(city)) == rows
        assert max(slices_of(city)) < 1_000_000
    print(peaks)
    assert max(peaks) < 1 << 30
    assert peaks[1] < 1.15 * peaks[0]
