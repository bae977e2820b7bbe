"""The flows end to end on Prefect's ephemeral server, and the commands round them."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import yaml
from prefect.settings import PREFECT_HOME
from prefect.testing.utilities import prefect_test_harness

from roadfuse_core.cubes import ledger
from roadfuse_core.inference import MapReader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_HOME.value()


@pytest.mark.prefect
def test_refresh_makes_everything_and_again_changes_nothing(server, small_city):
    from flows.refresh import refresh

    city_file = small_city.root / "city.yaml"
    first = refresh(city_file)
    assert set(first["scores"]) == {"map", "baseline"}
    assert 0 <= first["scores"]["map"]["test"]["g_iou"] <= 1
    for path in first["files"].values():
        assert Path(path).exists()
    with rasterio.open(first["files"]["probability"]) as source:
        assert source.shape == small_city.make_grid().shape
    page = first["files"]["report"].read_text()
    assert "http" not in re.sub(r"data:image/webp;base64,[^\"]*", "", page).replace("<!doctype html>", "")
    assert page.count("data:image/webp") == 6
    second = refresh(city_file)
    assert second["record"]["unchanged"]
    assert {k: second["record"][k] for k in first["record"]} == first["record"]
    item = json.loads(second["files"]["stac item"].read_text())
    assert item["properties"]["roadfuse:map"] == MapReader(small_city).key
    assert "3 test tiles with labels: split seed 0" in page
    assert second["scores"] == first["scores"]
    assert len(ledger(small_city)) == 1


@pytest.mark.prefect
def test_a_new_dump_changes_the_map(server, small_city):
    from flows.refresh import refresh

    city_file = small_city.root / "city.yaml"
    spec = yaml.safe_load(city_file.read_text())
    spec["points"]["sources"] = ["dumps/2026-03-29.parquet"]
    del spec["labels"]
    city_file.write_text(yaml.safe_dump(spec))
    before = refresh(city_file)
    assert before["scores"] == {}
    spec["points"]["sources"] = ["dumps/*.parquet"]
    city_file.write_text(yaml.safe_dump(spec))
    after = refresh(city_file)
    assert after["record"]["digest"] != before["record"]["digest"]
    assert [len(e["files"]) for e in ledger(small_city).values()] == [1, 2]


@pytest.mark.prefect
def test_a_broken_city_fails_the_flow_with_its_own_error(server, small_city):
    from flows.refresh import refresh
    from roadfuse_core.settings import InvalidCityError

    city_file = small_city.root / "city.yaml"
    city_file.write_text(city_file.read_text().replace("km/h", "kmh"))
    with pytest.raises(InvalidCityError, match=r"points\.speed_unit"):
        refresh(city_file)
    assert not (small_city.workspace_path).exists()


def roadfuse(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_plain_commands_on_one_city(small_city, tmp_path):
    city_file = small_city.root / "city.yaml"
    assert "no dumps yet" in roadfuse("status", city_file).stdout
    dry = roadfuse("ingest", city_file, "--dry-run", "--json")
    assert json.loads(dry.stdout)["new_files"] == 3
    listed = roadfuse("backfill", city_file, "--from", "2026-03-30", "--to", "2026-04-01", "--dry-run").stdout
    assert "2 new files" in listed
    entry = json.loads(roadfuse("ingest", city_file, "--json").stdout)
    assert entry["rows"] == 9027
    assert "0 new files" in roadfuse("ingest", city_file).stdout
    assert roadfuse("export", city_file, "count", "--out", tmp_path / "count.tif").returncode == 0
    with rasterio.open(tmp_path / "count.tif") as source:
        assert source.read(1).sum() == entry["kept"]
    picture = roadfuse("export", city_file, "count", "--out", tmp_path / "count.png")
    assert (picture.returncode, list(tmp_path.glob("count.*"))) == (2, [tmp_path / "count.tif"])
    wrong = roadfuse("export", city_file, "heights", "--out", tmp_path / "x.tif")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    tuned = roadfuse("tune", city_file, "--out", tmp_path / "kde.json")
    assert tuned.returncode == 0
    assert json.loads((tmp_path / "kde.json").read_text())["tuned_on"].startswith("11 training tiles")
    missing = roadfuse("export", city_file, "road", "--out", tmp_path / "x.tif")
    assert missing.returncode == 4
    assert "roadfuse refresh" in missing.stderr


def test_plain_commands_never_import_prefect():
    code = "import sys, flows.cli, roadfuse_core.check, roadfuse_core.metrics, roadfuse_core.report; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_and_knobs_are_listed():
    assert json.loads(roadfuse("models", "--json").stdout)[0]["parameters"] == 31_099_265
    listed = roadfuse("simulate", "x", "--knobs").stdout
    assert "canopy" in listed
    assert "untravelled" in listed
    assert roadfuse("simulate", "x", "--set", "trees=1").returncode == 2
    assert roadfuse("simulate", "x", "--set", "canopy=7").returncode == 2


def test_deployments_name_flows_that_exist():
    spec = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    for deployment in spec["deployments"]:
        module, name = deployment["entrypoint"].rsplit(".", 1)
        flow = getattr(importlib.import_module(module), name)
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)


def test_the_map_reader_wants_a_map(small_city):
    from roadfuse_core.errors import StoreError

    with pytest.raises(StoreError, match="roadfuse refresh"):
        MapReader(small_city)
