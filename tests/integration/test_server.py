"""Real processes on loopback: PostgreSQL, a Prefect server, a Dask scheduler with two workers, `roadfuse serve`; minutes, so slow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from roadfuse_core.cubes import ledger
from roadfuse_core.inference import MapReader
from roadfuse_core.settings import load_city

PORT, DASK, DATABASE = 4231, 18796, 54331


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
def house(database, tmp_path):
    """Everything that runs, with the environment of a client."""
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api",
        "PREFECT_API_DATABASE_CONNECTION_URL": database, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_API_PORT": str(PORT), "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    started = []

    def start(*command):
        log = open(tmp_path / f"{len(started)}.log", "w")  # noqa: SIM115
        process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, start_new_session=True, stdout=log,
                                   stderr=subprocess.STDOUT, cwd=tmp_path)  # fmt: skip
        started.append(process)
        return process

    start("-m", "prefect", "server", "start", "--host", "127.0.0.1")
    start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", DASK, "--no-dashboard")
    for _ in range(2):
        start("-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{DASK}", "--nthreads", "1", "--no-dashboard")

    def up():
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/health", timeout=5) as answer:
            return answer.status == 200

    wait_for("server", 120, up)
    yield start
    for process in reversed(started):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(15)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)


def runs(name=None):
    """Flow runs that have begun, the newest first; those that wait for their time would fill the page."""
    begun = {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    found = ask("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50} | begun)
    return [r for r in found if name is None or name in r["name"]]


def deployment(name):
    return next(d for d in ask("/deployments/filter") if d["name"] == name)


def start_run(name, **parameters):
    made = ask(f"/deployments/{deployment(name)['id']}/create_flow_run", {"parameters": parameters})
    return made["id"]


def state(run_id):
    return ask(f"/flow_runs/{run_id}", method="GET")["state_name"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_week_of_a_city(house, small_city):
    """A scheduled refresh, a backfill over two dumps, a cancelled run, a killed process, and again."""
    city_file = small_city.root / "city.yaml"
    spec = yaml.safe_load(city_file.read_text())
    spec["points"]["sources"] = ["dumps/2026-03-29.parquet"]
    spec["cluster"] = {"kind": f"tcp://127.0.0.1:{DASK}"}
    city_file.write_text(yaml.safe_dump(spec))
    serving = house("-m", "flows.cli", "serve", city_file, "--cron", "* * * * *")
    wait_for("scheduled refresh", 240, lambda: [r for r in runs(" refresh ") if r["state_name"] == "Completed"])
    ask(f"/deployments/{deployment(f'{small_city.name}-refresh')['id']}/pause_deployment")
    wait_for("quiet", 120, lambda: not [r for r in runs() if r["state_name"] in ("Running", "Pending")])
    city = load_city(city_file)
    assert len(ledger(city)) == 1
    first = MapReader(city).record
    spec["points"]["sources"] = ["dumps/*.parquet"]
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
    assert "AWS_" not in page
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
