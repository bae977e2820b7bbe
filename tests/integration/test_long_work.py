"""What only shows work never ends it: flows whose artifacts fail, and that have no time limit."""

import importlib
import pkgutil
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect import Flow
from prefect.testing.utilities import prefect_test_harness

import flows
from flows.refresh import refresh
from flows.watch import watch
from roadfuse_core import locks
from roadfuse_core.cubes import ledger
from roadfuse_core.inference import MapReader
from roadfuse_core.settings import load_city
from tasks import artifacts


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def points_alone(tmp_path):
    """City file of points and no image, mapped by kernel density."""
    rng = np.random.default_rng(5)
    n = 900
    pq.write_table(pa.table({"lon": 13 + 0.003 * rng.random(n), "lat": 47 + 0.002 * rng.random(n)}), tmp_path / "dump.parquet")
    spec = {"name": "few", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.003, 47.002], "resolution_m": 1.0, "tile_px": 64},
            "points": {"sources": ["dump.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
            "model": {"weights": "kde"}, "cluster": {"workers": 1}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path / "city.yaml"


@pytest.mark.slow
@pytest.mark.prefect
def test_a_refresh_whose_artifacts_all_fail_is_published(server, points_alone, monkeypatch):
    calls = []

    def fails(*arguments, **named):
        calls.append(named.get("key"))
        raise OSError("the server is gone")

    for name in ("create_progress_artifact", "create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(artifacts, name, fails)
    monkeypatch.setattr(artifacts, "EVERY_S", 0.0)
    done = refresh(points_alone)
    assert done["held"] == []
    city = load_city(points_alone)
    assert sum(e["kept"] for e in ledger(city).values()) == 900
    assert MapReader(city).record["windows"] > 0
    assert "few-refresh" in calls
    assert "few-reading-points" in calls


def test_a_progress_artifact_that_somebody_deleted_is_made_again(monkeypatch):
    made, there = [], set()

    def create(percent, key, description):
        made.append(description)
        there.add(len(made))
        return len(made)

    def update(number, percent, description):
        if number not in there:
            raise ValueError("no such artifact")

    monkeypatch.setattr(artifacts, "EVERY_S", 0.0)
    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts, "update_progress_artifact", update)
    tell = artifacts.ProgressArtifact("deleted")
    tell("reading points", 1, 9)
    tell("reading points", 2, 9)
    there.clear()
    with pytest.raises(ValueError, match="no such artifact"):
        tell("reading points", 3, 9)
    tell("reading points", 4, 9)
    assert made == ["reading points: 1 of 9", "reading points: 4 of 9"]


HOLD = """
import sys
from pathlib import Path
from roadfuse_core.locks import TURN, waiting_lock
with waiting_lock(Path(sys.argv[1]), TURN, "refresh of few"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.prefect
def test_a_refresh_waits_for_its_turn_and_a_poll_does_not(server, points_alone, monkeypatch):
    told = queue.Queue()
    monkeypatch.setattr(locks.log, "warning", lambda text, *values: told.put(text % values))
    city = load_city(points_alone)
    command = [sys.executable, "-c", HOLD, city.workspace_path]
    with (
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        assert holder.stdout.readline() == "held\n"
        assert watch(points_alone) is None
        running = pool.submit(refresh, points_alone)
        assert f"waiting for process {holder.pid} on " in told.get(timeout=120)
        assert ledger(city) == {}
        holder.communicate("\n")
        assert running.result(timeout=200)["held"] == []
    assert sum(e["kept"] for e in ledger(city).values()) == 900


def test_no_flow_has_a_time_limit():
    """The first map of a country takes as long as it takes."""
    found = {}
    for module in pkgutil.iter_modules(flows.__path__):
        for name, value in vars(importlib.import_module(f"flows.{module.name}")).items():
            if isinstance(value, Flow):
                found[name] = value.timeout_seconds
    assert {"refresh", "backfill", "watch", "train", "evaluate", "demo"} <= set(found)
    assert set(found.values()) == {None}
