"""Dumps in an S3-compatible store: a real server process, read in ranges through fsspec."""

import gzip
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.cubes import CubeReader, cubes_path, files_between, ingest, ledger, plan_ingest
from roadfuse_core.errors import RoadFuseError
from roadfuse_core.settings import City, load_city

boto3 = pytest.importorskip("boto3", reason="the dev extra has it")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a server with an empty bucket `dumps`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    for _ in range(300):
        try:
            urllib.request.urlopen(address)
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                           "AWS_ENDPOINT_URL": address}.items():  # fmt: skip
            patch.setenv(key, value)
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="dumps")
        yield client
    server.kill()
    server.wait()


def table(seed: int, rows: int = 4000) -> pa.Table:
    rng = np.random.default_rng(seed)
    stamps = np.datetime64(f"2026-0{seed}-01", "us") + rng.integers(0, 10**12, rows).astype("timedelta64[us]")
    return pa.table({"lon": 13 + 0.01 * rng.random(rows), "lat": 47 + 0.01 * rng.random(rows), "t": stamps,
                     "v": rng.integers(0, 9, rows)})  # fmt: skip


def city(folder: Path, source: str, **columns) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": [source], "columns": {"lon": "lon", "lat": "lat", "time": "t"} | columns},
    }  # fmt: skip
    folder.mkdir()
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def counts(c: City):
    return CubeReader(cubes_path(c)).window("count", 0, 0, *c.make_grid().shape).tolist()


@pytest.fixture
def dumps(store, tmp_path):
    """The same files in a folder and in the bucket: Parquet in a hive layout, text, gzip and a zip."""
    local = tmp_path / "local"
    for month in (1, 2):
        (local / f"parquet/month={month}").mkdir(parents=True)
        pq.write_table(table(month), local / f"parquet/month={month}/a.parquet")
    (local / "text").mkdir()
    text = table(3, 500).to_pandas().to_csv(index=False).encode()
    (local / "text/a.csv").write_bytes(text)
    (local / "text/b.csv.gz").write_bytes(gzip.compress(table(4, 500).to_pandas().to_csv(index=False).encode()))
    with zipfile.ZipFile(local / "text/c.zip", "w") as archive:
        archive.writestr("__MACOSX/x.csv", b"junk")
        archive.writestr("in/c.csv", table(5, 500).to_pandas().to_csv(index=False))
    for path in (p for p in local.rglob("*") if p.is_file()):
        store.upload_file(str(path), "dumps", str(path.relative_to(local)))
    return local


@pytest.mark.parametrize("vehicle", [{}, {"vehicle": "v"}])
@pytest.mark.parametrize("pattern", ["parquet", "parquet/**/*.parquet", "text/a.csv", "text/*.gz", "text/c.zip::*.csv"])
def test_a_store_gives_the_same_cube_as_a_disk(dumps, tmp_path, pattern, vehicle):
    here, there = (
        city(tmp_path / "a", f"../local/{pattern}", **vehicle),
        city(tmp_path / "b", f"s3://dumps/{pattern}", **vehicle),
    )
    check_city(there.model_copy(update={"model": there.model.model_copy(update={"weights": "kde"})}))
    first, second = ingest(here), ingest(there)
    assert counts(there) == counts(here)
    assert (second["dump"], second["rows"], second["rejected"]) == (first["dump"], first["rows"], first["rejected"])
    assert ingest(there) is None
    assert len(ledger(there)) == 1


def test_a_new_object_is_a_new_dump_and_known_ones_are_not_read_again(dumps, store, tmp_path):
    c = city(tmp_path / "c", "s3://dumps/parquet")
    ingest(c)
    pq.write_table(table(6), tmp_path / "new.parquet")
    store.upload_file(str(tmp_path / "new.parquet"), "dumps", "parquet/month=6/new.parquet")
    try:
        plan = plan_ingest(c)
        assert [f["label"] for f in plan.files] == ["s3://dumps/parquet/month=6/new.parquet"]
        assert len(plan.known) == 2
        june = [np.datetime64(t).astype("datetime64[s]").item() for t in ("2026-06-01", "2026-07-01")]
        assert [f.label for f in files_between(c, plan, *june)] == ["s3://dumps/parquet/month=6/new.parquet"]
        assert ingest(c)["rows"] == 4000
    finally:
        store.delete_object(Bucket="dumps", Key="parquet/month=6/new.parquet")


@pytest.mark.parametrize("source", ["s3://dumps/none/*.parquet", "s3://nobody/x.parquet", "ftp9://host/x.parquet"])
def test_a_store_that_has_nothing_is_one_clear_line(store, tmp_path, source):
    with pytest.raises(RoadFuseError, match=r"points\.sources") as caught:
        plan_ingest(city(tmp_path / "c", source))
    assert "\n" not in str(caught.value)


def test_a_store_that_does_not_answer_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RoadFuseError, match=r"cannot read s3://dumps/x\.parquet"):
        plan_ingest(city(tmp_path / "c", "s3://dumps/x.parquet"))
    fsspec.filesystem("s3").clear_instance_cache()
    assert os.environ["AWS_ENDPOINT_URL"].endswith(":9")
