"""Parquet files whose footers do not tell the truth about their rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import ingest, ledger
from roadfuse_core.errors import RoadFuseError
from roadfuse_core.points import find_sources
from roadfuse_core.settings import City, load_city

# A 64-bit integer of Thrift's compact protocol, one field after the one before.
INT64 = b"\x16"
LIST = b"\x19"


def city_of(folder: Path) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 2.0, "tile_px": 256},
        "points": {"sources": ["a.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def write(path: Path, rows: int) -> None:
    rng = np.random.default_rng(3)
    table = pa.table({"lon": 13 + 0.01 * rng.random(rows), "lat": 47 + 0.01 * rng.random(rows)})
    pq.write_table(table, path, use_dictionary=False, write_statistics=False, store_schema=False)


def number(value: int) -> bytes:
    """An integer as Thrift's compact protocol writes it: zigzag, seven bits a byte."""
    value *= 2
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def restate(path: Path, rows: int, stated: int, places: str) -> None:
    """Change what a footer says about a file's rows, in the file's total alone or in all places."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    body, footer = content[: -8 - length], content[-8 - length : -8]
    if places == "total":
        assert footer.count(INT64 + number(rows) + LIST) == 1
        footer = footer.replace(INT64 + number(rows) + LIST, INT64 + number(stated) + LIST)
    else:
        assert footer.count(INT64 + number(rows)) == {"groups": 4, "everywhere": 4}[places]
        totals = INT64 + number(rows) + LIST
        footer = footer.replace(totals, INT64 + number(stated) + LIST)
        *columns, group = footer.split(INT64 + number(rows))
        if places == "everywhere":
            footer = (INT64 + number(stated)).join([*columns, group])
        else:
            footer = (INT64 + number(rows)).join(columns) + INT64 + number(stated) + group
    path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize(
    ("stated", "places", "message"),
    [
        (500, "total", "states 500 rows, and 1,000 in its groups"),
        (1500, "total", "states 1,500 rows, and 1,000 in its groups"),
        (500, "groups", "states 500 rows in group 0, and 1,000 values of lon"),
        (10**15, "total", "states 1,000,000,000,000,000 rows, and 1,000 in its groups"),
        (10**15, "everywhere", "states 1,000,000,000,000,000 rows in"),
        (10**11, "everywhere", "states 100,000,000,000 rows in"),
    ],
)
@pytest.mark.parametrize("command", ["check", "ingest"])
def test_a_footer_that_cannot_be_true_is_refused(tmp_path, stated, places, message, command):
    write(tmp_path / "a.parquet", 1000)
    restate(tmp_path / "a.parquet", 1000, stated, places)
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == stated
    city = city_of(tmp_path)
    refused = CliRunner().invoke(app, [command, str(tmp_path / "city.yaml")]).exception
    assert isinstance(refused, RoadFuseError)
    assert refused.exit_code == {"check": 2, "ingest": 3}[command]
    assert f"a.parquet has a footer that {message}" in str(refused)
    assert ledger(city) == {}


def test_many_equal_rows_in_few_bytes_are_read(tmp_path):
    """Three million rows of a parked car in 28 thousand bytes."""
    rows = 3_000_000
    table = pa.table({"lon": np.full(rows, 13.005), "lat": np.full(rows, 47.005)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    city = city_of(tmp_path)
    assert find_sources(city)[0].size < 30_000
    assert ingest(city)["rows"] == rows
