"""Real, dirty dumps beside the project: rows are conserved, and an independent count agrees."""

import io
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import yaml
from pyproj import Transformer

from roadfuse_core.check import check_city
from roadfuse_core.cubes import CubeReader, cubes_path, ingest
from roadfuse_core.labels import lanes_of, read_lines
from roadfuse_core.settings import City, MapSpec, load_city

CITIES = Path(__file__).parents[1] / "real"


def city(name: str, real_data: Path, workspace: Path) -> City:
    """A city file of the repository, its workspace moved and its data where `ROADFUSE_DATA` says."""
    text = (CITIES / f"{name}.yaml").read_text().replace("../../../shared/data", str(real_data))
    (workspace / "city.yaml").write_text(text)
    return load_city(workspace / "city.yaml")


def independent_count(c: City, archive: Path, delimiter: str, names: list[str] | None, crs: str, columns: tuple[str, str]):
    """Rows, and the sum of points on the grid, by pandas, NumPy and PROJ alone."""
    frames, seen = [], set()
    with zipfile.ZipFile(archive) as z:
        for member in z.namelist():
            if member.endswith((".csv", ".txt")) and "__MACOSX" not in member and ("trips/" in member or ".csv" in member):
                content = z.read(member)
                if content not in seen:  # a copy counts once
                    frames.append(pd.read_csv(io.BytesIO(content), sep=delimiter, header=None if names else 0, names=names))
                seen.add(content)
    table = pd.concat(frames)
    x, y = (pd.to_numeric(table[k], errors="coerce").to_numpy(float) for k in columns)
    g = c.make_grid()
    zeros = int(((x == 0) & (y == 0)).sum())
    x, y = np.where(np.isfinite(x), x, 0), np.where(np.isfinite(y), y, 0)
    east, north = Transformer.from_crs(crs, g.crs, always_xy=True).transform(x, y)
    col, row = (east - g.bounds.left) / g.resolution_m, (g.bounds.top - north) / g.resolution_m
    col, row = (np.where(np.isfinite(v), v, -1) for v in (col, row))
    on = (col >= 0) & (row >= 0) & (col < g.shape[1]) & (row < g.shape[0])
    image = np.zeros(g.shape, np.int32)
    np.add.at(image, (row[on].astype(int), col[on].astype(int)), 1)
    edge = (np.abs(col - np.rint(col)) < 0.01) | (np.abs(row - np.rint(row)) < 0.01)
    return len(table), image, int((edge & on).sum()), zeros


TEXT = {"athens-small": ("athens/tracks_athens_small.zip", "EPSG:2100"),
        "athens-large": ("athens/tracks_athens_large.zip", "EPSG:2100"),
        "chicago": ("chicago/tracks_chicago.zip", "EPSG:32616")}  # fmt: skip


@pytest.mark.parametrize("name", TEXT)
def test_counts_agree_with_an_independent_count(name, real_data, tmp_path):
    archive, crs = TEXT[name]
    c = city(name, real_data, tmp_path)
    check_city(c)
    entry = ingest(c)
    rows, image, on_edges, _ = independent_count(c, real_data / archive, " ", ["x", "y", "t"], crs, ("x", "y"))
    assert entry["rows"] == rows == entry["kept"] + sum(entry["rejected"].values())
    got = CubeReader(cubes_path(c)).window("count", 0, 0, *c.make_grid().shape)
    assert got.sum() == entry["kept"]
    vehicle_rules = entry["rejected"].get("duplicate", 0) + entry["rejected"].get("teleport", 0)
    assert abs(int(image.sum()) - int(got.sum()) - vehicle_rules) <= on_edges
    assert (got != image).sum() <= 2 * on_edges + vehicle_rules


def test_austin_in_all_its_dirt(real_data, tmp_path):
    c = city("austin", real_data, tmp_path)
    entry = ingest(c.model_copy(update={"imagery": None}))
    archive = real_data / "austin/capmetrics_vehicle_positions_2015-03_2016-05.zip"
    rows, image, _, zeros = independent_count(c, archive, ",", None, "EPSG:4326", ("longitude", "latitude"))
    assert entry["rows"] == rows == entry["kept"] + sum(entry["rejected"].values())
    assert entry["rejected"]["null_island"] == zeros == 53
    got = CubeReader(cubes_path(c)).window("count", 0, 0, *c.make_grid().shape)
    on_grid_rejected = entry["rejected"].get("duplicate", 0) + entry["rejected"].get("teleport", 0)
    assert int(image.sum()) - int(got.sum()) == on_grid_rejected


