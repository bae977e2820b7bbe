"""What happens when something fails: a map is whole, or as before, and the work that was done is kept."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dask
import numpy as np
import pytest
import rasterio
import torch
from dask.distributed import WorkerPlugin

from roadfuse_core.cluster import ClusterLostError, open_cluster
from roadfuse_core.cubes import expire, ingest, ledger
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.imagery import find_imagery
from roadfuse_core.inference import IncompleteError, MapReader, infer, maps_path, release, rollback
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.inference import _predictor as predictors
from roadfuse_core.mosaic import NODATA
from roadfuse_core.settings import City, ClusterSpec
from tests.unit.test_changes import assert_equal_to_a_full_one, city, gated, layers, same  # noqa: F401


def damage(city: City) -> tuple[Path, bytes]:
    """Overwrite a part of the image's data; returns the file and its bytes before."""
    path = Path(find_imagery(city)[0])
    whole = path.read_bytes()
    with rasterio.open(path) as source:
        pixels = source.read()
        profile = source.profile | {
            "tiled": True,
            "blockxsize": 64,
            "blockysize": 64,
            "compress": "deflate",
            "photometric": "rgb",
        }
    profile.pop("interleave", None)
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(pixels)
    whole = path.read_bytes()
    with rasterio.open(path) as source:
        offset = int(
            source.tags(ns="TIFF", bidx=1).get("BLOCK_OFFSET_3_3") or source.get_tag_item("BLOCK_OFFSET_3_3", "TIFF", bidx=1)
        )
    path.write_bytes(whole[:offset] + b"\xff" * 200 + whole[offset + 200 :])
    return path, whole


def test_a_damaged_image_stops_the_map_or_leaves_a_hole_and_is_healed(city):
    ingest(city)
    path, whole = damage(city)
    with pytest.raises(IncompleteError, match=r"windows could not be predicted, the first at row .*nothing was published"):
        infer(city)
    with pytest.raises(StoreError, match=r"holds no map|nothing was published"):
        MapReader(city)
    listed = json.loads((city.workspace_path / "failures/map.json").read_text())
    assert {(f["row"], f["col"]) for f in listed} == {(r, c) for r in range(160, 256, 32) for c in range(160, 256, 32)}
    record = infer(city, allow_incomplete=True)
    assert len(record["failed"]) == len(listed)
    hole = layers(city)["road"] == NODATA
    assert hole.any()
    assert hole[192:256, 192:256].all(), "only windows that see the damage are missing"
    assert not hole[:160].any()
    path.write_bytes(whole)
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    healed = infer(city)
    assert not healed["failed"]
    assert not (layers(city)["road"] == NODATA).any()
    assert_equal_to_a_full_one(city)


def test_a_block_that_kills_its_workers_is_a_hole_of_the_rest(city, monkeypatch):
    ingest(city)
    monkeypatch.setattr(planning, "BLOCK_PX", 128)

    class Deadly(WorkerPlugin):
        """The process that reads the corner of the city dies, as one that the system kills for its memory."""

        def setup(self, worker):
            import os

            from roadfuse_core.inference import _blocks

            real = _blocks.read_region

            def read(evidence, layers, image, at, reach=0):
                if at.row0 < 0 and at.col0 < 0:
                    os._exit(1)
                return real(evidence, layers, image, at, reach)

            _blocks.read_region = read

    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), open_cluster(ClusterSpec(workers=2)) as client:
        client.register_plugin(Deadly())
        with pytest.raises(IncompleteError, match=r"KilledWorker"):
            infer(city, client=client)
        record = infer(city, client=client, allow_incomplete=True)
    assert record["failed"]
    hole = layers(city)["road"] == NODATA
    assert hole[:64, :64].all()
    assert not hole[192:].any()
    healed = infer(city)
    assert not healed["failed"]
    assert_equal_to_a_full_one(city)


def test_an_image_that_was_rewritten_is_placed_anew_by_a_process_that_read_it_before(city):
    ingest(city)
    infer(city)
    path = Path(find_imagery(city)[0])
    with rasterio.open(path) as source:
        pixels, profile = source.read()[:, :128], source.profile | {"height": 128}
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)
    infer(city)
    assert_equal_to_a_full_one(city)


