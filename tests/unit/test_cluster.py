"""Where work runs: what is counted, who may connect, and how it ends."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from dask.distributed import Client, Status, WorkerPlugin

from roadfuse_core.cluster import ALLOCATOR, ClusterLostError, open_cluster, run_jobs
from roadfuse_core.settings import ClusterSpec


def listening() -> set[str]:
    """Addresses at which this process and its children listen."""
    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c for p in every for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip for c in found}


def test_nothing_listens_beyond_this_machine():
    with open_cluster(ClusterSpec(workers=1)) as client:
        assert client.submit(abs, -1).result() == 1
        assert listening() == {"127.0.0.1"}


def test_workers_keep_the_memory_that_they_use_again_and_again(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    with open_cluster(ClusterSpec(workers=1)) as client:
        found = client.submit(lambda: {k: os.environ[k] for k in (*ALLOCATOR, "OMP_NUM_THREADS")}).result()
    # What an operator sets counts more; what Dask sets otherwise stays.
    kept = {k: str(v) for k, v in ALLOCATOR.items()}
    assert found == kept | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}


def test_images_keep_memory_as_local_workers_do():
    for path in (Path(__file__).parents[2] / "infra/docker").glob("Dockerfile*"):
        stated = " ".join(f"{k}={v}" for k, v in ALLOCATOR.items())
        assert f"ENV {stated}\n" in path.read_text(), path


def double(n: int) -> int:
    if n == 3:
        raise ValueError("no threes")
    return 2 * n


def test_progress_counts_what_results_are_worth():
    told = []
    out = run_jobs(None, double, [1, 2, 4], "doubling", lambda *t: told.append(t), amount=lambda r: r, expected=20)
    assert out == [2, 4, 8]
    assert told == [("doubling", 0, 20), ("doubling", 2, 20), ("doubling", 6, 20), ("doubling", 14, 20), ("doubling", 14, 14)]


def test_an_error_becomes_a_result_where_it_may():
    with open_cluster(ClusterSpec(workers=1)) as client:
        for where in (None, client):
            assert run_jobs(where, double, [1, 3], "doubling", on_error=lambda job, error: -job) == [2, -3]


@pytest.fixture
def lonely_client(scheduler):
    """A client that knows that its scheduler has gone, and has not given up."""
    client = Client(scheduler.address, timeout="60s")
    client._timeout = 1
    scheduler.kill()
    wait_for(lambda: client.status == "connecting")
    yield client
    client.close()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_scheduler_lost_before_the_work_is_told(lonely_client, given_up):
    if given_up:
        wait_for(lambda: lonely_client.status == "closed")
    with pytest.raises(ClusterLostError, match="doubling: the Dask scheduler was lost; run again"):
        run_jobs(lonely_client, double, [1, 2], "doubling")


class DiesAtStart(WorkerPlugin):
    """Workers die as soon as the scheduler knows them, as long as there are lives to lose."""

    def __init__(self, lives: Path) -> None:
        self.lives = lives

    def setup(self, worker):
        left = int(self.lives.read_text())
        self.lives.write_text(str(max(0, left - 1)))
        if left:
            os._exit(1)


def test_workers_that_die_as_they_start_leave_a_cluster_that_works_and_closes(tmp_path):
    lives = tmp_path / "lives"
    lives.write_text("0")
    with open_cluster(ClusterSpec(workers=1)) as client:
        client.register_plugin(DiesAtStart(lives))
        (nanny,) = client.cluster.workers.values()
        lives.write_text("4")
        os.kill(nanny.pid, signal.SIGKILL)
        assert client.submit(abs, -1).result() == 1
        wait_for(lambda: nanny.process.status == Status.running)  # or it could never be closed


def wait_for(law: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not law():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_takes_long_to_start_anew_is_awaited():
    with open_cluster(ClusterSpec(workers=1)) as client:
        (nanny,) = client.cluster.workers.values()
        dead = nanny.pid
        os.kill(dead, signal.SIGKILL)
        wait_for(lambda: nanny.pid not in (None, dead))
        os.kill(nanny.pid, signal.SIGSTOP)
        time.sleep(20)  # Dask's own patience is 15 s
        os.kill(nanny.pid, signal.SIGCONT)
        assert client.submit(abs, -1).result(timeout=30) == 1
        assert nanny.status == Status.running


def test_a_worker_that_takes_long_to_end_is_awaited():
    with open_cluster(ClusterSpec(workers=1)) as client:
        (nanny,) = client.cluster.workers.values()
        worker = psutil.Process(nanny.pid)
        assert client.cluster.sync(nanny.close, timeout=0) == "OK"
        assert not worker.is_running()
