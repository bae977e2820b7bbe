"""Progress for people: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ConsoleProgress", "LogProgress"]

QUIET_S = 5.0


class ConsoleProgress:
    """A `tell(what, done, total)` for terminals; off a terminal it prints a line when a job ends or every five seconds."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.live = Progress(
            TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, transient=False, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bars: dict[str, TaskID] = {}
        self.last = 0.0

    def __enter__(self) -> ConsoleProgress:
        """Show the bars."""
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the finished bars on the screen."""
        self.live.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of a job."""
        if what not in self.bars or done == 0:
            self.bars[what] = self.live.add_task(what, total=total)
        self.live.update(self.bars[what], completed=done, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and (done == total or now - self.last > QUIET_S):
            self.last = now
            self.console.print(f"{what}: {done:,} of {total:,}", highlight=False)


class LogProgress:
    """A `tell` that writes to a logger, at most every five seconds and at the end of a job."""

    def __init__(self, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self.log, self.last = log, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Log a line."""
        now = time.monotonic()
        if done == total or now - self.last > QUIET_S:
            self.last = now
            self.log.info("%s: %s of %s", what, f"{done:,}", f"{total:,}")