def test_the_command_ends_with_its_own_code(city):
    ingest(city)
    damage(city)
    done = subprocess.run([sys.executable, "-c", f"""
import sys
from pathlib import Path
from flows import cli
from roadfuse_core.inference import infer
from roadfuse_core.settings import load_city
cli.app = lambda: infer(load_city(Path({str(city.root / 'city.yaml')!r})))
cli.main()"""], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 6
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "--allow-incomplete" in errors[0]


@pytest.mark.parametrize(("happens", "code"), [("1 / 0", 1), ("sys.exit()", 0), ("sys.exit(3)", 3), ("None", 0)])
def test_a_fault_that_nobody_foresaw_is_no_success(happens, code):
    done = subprocess.run([sys.executable, "-c", f"""
import sys
from flows import cli
cli.app = lambda: {happens}
cli.main()"""], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == code
    assert ("ZeroDivisionError" in done.stderr) == (happens == "1 / 0")


def test_a_device_out_of_memory_halves_the_batch(city, monkeypatch):
    ingest(city)
    infer(city)
    expected, seen = layers(city), []
    real = predictors.NetworkPredictor._forward

    def small(self, inputs):
        n = len(next(iter(inputs.values())))
        seen.append(n)
        if n > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, inputs)

    monkeypatch.setattr(predictors.NetworkPredictor, "_forward", small)
    blocks_module.predictor_of.cache_clear()
    infer(city, full=True)
    assert {4, 2, 1} <= set(seen)
    got = layers(city)
    assert max(np.abs(got[k].astype(int) - expected[k]).max() for k in ("probability", "gate_image")) <= 1


def test_too_little_memory_is_refused_with_both_numbers(city):
    ingest(city)
    small = city.model_copy(update={"cluster": ClusterSpec(memory_gib=0.3)})
    with pytest.raises(ConfigError, match=r"cluster\.memory_gib: 0\.3 is less than the 0\.\d+ GiB"):
        infer(small)


def _start(city: City, workers: int = 2) -> subprocess.Popen[bytes]:
    code = f"""
import sys
from pathlib import Path
from roadfuse_core.cluster import open_cluster
from roadfuse_core.inference import infer, _plan
from roadfuse_core.settings import ClusterSpec, load_city
if __name__ == "__main__":
    _plan.BLOCK_PX = 128
    with open_cluster(ClusterSpec(workers={workers})) as client:
        infer(load_city(Path(sys.argv[1])), client=client)
"""
    script = city.root / "run.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script), str(city.root / "city.yaml")], start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def test_what_writes_is_refused_while_a_refresh_runs_and_the_map_comes_out_right(city):
    """Expiry, rollback, release, an ingest and another refresh, while another process is in the middle of one."""
    for day in (29, 30):
        ingest(city, [f"dumps/2026-03-{day}.parquet"])
        infer(city)
    ingest(city)
    go = city.root / "go"
    code = f"""
import time
from pathlib import Path
from roadfuse_core.inference import infer, _plan
from roadfuse_core.settings import load_city
_plan.BLOCK_PX = 128

def tell(what, done, total):
    if what == "predicting windows" and done > 20:
        print("on", flush=True)
        while not Path({str(go)!r}).exists():
            time.sleep(0.05)

infer(load_city(Path({str(city.root / "city.yaml")!r})), tell=tell)
"""
    before = layers(city)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as refresh:
        assert refresh.stdout.readline() == b"on\n"
        later = datetime.now(UTC) + timedelta(days=1)
        for attempt in (
            lambda: expire(city, later),
            lambda: rollback(city),
            lambda: release(city),
            lambda: ingest(city),
            lambda: infer(city),
        ):
            with pytest.raises(StoreError, match="is writing"):
                attempt()
        assert same(layers(city), before), "readers see the map before"
        go.touch()
        refresh.communicate()
    assert refresh.returncode == 0
    assert not same(layers(city), before)
    dumps = set(ledger(city))
    expire(city, later, keep=MapReader(city).record["cubes_snapshot"])
    assert set(ledger(city)) == dumps, "the ledger survives"
    assert_equal_to_a_full_one(city)


def test_expiry_sweeps_the_blocks_of_a_refresh_that_never_went_on(city):
    ingest(city)
    (city.workspace_path / "scratch/map-0123456789abcdef").mkdir(parents=True)
    (city.workspace_path / "scratch/map-0123456789abcdef/0-0.safetensors").write_bytes(b"x")
    now = datetime.now(UTC)
    assert expire(city, now - timedelta(days=1)).leftovers == 0
    assert expire(city, now + timedelta(days=1), dry_run=True).leftovers == 1
    assert expire(city, now + timedelta(days=1)).leftovers == 1
    assert not (city.workspace_path / "scratch/map-0123456789abcdef").exists()


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(p) for p in found]


