"""What a poll and a refresh cost where the sources are many objects that the ledger knows: requests and own time.

python -m tests.benchmarks.sources [--objects 10000]. The store is a local S3 server in a process of its own.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zarr

from roadfuse_core.check import check_refresh
from roadfuse_core.cubes import cubes_path, ingest, open_repository, plan_ingest
from roadfuse_core.points import find_sources
from roadfuse_core.settings import City, load_city
from tests.counting_store import Store, running_store

REALLY_READ = 20


def parquet(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"lon": 13 + 0.01 * rng.random(5), "lat": 47 + 0.01 * rng.random(5)}), sink)
    return sink.getvalue().to_pybytes()


def make_city(folder: Path) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": ["s3://dumps/day=*/*.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
        "model": {"weights": "kde"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def make_known(city: City) -> None:
    """Some objects are ingested; the others are put beside them into their dump, as reading them all takes minutes."""
    found = find_sources(city)
    ingest(city, [f.label for f in found[:REALLY_READ]])
    session = open_repository(cubes_path(city)).writable_session("main")
    ledger = zarr.open_group(session.store)["ledger"]
    ((name, entry),) = ledger.attrs["dumps"].items()
    others = [{"path": f.path, "member": "", "label": f.label, "version": f.version, "size": f.size, "hash": f"{k:032x}", "rows": 5}
              for k, f in enumerate(found[REALLY_READ:])]  # fmt: skip
    ledger.attrs["dumps"] = {name: entry | {"files": entry["files"] + others}}
    session.commit("others")


def measure(store: Store, what: str, step: Callable[[], object]) -> None:
    store.requests()
    wall, own = time.perf_counter(), time.process_time()
    step()
    own, wall = time.process_time() - own, time.perf_counter() - wall
    print(f"  {what:<32} {store.requests():>4} requests  {own:6.2f} s own time  {wall:6.2f} s   (target ≤ 20 requests, ≤ 2 s)")


def main(objects: int = 10_000) -> None:
    """Print requests and seconds of a poll, and of what a refresh does with its sources."""
    with tempfile.TemporaryDirectory() as folder, running_store() as store:
        store.client.create_bucket(Bucket="dumps")

        def put(k: int) -> None:
            store.client.put_object(Bucket="dumps", Key=f"day={k % 365:03d}/{k:06d}.parquet", Body=parquet(k))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(objects)))
        city = make_city(Path(folder))
        make_known(city)
        assert not plan_ingest(city).files
        print(f"sources, {objects:,} known objects in an S3 store on this machine")
        measure(store, "poll", lambda: plan_ingest(city))
        measure(store, "refresh (check, ingest)", lambda: (check_refresh(city), ingest(city)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=10_000)
    main(parser.parse_args().objects)
