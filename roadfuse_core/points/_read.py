"""DuckDB reads rows of any source into six plain columns."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from roadfuse_core.errors import DataError
from roadfuse_core.files import replacing
from roadfuse_core.points._vehicles import NO_VEHICLE, quoted, vehicle_number
from roadfuse_core.settings import PointsSpec

__all__ = ["METRES_PER_SECOND", "Part", "Rows", "read_batches", "read_rows", "rows_by_bucket", "shuffle_rows", "time_span"]

METRES_PER_SECOND = {"km/h": 1 / 3.6, "m/s": 1.0, "mph": 0.44704, "m/min": 1 / 60, "knots": 1852 / 3600}
NO_TIME = np.iinfo(np.int64).min
DUCKDB_BYTES = 800_000_000
# Vehicles come together in so many buckets, each far smaller than a slice, so that slices can be cut by what there is.
BUCKETS = 4096
BATCH_ROWS = 14_336  # 112 KiB a column, which fit the cache
ABSENT = ["", "None", "none", "NULL", "null", "NaN", "nan", "NA"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Rows as read, nothing judged yet.

    Attributes:
        vehicle: (n,) int64, a hash, -1 where a row names no vehicle; length 0 where rows are judged alone.
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
    """

    paths: tuple[str, ...]
    rows: tuple[int, int] | None = None
    buckets: tuple[int, int] | None = None


@contextmanager
def _connection(spec: PointsSpec, paths: tuple[str, ...], scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB on one thread, spilling to a scratch folder; its errors name the files.

    Object stores are read through fsspec in ranges; DuckDB's own extensions would have to be downloaded.
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
        for scheme in {p.split("://")[0] for p in paths if "://" in p}:
            connection.register_filesystem(fsspec.filesystem(scheme))
        try:
            yield connection
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # what DuckDB finds in the midst of a file comes by Arrow
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            named = [p for p in paths if p in str(error)] or paths
            where = named[0] if len(named) == 1 else f"{named[0]}, or one of {len(named) - 1} others"
            raise DataError(f"points.sources: cannot read {where} ({str(error).splitlines()[0]}); check the file") from error


def read_batches(spec: PointsSpec, part: Part, ordered: bool, scratch: Path) -> Iterator[Rows]:
    """The rows of a part, in batches that stay in a processor's cache; all at once where their order matters.

    Args:
        spec: How the files are laid out.
        part: Which rows.
        ordered: Sort by vehicle, time and all other columns, so that the order is the same for any split into files.
        scratch: Where DuckDB spills.

    Raises:
        DataError: DuckDB cannot read a file.
    """
    with _connection(spec, part.paths, scratch) as connection:
        query, parameters = _query(connection, spec, part, ordered)
        relation = connection.sql(query, params=parameters)
        if ordered:
            yield _rows(relation.to_arrow_table().combine_chunks())
            return
        for batch in relation.to_arrow_reader(BATCH_ROWS):
            yield _rows(batch)


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
        query, parameters = _query(connection, spec, part, False)
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
        connection.execute(f"COPY ({bucketed}) TO '{out}' ({layout})", parameters)


def rows_by_bucket(path: Path) -> NDArray[np.int64]:
    """Rows of each bucket of a file that `shuffle_rows` wrote."""
    counts = np.zeros(BUCKETS, np.int64)
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        found = connection.execute("SELECT bucket, count(*) FROM read_parquet(?) GROUP BY bucket", [str(path)]).fetchnumpy()
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
    connection: duckdb.DuckDBPyConnection, spec: PointsSpec, part: Part, ordered: bool, unsorted: bool = False
) -> tuple[str, list[object]]:
    """SQL for a part's rows in plain columns."""
    if part.buckets is not None:
        rows, parameters = _bucket_query(spec, part.paths, part.buckets, ordered)
    else:
        rows, parameters = _files_query(connection, spec, part, ordered)
    if not ordered or unsorted:
        return rows, parameters
    chosen = _columns(spec, {}, ordered)
    keys = [quoted(k) for k in ("vehicle", "time_us", "x", "y", "speed", "bearing", "interval") if k in chosen]
    return f"{rows} ORDER BY {', '.join(keys)}", parameters


def _bucket_query(
    spec: PointsSpec, paths: tuple[str, ...], buckets: tuple[int, int], ordered: bool
) -> tuple[str, list[object]]:
    """SQL for some buckets of shuffled files, whose columns are plain already."""
    names = ", ".join(quoted(name) for name in _columns(spec, {}, ordered))
    where = "WHERE bucket >= {} AND bucket < {}".format(*buckets)
    return f"SELECT {names} FROM read_parquet(?) {where}", [list(paths)]