def _survives(city: City, delays: list[float], monkeypatch, whom: str) -> None:
    """Kill, look, run again; a reader that polls all the while sees whole maps alone."""
    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    before = layers(city)
    ingest(city, ["dumps/2026-03-30.parquet", "dumps/2026-03-31.parquet"])
    infer(city, group="expected", full=True)
    expected = layers(city, "expected")
    shutil.copytree(maps_path(city), city.root / "maps-before")
    seen, stop = [], threading.Event()

    def poll():
        while not stop.is_set():
            try:
                found = layers(city)
            except (StoreError, FileNotFoundError, KeyError):
                continue
            seen.append(same(found, before) or same(found, expected))
            time.sleep(0.05)

    for delay in delays:
        shutil.rmtree(maps_path(city))
        shutil.copytree(city.root / "maps-before", maps_path(city))
        stop.clear()
        reader = threading.Thread(target=poll)
        reader.start()
        process = _start(city)
        time.sleep(delay)
        if whom == "client":
            os.killpg(process.pid, signal.SIGKILL)
        elif workers := [w for w in _children(process.pid) for w in [w, *_children(w)] if w != process.pid]:
            os.kill(random.Random(delay).choice(workers[1:] or workers), signal.SIGKILL)
        process.wait(120)
        stop.set()
        reader.join()
        assert same(layers(city), before) or same(layers(city), expected)
        infer(city)
        assert same(layers(city), expected)
    assert seen
    assert all(seen)


def test_killed_and_run_again_gives_the_same_map(city, monkeypatch):
    _survives(city, [4.0], monkeypatch, "client")


def test_a_killed_worker_costs_nothing_but_time(city, monkeypatch):
    _survives(city, [5.0], monkeypatch, "worker")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["client", "worker"])
def test_killed_at_random_moments(city, monkeypatch, whom):
    rng = random.Random(5)
    _survives(city, [rng.uniform(2.0, 9.0) for _ in range(8)], monkeypatch, whom)


def test_a_lost_scheduler_is_told_and_the_work_is_kept(city, monkeypatch, scheduler):
    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    ingest(city)
    scheduler.add_workers(1)
    told = []

    def kill_it(what, done, total):
        if what == "predicting windows":
            told.append(done)
            if len(told) == 5:  # the first says that none is done
                scheduler.kill()

    with pytest.raises(ClusterLostError, match="run again"), open_cluster(ClusterSpec(kind=scheduler.address)) as client:
        infer(city, client=client, tell=kill_it)
    kept = list((city.workspace_path / "scratch").glob("map-*/*.safetensors"))
    assert len(kept) >= 4
    infer(city)
    assert_equal_to_a_full_one(city)


def test_a_full_disk_leaves_the_map_as_it_was(city, small_disk, fill):
    disk = small_disk("9m")
    full = city.model_copy(update={"workspace": str(disk / "work")})
    ingest(full, ["dumps/2026-03-29.parquet"])
    infer(full)
    before = layers(full)
    ingest(full, ["dumps/2026-03-30.parquet"])
    fill(disk / "filler")
    for free in (0, 200_000, 700_000):
        os.truncate(disk / "filler", max(0, (disk / "filler").stat().st_size - free))
        with pytest.raises(StoreError, match=r"o space.*run again"):
            infer(full)
        assert same(layers(full), before)
    (disk / "filler").unlink()
    infer(full)
    assert_equal_to_a_full_one(full)
