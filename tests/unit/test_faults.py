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
from roadfuse_core.inference import IncompleteError, MapReader, infer, maps_path
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.inference import _predictor as predictors
from roadfuse_core.mosaic import NODATA
from roadfuse_core.settings import City, ClusterSpec
from tests.stopping import Stopped
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


def test_a_refresh_under_way_is_neither_collected_nor_in_the_way(city):
    """Expiry is refused and an ingest goes on, while another process is in the middle of a refresh."""
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
        with pytest.raises(StoreError, match="is writing"):
            expire(city, later)
        assert ingest(city) is None, "nothing is new, and nobody has to wait for that"
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


# A refresh's stages of prediction, by themselves, under the command's own progress and cluster.
INFER = """
from flows import cli
from roadfuse_core.cluster import open_cluster
from roadfuse_core.inference import _plan, infer
from roadfuse_core.settings import ClusterSpec, load_city
from pathlib import Path

def run():
    with open_cluster(ClusterSpec(workers=2)) as client, ConsoleProgress() as tell:
        infer(load_city(Path(sys.argv[1])), client=client, tell=tell)

_plan.BLOCK_PX = 128
cli.app = run
"""


@pytest.fixture
def two_maps(city, monkeypatch):
    """A city with a published map, and new points; what readers see now, and what the next map must be."""
    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    before = layers(city)
    ingest(city, ["dumps/2026-03-30.parquet", "dumps/2026-03-31.parquet"])
    infer(city, group="expected", full=True)
    expected = layers(city, "expected")
    assert not same(before, expected)
    return before, expected


def _reading_all_the_while(city: City, before, expected, act) -> None:
    """A reader that polls while something happens sees whole maps alone."""
    seen, stop = [], threading.Event()

    def poll():
        while not stop.is_set():
            found = layers(city)
            seen.append("before" if same(found, before) else "after" if same(found, expected) else "neither")
            stop.wait(0.05)

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        act()
    finally:
        stop.set()
        reader.join()
    assert "before" in seen
    assert "neither" not in seen


def _dies_and_is_run_again(city: City, before, expected, what: str, least: int) -> None:
    def kill():
        Stopped(what, least, [city.root / "city.yaml"], INFER).kill()

    _reading_all_the_while(city, before, expected, kill)
    assert same(layers(city), before), "nothing was published"
    assert list((city.workspace_path / "scratch").glob("map-*/*.safetensors")), "the work was under way"
    infer(city)
    assert same(layers(city), expected)


def _loses_a_worker(city: City, before, expected, what: str, least: int) -> None:
    def kill_one():
        running = Stopped(what, least, [city.root / "city.yaml"], INFER)
        assert len(running.workers()) == 2
        os.kill(running.workers()[0], signal.SIGKILL)
        assert running.go_on() == 0

    _reading_all_the_while(city, before, expected, kill_one)
    assert same(layers(city), expected)


LATER = pytest.param("writing the mosaic", marks=pytest.mark.slow)


@pytest.mark.parametrize("what", ["predicting windows", LATER])
def test_killed_and_run_again_gives_the_same_map(city, two_maps, what):
    _dies_and_is_run_again(city, *two_maps, what, 1)


@pytest.mark.parametrize("what", ["predicting windows", LATER])
def test_a_killed_worker_costs_nothing_but_time(city, two_maps, what):
    _loses_a_worker(city, *two_maps, what, 1)


@pytest.mark.slow
@pytest.mark.parametrize("happens", [_dies_and_is_run_again, _loses_a_worker])
def test_killed_at_random_moments(city, two_maps, happens):
    rng = random.Random(5)
    shutil.copytree(maps_path(city), city.root / "maps-before")
    for _ in range(8):
        shutil.rmtree(maps_path(city))
        shutil.copytree(city.root / "maps-before", maps_path(city))
        what, most = rng.choice([("predicting windows", 200), ("writing the mosaic", 12)])
        happens(city, *two_maps, what, rng.randrange(1, most))


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
