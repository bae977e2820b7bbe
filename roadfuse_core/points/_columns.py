"""Whether files hold the columns that a city names, and how many rows."""

from __future__ import annotations

from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyproj import CRS

from roadfuse_core.errors import (
    ConfigError,
    DataError,
    printable,
)
from roadfuse_core.grid import fit_projection
from roadfuse_core.points._footer import stated_rows
from roadfuse_core.points._layout import layout_of_parquet, layout_of_text, point_number, texts_of
from roadfuse_core.points._opening import Opener, SourceFile, by_path, members_of
from roadfuse_core.points._other_formats import fix_for_column
from roadfuse_core.points._sources import points_of
from roadfuse_core.points._text import Head, is_packed, read_head
from roadfuse_core.points._text_rows import estimate_rows
from roadfuse_core.points._times import is_number
from roadfuse_core.points._unpack import require_plausible
from roadfuse_core.settings import City, CsvSpec, PointsSpec

__all__ = ["check_columns", "empty_files", "single_precision_step"]

METRES_PER_DEGREE = 111_195.0


def empty_files(city: City, files: list[SourceFile]) -> list[SourceFile]:
    """Files that hold no rows: none in Parquet, nothing behind the header, if there is one, in text."""
    layout = points_of(city).csv
    empty = by_path(files, lambda opener, file: _is_empty(opener, file, layout))
    return [file for file, is_empty in zip(files, empty, strict=True) if is_empty]


def _is_empty(opener: Opener, file: SourceFile, layout: CsvSpec) -> bool:
    if file.is_parquet:
        with opener.open(file) as stream:
            return int(pq.read_metadata(stream).num_rows) == 0
    head = _head(file, opener, layout)
    return head.whole and not head.rows


def check_columns(city: City, files: list[SourceFile]) -> list[int]:
    """Open every Parquet footer and every text header; rows of each file, counted for Parquet, for text by its head.

    Raises:
        ConfigError: A named column is absent or cannot hold what it should.
        DataError: A file is truncated or is not what its ending says.
    """

    def rows(opener: Opener, file: SourceFile) -> int:
        if file.path.lower().endswith(".zip") and not file.member:
            members_of(opener, file, "*")
            raise DataError(f"points.sources: {file.path} was not a readable zip, and is one now; run again")
        if file.is_parquet:
            return _check_parquet(city, file, opener)
        _check_text(city, file, opener)
        with opener.open(file) as stream:
            return estimate_rows(stream, file.size, is_packed(file.label), points_of(city).csv.header)

    return by_path(files, rows)


def _check_parquet(city: City, file: SourceFile, opener: Opener) -> int:
    if file.member:
        raise ConfigError("points.sources", file.shown, "is Parquet inside a zip", "unpack it; Parquet is compressed")
    with opener.open(file) as stream:
        footer, schema = _footer(stream, file)
        for key, column in points_of(city).columns.named():
            _check_name(key, column, schema.names, file)
            if key != "vehicle":
                _check_type(key, column, schema.types[schema.names.index(column)], file)
        layout_of_parquet(stream, points_of(city), file.shown)
        named = [column for _, column in points_of(city).columns.named()]
    return stated_rows(footer, file.size, named, file.shown)


def _footer(stream: IO[bytes], file: SourceFile) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        footer = pq.read_metadata(stream)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        short = str(error).split(". ")[0]
        raise DataError(f"points.sources: {file.shown} is not readable Parquet ({short}); write or copy it again") from error
    return footer, schema


def _check_type(key: str, column: str, kind: pa.DataType, file: SourceFile) -> None:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    time = key == "time" and (pa.types.is_temporal(kind) and not pa.types.is_time(kind))
    # A writer that saw no value in a whole file knows no type.
    empty = pa.types.is_null(kind)
    if not (numeric or text or time or empty):
        raise ConfigError(f"points.columns.{key}", column, f"has type {kind} in {file.shown}", "name a column of numbers")