def _files_query(
    connection: duckdb.DuckDBPyConnection, spec: PointsSpec, part: Part, ordered: bool
) -> tuple[str, list[object]]:
    """SQL for files as they came, each cast from its own types: a type that several agree on would change values."""
    queries = list[str]()
    parameters = list[object]()
    for paths in _alike(connection, spec, part.paths):
        source, values = _source(spec, Part(paths, part.rows))
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}", values).fetchall()
        chosen = _columns(spec, {row[0]: row[1] for row in described}, ordered)
        where = "WHERE file_row_number >= {} AND file_row_number < {}".format(*map(int, part.rows)) if part.rows else ""
        selected = ", ".join(f"{text} AS {quoted(name)}" for name, text in chosen.items())
        queries.append(f"SELECT {selected} FROM {source} {where}")
        parameters += values
    return " UNION ALL ".join(queries), parameters


def _alike(connection: duckdb.DuckDBPyConnection, spec: PointsSpec, paths: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Files in groups of equal types in the columns that the city names; text has but one type."""
    if len(paths) == 1 or not _is_parquet(paths[0]):
        return [paths]
    names = {column for _, column in spec.columns.named()}
    schema = connection.execute(
        "SELECT file_name, name, type, converted_type, logical_type, scale, precision FROM parquet_schema(?)", [list(paths)]
    ).fetchall()
    types = {path: list[tuple[str, ...]]() for path in paths}
    for path, name, *facts in schema:
        if name in names:
            types[path].append((name, *map(str, facts)))
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for path, kinds in types.items():
        groups.setdefault(tuple(sorted(kinds)), []).append(path)
    return [tuple(group) for group in groups.values()]


def _is_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".pq"))


def _columns(spec: PointsSpec, types: dict[str, str], ordered: bool) -> dict[str, str]:
    """SQL of each plain column that the city names."""
    c, factor = spec.columns, METRES_PER_SECOND[spec.speed_unit]
    columns = {
        "vehicle": vehicle_number(c.vehicles, types) if ordered and c.vehicle else None,
        "x": _number(c.lon, types),
        "y": _number(c.lat, types),
        "time_us": _time(spec, types) if c.time else None,
        "speed": f"{_number(c.speed, types)} * {factor!r}" if c.speed else None,
        "bearing": _number(c.bearing, types) if c.bearing else None,
        "interval": _number(c.interval, types) if c.interval else None,
    }
    return {name: text for name, text in columns.items() if text}


def _source(spec: PointsSpec, part: Part) -> tuple[str, list[object]]:
    paths = list(part.paths)
    named = "true" if "filename" in spec.columns.vehicles else "false"
    if _is_parquet(paths[0]):
        numbered = ", file_row_number = true" if part.rows else ""
        return f"read_parquet(?, union_by_name = true, filename = {named}, hive_partitioning = false{numbered})", [paths]
    csv = spec.csv
    header = "true" if csv.header else "false"
    layout = f"delim = ?, header = {header}, all_varchar = true, nullstr = ?, null_padding = true, filename = {named}"
    # Without `auto_detect = false` DuckDB guesses quotes and line ends from a sample; columns are then named explicitly.
    if csv.header:
        return f"read_csv(?, {layout}, union_by_name = true)", [paths, csv.delimiter, ABSENT]
    columns = ", ".join(f"{quoted(n)}: 'VARCHAR'" for n in csv.names)
    return f"read_csv(?, {layout}, auto_detect = false, columns = {{{columns}}})", [paths, csv.delimiter, ABSENT]


def _number(column: str | None, types: dict[str, str]) -> str:
    if column is None:
        return ""
    kind = types.get(column, "VARCHAR")
    return quoted(column) if kind == "DOUBLE" else f"TRY_CAST({quoted(column)} AS DOUBLE)"


def _time(spec: PointsSpec, types: dict[str, str]) -> str:
    column, unit = quoted(spec.columns.time or ""), {"s": 1e6, "ms": 1e3}[spec.time_unit]
    numeric = f"TRY_CAST(round(TRY_CAST({column} AS DOUBLE) * {unit!r}) AS BIGINT)"
    stamp = f"epoch_us(TRY_CAST({column} AS TIMESTAMPTZ))"
    kind = types.get(spec.columns.time or "", "VARCHAR")
    if kind in ("TIMESTAMP WITH TIME ZONE", "TIMESTAMP") and (kind != "TIMESTAMP" or spec.time_zone == "UTC"):
        value = f"epoch_us({column})"
    elif kind.startswith(("TIMESTAMP", "DATE")):
        value = stamp
    elif kind == "VARCHAR":
        value = f"coalesce({numeric}, {stamp})"
    else:
        value = numeric
    return value
