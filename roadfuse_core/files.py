"""Files that are complete or not there, and that are known again by their digest."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from roadfuse_core.errors import StoreError

__all__ = ["DamagedFileError", "digest_of", "read_record", "replacing", "write_record", "write_whole"]

DIGEST = "blake3"


class DamagedFileError(StoreError):
    """A file of ours is not what was written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file in the making, which takes its place in one step when all of it is on the disk.

    The name in the making belongs to this writer alone, so that two writers of one file do not meet; the later one stays.

    Args:
        path: Where the file goes; its folder is made.

    Yields:
        Path in the same folder, where nothing is yet. What lies there at the end replaces `path`; after an error it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield part
        _sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> Path:
    """Write a text file in one step: a reader, or a crash, never sees half of it.

    Args:
        path: Where to; its folder is made.
        text: The content.

    Returns:
        The path.
    """
    with replacing(path) as part:
        part.write_text(text)
    return path


def digest_of(content: bytes | Path) -> str:
    """BLAKE3 of bytes, or of a file, 16 bytes in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    digest = blake3()
    if isinstance(content, Path):
        digest.update_mmap(content)
    else:
        digest.update(content)
    return digest.hexdigest(16)


def write_record(path: Path, record: dict[str, Any]) -> Path:
    """Write a record as JSON with its own digest, in one step; `read_record` reads it.

    Args:
        path: Where to; its folder is made.
        record: Of what JSON knows.

    Returns:
        The path.
    """
    return write_whole(path, json.dumps({DIGEST: _digest(record), "record": record}, indent=1))


def read_record(path: Path) -> dict[str, Any]:
    """The record that `write_record` wrote.

    Raises:
        DamagedFileError: The file is something else than was written.
        OSError: It cannot be read, or there is none (`FileNotFoundError`).
    """
    try:
        raw = json.loads(path.read_bytes())
        record: dict[str, Any] = raw["record"]
        intact = raw[DIGEST] == _digest(record)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedFileError(f"{path}: is damaged; remove it and run again")
    return record


def _digest(record: dict[str, Any]) -> str:
    """Of what a reader will find: keys are text there, and sorted as text."""
    return digest_of(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode())
