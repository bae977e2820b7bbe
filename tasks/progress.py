"""Progress for people: a bar on a terminal, now and then a line in a log.

Nothing here ends the work that it shows: what cannot be shown is logged once, and the work goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ConsoleProgress", "LogProgress", "SafeProgress"]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
log = logging.getLogger(__name__)
QUIET_S = 5.0
# A receiver that failed is left alone for so long: each try at a server that is gone may wait for a minute.
REST_S = 300.0


class SafeProgress:
    """A `tell(what, done, total)` that passes on to others and never raises, whatever they do."""

    def __init__(self, *receivers: Callable[[str, int, int], None], log: Log = log) -> None:
        self.receivers = receivers
        self.log = log
        self.rests_until: dict[int, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Pass on; a receiver that fails rests for five minutes, and its first failure is logged."""
        for number, receiver in enumerate(self.receivers):
            if time.monotonic() < self.rests_until.get(number, 0.0):
                continue
            try:
                receiver(what, done, total)
            except Exception as error:
                self._rest(number, error)

    def _rest(self, number: int, error: Exception) -> None:
        if number not in self.rests_until:
            self.log.warning("progress cannot be shown (%s: %s); the work goes on", type(error).__name__, error)
        self.rests_until[number] = time.monotonic() + REST_S


class ConsoleProgress:
    """A `tell(what, done, total)` for terminals; off a terminal it prints a line when a job ends or every five seconds."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = Progress(
            TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console, transient=False, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bars: dict[str, TaskID] = {}
        self.last = 0.0
        self.safe = SafeProgress(self._show)

    def __enter__(self) -> ConsoleProgress:
        """Show the bars."""
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the finished bars on the screen, where there still is one."""
        try:
            self.live.stop()
        except OSError:
            log.warning("the terminal is gone")

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of a job."""
        self.safe(what, done, total)

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self.bars or done == 0:
            self.bars[what] = self.live.add_task(what, total=total)
        self.live.update(self.bars[what], completed=done, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and (done == total or now - self.last > QUIET_S):
            self.last = now
            self.console.print(f"{what}: {done:,} of {total:,}")


class LogProgress:
    """A `tell` that writes to a logger, at most every five seconds and at the end of a job."""

    def __init__(self, log: Log) -> None:
        self.log, self.last = log, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Log a line."""
        now = time.monotonic()
        if done == total or now - self.last > QUIET_S:
            self.last = now
            self.log.info("%s: %s of %s", what, f"{done:,}", f"{total:,}")
