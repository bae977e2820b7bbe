"""Paths and patterns of a user, found once: names that exist as they are written are never taken for patterns."""

from __future__ import annotations

import glob
import os
from pathlib import Path

__all__ = ["find_paths"]

MAGIC = "*?["


def find_paths(root: Path, text: str) -> list[Path]:
    """Files and folders behind a path or a glob.

    A part of the path with a bracket that exists as it is written stands for itself (`trips[1].csv`, as browsers name a
    second download); a star or a question mark is always a wildcard, which matches itself too.

    Args:
        root: Where relative paths start; its own name is never a pattern.
        text: A path or a glob, `**` for any depth; `~` is the home folder.

    Returns:
        Absolute paths that exist, sorted; empty where nothing matches.
    """
    if "\0" in text:
        return []
    parts = Path(text).parts
    start = root
    if os.path.isabs(text) or (parts and parts[0] == "~"):
        start, parts = Path(parts[0]).expanduser(), parts[1:]
    plain = next((k for k, part in enumerate(parts) if any(c in part for c in MAGIC)), len(parts))
    start = start.joinpath(*parts[:plain])
    if not os.path.isabs(text):
        start = start.resolve()
    if plain == len(parts):
        return [start] if start.exists() else []
    return sorted(Path(p) for p in glob.iglob(_pattern(str(start), parts[plain:]), recursive=True))


def _pattern(start: str, parts: tuple[str, ...]) -> str:
    """A glob of a folder and parts below it, with brackets escaped where they stand for themselves."""
    pattern = glob.escape(start).rstrip("/")
    for part in parts:
        itself = f"{pattern}/{part.replace('[', '[[]')}"
        written_so = "[" in part and next(glob.iglob(itself, recursive=True), None) is not None
        pattern = itself if written_so else f"{pattern}/{part}"
    return pattern