def single_precision_step(city: City, files: list[SourceFile]) -> float:
    """Pixels between neighbouring positions that 32 bits can hold, where a Parquet file stores such; 0 where none does."""
    spec, grid = points_of(city), city.make_grid()
    box = fit_projection(grid, spec.crs).box
    metres = METRES_PER_DEGREE if CRS.from_user_input(spec.crs).is_geographic else 1.0
    step = float(np.spacing(np.float32(max(abs(v) for v in box)))) * metres / grid.resolution_m

    def in_single_precision(opener: Opener, file: SourceFile) -> bool:
        with opener.open(file) as stream:
            schema = pq.read_schema(stream)
        return any(pa.types.is_float32(schema.field(name).type) for name in (spec.columns.lon, spec.columns.lat))

    return step if any(by_path([f for f in files if f.is_parquet], in_single_precision)) else 0.0


def _check_text(city: City, file: SourceFile, opener: Opener) -> None:
    if file.member:
        require_plausible(file, opener.archive(file).getinfo(file.member))
    spec = points_of(city)
    head = _head(file, opener, spec.csv)
    if not spec.csv.header:
        _check_given_names(spec, head, file)
    if spec.csv.header and not {column for _, column in spec.columns.named()} <= set(head.names):
        _find_delimiter(city, file, opener)
    for key, column in spec.columns.named():
        _check_name(key, column, list(head.names), file)
        if key in ("lon", "lat"):
            _check_numbers(key, column, texts_of(head, head.names.index(column)), spec, file)
    layout_of_text(head, spec, file.label, file.shown)


def _head(file: SourceFile, opener: Opener, layout: CsvSpec) -> Head:
    with opener.open(file) as raw:
        return read_head(raw, layout, is_packed(file.label), file.shown)


def _check_given_names(spec: PointsSpec, head: Head, file: SourceFile) -> None:
    names = list(spec.csv.names)
    if not names:
        raise ConfigError("points.csv.names", names, "is empty for a file without a header", "list the columns in order")
    cells = len(head.rows[0]) if head.rows else len(names)
    if cells > len(names) and head.rows[0][-1] == "":  # behind a separator at the end of the line
        cells -= 1
    if cells != len(names):
        raise ConfigError(
            "points.csv.names",
            names,
            f"are {len(names)} names, and {file.shown} has {cells} columns",
            "name every column in order",
        )


def _find_delimiter(city: City, file: SourceFile, opener: Opener) -> None:
    """Say so where another separator would give the columns."""
    layout = points_of(city).csv
    for other in (c for c in ",;\t| " if c != layout.delimiter):
        names = _head(file, opener, layout.model_copy(update={"delimiter": other})).names
        if {column for _, column in points_of(city).columns.named()} <= set(names):
            raise ConfigError(
                "points.csv.delimiter",
                layout.delimiter,
                f"does not separate the columns of {file.shown}",
                f"set it to {other!r}",
            )


def _check_numbers(key: str, column: str, texts: list[str], spec: PointsSpec, file: SourceFile) -> None:
    """Refuse a column of positions without any number in the first rows."""
    if not texts or any(is_number(point_number(text, spec)) for text in texts):
        return
    if all(is_number(text.replace(",", ".")) for text in texts):
        raise ConfigError(
            "points.csv.decimal",
            spec.csv.decimal,
            f"does not fit numbers such as {texts[0]!r} in {file.shown}",
            "set it to ','",
        )
    raise ConfigError(
        f"points.columns.{key}", column, f"holds no number in the first rows of {file.shown}, for example {texts[0]!r}",
        "name a column of plain numbers, or write them so",
    )  # fmt: skip


def _check_name(key: str, column: str, names: list[str], file: SourceFile) -> None:
    if column not in names:
        fix = fix_for_column(column, [printable(name) for name in names], file.path)
        raise ConfigError(f"points.columns.{key}", column, f"is not a column of {file.shown}", fix)
    if names.count(column) > 1:
        raise ConfigError(f"points.columns.{key}", column, f"names several columns of {file.shown}", "give each its own name")
