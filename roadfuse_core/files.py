"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> Path:
    """Write a text file in one step: a reader, or a crash, never sees half of it.

    Args:
        path: Where to; its folder is made.
        text: The content.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
    return path
