"""How many rows a Parquet file has by its footer, where the footer can be true."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.parquet as pq

from roadfuse_core.errors import DataError

__all__ = ["stated_rows"]

# Equal values pack well, and so do a billion of them; but no trajectories have thousands of rows in each byte.
MANY_ROWS = 1_000_000_000
ROWS_PER_BYTE = 1000


def stated_rows(footer: pq.FileMetaData, size: int, columns: Sequence[str], where: str) -> int:
    """Rows of a file, which its footer states three times.

    Args:
        footer: The footer.
        size: Bytes of the file.
        columns: Columns that the city names.
        where: The file, for messages.

    Raises:
        DataError: The footer contradicts itself, or states more rows than such a file can hold.
    """
    groups = [footer.row_group(k) for k in range(footer.num_row_groups)]
    rows = int(footer.num_rows)
    fix = "write or copy it again"
    if sum(int(g.num_rows) for g in groups) != rows:
        stated = sum(int(g.num_rows) for g in groups)
        raise DataError(f"points.sources: {where} has a footer that states {rows:,} rows, and {stated:,} in its groups; {fix}")
    if rows < 0 or (rows > MANY_ROWS and rows > ROWS_PER_BYTE * size):
        raise DataError(f"points.sources: {where} has a footer that states {rows:,} rows in {size:,} bytes; {fix}")
    for k, group in enumerate(groups):
        for values, name in _values_of(group, columns):
            if values != group.num_rows:
                problem = f"{group.num_rows:,} rows in group {k}, and {values:,} values of {name}"
                raise DataError(f"points.sources: {where} has a footer that states {problem}; {fix}")
    return rows


def _values_of(group: pq.RowGroupMetaData, columns: Sequence[str]) -> list[tuple[int, str]]:
    """How many values each named column has in a group, absent ones included; columns of lists are left out."""
    chunks = [group.column(k) for k in range(group.num_columns)]
    return [(int(c.num_values), c.path_in_schema) for c in chunks if c.path_in_schema in columns]