@pytest.mark.parametrize(("stated", "wrong", "likely"), [("mph", "after", "m/s"), ("m/s", "before", "mph")])
def test_a_unit_that_changes_within_a_dump_is_found(real_data, tmp_path, stated, wrong, likely):
    """Austin's speeds are in miles an hour until 2015-09 and in metres a second from 2015-12 on."""
    c = city("austin", real_data, tmp_path)
    columns = c.points.columns.model_copy(update={"speed": "speed"})
    points = c.points.model_copy(update={"columns": columns, "speed_unit": stated})
    found = ingest(c.model_copy(update={"imagery": None, "points": points}))["speed_break"]
    assert "2015-09-30" < found["day"] <= "2016-01-02"
    assert (found["wrong"], found["likely_unit"]) == (wrong, likely)


def test_blank_bearings_are_no_bearings(real_data, tmp_path):
    """Liverpool's buses: 399 of 1,533 rows say no bearing."""
    archive = real_data / "extras/liverpool_bus_route14.zip"
    spec = {
        "name": "liverpool", "workspace": "w", "grid": {"bounds": [-3.1, 53.3, -2.8, 53.5], "resolution_m": 2.0, "tile_px": 512},
        "points": {
            "sources": [f"{archive}::*.csv"], "time_zone": "Europe/London",
            "columns": {"lon": "longitude", "lat": "latitude", "time": "timestamp", "vehicle": "vehicle_id", "bearing": "bearing"},
        },
    }  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    c = load_city(tmp_path / "city.yaml")
    entry = ingest(c)
    with zipfile.ZipFile(archive) as z:
        table = pd.read_csv(z.open(next(n for n in z.namelist() if n.endswith(".csv"))))
    assert entry["rows"] == len(table) == entry["kept"] + sum(entry["rejected"].values())
    assert table.bearing.isna().sum() == 399
    cube = CubeReader(cubes_path(c))
    sums = {name: int(cube.window(name, 0, 0, *c.make_grid().shape).sum()) for name in ("count", "bearing_count")}
    assert sums["count"] == entry["kept"]
    repeated = entry["rows"] - entry["kept"]
    assert table.bearing.notna().sum() - repeated <= sums["bearing_count"] <= table.bearing.notna().sum()


def test_positions_that_are_missing_by_word(real_data, tmp_path):
    """`None` for missing, no header, longitude and latitude: the same shuttles as another publisher has them."""
    text = (CITIES / "chicago.yaml").read_text()
    text = text.replace("../../../shared/data", str(real_data)).replace(
        "tracks_chicago.zip::*/trips/*.txt", "uic_trips_1m_wgs84.zip::trips/*"
    )
    text = text.replace("EPSG:32616\n  csv", "EPSG:4326\n  csv").replace('delimiter: " ", header: false, names: [x, y, t]',
                                                                         'delimiter: ",", header: false, names: [id, y, x, t, p, n]')  # fmt: skip
    (tmp_path / "city.yaml").write_text(text)
    entry = ingest(load_city(tmp_path / "city.yaml"))
    assert entry["rows"] == 118_364
    assert entry["rows"] == entry["kept"] + sum(entry["rejected"].values())
    assert entry["kept"] >= 118_000


def test_extracts_of_openstreetmap_are_read(real_data):
    """Never more ways than GDAL's lines without those for feet and bicycles."""
    for name in ("Helsinki.osm.pbf", "berlin-siegessaeule.osm.gz"):
        path = real_data / "extras" / name
        ways = read_lines(path, MapSpec(path=name), "existing_map")
        every = gpd.read_file(f"/vsigzip/{path}" if name.endswith(".gz") else path, layer="lines").highway
        plain = every.isin(["footway", "path", "cycleway", "steps", "pedestrian", "construction", "platform", "proposed"])
        assert 0 < len(ways) <= every.notna().sum() - plain.sum()
        assert ways.crs.to_epsg() == 4326
        lanes = lanes_of(ways, "existing_map", name)
        assert lanes.min() >= 0.5
        assert lanes.max() <= 8
