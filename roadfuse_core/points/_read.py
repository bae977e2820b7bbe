"""DuckDB reads rows of any source into six plain columns."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from roadfuse_core.errors import ConfigError, DataError, StoreError, printable, without_secrets
from roadfuse_core.files import replacing
from roadfuse_core.points._layout import ABSENT, Layout, layout_of_parquet, layout_of_text
from roadfuse_core.points._opening import PARQUET, open_bytes
from roadfuse_core.points._text import ending, is_packed, read_head, require_whole
from roadfuse_core.points._times import Clock, time_sql
from roadfuse_core.points._vehicles import NO_VEHICLE, quoted, vehicle_number
from roadfuse_core.settings import PointsSpec

__all__ = ["METRES_PER_SECOND", "Part", "Rows", "read_batches", "read_rows", "rows_by_bucket", "shuffle_rows", "time_span"]

METRES_PER_SECOND = {"km/h": 1 / 3.6, "m/s": 1.0, "mph": 0.44704, "m/min": 1 / 60, "knots": 1852 / 3600}
NO_TIME = np.iinfo(np.int64).min
# What DuckDB may hold; it sorts on the disk what is more. A worker's plan counts with all of it.
DUCKDB_BYTES = 400_000_000
# Vehicles come together in so many buckets, each far smaller than a slice, so that slices can be cut by what there is.
BUCKETS = 4096
BATCH_ROWS = 14_336  # 112 KiB a column, which fit the cache
TOO_WIDE = "error('a row has more cells than there are columns, in ' || file)::BOOLEAN"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Rows as read, nothing judged yet.

    Attributes:
        vehicle: (n,) int64, a hash; length 0 where rows are judged alone.
        x: (n,) longitude or easting; NaN where absent or not a number.
        y: (n,) latitude or northing.
        time_us: (n,) int64 microseconds since 1970 UTC; the smallest int64 where absent; length 0 without the column.
        speed: (n,) m/s, NaN where absent; length 0 where there is no such column.
        bearing: (n,) degrees, likewise.
        interval: (n,) seconds, likewise.
    """

    vehicle: NDArray[np.int64]
    x: Floats
    y: Floats
    time_us: NDArray[np.int64]
    speed: Floats
    bearing: Floats
    interval: Floats


@dataclass(frozen=True)
class Part:
    """Some rows of a dump.

    Attributes:
        paths: Files, all Parquet or all text; or what `shuffle_rows` wrote.
        rows: Row numbers [from, to) of a single Parquet file; None for all rows.
        buckets: Which vehicles of shuffled files, buckets [from, to); None for files as they came.
        expected: Rows that the files' footers promise; None for text and shuffled files.
    """

    # Addresses may be signed: they are left out of what is logged of a job.
    paths: tuple[str, ...] = field(repr=False)
    rows: tuple[int, int] | None = None
    buckets: tuple[int, int] | None = None
    expected: int | None = None


