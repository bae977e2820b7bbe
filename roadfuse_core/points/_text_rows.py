"""How many rows a text file has, from its head: the file itself may be far too large to be counted."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import IO

__all__ = ["estimate_rows"]

HEAD_BYTES = 1 << 18
MOST_UNPACKED = 1 << 22
GZIP = 31  # zlib's window for a gzip header


@dataclass(frozen=True)
class _Head:
    """The begin of a file.

    Attributes:
        text: Its text, unpacked.
        stored: Bytes of the file that hold this text.
    """

    text: bytes
    stored: int


def estimate_rows(stream: IO[bytes], size: int, packed: bool, header: bool) -> int:
    """Rows of a text file, exact where it is small, else by the length and the compression of its first rows.

    Args:
        stream: The file as stored, at its begin.
        size: Bytes as stored.
        packed: Whether it is compressed with gzip.
        header: Whether its first line holds no row.

    Returns:
        At least 0. Rows that grow shorter, or compress better, after the head are more than estimated.
    """
    head = _unpacked_head(stream) if packed else _head(stream)
    lines = max(head.text.count(b"\n"), head.text.count(b"\r"))
    if head.stored >= size:
        return max(0, lines + (not head.text.endswith((b"\n", b"\r")) and len(head.text) > 0) - header)
    return round(max(1, lines) * size / max(1, head.stored)) - header


def _head(stream: IO[bytes]) -> _Head:
    text = stream.read(HEAD_BYTES)
    return _Head(text, len(text))


def _unpacked_head(stream: IO[bytes]) -> _Head:
    """Members of a gzip file one after the other, as far as they go; a damaged one ends it."""
    left = stream.read(HEAD_BYTES)
    stored, texts, room = 0, list[bytes](), MOST_UNPACKED
    while left and room > 0:
        unpacker = zlib.decompressobj(GZIP)
        try:
            text = unpacker.decompress(left, room)
        except zlib.error:
            break
        after = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
        texts.append(text)
        stored += len(left) - len(after)
        room -= len(text)
        if not unpacker.eof:
            break
        left = after
    return _Head(b"".join(texts), stored)
