"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_whole"]


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
