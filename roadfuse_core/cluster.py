"""Dask: where work runs, and how many small jobs become a few futures."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import dask
from dask.distributed import Client, LocalCluster, Nanny, Status, as_completed, get_worker
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError

from roadfuse_core.errors import ConfigError, RoadFuseError
from roadfuse_core.settings import City, ClusterSpec

__all__ = [
    "LOST",
    "ClusterLostError",
    "Progress",
    "count_gpus",
    "count_workers",
    "default_ranks",
    "gpu_names",
    "on_cores",
    "open_cluster",
    "open_cores",
    "quiet",
    "run_jobs",
    "telling_loss",
    "threads_of_worker",
]

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
log = logging.getLogger(__name__)

# Dask tells workers' allocator to give every freed 64 KiB back to the system, so that each array of each step is mapped,
# zeroed and unmapped anew. These keep what is used again and again, in few arenas: each thread's own would keep its own.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": 256 << 20, "MALLOC_MMAP_THRESHOLD_": 32 << 20, "MALLOC_ARENA_MAX": 2}

# A local worker that died is started anew by its nanny, however long a busy machine takes; after 15 s Dask would close
# both for good, and a cluster without workers waits for ever.
PATIENCE = {"distributed.deploy.lost-worker-timeout": "1h"}

# What Dask raises when its scheduler has gone: as work is waited for, on its way, and once it is given up for lost.
LOST = (CancelledError, FutureCancelledError, CommClosedError, ClosedClientError)


class ClusterLostError(RoadFuseError, ConnectionError):
    """The scheduler that ran the work has gone."""

    exit_code = 7


def quiet(what: str, done: int, total: int) -> None:
    """A progress receiver that says nothing."""


def gpu_names() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without touching CUDA.

    On a Dask worker with a GPU of its own that one is the first.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named in ("", "-1"):
        return []
    there = _count_driver_gpus()
    if named is None or not there:
        return [str(number) for number in range(there)]
    return [name.strip() for name in named.split(",")]


def count_gpus() -> int:
    """GPUs that this process may use."""
    return len(gpu_names())


def default_ranks() -> int:
    """Ranks of a training that names no number: one a GPU; on a Dask worker, whose GPU is one of them, and on a CPU one."""
    return 1 if _is_worker() else max(1, count_gpus())


def _is_worker() -> bool:
    try:
        get_worker()
    except ValueError:
        return False
    return True


def _count_driver_gpus() -> int:
    """GPUs that NVIDIA's management library lists; 0 where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    nvml.nvmlShutdown()
    return count.value


def count_workers(spec: ClusterSpec) -> int:
    """Workers on this machine that the settings ask for; of a scheduler elsewhere, one."""
    if "://" in spec.kind:
        return 1
    return spec.workers or (count_gpus() if spec.kind in ("auto", "cuda") else 0) or os.cpu_count() or 1


def on_cores(city: City) -> City:
    """The city for work that no GPU helps: one process a core of this machine, where its own cluster is one a GPU.

    Ingests, scores and tuning would otherwise keep as many cores busy as there are GPUs.
    """
    spec = city.cluster
    elsewhere = "://" in spec.kind or (spec.kind == "auto" and dask.config.get("scheduler-address", None))
    if elsewhere or spec.kind == "local" or not count_gpus():
        return city
    # Number and memory of workers are those of workers with a GPU.
    return city.model_copy(update={"cluster": ClusterSpec(kind="local")})


@contextmanager
def open_cores(city: City, client: Client) -> Iterator[Client]:
    """A client of workers for what no GPU helps: of a cluster of its own beside one of GPUs, else the client itself.

    Args:
        city: The city.
        client: Of the city's own cluster.
    """
    cores = on_cores(city)
    if cores is city:
        yield client
        return
    with open_cluster(cores.cluster) as own:
        yield own


