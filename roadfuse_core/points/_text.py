"""Text files: their first lines, and whether their packing and their quotes are whole."""

# Numba infers the types of its kernel.
# ruff: noqa: ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numba import njit
from numpy.typing import NDArray

from roadfuse_core.errors import DataError
from roadfuse_core.settings import CsvSpec

__all__ = ["WEB", "Head", "ending", "is_packed", "read_head", "require_whole"]

WEB = ("http://", "https://")
HEAD_BYTES = 1 << 16
HEAD_ROWS = 200
CHUNK_BYTES = 1 << 22
BYTE_ORDER_MARKS = {"utf-8": "utf-8-sig", "latin-1": "latin-1", "utf-16": "utf-16"}
# Where a byte stands: at the start of a cell, in one without quotes, in one with, behind a quote that may end it.
START, BARE, QUOTED, ENDING = range(4)
STATE, LINE, OPENED = range(3)
UNPACKING = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class Head:
    """The first lines of a text file.

    Attributes:
        names: Its columns: of its own header, or those that the city file gives.
        rows: Cells of some rows behind the header, without spaces around them.
        whole: Whether these are all bytes of the file.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    whole: bool


def ending(path: str) -> str:
    """A path or URL in lower case, up to its ending: the parameters of a web address follow it."""
    return (path.partition("?")[0] if path.startswith(WEB) else path).lower()


def is_packed(path: str) -> bool:
    """Whether a file is packed by gzip, by its ending."""
    return ending(path).endswith(".gz")


def read_head(raw: IO[bytes], layout: CsvSpec, packed: bool, where: str) -> Head:
    """Columns and first rows.

    Args:
        raw: The file's bytes, from its beginning.
        layout: How text is laid out.
        packed: Whether they are packed by gzip.
        where: The file, for messages.

    Raises:
        DataError: It cannot be unpacked or decoded.
    """
    try:
        block = _unpacked(raw, packed).read(HEAD_BYTES)
    except UNPACKING as error:
        raise _damaged(where, error) from error
    text = _decode(block, layout, len(block) < HEAD_BYTES, where)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=layout.delimiter, skipinitialspace=layout.delimiter != " ")
    rows: list[list[str]] = []
    try:
        for row in reader:
            rows.append(row)
            if len(rows) > HEAD_ROWS:
                break
    except csv.Error as error:
        raise DataError(f"points.sources: {where} is not text ({error}); convert or copy it again") from error
    if len(block) == HEAD_BYTES and 1 < len(rows) <= HEAD_ROWS:
        rows.pop()  # cut by the end of the block
    cells = [tuple(cell.strip() for cell in row) for row in rows]
    names = (cells[0] if cells else ()) if layout.header else layout.names
    return Head(tuple(names), tuple(row for row in cells[int(layout.header) :] if any(row)), len(block) < HEAD_BYTES)


def _unpacked(raw: IO[bytes], packed: bool) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[return-value]


def _decode(block: bytes, layout: CsvSpec, final: bool, where: str) -> str:
    try:
        return codecs.getincrementaldecoder(BYTE_ORDER_MARKS[layout.encoding])().decode(block, final)
    except UnicodeDecodeError as error:
        other = "utf-16" if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
        raise DataError(
            f"points.sources: {where} is not text in {layout.encoding.upper()} ({error.reason} at byte {error.start}); "
            f"set points.csv.encoding, for example to {other}, or convert or copy it again"
        ) from error


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"points.sources: {where} is a damaged gzip file ({error}); copy it again")


def require_whole(raw: IO[bytes], layout: CsvSpec, packed: bool, where: str) -> None:
    """Read a text file to its end: its packing must check, and every quote must close at the end of its cell.

    DuckDB checks no sum of gzip, and takes what follows an open quote for one cell.

    Args:
        raw: The file's bytes, from its beginning.
        layout: How text is laid out.
        packed: Whether they are packed by gzip.
        where: The file, for messages.

    Raises:
        DataError: It is damaged, or a quote stays open; the line is named.
    """
    place = np.array([START, 1, 0], np.int64)
    separator = layout.delimiter.encode()[-1]
    try:
        for chunk in _chunks(raw, layout, packed):
            data = np.frombuffer(chunk, np.uint8)
            if place[STATE] < QUOTED and b'"' not in chunk:
                place[STATE] = START if chunk[-1] in (separator, 10, 13) else BARE
                place[LINE] += chunk.count(b"\n")
            elif not _follow(data, separator, place):
                break
    except UNPACKING as error:
        raise _damaged(where, error) from error
    if place[STATE] == QUOTED:
        raise DataError(f"points.sources: {where} has a quote in line {place[OPENED]} that does not close at the end of its "
                        "cell; double the quotes inside cells, or export it again")  # fmt: skip


def _chunks(raw: IO[bytes], layout: CsvSpec, packed: bool) -> Iterator[bytes]:
    """Bytes of the text, of which separators, quotes and ends of lines are one byte each."""
    stream = _unpacked(raw, packed)
    wide = codecs.getincrementaldecoder("utf-16")() if layout.encoding == "utf-16" else None
    while chunk := stream.read(CHUNK_BYTES):
        text = wide.decode(chunk).encode() if wide else chunk
        if text:
            yield text


@njit(cache=True, nogil=True)
def _follow(data: NDArray[np.uint8], separator: int, place: NDArray[np.int64]):  # noqa: C901
    """Follow the quotes of a chunk; False, in the state QUOTED, where one does not close at the end of its cell."""
    state = place[0]
    for byte in data:
        end = byte == separator or byte == 10 or byte == 13
        if byte == 10:
            place[1] += 1
        if state == 2:
            if byte == 34:
                state = 3
        elif state == 0:
            if byte == 34:
                state = 2
                place[2] = place[1]
            elif not end and byte != 32:
                state = 1
        elif state == 1:
            if end:
                state = 0
        elif byte == 34:
            state = 2
        elif end:
            state = 0
        elif byte != 32:
            place[0] = 2
            return False
    place[0] = state
    return True