@contextmanager
def _connection(spec: PointsSpec, paths: tuple[str, ...], scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB on one thread, spilling to a scratch folder; its errors name the files.

    What it cannot name or reach by itself is read through Python; its own extensions would have to be downloaded.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = ?", [spec.time_zone])
        connection.execute("SET temp_directory = ?", [str(scratch)])
        connection.execute("SET threads = 1")
        connection.execute(f"SET memory_limit = '{DUCKDB_BYTES}B'")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.register_filesystem(_Sources([path for path in paths if _address(path) != path]))
        try:
            yield connection
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # what DuckDB finds in the midst of a file comes by Arrow
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if "Too many open files" in str(error):
                where = printable(without_secrets(paths[0]))
                raise StoreError(f"{where}: too many files are open; raise the limit (ulimit -n 4096), run again") from None
            raise _translated(error, paths) from None


def _translated(error: Exception, paths: tuple[str, ...]) -> DataError:
    """What DuckDB found, with the file and the reason that it gives on its further lines, in one line."""
    text = str(error)
    named = [p for p in paths if p in text or _address(p) in text] or list(paths)
    first = printable(without_secrets(named[0]))
    where = first if len(named) == 1 else f"{first}, or one of {len(named) - 1} others"
    lines = [line.strip() for line in text.splitlines()]
    end = next((k for k, line in enumerate(lines) if line.startswith(("Possible", "file =", "LINE"))), len(lines))
    told = [line for line in lines[:end] if line and not line.startswith("Original Line")]
    reason = "; ".join(told).replace(_address(named[0]), first)[:400]
    return DataError(f"points.sources: cannot read {where} ({printable(reason)}); check the file")


def read_batches(spec: PointsSpec, part: Part, ordered: bool, scratch: Path) -> Iterator[Rows]:
    """The rows of a part, in batches that stay in a processor's cache; all at once where their order matters.

    Args:
        spec: How the files are laid out.
        part: Which rows.
        ordered: Sort by vehicle, time and all other columns, so that the order is the same for any split into files.
        scratch: Where DuckDB spills.

    Raises:
        DataError: DuckDB cannot read a file, or a Parquet file holds other rows than its footer says.
    """
    with _connection(spec, part.paths, scratch) as connection:
        query, parameters = _query(connection, spec, part, ordered)
        relation = connection.sql(query, params=parameters)
        if ordered:
            table = relation.to_arrow_table().combine_chunks()
            _require_rows(part, table.num_rows)
            yield _rows(table)
            return
        rows = 0
        for batch in relation.to_arrow_reader(BATCH_ROWS):
            rows += batch.num_rows
            yield _rows(batch)
        _require_rows(part, rows)


def _require_rows(part: Part, rows: int) -> None:
    """Refuse files that give more or fewer rows than their footers said when the dump was planned."""
    if part.expected is None or rows == part.expected:
        return
    where = printable(without_secrets(part.paths[0])) + (f" and {len(part.paths) - 1} more" if len(part.paths) > 1 else "")
    raise DataError(
        f"points.sources: {where} gave {rows:,} rows and promised {part.expected:,}: it changed meanwhile, or its footer is "
        "wrong; run again, or write it again"
    )


def read_rows(spec: PointsSpec, part: Part, scratch: Path, limit: int) -> Rows:
    """Some rows of a part, for a look at a file.

    Args:
        spec: How the files are laid out.
        part: Which rows.
        scratch: Where DuckDB spills.
        limit: Read no more rows than this.

    Raises:
        DataError: DuckDB cannot read a file.
    """
    with _connection(spec, part.paths, scratch) as connection:
        query, parameters = _query(connection, spec, part, False, whole=False)
        return _rows(connection.sql(f"{query} LIMIT {int(limit)}", params=parameters).to_arrow_table().combine_chunks())


def time_span(spec: PointsSpec, path: str, scratch: Path) -> tuple[int, int] | None:
    """Earliest and latest time of a file, microseconds since 1970; None where no row has one.

    Raises:
        DataError: DuckDB cannot read the file.
    """
    part = Part((path,))
    with _connection(spec, part.paths, scratch) as connection:
        query, parameters = _query(connection, spec, part, False)
        low, high = connection.execute(f"SELECT min(time_us), max(time_us) FROM ({query})", parameters).fetchall()[0]
    return None if low is None else (int(low), int(high))


def shuffle_rows(spec: PointsSpec, part: Part, target: Path, scratch: Path) -> None:
    """Write a part's rows, in plain columns, sorted by the bucket of their vehicle.

    Any buckets can then be read from all such files by the few row groups that hold them: vehicles come together in
    one pass over the dump, however large it is. DuckDB sorts on the disk what does not fit its memory.

    Args:
        spec: How the files are laid out.
        part: Which rows.
        target: The Parquet file; it gets its name when it is complete.
        scratch: Where DuckDB spills.

    Raises:
        DataError: DuckDB cannot read a file.
    """
    with replacing(target) as unfinished, _connection(spec, part.paths, scratch) as connection:
        query, parameters = _query(connection, spec, part, True, unsorted=True)
        layout = "FORMAT parquet, COMPRESSION lz4, ROW_GROUP_SIZE 16384"
        out = str(unfinished).replace("'", "''")
        # Rows without a vehicle have no neighbours: any bucket is theirs, and none gets all of them.
        spread = f"CASE WHEN vehicle = {NO_VEHICLE} THEN row_number() OVER () ELSE vehicle END"
        bucketed = f"SELECT *, ({spread} % {BUCKETS})::INTEGER AS bucket FROM ({query}) ORDER BY bucket"
        written = connection.execute(f"COPY ({bucketed}) TO '{out}' ({layout})", parameters).fetchall()
        _require_rows(part, int(written[0][0]))


def rows_by_bucket(path: Path) -> NDArray[np.int64]:
    """Rows of each bucket of a file that `shuffle_rows` wrote."""
    counts = np.zeros(BUCKETS, np.int64)
    address = _address(str(path))
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.register_filesystem(_Sources([str(path)] if address != str(path) else []))
        found = connection.execute("SELECT bucket, count(*) FROM read_parquet(?) GROUP BY bucket", [address]).fetchnumpy()
    counts[found["bucket"]] = found["count_star()"]
    return counts


def _rows(table: pa.Table | pa.RecordBatch) -> Rows:
    return Rows(**{name: _column(table, name) for name in Rows.__dataclass_fields__})


def _column(table: pa.Table | pa.RecordBatch, name: str) -> NDArray[Any]:
    """A column, read-only, or nothing."""
    whole = name in ("vehicle", "time_us")
    if name not in table.schema.names or not table.num_rows:
        return np.zeros(0, np.int64 if whole else np.float64)
    column = table.column(name)
    if column.null_count:
        column = pc.fill_null(column, pa.scalar(NO_TIME if whole else float("nan"), column.type))
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return chunk.to_numpy()  # type: ignore[no-any-return]


def _query(
    connection: duckdb.DuckDBPyConnection,
    spec: PointsSpec,
    part: Part,
    ordered: bool,
    unsorted: bool = False,
    whole: bool = True,
) -> tuple[str, list[object]]:
    """SQL for a part's rows in plain columns; text is first read to its end where all of it will be read."""
    if part.buckets is not None:
        names = ", ".join(map(quoted, _plain_columns(spec, ordered)))
        where = "WHERE bucket >= {} AND bucket < {}".format(*map(int, part.buckets))
        query = f"SELECT {names} FROM read_parquet(?) {where}"
        parameters: list[object] = [[_address(path) for path in part.paths]]
    else:
        alike: dict[Layout, list[str]] = {}
        for path in part.paths:
            layout = _layout(spec, path, whole)
            _require_times(connection, spec, layout, path)
            alike.setdefault(layout, []).append(path)
        selects = [_select(connection, spec, layout, paths, part, ordered) for layout, paths in alike.items()]
        query = " UNION ALL ".join(f"({text})" for text, _ in selects)
        parameters = [p for _, some in selects for p in some]
    keys = [
        f'"{k}"' for k in ("vehicle", "time_us", "x", "y", "speed", "bearing", "interval") if k in _plain_columns(spec, ordered)
    ]
    order = f"ORDER BY {', '.join(keys)}" if ordered and not unsorted else ""
    return f"SELECT * FROM ({query}) {order}", parameters


def _layout(spec: PointsSpec, path: str, whole: bool) -> Layout:
    where = printable(without_secrets(path))
    with open_bytes(path) as stream:
        if ending(path).endswith(PARQUET):
            return layout_of_parquet(stream, spec, where)
        layout = layout_of_text(read_head(stream, spec.csv, is_packed(path), where), spec, path, where)
        if whole:
            stream.seek(0)
            require_whole(stream, spec.csv, layout.packed, where)
    return layout


def _require_times(connection: duckdb.DuckDBPyConnection, spec: PointsSpec, layout: Layout, path: str) -> None:
    """Refuse a file whose first times are all written in a way that is not read."""
    if layout.clock is not Clock.STAMP or not layout.texts:
        return
    value = time_sql("v", "VARCHAR", layout.clock, spec)
    read = connection.execute(f"SELECT count({value}) FROM (SELECT unnest(?) AS v)", [list(layout.texts)]).fetchall()
    if not read[0][0]:
        where = printable(without_secrets(path))
        raise ConfigError(
            "points.columns.time", spec.columns.time, f"holds {layout.texts[0]!r} in {where}, a form of time that is not read",
            "write 2024-05-01 08:00:00, with or without a zone, or seconds since 1970",
        )  # fmt: skip


def _plain_columns(spec: PointsSpec, ordered: bool) -> dict[str, tuple[str, ...]]:
    """Columns of the files by the name of each plain column that the city has."""
    c = spec.columns
    single = {"x": c.lon, "y": c.lat, "time_us": c.time, "speed": c.speed, "bearing": c.bearing, "interval": c.interval}
    vehicles = {"vehicle": c.vehicles} if ordered and c.vehicle else {}
    return vehicles | {name: (column,) for name, column in single.items() if column}


def _select(
    connection: duckdb.DuckDBPyConnection, spec: PointsSpec, layout: Layout, paths: list[str], part: Part, ordered: bool
) -> tuple[str, list[object]]:
    """SQL for the rows of files that are laid out alike. Columns go by their place, because DuckDB's names know no case."""
    numbers = range(len(layout.names))
    if layout.kinds:
        more = ", filename = true" if "filename" in spec.columns.vehicles else ""
        more += ", file_row_number = true" if part.rows else ""
        source = f"read_parquet(?, union_by_name = false, hive_partitioning = false{more})"
        parameters: list[object] = [[_address(path) for path in paths]]
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}", [parameters[0][:1]]).fetchall()  # type: ignore[index]
        kinds = [str(row[1]) for row in described[: len(layout.names)]]
        added = ["number" if row[0].startswith("file_row_number") else "file" for row in described[len(layout.names) :]]
        names = ", ".join([*(f"c{k}" for k in numbers), *added])
        where = "WHERE number >= {} AND number < {}".format(*map(int, part.rows)) if part.rows else ""
        source = f"{source} AS t({names})"
    else:
        source, parameters = _text_source(spec, layout, paths)
        kinds = ["VARCHAR"] * len(layout.names)
        where = f"WHERE CASE WHEN c{len(layout.names)} IS NULL THEN true ELSE {TOO_WIDE} END"
    selected = ", ".join(
        f'{_plain_sql(spec, layout, kinds, plain, column)} AS "{plain}"'
        for plain, column in _plain_columns(spec, ordered).items()
    )
    return f"SELECT {selected} FROM {source} {where}", parameters


