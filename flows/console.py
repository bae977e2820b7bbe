"""What all commands share: where they print, how they name a city, and how Prefect is prepared."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

__all__ = ["AsJson", "CityFile", "console", "prepare_prefect", "print_json", "set_prefect_defaults", "without_login"]

# Names of files, labels and maps are printed as they are: "[1]" is no markup, ":car:" is no picture.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
if not console.is_terminal:
    console.width = 200
OWN_SERVER = "starting Prefect's own server, about 15 seconds; nothing stays behind"
CityFile = Annotated[Path, typer.Argument(metavar="CITY.yaml", help="The city file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def set_prefect_defaults() -> None:
    """Defaults for Prefect where the user set none, before it is imported: a patient start, no telemetry, a quiet log."""
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "INFO" if os.environ.get("PREFECT_API_URL") else "WARNING",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "roadfuse_core",
        # Lines outside a run, such as who holds a lock, go to the terminal alone.
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def without_login(address: str) -> str:
    """An address as it may be printed: without `user:password@`."""
    where = urlsplit(address).netloc
    return address.replace(where, where.rpartition("@")[2], 1)


def prepare_prefect() -> None:
    """Set the defaults for Prefect, and print where a run will be seen."""
    set_prefect_defaults()
    address = os.environ.get("PREFECT_API_URL")
    where = f"running on the Prefect server at {without_login(address)}" if address else OWN_SERVER
    Console(stderr=True, highlight=False, markup=False, emoji=False).print(where, style="dim")


def print_json(value: Any) -> None:
    """A value on the standard output, for scripts."""
    sys.stdout.write(json.dumps(value, default=str, indent=1) + "\n")
