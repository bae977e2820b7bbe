"""A cube that lost some of its files says so, and is not told to make room."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.cubes import cubes_path, ingest
from roadfuse_core.errors import StoreError
from roadfuse_core.settings import load_city


def test_chunks_that_were_deleted_are_missing(tmp_path):
    for name in ("a", "b"):
        rng = np.random.default_rng(ord(name))
        columns = {"lon": 13 + 0.003 * rng.random(40_000), "lat": 47 + 0.003 * rng.random(40_000)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": ["a.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
    }  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    city = load_city(tmp_path / "city.yaml")
    ingest(city)
    lost = list((cubes_path(city) / "chunks").iterdir())
    assert lost
    for path in lost:
        path.unlink()
    with pytest.raises(
        StoreError, match=r"work.*: lacks a part of what it stores \(.*not found.*\); restore it from a copy"
    ) as caught:
        ingest(city, ["b.parquet"])
    assert "\n" not in str(caught.value)
    assert "make room" not in str(caught.value)
