"""Who writes into a workspace while others want to: real processes, stopped in the middle of their work."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.cubes import CubeReader, committer_lock, cubes_path, expire, ingest, ledger, snapshots
from roadfuse_core.errors import StoreError
from roadfuse_core.inference import MapReader, infer, published, rollback
from roadfuse_core.locks import COMMITTER, INGEST, MAP, TURN, holder_of, sole_writer, waiting_lock
from roadfuse_core.settings import City, load_city

# Runs a function on a city, and stops at its first report of some work until a line comes in.
WORK = """
import sys
from pathlib import Path
from roadfuse_core.cubes import ingest
from roadfuse_core.inference import infer
from roadfuse_core.settings import load_city

name, city_file, stop_at = sys.argv[1:]
stopped = []

def tell(what, done, total):
    if what == stop_at and not stopped:
        stopped.append(what)
        print("under way", flush=True)
        sys.stdin.readline()

print(bool({"ingest": ingest, "infer": infer}[name](load_city(Path(city_file)), tell=tell)), flush=True)
"""


def write(city: City, name: str, seed: int, rows: int = 700) -> None:
    rng = np.random.default_rng(seed)
    table = pa.table({"lon": 13 + 0.003 * rng.random(rows), "lat": 47 + 0.002 * rng.random(rows)})
    pq.write_table(table, city.root / "dumps" / name)


@pytest.fixture
def city(tmp_path) -> City:
    spec = {"name": "few", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.003, 47.002], "resolution_m": 1.0, "tile_px": 64},
            "points": {"sources": ["dumps"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
            "model": {"weights": "kde"}, "cluster": {"workers": 1}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "dumps").mkdir()
    made = load_city(tmp_path / "city.yaml")
    write(made, "1.parquet", 1)
    return made


@contextmanager
def under_way(city: City, name: str, stop_at: str):
    """A process that works on the city and has stopped in the middle."""
    command = [sys.executable, "-c", WORK, name, city.root / "city.yaml", stop_at]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "under way\n"
            yield process
        finally:
            process.kill()


def finish(process) -> tuple[int, str, str]:
    """Let it go on to its end."""
    out, err = process.communicate("\n", timeout=120)
    return process.returncode, out, err


def test_a_second_ingest_waits_for_the_first_and_counts_nothing_twice(city):
    command = [sys.executable, "-m", "flows.cli", "ingest", city.root / "city.yaml"]
    with (
        under_way(city, "ingest", "reading points") as first,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second,
    ):
        told = second.stderr.readline()
        expected = rf"{re.escape(str(city.workspace_path))}: waiting for process {first.pid} on {socket.gethostname()} \(ingest of few, since .*\)\n"
        assert re.fullmatch(expected, told)
        assert second.poll() is None
        assert finish(first)[:2] == (0, "True\n")
        out, err = second.communicate(timeout=120)
    assert (second.returncode, out) == (0, "nothing is new any more: another run ingested these files meanwhile\n"), err
    assert [e["kept"] for e in ledger(city).values()] == [700]
    assert CubeReader(cubes_path(city)).window("count", 0, 0, *city.make_grid().shape).sum() == 700


@pytest.mark.slow
def test_a_lock_is_free_when_its_holder_is_killed(city):
    with under_way(city, "ingest", "reading points") as first:
        assert holder_of(city.workspace_path, INGEST).startswith(f"process {first.pid} on ")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert holder_of(city.workspace_path, INGEST) is None
    assert ingest(city)["kept"] == 700


@pytest.mark.slow
def test_an_ingest_goes_on_while_a_map_is_predicted(city):
    ingest(city)
    before = snapshots(city)[0].id
    with under_way(city, "infer", "predicting windows") as predicting:
        write(city, "2.parquet", 2)
        assert ingest(city)["kept"] == 700
        assert finish(predicting)[0] == 0
    assert MapReader(city).record["cubes_snapshot"] == before
    assert infer(city)["cubes_snapshot"] == snapshots(city)[0].id != before


@pytest.mark.slow
def test_a_second_prediction_waits_and_finds_nothing_changed(city):
    ingest(city)
    command = [sys.executable, "-c", WORK, "infer", city.root / "city.yaml", "-"]
    with (
        under_way(city, "infer", "predicting windows") as first,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second,
    ):
        assert f"waiting for process {first.pid} on" in second.stderr.readline()
        assert finish(first)[:2] == (0, "True\n")
        assert second.communicate(timeout=120)[0] == "True\n"
    assert len(published(city)) == 1


def test_a_rollback_is_not_kept_waiting_and_the_map_under_way_is_refused(city):
    ingest(city)
    first = infer(city)
    write(city, "2.parquet", 2)
    ingest(city)
    infer(city)
    write(city, "3.parquet", 3)
    ingest(city)
    with under_way(city, "infer", "predicting windows") as predicting:
        rollback(city)
        code, _, err = finish(predicting)
    assert code == 1
    assert err.splitlines()[-1].endswith("another map was published meanwhile; run again")
    assert MapReader(city).record == first
    assert infer(city)["cubes_snapshot"] == snapshots(city)[0].id


@pytest.mark.parametrize(("name", "stop_at"), [pytest.param("ingest", "reading points", marks=pytest.mark.slow), ("ingest", "writing blocks"),
                                               pytest.param("infer", "predicting windows", marks=pytest.mark.slow), pytest.param("infer", "writing the mosaic", marks=pytest.mark.slow)])  # fmt: skip
def test_nothing_is_collected_under_work_that_is_not_published(city, name, stop_at):
    ingest(city)
    write(city, "2.parquet", 2)
    if name == "infer":
        ingest(city)
    with under_way(city, name, stop_at) as working:
        with pytest.raises(StoreError, match=rf"process {working.pid} on .* is writing there"):
            expire(city, datetime.now(UTC))
        code, _, err = finish(working)
    assert code == 0, err
    assert CubeReader(cubes_path(city)).window("count", 0, 0, *city.make_grid().shape).sum() == 1400
    expire(city, datetime.now(UTC))
    assert CubeReader(cubes_path(city)).window("count", 0, 0, *city.make_grid().shape).sum() == 1400
    if name == "infer":
        assert MapReader(city).window("probability", 0, 0, 64, 64).shape == (64, 64)


def test_a_sole_writer_takes_all_locks_or_none(tmp_path):
    with waiting_lock(tmp_path, MAP, "a map"):
        refused = pytest.raises(StoreError, match=rf"process {os.getpid()} on \S+ \(a map, since .*\) is writing there")
        with refused, sole_writer(tmp_path, (INGEST, MAP, COMMITTER), "all"):
            raise AssertionError("it was taken")
        assert holder_of(tmp_path, INGEST) is None
        assert holder_of(tmp_path, COMMITTER) is None
    with sole_writer(tmp_path, (INGEST, MAP, COMMITTER), "all"):
        assert "(all, since " in holder_of(tmp_path, COMMITTER)
    assert holder_of(tmp_path, TURN) is None


def test_commits_wait_for_one_another(tmp_path, caplog):
    code = ("import sys; from pathlib import Path; from roadfuse_core.cubes import committer_lock\n"
            "with committer_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()")  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert holder_of(tmp_path, COMMITTER).startswith(f"process {holder.pid} on ")
        holder.stdin.write("\n")
        holder.stdin.flush()
        with committer_lock(tmp_path):
            assert holder_of(tmp_path, COMMITTER).startswith(f"process {os.getpid()} on ")
        holder.stdin.close()
