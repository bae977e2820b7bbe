"""How a file of points is laid out: its columns, their types, and how its times are to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from roadfuse_core.errors import ConfigError
from roadfuse_core.points._text import Head, is_packed
from roadfuse_core.points._times import Clock, clock_of_numbers, clock_of_texts, is_number
from roadfuse_core.settings import PointsSpec

__all__ = ["ABSENT", "Layout", "layout_of_parquet", "layout_of_text", "point_number", "texts_of"]

ABSENT = ["", "None", "none", "NULL", "null", "NaN", "nan", "NA", "-", "N/A", "n/a", "<NA>", "NaT", "\\N"]
SAMPLE_ROWS = 1000


@dataclass(frozen=True)
class Layout:
    """What files have in common that one query can read.

    Attributes:
        names: Columns in the file's order; names may differ by case alone.
        kinds: Types in Parquet of the columns that the city names; empty for text.
        clock: How the time column is to be read; None where the city names none.
        packed: Whether text is packed by gzip.
        texts: Some times of a column that is text.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    clock: Clock | None
    packed: bool = False
    texts: tuple[str, ...] = field(default=(), compare=False)


def layout_of_text(head: Head, spec: PointsSpec, path: str, where: str) -> Layout:
    """The layout of a text file.

    Args:
        head: Its first lines.
        spec: Which columns hold what.
        path: The file, for its ending.
        where: The file, for messages.

    Raises:
        ConfigError: Its times cannot be what the settings say.
    """
    clock, texts = None, list[str]()
    if spec.columns.time is not None:
        texts = [point_number(t, spec) for t in texts_of(head, head.names.index(spec.columns.time))]
        clock = clock_of_texts(texts, spec, where)
    return Layout(head.names, (), clock, is_packed(path), tuple(texts))


def texts_of(head: Head, column: int) -> list[str]:
    """Cells of a column that hold something."""
    cells = [row[column] for row in head.rows if column < len(row)]
    return [cell for cell in cells if cell not in ABSENT]


def point_number(text: str, spec: PointsSpec) -> str:
    """A number with a decimal point; another text as it is."""
    pointed = text.replace(",", ".") if spec.csv.decimal == "," else text
    return pointed if is_number(pointed) else text


def layout_of_parquet(stream: IO[bytes], spec: PointsSpec, where: str) -> Layout:
    """The layout of a Parquet file; reads its footer, and of times that are text, or whose footer has no range, some values.

    Args:
        stream: The file.
        spec: Which columns hold what.
        where: The file, for messages.

    Raises:
        ConfigError: Its times cannot be what the settings say.
    """
    file = pq.ParquetFile(stream)
    schema = file.schema_arrow
    clock, texts = None, list[str]()
    if spec.columns.time is not None:
        column = schema.names.index(spec.columns.time)
        if pa.types.is_string(schema.types[column]) or pa.types.is_large_string(schema.types[column]):
            texts = [v for v in map(str.strip, _values(file, spec.columns.time)) if v not in ABSENT]
            clock = clock_of_texts(texts, spec, where)
        else:
            clock = _clock_of(file, column, spec, where)
    kinds = tuple(str(schema.types[schema.names.index(column)]) for _, column in spec.columns.named())
    return Layout(tuple(schema.names), kinds, clock, texts=tuple(texts))


def _clock_of(file: pq.ParquetFile, column: int, spec: PointsSpec, where: str) -> Clock:
    field = file.schema_arrow.field(column)
    leaf = _leaf_of(file, field.name)
    if leaf is not None and file.schema.column(leaf).physical_type == "INT96":
        return Clock.INSTANT  # Spark's, which writes instants
    if pa.types.is_timestamp(field.type):
        return Clock.INSTANT if field.type.tz or spec.time_zone == "UTC" else Clock.LOCAL
    if pa.types.is_date(field.type):
        return Clock.LOCAL
    bounds = _bounds(file, leaf)
    try:
        return clock_of_numbers(bounds or [float(v) for v in _values(file, field.name)], spec, where)
    except ConfigError:
        if not bounds:
            raise
        # One wild value makes a range that cannot be: look at values before a word is said.
        return clock_of_numbers([float(v) for v in _values(file, field.name)], spec, where)


def _leaf_of(file: pq.ParquetFile, name: str) -> int | None:
    """Number of a column among the leaves of the schema."""
    leaves = range(len(file.schema))
    return next((k for k in leaves if file.schema.column(k).path == name), None)


def _bounds(file: pq.ParquetFile, leaf: int | None) -> list[float]:
    """Least and greatest value of each row group, as the footer says; empty where it does not."""
    if leaf is None:
        return []
    chunks = [file.metadata.row_group(k).column(leaf) for k in range(file.metadata.num_row_groups)]
    known = [c.statistics for c in chunks if c.is_stats_set and c.statistics.has_min_max]
    return [float(v) for statistics in known for v in (statistics.min, statistics.max)]


def _values(file: pq.ParquetFile, name: str) -> Sequence[str]:
    """Some values of a column, from its beginning."""
    for batch in file.iter_batches(SAMPLE_ROWS, columns=[name]):
        some = batch.column(0).drop_null().to_pylist()
        if some:
            return some  # type: ignore[no-any-return]
    return []