def _text_source(spec: PointsSpec, layout: Layout, paths: list[str]) -> tuple[str, list[object]]:
    """Text, nothing guessed; one column more than there are names, to notice rows that have more cells."""
    csv = spec.csv
    columns = ", ".join(f"'c{k}': 'VARCHAR'" for k in range(len(layout.names) + 1))
    options = {
        "delim": "?", "header": str(csv.header).lower(), "nullstr": "?", "columns": f"{{{columns}}}", "auto_detect": "false",
        "quote": "'\"'", "escape": "'\"'", "null_padding": "true", "strict_mode": "false", "parallel": "false",
        "encoding": f"'{csv.encoding}'", "compression": "'gzip'" if layout.packed else "'none'",
        "hive_partitioning": "false", "filename": "'file'",
    }  # fmt: skip
    given = ", ".join(f"{key} = {value}" for key, value in options.items())
    return f"read_csv(?, {given})", [[_address(path) for path in paths], csv.delimiter, ABSENT]


def _plain_sql(spec: PointsSpec, layout: Layout, kinds: list[str], plain: str, columns: tuple[str, ...]) -> str:
    """SQL of a plain column."""
    places = ["file" if c == "filename" else f"c{layout.names.index(c)}" for c in columns]
    if plain == "vehicle":
        return vehicle_number(places, {f"c{k}": kind for k, kind in enumerate(kinds)})
    kind, value = kinds[layout.names.index(columns[0])], places[0]
    if kind == "VARCHAR":
        # Not for the spaces alone: DuckDB moves a bare cast into its reader, where a failure is an error.
        value = f"trim({value})"
    if kind == "VARCHAR" and spec.csv.decimal == ",":
        value = f"CASE WHEN regexp_full_match({value}, '[-+0-9,eE]*') THEN replace({value}, ',', '.') ELSE {value} END"
    if plain == "time_us":
        assert layout.clock is not None
        return time_sql(value, kind, layout.clock, spec)
    number = value if kind == "DOUBLE" else f"TRY_CAST({value} AS DOUBLE)"
    return f"{number} * {METRES_PER_SECOND[spec.speed_unit]!r}" if plain == "speed" else number


def _address(path: str) -> str:
    """How DuckDB is asked for a file: it takes every path for a glob and knows no object store without downloads."""
    if "://" not in path and not any(c in path for c in "*?["):
        return path
    return f"source://{hashlib.blake2b(path.encode(), digest_size=12).hexdigest()}"


class _Sources(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Files under plain names, as `_address` gives them; DuckDB reads their bytes through Python, in ranges."""

    protocol = "source"
    cachable = False

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = {_address(path): path for path in paths}
        self.sizes: dict[str, int] = {}

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]

    def open(self, path: str, *_: Any, **__: Any) -> IO[bytes]:
        return open_bytes(self.paths[path])

    def size(self, path: str) -> int:
        if path not in self.sizes:
            with self.open(path) as stream:
                self.sizes[path] = stream.seek(0, os.SEEK_END)
        return self.sizes[path]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0)
