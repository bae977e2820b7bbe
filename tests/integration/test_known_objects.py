"""A look at sources whose objects are all known costs their listing, through the commands that people run."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.logging import disable_run_logger
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import ingest, ledger
from roadfuse_core.settings import City, load_city
from tasks import stages
from tests.counting_store import Store, running_store

pytest.importorskip("boto3", reason="the dev extra has it")
OBJECTS = 37


@pytest.fixture(scope="module")
def store():
    with running_store() as made:
        made.client.create_bucket(Bucket="dumps")
        yield made


def put(store: Store, key: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"lon": 13 + 0.01 * rng.random(30), "lat": 47 + 0.01 * rng.random(30)}), sink)
    store.client.put_object(Bucket="dumps", Key=key, Body=sink.getvalue().to_pybytes())


def city(folder: Path, source: str) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": [source], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"}, "model": {"weights": "kde"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def run(store: Store, *arguments: str) -> tuple[str, int]:
    """What a command prints, and how many requests it made."""
    store.requests()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output, store.requests()


@pytest.fixture(scope="module")
def known(store, tmp_path_factory) -> Path:
    """Folder of a city whose ledger holds all objects."""
    folder = tmp_path_factory.mktemp("city")
    for k in range(OBJECTS):
        put(store, f"known/day={k % 5}/f{k}.parquet", k)
    assert ingest(city(folder, "s3://dumps/known"))["rows"] == 30 * OBJECTS
    return folder


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("known", OBJECTS),
        ("known/**/*.parquet", OBJECTS),
        ("known/day=*/[af]*.parquet", OBJECTS),
        ("kn*/day=?/*", OBJECTS),
        ("known/day=0/*.parquet", 8),
        ("known/day=4/f*.parquet", 7),
    ],
)
def test_known_objects_cost_one_listing(store, known, pattern, files):
    city(known, f"s3://dumps/{pattern}")
    told, requests = run(store, "ingest", str(known / "city.yaml"))
    assert f"0 new files, 0.0 MB, about 0 rows in 0 slices; {files} files are already in the ledger" in told
    assert requests == 1
    told, requests = run(store, "check", str(known / "city.yaml"))
    assert f"{files} files, {files} of them in the ledger" in told
    assert requests == 1


def test_a_refresh_lists_its_sources_once(store, known):
    """The stages of a refresh that look at sources; another stage reads the cube alone."""
    c = city(known, "s3://dumps/known")
    store.requests()
    with disable_run_logger():
        found = stages.check.fn(known / "city.yaml")
    assert found[1] == "points: 1 dumps in the ledger; the ingest checks what is new"
    assert ingest(c) is None
    assert store.requests() == 1


def test_of_many_objects_only_a_new_one_is_opened(store, known):
    c = city(known, "s3://dumps/known")
    put(store, "known/late.parquet", 1000)
    told, requests = run(store, "check", str(known / "city.yaml"))
    assert f"{OBJECTS + 1} files, {OBJECTS} of them in the ledger, 30 rows in new Parquet" in told
    assert requests < OBJECTS // 2
    assert ingest(c)["rows"] == 30
    assert sum(e["rows"] for e in ledger(c).values()) == 30 * (OBJECTS + 1)
