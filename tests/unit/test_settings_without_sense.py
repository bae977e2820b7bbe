"""City files that make no sense get one line that says where and how to fix them, soon, and without much memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.errors import ConfigError, RoadFuseError
from roadfuse_core.grid import Bounds, make_grid
from roadfuse_core.labels import open_map
from roadfuse_core.settings import City, InvalidCityError, MapSpec, load_city, parse_assignments, parse_yaml
from roadfuse_core.training import load_recipe

CITY = {
    "name": "c", "workspace": "work", "model": {"weights": "kde"},
    "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
    "points": {"sources": ["p.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    rng = np.random.default_rng(0)
    columns = {"lon": 13 + 0.01 * rng.random(97), "lat": 47 + 0.01 * rng.random(97)}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")

    def city(more="", **changes):
        spec = yaml.safe_load(yaml.safe_dump(CITY))
        for key, value in changes.items():
            part = spec
            *parents, last = key.split("__")
            for name in parents:
                part = part.setdefault(name, {})
            part[last] = value
        (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True) + more)
        return tmp_path / "city.yaml"

    return city


def lines_of(path):
    with pytest.raises(RoadFuseError) as caught:
        check_city(load_city(path))
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 2000
    return str(caught.value).splitlines()


def test_the_city_itself_is_good(write):
    assert check_city(load_city(write()))


WRONG = {
    "a CRS that does not exist": ({"grid__crs": "EPSG:99999999"}, r"^grid\.crs: 'EPSG:99999999' is wrong; give the code of a CRS, such as EPSG:32633$"),
    "points in one": ({"points__crs": "nonsense"}, r"^points\.crs: 'nonsense' is wrong; give the code of a CRS"),
    "imagery in one": ({"imagery": {"sources": ["a.tif"], "crs": "EPSG:0"}}, r"^imagery\.crs: 'EPSG:0' is wrong"),
    "lidar in one": ({"lidar": {"sources": ["a.tif"], "crs": "x"}}, r"^lidar\.crs: 'x' is wrong"),
    "labels in one": ({"labels": {"roads": {"path": "a.gpkg", "crs": "EPSG:999999"}}}, r"^labels\.roads\.crs: 'EPSG:999999' is wrong"),
    "an existing map in one": ({"existing_map": {"path": "a.gpkg", "crs": "?"}}, r"^existing_map\.crs: '\?' is wrong"),
    "heights as positions": ({"points__crs": "EPSG:5773"}, r"^points\.crs: 'EPSG:5773' is wrong; give a CRS of positions on the ground"),
    "positions in space": ({"points__crs": "EPSG:4978"}, r"^points\.crs: 'EPSG:4978' is wrong; give a CRS of positions"),
    "degrees as a grid": ({"grid__crs": "EPSG:4326"}, r"^grid\.crs: 'EPSG:4326' is not a projected CRS in metres"),
    "feet as a grid": ({"grid__crs": "EPSG:2263"}, r"^grid\.crs: 'EPSG:2263' is not a projected CRS in metres"),
    "a grid on the other side": ({"grid__crs": "EPSG:32603"}, r"^grid\.crs: 'EPSG:32603' is made for Between 168°W and 162°W.*; leave it out"),
    "a zone that does not exist": ({"points__time_zone": "Asia/Beijing"}, r"^points\.time_zone: 'Asia/Beijing' is wrong; give a name such as Asia/"),
    "an offset as a zone": ({"points__time_zone": "+08:00"}, r"^points\.time_zone: '\+08:00' is wrong; give a name such as .*Etc/GMT-8"),
    "a range of one value": ({"imagery": {"sources": ["a.tif"], "value_range": [5, 5]}}, r"^imagery\.value_range: \[5, 5\] is wrong; black and white"),
    "a range without end": ({"imagery": {"sources": ["a.tif"], "value_range": [0, float("inf")]}}, r"^imagery\.value_range\.1: inf is wrong; input should be a finite"),
    "times backwards": ({"points__clean": {"time_range": ["2026-03-02", "2026-03-01"]}}, r"^points\.clean\.time_range: .*the first time must come before"),
    "times of two kinds": ({"points__clean": {"time_range": ["2026-03-02T00:00:00Z", "2026-03-01"]}}, r"^points\.clean\.time_range: .*must come before"),
    "a billion workers": ({"cluster__workers": 10**9}, r"^cluster\.workers: 1000000000 is wrong; input should be less than or equal to 10000"),
    "a price without end": ({"price_per_worker_hour": float("inf")}, r"^price_per_worker_hour: inf is wrong"),
    "a resolution that is no number": ({"grid__resolution_m": float("nan")}, r"^grid\.resolution_m: nan is wrong"),
    "pixels of a micrometre": ({"grid__resolution_m": 1e-6}, r"^grid\.resolution_m: 1e-06 makes [\d,]+ × [\d,]+ px in [\d,]+ tiles; choose larger pixels"),
    "a workspace that is a device": ({"workspace": "/dev/null"}, r"^workspace: '/dev/null' is no folder: /dev/null is a file"),
    "a workspace below a file": ({"workspace": "p.parquet/work"}, r"^workspace: 'p\.parquet/work' is no folder: .*p\.parquet is a file"),
    "a workspace of the kernel": ({"workspace": "/proc/work"}, r"^workspace: '/proc/work' cannot be written: /proc takes no files"),
    "a workspace of the kernel's": ({"workspace": "/sys"}, r"^workspace: '/sys' cannot be written: /sys takes no files"),
    "a name too long for a disk": ({"workspace": "w" * 300}, r"^workspace: 'w+ … w+' cannot be a folder|^workspace: 'w+' cannot be a folder"),
    "a city on both sides of 180": ({"grid__bounds": [179.998, -16.8, -179.998, -16.797]}, r"^grid: bounds must have west < east; of a city on both sides of 180 degrees make two"),
    "whole tiles across 180": ({"grid__bounds": [179.998, -16.8, 180, -16.797]}, r"^grid\.bounds: .* reach across 180 degrees once they are whole tiles of 64 m; end them 64 m before"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_without_sense_get_one_line(write, name):
    changes, message = WRONG[name]
    found = lines_of(write(**changes))
    assert any(re.search(message, line) for line in found), found
    key = message.lstrip("^").split(":")[0].replace("\\", "")
    assert len([line for line in found if line.startswith(key)]) == 1


def test_the_fix_for_180_degrees_is_one(write):
    assert make_grid(Bounds(179.997, -16.8, 180 - 64 / 106_000, -16.797), 1.0, 64).crs == "EPSG:32760"
    assert make_grid(Bounds(-180 + 64 / 106_000, -16.8, -179.997, -16.797), 1.0, 64).crs == "EPSG:32701"


def nested(depth):
    return "x: " + "[" * depth + "]" * depth


def laughs():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    return "\n".join(rows) + "\nworkspace: *a11\n"


TEXTS = {
    "the 30th of February": ("price_per_worker_hour: 2026-02-30", r"is not YAML \(day (is )?out of range"),
    "the 13th month": ("price_per_worker_hour: 2026-13-45", r"is not YAML \(month must be"),
    "a number of 5,000 digits": ("price_per_worker_hour: " + "9" * 5000, r"is not YAML \(Exceeds the limit"),
    "deep nesting": (nested(3000), r"is not YAML \(too deep\)"),
    "anchors that multiply": (laughs(), r"is not YAML \(.*more than 100,000 values"),
    "an anchor in itself": ("x: &a [*a]", r"is not YAML \(.*holds itself"),
    "a key twice": ("name: d", r"is not YAML \(.*the key 'name' stands there twice"),
    "a key twice within": (
        "model: {weights: kde, weights: gps}",
        r"is not YAML \(.*the key '(model|weights)' stands there twice",
    ),
    "NUL in a path": ('cluster: {kind: "a\\0b"}', r"is not YAML \(.*holds NUL"),
    "half a character": ('cluster: {kind: "\\ud800"}', r"is not YAML \(.*half a character"),
    "a tag of Python": ("x: !!python/object/apply:os.system [ls]", r"is not YAML \(could not determine a constructor"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_without_sense_get_one_line(write, name):
    text, message = TEXTS[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load_city(write(text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_anchors_that_do_no_harm_are_allowed():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert parse_yaml("{1: a, '1': b, 2026-03-01: c}")["1"] == "b"


def test_a_number_that_python_cannot_write_is_a_wrong_value(write):
    (line,) = lines_of(write("price_per_worker_hour: 0x" + "f" * 5000))
    assert line.startswith("price_per_worker_hour: a number of thousands of digits is wrong")


def test_values_of_any_size_are_shortened(write):
    (line,) = lines_of(write(points__columns__lon=["x" * 90] * 900))
    assert line.startswith("points.columns.lon: ['xxx")
    assert len(line) < 600
    with pytest.raises(ConfigError) as caught:
        parse_assignments("--set", ["a=" + "x: [" * 50], "seed=1")
    assert len(str(caught.value)) < 600


def test_anchors_end_soon_and_stay_small(write):
    """They took 25 seconds and 0.8 GB before somebody stopped them."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); from flows.cli import main; sys.argv = ['roadfuse', 'check', sys.argv[1]]; main()"
    done = subprocess.run([sys.executable, "-c", code, str(write(laughs()))], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: city file: ")
    assert len(done.stderr.splitlines()) == 1


def test_folders_and_files_nobody_may_read_are_no_city(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; give the path of a file"):
        load_city(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_city(tmp_path / "a.yaml")


def test_check_says_that_metres_of_web_mercator_are_not_true(write):
    """Helsinki: a metre of EPSG:3857 is half a metre on the ground."""
    path = write(grid__crs="EPSG:3857", grid__bounds=[24.9, 60.17, 24.92, 60.18], points__sources=["h.parquet"])
    rng = np.random.default_rng(0)
    pq.write_table(
        pa.table({"lon": 24.9 + 0.02 * rng.random(97), "lat": 60.17 + 0.01 * rng.random(97)}), path.parent / "h.parquet"
    )
    found = check_city(load_city(path))
    (line,) = [f for f in found if "on the ground" in f]
    assert line.startswith("grid: a metre of EPSG:3857 is 0.50 m on the ground here, and the city ")
    assert line.endswith("leave grid.crs out for a UTM zone, whose metres are true")
    city = load_city(path)
    plain = city.model_copy(update={"grid": city.grid.model_copy(update={"crs": None})})
    true_km2 = float(line.partition("city ")[2].partition(" ")[0])
    km2 = plain.make_grid().n_tiles * plain.make_grid().tile_m ** 2 / 1e6
    assert abs(true_km2 - km2) < 0.4
    assert not [f for f in check_city(plain) if "on the ground" in f]


def test_roads_are_as_wide_on_the_ground_in_web_mercator(tmp_path):
    city = City(name="c", workspace="w", grid={"bounds": (24.9, 60.17, 24.92, 60.18), "crs": "EPSG:3857", "resolution_m": 1.0, "tile_px": 64},
                imagery={"sources": ["x"]}, root=tmp_path)  # fmt: skip
    gpd.GeoDataFrame(geometry=[shapely.LineString([(24.9, 60.175), (24.92, 60.175)])], crs=4326).to_file(tmp_path / "a.gpkg")
    grid = city.make_grid()
    road, _ = open_map(city, MapSpec(path="a.gpkg", width_m=8), "labels.roads", grid).window(0, 0, *grid.shape)
    assert 15 <= road[:, grid.shape[1] // 2].sum() <= 17


def test_an_unknown_crs_of_the_library_is_one_line():
    with pytest.raises(ConfigError, match=r"grid\.crs: 'EPSG:99999999' is not a CRS"):
        make_grid(Bounds(13, 47, 13.01, 47.01), 1.0, 64, "EPSG:99999999")


def test_two_sides_of_180_are_named_in_the_file(write):
    with pytest.raises(InvalidCityError, match="one city file for each side"):
        load_city(write(grid__bounds=[179, -17, -179, -16]))


@pytest.mark.parametrize("seed", ["9" * 5000, str(2**70), "0x" + "f" * 5000, "-1"])
def test_a_seed_beyond_all_bounds_is_one_line(tmp_path, seed):
    (tmp_path / "recipe.yaml").write_text(f"base: sun2019\nseed: {seed}\n")
    with pytest.raises(RoadFuseError, match=r"(?m)^(recipe: .*is not YAML|seed: .* is wrong)") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert caught.value.exit_code == 2
    assert [line for line in str(caught.value).splitlines() if "seed" in line or "not YAML" in line]
    assert len(str(caught.value)) < 3000