def threads_of_worker(spec: ClusterSpec) -> int:
    """Threads that a worker keeps busy beside its device, 1 … 8: its share of the cores."""
    return min(8, max(1, (os.cpu_count() or 1) // count_workers(spec)))


@contextmanager
def open_cluster(spec: ClusterSpec) -> Iterator[Client]:
    """A Dask client for the city's cluster, closed with it.

    `auto` is, in this order: the scheduler that Dask's own configuration names, one process a GPU, one process
    a core. Where there are GPUs, each worker has one of its own, and workers of `local` have none. Nothing listens beyond
    loopback.

    Args:
        spec: Kind and number of workers.

    Yields:
        A connected client.

    Raises:
        ConfigError: `cuda` without a GPU, more workers than GPUs, or a scheduler that does not answer.
    """
    # At INFO, Dask tells every connection; what people need comes through the progress.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    address = spec.kind if "://" in spec.kind else dask.config.get("scheduler-address", None) if spec.kind == "auto" else None
    if address:
        try:
            client = Client(address, timeout="20s")
        except OSError as error:
            raise ConfigError("cluster.kind", address, "does not answer", "start the scheduler or use auto") from error
        with client:
            yield client
        return
    gpus = gpu_names() if spec.kind in ("auto", "cuda") else []
    if spec.kind == "cuda" and not gpus:
        raise ConfigError("cluster.kind", "cuda", "finds no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use auto")
    if gpus and (spec.workers or 0) > len(gpus):
        raise ConfigError(
            "cluster.workers", spec.workers, f"exceeds this machine's GPUs, of which there are {len(gpus)}",
            "leave it out for one worker a GPU, or set cluster.kind: local for workers without GPUs",
        )  # fmt: skip
    environment = dask.config.get("distributed.nanny.pre-spawn-environ") | ALLOCATOR
    with dask.config.set({"distributed.nanny.pre-spawn-environ": environment}):
        cluster = _local_cluster(spec, gpus, hidden=bool(gpu_names()) and not gpus)
    with dask.config.set(PATIENCE), cluster, Client(cluster) as client:
        yield client


def _local_cluster(spec: ClusterSpec, gpus: list[str], hidden: bool) -> Any:
    """Workers with a GPU each, or, where there are none or they are hidden, with a core each."""
    if gpus and find_spec("dask_cuda"):
        from dask_cuda import LocalCUDACluster

        workers = spec.workers or len(gpus)
        return LocalCUDACluster(n_workers=workers, dashboard_address="127.0.0.1:0", worker_class=_PatientNanny)
    workers = spec.workers or len(gpus) or os.cpu_count() or 1
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
        dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL, worker_class=_PatientNanny,
        gpus=gpus if gpus or hidden else None,
    )  # fmt: skip


class _PatientNanny(Nanny):
    """Dask's keeper of a worker's process, fixed where it could never be closed (distributed 2026.7).

    Args:
        gpus: Those of the machine, of which the worker sees its own as the first, as Dask-CUDA's workers do, and none where the
            list is empty; None leaves that as it is. Without it, all workers would work on the first one.
    """

    def __init__(self, *args: Any, gpus: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if gpus is not None:
            own = int(kwargs.get("name") or 0) % max(1, len(gpus))
            self.env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[own:] + gpus[:own])
        self._one_start = asyncio.Lock()

    async def instantiate(self) -> Status:
        """Start a worker when the start before it has ended.

        A worker that dies as it starts is started anew, and the first start, still waiting for its worker's word, could
        take that of the second, which then waited for ever.
        """
        async with self._one_start:
            return self.status if self.status in (Status.closing, Status.closed) else await super().instantiate()

    async def close(self, timeout: float = 5, reason: str = "nanny-close") -> Literal["OK"]:  # type: ignore[override]
        """End the worker; one that takes longer than its time is killed, and its end awaited.

        Dask awaits it for a second and raises, in the middle of closing.
        """
        try:
            return await super().close(timeout, reason)
        except TimeoutError:
            self.status = Status.failed
            return await super().close(timeout, reason)


@contextmanager
def telling_loss(what: str) -> Iterator[None]:
    """Whatever Dask says of a scheduler that has gone, as one line.

    Args:
        what: The work that was being done.

    Raises:
        ClusterLostError: The scheduler has gone.
    """
    try:
        yield
    except LOST as error:
        raise ClusterLostError(f"{what}: the Dask scheduler was lost; run again, what is done is kept") from error


def run_jobs(
    client: Client | None, function: Callable[[Job], Result], jobs: Sequence[Job], what: str, tell: Progress = quiet,
    on_error: Callable[[Job, Exception], Result] | None = None, avoid: Sequence[str | None] = (),
    amount: Callable[[Result], int] = lambda result: 1, expected: int | None = None,
) -> list[Result]:  # fmt: skip
    """Run a function on every job and return the results in the jobs' order.

    Args:
        client: Where to run; None runs here, one after the other, with the same results.
        function: Importable by name on the workers.
        jobs: Small picklable records.
        what: Name for the progress.
        tell: Called with (what, done, total) after each job, in the unit of `amount`.
        on_error: Makes a result of a job's error, or raises.
        avoid: For each job the address of a worker that should not get it, if there are others.
        amount: How much a result is worth, in rows, windows or whatever is counted; by default every job is one.
        expected: The sum of all amounts, as far as it is known before.

    Raises:
        Exception: The first error of a job; the others are cancelled.
        ClusterLostError: The scheduler has gone.
    """
    count = _Count(what, len(jobs) if expected is None else expected, tell)
    if client is None:
        results = []
        for job in jobs:
            results.append(_outcome(partial(function, job), job, on_error))
            count.add(amount(results[-1]))
        count.end()
        return results
    out: dict[int, Result] = {}
    with telling_loss(what):
        futures = _submit(client, function, jobs, avoid)
        place = {future.key: k for k, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                k = place[future.key]
                out[k] = _outcome(future.result, jobs[k], on_error)
                future.release()
                count.add(amount(out[k]))
        finally:
            with suppress(*LOST, OSError):
                client.cancel(futures)
        if len(out) < len(jobs):
            raise CancelledError
    count.end()
    return [out[k] for k in range(len(jobs))]


def _outcome(work: Callable[[], Result], job: Job, on_error: Callable[[Job, Exception], Result] | None) -> Result:
    """What the work returns, or what its error is worth; a scheduler that has gone is no error of the job."""
    try:
        return work()
    except LOST:
        raise
    except Exception as error:
        if on_error is None:
            raise
        return on_error(job, error)


class _Count:
    """Tells how much is done of what was expected; at the end, of what there was."""

    def __init__(self, what: str, expected: int, tell: Progress) -> None:
        self.what, self.expected, self.tell, self.done = what, expected, tell, 0
        tell(what, 0, expected)

    def add(self, amount: int) -> None:
        self.done += amount
        self.tell(self.what, min(self.done, self.expected), self.expected)

    def end(self) -> None:
        if self.done != self.expected:
            self.tell(self.what, self.done, self.done)


def _submit(client: Client, function: Callable[[Job], Result], jobs: Sequence[Job], avoid: Sequence[str | None]) -> list[Any]:
    if not any(avoid):
        return list(client.map(function, jobs, pure=False, retries=1, batch_size=1000))
    every = list(client.scheduler_info(n_workers=-1)["workers"])
    others = [[w for w in every if w != bad] or every for bad in avoid]
    return [
        client.submit(function, job, pure=False, retries=1, workers=good, allow_other_workers=True)
        for job, good in zip(jobs, others, strict=True)
    ]
