"""A Prefect server of our own, and the deployments of one city on it, for one machine without a work pool."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.console import without_login
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.files import write_whole
from roadfuse_core.settings import City

__all__ = ["check_cron", "require_server", "same_origin", "serve_city", "start_server"]

FIRST_PORT = 4200
ANSWER_S = 20.0
PATIENCE_S = 180.0


def check_cron(cron: str) -> None:
    """Refuse a cron line that Prefect cannot read, or that never comes.

    Raises:
        ConfigError: It is none.
    """
    from prefect.server.schemas.schedules import CronSchedule

    try:
        asyncio.run(CronSchedule(cron=cron, timezone="UTC").get_dates(1))
    except ValueError as error:
        fix = 'write minute, hour, day, month and weekday, such as "0 3 * * 1" for Mondays at three'
        raise ConfigError("--cron", cron, "is no cron line that ever comes", fix) from error


def require_server() -> None:
    """Refuse to go on without a Prefect server that answers at `PREFECT_API_URL`.

    Raises:
        ConfigError: None is named, or it does not answer.
    """
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise ConfigError("PREFECT_API_URL", None, "is not set", "start `prefect server start` and name its address")
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=ANSWER_S):
            return
    except (OSError, ValueError) as error:
        raise ConfigError("PREFECT_API_URL", without_login(address), f"does not answer ({error})",
                          "start `prefect server start`, or correct the address; it ends in /api") from error  # fmt: skip


def serve_city(city: City, city_file: Path, cron: str, watch_s: int = 0) -> None:
    """Deploy the flows of a city to the server that `PREFECT_API_URL` names, and run them until interrupted.

    Args:
        city: The city.
        city_file: Its file, absolute.
        cron: When to refresh, UTC.
        watch_s: Seconds between two looks for new dumps; 0 for none.
    """
    from prefect import serve

    from flows.backfill import backfill
    from flows.refresh import refresh
    from flows.watch import watch

    every: dict[str, Any] = {
        "parameters": {"city_file": str(city_file)}, "tags": ["roadfuse", city.name], "concurrency_limit": 1,
    }  # fmt: skip
    deployments: list[Any] = [
        refresh.to_deployment(f"{city.name}-refresh", cron=cron, **every),
        backfill.to_deployment(f"{city.name}-backfill", **every),
    ]
    if watch_s:
        deployments.append(watch.to_deployment(f"{city.name}-watch", interval=watch_s, **every))
    serve(*deployments, limit=1)


@contextmanager
def start_server(home: Path) -> Iterator[str]:
    """Start a Prefect server on loopback and stop it at the end.

    Args:
        home: Folder for its database and its log.

    Yields:
        Its address; the UI is there, the API at `/api`.

    Raises:
        StoreError: It does not come up; the log says why.
    """
    port = _free_port()
    log = write_whole(home / "server.log", "")
    environment = os.environ | {
        "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_API_PORT": str(port), **same_origin(port),
    }  # fmt: skip
    with log.open("w") as lines:
        server = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"],
                                  env=environment, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def same_origin(port: int) -> dict[str, str]:
    """Settings by which a server's API answers no web page but its own UI, and changes nothing without a token."""
    return {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }


def _free_port() -> int:
    """The first port from Prefect's own on that nobody listens at."""
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise StoreError(f"127.0.0.1: ports {FIRST_PORT} to {FIRST_PORT + 99} are taken; stop a server")


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise StoreError(f"the Prefect server did not start; see {log}")
