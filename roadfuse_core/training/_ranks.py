"""Several processes that share the batches of one training: Dask workers that find each other."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dask.distributed import Client, Future
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from roadfuse_core.cluster import LOST, ClusterLostError
from roadfuse_core.errors import ConfigError, RoadFuseError

__all__ = ["Meeting", "Rank", "run_ranks"]

Result = TypeVar("Result")
LOOK_S = 0.5  # between two looks at the ranks
LAST_WORDS_S = 5.0  # that the others have to fail too, once a rank has: the first error is rarely the cause
END_S = 20  # until a worker that does not end is killed


@dataclass(frozen=True)
class Rank:
    """One process of a training.

    Attributes:
        number: Its rank.
        of: Number of ranks.
        address: Host of rank 0.
        port: Where they meet.
    """

    number: int = 0
    of: int = 1
    address: str = "127.0.0.1"
    port: int = 0


class Meeting(ClusterEnvironment):
    """Where ranks that somebody else started find each other."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self.rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.rank.address

    @property
    def main_port(self) -> int:
        return self.rank.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.rank.of

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.rank.number

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.rank.number


def run_ranks(client: Client, ranks: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Run a function on as many workers at once, one rank each, and return the first rank's result.

    When a rank fails or its worker is lost, the workers of the others are restarted: they wait for it and would not end by
    themselves.

    Args:
        client: Dask.
        ranks: How many.
        function: Takes a rank and the arguments; importable by name on the workers.
        arguments: The same for all.

    Raises:
        ConfigError: The cluster has fewer workers.
        ClusterLostError: A worker was lost.
        Exception: What a rank raised.
    """
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    if len(workers) < ranks:
        raise ConfigError("ranks", ranks, f"exceeds the {len(workers)} workers of the cluster", "start more of them")
    workers = workers[:ranks]
    host = workers[0].split("//")[1].rsplit(":", 1)[0]
    port = client.submit(_free_port, workers=[workers[0]], pure=False).result()
    futures = [
        client.submit(function, Rank(k, ranks, host, port), *arguments, workers=[w], pure=False, allow_other_workers=False)
        for k, w in enumerate(workers)
    ]
    try:
        return _await_all(client, workers, futures)
    except BaseException:
        with suppress(*LOST, OSError):
            client.cancel(futures)
        _end(client, workers)
        raise


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _await_all(client: Client, workers: Sequence[str], futures: list[Future[Any]]) -> Any:
    while not all(future.status == "finished" for future in futures):
        if lost := _lost(client, workers):
            raise _loss_of(lost[0])
        if any(future.done() and future.status != "finished" for future in futures):
            raise _cause(client, workers, futures)
        time.sleep(LOOK_S)
    return futures[0].result()


def _lost(client: Client, workers: Sequence[str]) -> list[int]:
    """Ranks whose workers the scheduler does not know now; a worker that is started again may have its address again."""
    known = client.scheduler_info(n_workers=-1)["workers"]
    return [number for number, worker in enumerate(workers) if worker not in known]


def _loss_of(rank: int) -> ClusterLostError:
    return ClusterLostError(
        f"training: the worker of rank {rank} was lost (killed, or out of memory?); run the same command again, and it goes on "
        "from its last state"
    )


def _cause(client: Client, workers: Sequence[str], futures: Sequence[Future[Any]]) -> BaseException:
    """Why the ranks ended: a worker that was lost, an error of ours, or what a rank raised first."""
    until = time.monotonic() + LAST_WORDS_S
    while time.monotonic() < until and not all(future.done() for future in futures):
        if lost := _lost(client, workers):
            return _loss_of(lost[0])
        time.sleep(LOOK_S)
    errors = [_error_of(future) for future in futures if future.done() and future.status != "finished"]
    ours = [error for error in errors if isinstance(error, RoadFuseError)]
    return (ours or errors)[0]


def _error_of(future: Future[Any]) -> BaseException:
    try:
        future.result()
    except (Exception, CancelledError) as error:
        return error
    raise AssertionError(f"{future} has no error")


def _end(client: Client, workers: Sequence[str]) -> None:
    """Restart the workers that are left, so that no rank goes on alone."""
    with suppress(Exception):
        left = [workers[k] for k in range(len(workers)) if k not in _lost(client, workers)]
        client.restart_workers(left, timeout=END_S, raise_for_error=False)
