"""What all commands share: where they print, how they name a city, and how Prefect is prepared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["CityFile", "console", "prepare_prefect"]

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 200
CityFile = Annotated[Path, typer.Argument(metavar="CITY.yaml", help="The city file.")]


def prepare_prefect() -> None:
    """Defaults for Prefect where the user set none: a patient start of its own server, no telemetry, a quiet log."""
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "INFO" if os.environ.get("PREFECT_API_URL") else "WARNING",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "roadfuse_core",
    }.items():
        os.environ.setdefault(name, value)
    Console(stderr=True).print(
        f"[dim]running on the Prefect server at {os.environ['PREFECT_API_URL']}[/]" if os.environ.get("PREFECT_API_URL")
        else "[dim]starting Prefect's own server, about 15 seconds; nothing stays behind[/]"
    )  # fmt: skip
