"""Locks of a folder: who writes there, and what others do meanwhile. A lock is free when its process dies.

A workspace has four, taken in this order:

    turn       a refresh or backfill, from its ingest to its last file; others wait, a release or rollback is refused
    ingest     points on their way into the cube; another ingest waits
    map        windows on their way into a map; another prediction waits
    committer  a commit and the move of a branch: seconds; everybody waits

Whoever removes what nothing refers to takes the last three and waits for none: under a writer, that would be what the writer
has not published yet.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from roadfuse_core.errors import StoreError

__all__ = ["COMMITTER", "INGEST", "MAP", "TURN", "holder_of", "sole_writer", "waiting_lock"]

TURN, INGEST, MAP, COMMITTER = "turn", "ingest", "map", "committer"
LOOK_S = 0.25
TELL_S = 600.0
log = logging.getLogger(__name__)


@contextmanager
def waiting_lock(folder: Path, name: str, doing: str) -> Iterator[None]:
    """Hold a lock of a folder; while another process holds it, wait and say for whom.

    Args:
        folder: Where the lock lies; made if it is missing.
        name: Which lock.
        doing: What the holder does with it, as others read it.
    """
    with _open(folder, name) as file:
        told = -TELL_S
        while not _take(file):
            now = time.monotonic()
            if now - told >= TELL_S:
                told = now
                log.warning("%s: waiting for %s", folder, _holder(file))
            time.sleep(LOOK_S)
        with _held(file, doing):
            yield


@contextmanager
def sole_writer(folder: Path, names: tuple[str, ...], doing: str) -> Iterator[None]:
    """Hold locks of a folder, or none.

    Args:
        folder: Where the locks lie; made if it is missing.
        names: Which locks.
        doing: What the holder does with them, as others read it.

    Raises:
        StoreError: Another process holds one of them.
    """
    with ExitStack() as stack:
        for name in names:
            file = stack.enter_context(_open(folder, name))
            if not _take(file):
                raise StoreError(f"{folder}: {_holder(file)} is writing there; wait for it or stop it")
            stack.enter_context(_held(file, doing))
        yield


def holder_of(folder: Path, name: str) -> str | None:
    """Who holds a lock now, in words; None where nobody does."""
    path = folder / f"{name}.lock"
    if not path.is_file():
        return None
    with open(path, "r+") as file:
        if not _take(file):
            return _holder(file)
        fcntl.flock(file, fcntl.LOCK_UN)
    return None


def _open(folder: Path, name: str) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / f"{name}.lock", "a+")


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _held(file: IO[str], doing: str) -> Iterator[None]:
    """Say who holds a lock that was taken, and give it back."""
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({doing}, since {since})")
        file.flush()
        yield
    finally:  # closing alone would wait for a child that was forked meanwhile, such as a worker that just starts
        fcntl.flock(file, fcntl.LOCK_UN)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"
