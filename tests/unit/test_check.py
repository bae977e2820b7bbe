"""Ten broken city files and more: one clear line each, exit code 2, and nothing written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.errors import ConfigError
from roadfuse_core.settings import InvalidCityError, load_city, parse_assignments


def edit(path: str, value):
    def apply(spec, folder):
        *parents, last = path.split(".")
        for key in parents:
            spec = spec[key]
        spec[last] = value

    return apply


def remove_imagery(spec, folder):
    spec["imagery"]["sources"] = ["nowhere/*.tif"]


def imagery_elsewhere(spec, folder):
    with rasterio.open(folder / "far.tif", "w", driver="GTiff", height=8, width=8, count=3, dtype="uint8", crs="EPSG:32633",
                       transform=rasterio.Affine(1, 0, 200_000, 0, -1, 5_000_000)) as dst:  # fmt: skip
        dst.write(np.zeros((3, 8, 8), np.uint8))
    spec["imagery"]["sources"] = ["far.tif"]


def label_without_crs(spec, folder):
    (folder / "roads.csv").write_text('WKT\n"LINESTRING (0 0, 1 1)"\n')
    spec["labels"]["roads"] = {"path": "roads.csv"}


def empty_dump(spec, folder):
    schema = pq.read_schema(folder / "dumps/2026-03-29.parquet")
    pq.write_table(schema.empty_table(), folder / "empty.parquet")
    spec["points"]["sources"] = ["empty.parquet"]


def points_elsewhere(spec, folder):
    for key in ("imagery", "labels", "existing_map"):
        del spec[key]
    spec["grid"]["bounds"] = [3.2, 47.4, 3.21, 47.41]


def misspell(spec, folder):
    spec["points"]["sorces"] = spec["points"].pop("sources")


def unreadable(spec, folder):
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    spec["points"]["sources"] = ["bad.parquet"]


def list_column(spec, folder):
    pq.write_table(pa.table({"lon": [[1.0]], "lat": [2.0]}), folder / "list.parquet")
    spec["points"] = {"sources": ["list.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"}


BROKEN = {
    "missing file": (remove_imagery, ["imagery.sources", "nowhere/*.tif", "matches no file", "correct the path"]),
    "unknown key": (edit("points.sorces", ["x"]), ["points.sorces", "unknown key", "did you mean sources?"]),
    "misspelt key": (misspell, ["points.sorces", "unknown key", "did you mean sources?"]),
    "wrong column": (edit("points.columns.lon", "longitude"), ["points.columns.lon", "'longitude'", "is not a column", "it has: vehicle"]),
    "wrong unit": (edit("points.speed_unit", "kmh"), ["points.speed_unit", "'kmh'", "use 'km/h', 'm/s'"]),
    "bounds reversed": (edit("grid.bounds", [13.3, 47.5, 13.2, 47.4]), ["grid", "west < east"]),
    "imagery elsewhere": (imagery_elsewhere, ["imagery.sources", "far.tif", "lies outside grid.bounds", "correct grid.bounds"]),
    "label without CRS": (label_without_crs, ["labels.roads", "roads.csv", "has no CRS", "labels.roads.crs"]),
    "bad period": (edit("points.period", "fortnight"), ["points.period", "'fortnight'", "use 'day', 'week', 'month' or 'all'"]),
    "empty dump": (empty_dump, ["points.sources", "empty.parquet", "hold no rows", "point at files with data"]),
    "unreadable Parquet": (unreadable, ["points.sources", "bad.parquet", "not readable Parquet", "write or copy it again"]),
    "points elsewhere": (points_elsewhere, ["points.sources", "no position inside grid.bounds", "correct"]),
    "exchanged columns": (edit("points.columns", {"lon": "lat", "lat": "lon", "time": "time"}), ["points.columns", "exchange lon and lat"]),
    "column of lists": (list_column, ["points.columns.lon", "has type list", "name a column of numbers"]),
    "unknown weights": (edit("model.weights", "best"), ["model.weights", "'best'", "use default, fused, image, gps, kde or a path"]),
    "bad tile": (edit("grid.tile_px", 300), ["grid.tile_px", "300", "use 64, 128"]),
    "misspelt class": (edit("labels", {"road": "truth/roads.tif"}), ["labels show road, and the target is roads", "set `target`"]),
    "bad class": (edit("target", "existing_map"), ["target", "'existing_map'", "match pattern"]),
    "class that the model does not find": (
        lambda s, f: s.update(target="buildings", labels={"buildings": "truth/roads.tif"}),
        ["target", "'buildings'", "is not what the model finds: roads", "change the model"],
    ),
    "missing key": (edit("points.columns", {"lon": "lon"}), ["points.columns.lat", "is missing", "add it"]),
    "no evidence": (lambda s, f: (s.pop("points"), s.pop("imagery")), ["a city needs points or imagery"]),
}  # fmt: skip


@pytest.fixture
def broken(simulated, tmp_path):
    def build(change) -> Path:
        for name in ("dumps", "imagery", "truth"):
            shutil.copytree(simulated / name, tmp_path / name)
        shutil.copy(simulated / "old_map.gpkg", tmp_path)
        spec = yaml.safe_load((simulated / "city.yaml").read_text())
        change(spec, tmp_path)
        (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        return tmp_path / "city.yaml"

    return build


def listing(folder: Path):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_city_file_gets_one_clear_line(name, broken):
    change, words = BROKEN[name]
    path = broken(change)
    before = listing(path.parent)
    with pytest.raises(InvalidCityError) as caught:
        check_city(load_city(path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert caught.value.exit_code == 2
    assert listing(path.parent) == before


def test_two_mistakes_get_two_lines(broken):
    def both(spec, folder):
        spec["points"]["speed_unit"] = "kmh"
        spec["grid"]["tile_px"] = 300

    with pytest.raises(InvalidCityError) as caught:
        load_city(broken(both))
    assert len(str(caught.value).splitlines()) == 2


def test_the_command_prints_the_line_and_exits_with_two(broken):
    path = broken(unreadable)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "check", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: points.sources: ")
    assert len(done.stderr.splitlines()) == 1


def test_no_permission_is_one_line(broken):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = broken(lambda s, f: (f / "dumps/2026-03-29.parquet").chmod(0))
    with pytest.raises(InvalidCityError, match="not readable Parquet"):
        check_city(load_city(path))


def test_a_good_city_is_described_and_nothing_is_written(broken):
    path = broken(lambda s, f: None)
    before = listing(path.parent)
    found = check_city(load_city(path))
    assert any("9,0" in line and "3 files" in line for line in found)
    assert listing(path.parent) == before


def test_missing_and_malformed_files(tmp_path):
    from roadfuse_core.errors import ConfigError

    with pytest.raises(ConfigError, match="does not exist"):
        load_city(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_city(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="is not a mapping"):
        load_city(tmp_path / "b.yaml")


@pytest.mark.parametrize(("west", "resolution_m", "warned"), [(13.0, 1.0, False), (116.3, 0.5, True)])
def test_positions_in_single_precision_are_told_when_they_step_over_pixels(tmp_path, west, resolution_m, warned):
    rng = np.random.default_rng(0)
    lon, lat = (pa.array((v + 0.01 * rng.random(500)).astype(np.float32)) for v in (west, 40.0))
    pq.write_table(pa.table({"lon": lon, "lat": lat}), tmp_path / "p.parquet")
    spec = {
        "name": "c", "workspace": "w", "model": {"weights": "kde"},
        "grid": {"bounds": [west, 40.0, west + 0.01, 40.01], "resolution_m": resolution_m, "tile_px": 256},
        "points": {"sources": ["p.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
    }  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    told = [line for line in check_city(load_city(tmp_path / "city.yaml")) if "32 bits" in line]
    assert bool(told) == warned


def test_settings_of_a_command_are_read_as_yaml():
    assert parse_assignments("--set", ["name=a,b", "stages=[{epochs: 1}, {epochs: 2}]", "clip=null", "text=a=b"], "seed=2") == {
        "name": "a,b", "stages": [{"epochs": 1}, {"epochs": 2}], "clip": None, "text": "a=b",
    }  # fmt: skip
    for wrong in (["seed"], ["=1"], ["seed="], ["seed=[1"], ["seed=1", "seed=2"]):
        with pytest.raises(ConfigError, match=r"^--set: "):
            parse_assignments("--set", wrong, "seed=2")
