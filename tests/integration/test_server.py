"""Real processes on loopback: PostgreSQL, a Prefect server, a Dask scheduler with two workers, an S3-compatible store, `roadfuse serve`;
minutes, so slow.

pytest -n 0 -s -m slow tests/integration/test_server.py prints what orchestration costs.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.cubes import ingest, ledger
from roadfuse_core.inference import MapReader
from roadfuse_core.settings import load_city

boto3 = pytest.importorskip("boto3", reason="the dev extra has it")
from botocore.exceptions import EndpointConnectionError  # noqa: E402

ROOT = Path(__file__).parents[2]
PORT, DASK, DATABASE, STORE, DASHBOARD = 4231, 18796, 54331, 54332, 54333
S3 = {"AWS_ACCESS_KEY_ID": "a-key-of-nobody", "AWS_SECRET_ACCESS_KEY": "a-secret-of-nobody", "AWS_DEFAULT_REGION": "us-east-1",
      "AWS_ENDPOINT_URL": f"http://127.0.0.1:{STORE}"}  # fmt: skip


def ask(path, body=None, method="POST"):
    """The server's answer as JSON."""
    data = None if method == "GET" else json.dumps(body or {}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/api{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read() or "null")


def wait_for(what, seconds, condition):
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(1)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture
def database(tmp_path):
    """Debian's PostgreSQL on a port of its own."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
    if not homes or os.getuid() or not shutil.which("runuser"):
        pytest.skip("PostgreSQL is not installed, or cannot be started by this user")
    folder = Path(f"/var/tmp/roadfuse-pg-{os.getpid()}")
    folder.mkdir()
    shutil.chown(folder, "postgres")
    run = ["runuser", "-u", "postgres", "--"]
    subprocess.run([*run, homes[-1] / "initdb", "-D", folder / "d", "-A", "trust"], check=True, stdout=subprocess.DEVNULL)
    options = f"-p {DATABASE} -c listen_addresses=127.0.0.1 -k {folder}"
    subprocess.run([*run, homes[-1] / "pg_ctl", "-D", folder / "d", "-o", options, "-w", "-l", folder / "log", "start"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    yield f"postgresql+asyncpg://postgres@127.0.0.1:{DATABASE}/postgres"
    subprocess.run([*run, homes[-1] / "pg_ctl", "-D", folder / "d", "-m", "immediate", "stop"], check=False)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def house(database, tmp_path, request):
    """Everything that runs, with the environment of a client."""
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api",
        "PREFECT_API_DATABASE_CONNECTION_URL": database, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_API_PORT": str(PORT), "PYTHONPATH": str(ROOT), "ROADFUSE_NOOP": str(tmp_path / "noop"),
    } | S3  # fmt: skip
    started = []

    def start(*command):
        log = open(tmp_path / f"{len(started)}.log", "w")  # noqa: SIM115
        process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, start_new_session=True, stdout=log,
                                   stderr=subprocess.STDOUT, cwd=tmp_path)  # fmt: skip
        started.append(process)
        return process

    start("-m", "prefect", "server", "start", "--host", "127.0.0.1")
    start("-m", "moto.server", "-H", "127.0.0.1", "-p", STORE)
    start(
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        DASK,
        "--dashboard-address",
        f"127.0.0.1:{DASHBOARD}",
    )
    preload = getattr(request, "param", ())
    for _ in range(2):
        start("-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{DASK}", "--nthreads", "1", "--no-dashboard", *preload)

    def up():
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/health", timeout=5) as answer:
            return answer.status == 200

    wait_for("server", 120, up)
    yield start
    for process in reversed(started):
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            os.killpg(process.pid, signal.SIGKILL)


def runs(name=None):
    """Flow runs that have begun, the newest first; those that wait for their time would fill the page."""
    begun = {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    found = ask("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50} | begun)
    return [r for r in found if name is None or name in r["name"]]


def deployment(name):
    return next(d for d in ask("/deployments/filter") if d["name"] == name)


@pytest.fixture
def bucket(house, monkeypatch):
    """The store's client, with an empty bucket `dumps`."""
    for key, value in S3.items():
        monkeypatch.setenv(key, value)

    def made():
        client = boto3.client("s3")
        client.create_bucket(Bucket="dumps")
        return client

    def tried():
        try:
            return made()
        except EndpointConnectionError:
            return None

    return wait_for("store", 60, tried)


def start_run(name, **parameters):
    made = ask(f"/deployments/{deployment(name)['id']}/create_flow_run", {"parameters": parameters})
    return made["id"]


def state(run_id):
    return ask(f"/flow_runs/{run_id}", method="GET")["state_name"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_week_of_a_city(house, bucket, small_city):
    """A scheduled refresh, a backfill over two dumps, a cancelled run, a killed process, and again; dumps lie in an object store."""
    for dump in (small_city.root / "dumps").iterdir():
        bucket.upload_file(str(dump), "dumps", dump.name)
    city_file = small_city.root / "city.yaml"
    spec = yaml.safe_load(city_file.read_text())
    spec["points"]["sources"] = ["s3://dumps/2026-03-29.parquet"]
    spec["cluster"] = {"kind": f"tcp://127.0.0.1:{DASK}"}
    city_file.write_text(yaml.safe_dump(spec))
    assert house("-m", "flows.cli", "ingest", city_file).wait(240) == 0  # by hand: a schedule makes no workspace
    serving = house("-m", "flows.cli", "serve", city_file, "--cron", "* * * * *")
    wait_for("scheduled refresh", 240, lambda: [r for r in runs(" refresh ") if r["state_name"] == "Completed"])
    ask(f"/deployments/{deployment(f'{small_city.name}-refresh')['id']}/pause_deployment")
    wait_for("quiet", 120, lambda: not [r for r in runs() if r["state_name"] in ("Running", "Pending")])
    city = load_city(city_file)
    assert len(ledger(city)) == 1
    first = MapReader(city).record
    spec["points"]["sources"] = ["s3://dumps/*.parquet"]
    city_file.write_text(yaml.safe_dump(spec))
    backfill = start_run(f"{small_city.name}-backfill", since="2026-03-30T00:00:00Z", until="2026-04-01T00:00:00Z")
    wait_for("backfill", 240, lambda: state(backfill) == "Completed")
    entries = list(ledger(load_city(city_file)).values())
    assert [len(e["files"]) for e in entries] == [1, 2]
    second = MapReader(load_city(city_file)).record
    assert second["cubes_snapshot"] != first["cubes_snapshot"]
    kinds = {a["type"] for a in ask("/artifacts/filter", {"limit": 200})}
    assert kinds == {"markdown", "table", "progress"}
    page = next(a["data"] for a in ask("/artifacts/filter", {"limit": 200}) if a["type"] == "markdown")
    assert "data:image/jpeg;base64," in page
    told = json.dumps([ask("/artifacts/filter", {"limit": 200}), ask("/logs/filter", {"limit": 200}), runs()])
    assert S3["AWS_SECRET_ACCESS_KEY"] not in told
    assert S3["AWS_ACCESS_KEY_ID"] not in told
    cancelled = start_run(f"{small_city.name}-refresh", full=True)
    wait_for("start", 120, lambda: state(cancelled) == "Running")
    ask(f"/flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for("cancel", 120, lambda: state(cancelled) == "Cancelled")
    assert MapReader(load_city(city_file)).record == second
    killed = start_run(f"{small_city.name}-refresh", full=True)
    wait_for("start", 120, lambda: state(killed) == "Running")
    time.sleep(4)
    os.killpg(serving.pid, signal.SIGKILL)
    assert MapReader(load_city(city_file)).record["made"] >= second["made"]
    house("-m", "flows.cli", "serve", city_file)
    again = start_run(f"{small_city.name}-refresh", full=True)
    wait_for("again", 240, lambda: state(again) in ("Completed", "AwaitingConcurrencySlot"))
    task_runs = ask("/task_runs/filter", {"limit": 200})
    assert len([t for t in task_runs if t["flow_run_id"] == backfill]) <= 30, "tens of task runs, not thousands"


def busy() -> int:
    """Tasks that Dask's workers hold now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{DASHBOARD}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [
        line for line in lines if line.startswith("dask_scheduler_tasks{") and ('"processing"' in line or '"queued"' in line)
    ]
    return int(sum(float(line.split()[-1]) for line in wanted))


@pytest.fixture
def large_city(tmp_path):
    """100 × 100 tiles with a point in each, and no image."""
    rng = np.random.default_rng(1)
    n = 200_000
    table = pa.table({"lon": rng.uniform(13.0, 13.085, n), "lat": rng.uniform(47.0, 47.058, n)})
    pq.write_table(table, tmp_path / "dump.parquet")
    spec = {"name": "large", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.085, 47.058], "resolution_m": 1.0, "tile_px": 64},
            "points": {"sources": ["dump.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
            "model": {"weights": "kde"}, "cluster": {"kind": f"tcp://127.0.0.1:{DASK}"}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    city = load_city(tmp_path / "city.yaml")
    ingest(city)
    assert len(city.make_grid().tiles()) >= 10_000
    return city


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("house", [("--preload", str(Path(__file__).with_name("noop_model.py")))], indirect=True)
def test_ten_thousand_tiles_keep_the_page_readable(house, large_city, tmp_path):
    """A batch that fails, a cancellation, and a whole run whose windows cost nothing: what is left is orchestration."""
    switch, city_file = tmp_path / "noop", large_city.root / "city.yaml"
    house("-m", "flows.cli", "serve", city_file)
    wait_for("deployment", 120, lambda: [d for d in ask("/deployments/filter") if d["name"] == "large-refresh"])
    switch.write_text("fail")
    failed = start_run("large-refresh")
    wait_for("failure", 300, lambda: state(failed) == "Failed")
    message = ask(f"/flow_runs/{failed}", method="GET")["state"]["message"]
    assert "a batch that fails on purpose" in message
    assert "nothing was published" in message
    switch.write_text("2")
    shutil.rmtree(large_city.workspace_path / "scratch")
    cancelled = start_run("large-refresh")
    wait_for("work", 120, busy)
    ask(f"/flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for("cancel", 120, lambda: state(cancelled) == "Cancelled")
    wait_for("idle workers", 30, lambda: not busy())
    switch.write_text("0")
    whole = start_run("large-refresh")
    wait_for("whole run", 300, lambda: state(whole) == "Completed")
    record = MapReader(large_city).record
    assert record["windows"] == record["windows_possible"] > 2000
    seconds = ask(f"/flow_runs/{whole}", method="GET")["total_run_time"]
    for run in (failed, cancelled, whole):
        tasks = ask("/task_runs/filter", {"limit": 200, "flow_runs": {"id": {"any_": [run]}}})
        assert 3 <= len(tasks) <= 30, "tens of task runs, not thousands"
    # What is between tasks is Prefect's, and of `predict`, whose windows cost nothing, Dask's and the writing of an empty mosaic.
    overhead = seconds - sum(t["total_run_time"] for t in tasks if not t["name"].startswith("predict"))
    print(f"10,000 tiles, {record['windows']:,} windows that cost nothing: {seconds:.1f} s in all, of them orchestration and writing "
          f"{overhead:.1f} s, {overhead / 600:.2%} of a run of 10 minutes (target 2 %)")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_deployments_run_on_a_worker(house, small_city):
    """The commands of docs/operate.md for a work pool, as they stand there."""
    text = (ROOT / "docs/operate.md").read_text()
    commands = [c for c in re.findall(r"`(prefect [^`]+)`", text) if "server" not in c]
    assert [c.split()[1] for c in commands] == ["work-pool", "--no-prompt", "worker"]
    *prepare, work = [c.replace("infra/prefect.yaml", str(ROOT / "infra/prefect.yaml")).split()[1:] for c in commands]
    for command in prepare:
        assert house("-m", "prefect", *command).wait(120) == 0
    ingest(small_city)  # by hand: a schedule makes no workspace
    house("-m", "prefect", *work)
    names = {d["name"] for d in ask("/deployments/filter")}
    assert names == {"weekly", "watch", "backfill", "train", "evaluate"}
    assert not any(s["active"] for s in deployment("weekly")["schedules"]), "schedules are switched on by a person"
    wait_for("worker", 60, lambda: ask("/work_pools/roadfuse/workers/filter"))
    done = start_run("weekly", city_file=str(small_city.root / "city.yaml"))
    wait_for("run on the worker", 300, lambda: state(done) == "Completed")
    assert MapReader(small_city).record["windows"] > 0
