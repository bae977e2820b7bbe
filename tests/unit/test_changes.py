"""Only what changed, and what happens when something fails: a map is whole, equal to a full one, or as before."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import expire, ingest
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.grid import Block, Grid, Lattice
from roadfuse_core.imagery import find_imagery
from roadfuse_core.inference import IncompleteError, MapReader, infer, load_predictor, maps_path, plan_refresh
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.inference import _predictor as predictors
from roadfuse_core.inference._coverage import cells_of, windows_meeting, windows_over
from roadfuse_core.metrics import Confusion, score_city, scores
from roadfuse_core.models import CheckpointInfo, build_network, preset, save_checkpoint
from roadfuse_core.mosaic import NODATA, write_cog, write_item
from roadfuse_core.settings import City, ClusterSpec, ModelSpec, load_city

LAYERS = [
    {"kind": "log_count", "cap": 20, "gain": 5},
    {"kind": "log_count", "cap": 9, "sigma_px": 3, "radius_px": 5, "gain": 9},
]


@pytest.fixture(scope="session")
def gated(tmp_path_factory) -> Path:
    """Fresh weights of a network with gates, on windows of 64: its map is nonsense, and depends on every input."""
    torch.manual_seed(1)
    config = preset("roadfuse").model_copy(update={"width": 0.125, "modalities": {"image": 3, "gps": 2}})
    network = build_network(config).eval()
    path = tmp_path_factory.mktemp("weights") / "gated.safetensors"
    save_checkpoint(path, network, CheckpointInfo(network=config, layers=LAYERS, resolution_m=1, window_px=64, recipe={}))
    return path


@pytest.fixture
def city(small_city: City, gated: Path) -> City:
    """The small city under that network, in files of its own."""
    for name in ("dumps", "imagery"):
        (small_city.root / name).unlink()
    shutil.copytree(small_city_source(small_city) / "dumps", small_city.root / "dumps")
    shutil.copytree(small_city_source(small_city) / "imagery", small_city.root / "imagery")
    text = (
        (small_city.root / "city.yaml")
        .read_text()
        .replace("weights: default", f"weights: {gated}\n  batch: 4\n  precision: '32'")
    )
    (small_city.root / "city.yaml").write_text(text)
    return load_city(small_city.root / "city.yaml")


def small_city_source(city: City) -> Path:
    return (city.root / "truth").resolve().parent


def layers(city, group="map"):
    reader = MapReader(city, group)
    return {name: reader.window(name, 0, 0, *city.make_grid().shape) for name in reader.arrays}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def assert_equal_to_a_full_one(city):
    record = infer(city, group="full", full=True)
    assert record["full"]
    assert same(layers(city), layers(city, "full"))
    mine = MapReader(city).record
    assert (mine["nodata_px"], mine["road_px"]) == (record["nodata_px"], record["road_px"])
    road = layers(city)["road"]
    assert mine["nodata_px"] == (road == NODATA).sum()
    assert mine["road_px"] == (road == 1).sum()


def write_dump(city: City, name: str, box: Block, n: int = 400, seed: int = 0) -> str:
    """A dump with points in a rectangle of pixels alone."""
    grid, rng = city.make_grid(), np.random.default_rng(seed)
    table = pq.read_table(city.root / "dumps/2026-03-29.parquet").slice(0, n)
    east = grid.bounds.left + rng.uniform(box.col0, box.col1, n) * grid.resolution_m
    north = grid.bounds.top - rng.uniform(box.row0, box.row1, n) * grid.resolution_m
    lon, lat = Transformer.from_crs(grid.crs, 4326, always_xy=True).transform(east, north)
    for column, values in (("lon", lon), ("lat", lat)):
        table = table.set_column(table.schema.get_field_index(column), column, [values])
    path = city.root / f"{name}.parquet"
    pq.write_table(table, path)
    return path.name


# --- which windows -----------------------------------------------------------------------------------------------------

TINY = Grid("EPSG:32633", 1.0, 64, 0, 2, 2, 3)


@given(
    st.integers(-20, 140),
    st.integers(-20, 200),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([(32, 16), (32, 8), (48, 16)]),
)
def test_windows_and_cells_against_plain_geometry(row, col, height, width, sizes):
    lattice = Lattice(*sizes)
    box = Block(row, col, row + height, col + width)
    got = windows_meeting(TINY, lattice, [box])
    size, stride, over = lattice.window_px, lattice.stride_px, lattice.overhang_px
    expected = np.zeros_like(got)
    covered = np.zeros(TINY.shape, bool)
    for i, r in enumerate(lattice.starts(0, TINY.shape[0])):
        for j, c in enumerate(lattice.starts(0, TINY.shape[1])):
            expected[i, j] = r < box.row1 and r + size > box.row0 and c < box.col1 and c + size > box.col0
            assert (r, c) == (i * stride - over, j * stride - over)
            if expected[i, j]:
                covered[max(r, 0) : r + size, max(c, 0) : c + size] = True
    assert np.array_equal(got, expected)
    cells = cells_of(got, lattice)
    spread = cells.repeat(stride, 0).repeat(stride, 1)[: TINY.shape[0], : TINY.shape[1]]
    assert np.array_equal(spread, covered), "cells are just the pixels under the windows"
    over_cells = windows_over(cells, lattice)
    for i, r in enumerate(lattice.starts(0, TINY.shape[0])):
        for j, c in enumerate(lattice.starts(0, TINY.shape[1])):
            assert over_cells[i, j] == covered[max(r, 0) : max(r + size, 0), max(c, 0) : max(c + size, 0)].any()


def test_a_change_of_one_percent_of_the_tiles_costs_at_most_three_percent_of_the_windows():
    grid, lattice = Grid("EPSG:32633", 1.0, 512, 0, 40, 40, 40), Lattice(256, 128)
    every = windows_meeting(grid, lattice, [Block(0, 0, *grid.shape)])
    assert every.all()
    for row, col in ((0, 0), (18, 18), (36, 5)):
        tile = Block(row * 512 - 12, col * 512 - 12, (row + 4) * 512 + 12, (col + 4) * 512 + 12)
        touched = windows_over(cells_of(windows_meeting(grid, lattice, [tile]), lattice), lattice)
        assert touched.sum() / every.sum() <= 0.03


# --- incremental equals full -------------------------------------------------------------------------------------------


def test_after_any_change_an_incremental_refresh_equals_a_full_one(city):
    """New dumps here and there, a replaced one, images that come, change and go."""
    ingest(city, ["dumps/2026-03-29.parquet"])
    first = infer(city)
    assert first["full"]
    assert first["windows"] == 17 * 17
    small = ingest(city, [write_dump(city, "corner", Block(0, 0, 60, 60))])
    record = infer(city)
    assert not record["full"]
    assert 0 < record["windows"] < 0.35 * first["windows"]
    assert_equal_to_a_full_one(city)
    ingest(city, [write_dump(city, "middle", Block(200, 300, 230, 330), seed=1)], replace=small["dump"])
    record = infer(city)
    assert not record["full"]
    assert record["windows"] < first["windows"]
    assert_equal_to_a_full_one(city)
    grid = city.make_grid()
    with rasterio.open(city.root / "imagery/0-first.tif", "w", driver="GTiff", height=70, width=90, count=3, dtype="uint8",
                       crs=grid.crs, transform=grid.affine @ rasterio.Affine.translation(400, 30)) as dst:  # fmt: skip
        dst.write(np.random.default_rng(0).integers(0, 255, (3, 70, 90), dtype=np.uint8))
    record = infer(city)
    assert not record["full"]
    assert record["windows"] < 0.4 * first["windows"]
    assert_equal_to_a_full_one(city)
    (city.root / "imagery/0-first.tif").unlink()
    assert not infer(city)["full"]
    assert_equal_to_a_full_one(city)
    assert infer(city)["made"] == MapReader(city).record["made"], "nothing changed, nothing done"


def test_points_alone_that_leave_make_no_data_again(city):
    blind = city.model_copy(update={"imagery": None})
    kept = ingest(blind, [write_dump(city, "a", Block(300, 300, 320, 320))])
    assert kept
    infer(blind)
    there = layers(blind)
    entry = ingest(blind, [write_dump(city, "b", Block(40, 40, 60, 60), seed=2)])
    infer(blind)
    both = layers(blind)
    assert (both["road"][:100, :100] != NODATA).any()
    ingest(blind, [write_dump(city, "c", Block(300, 300, 320, 320), seed=3)], replace=entry["dump"])
    infer(blind)
    again = layers(blind)
    assert (again["road"][:150, :150] == NODATA).all()
    assert again["road"][310, 310] != NODATA
    assert there["road"][310, 310] != NODATA
    assert_equal_to_a_full_one(blind)


def test_what_cannot_be_told_is_predicted_anew(city):
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    other = city.model_copy(update={"model": city.model.model_copy(update={"threshold": 0.4})})
    assert plan_refresh(other).why == "changed: threshold"
    ingest(city, ["dumps/2026-03-30.parquet"])
    assert plan_refresh(city).why == ""
    from datetime import UTC, datetime, timedelta

    expire(city, datetime.now(UTC) + timedelta(days=1), False, None)
    assert "expired" in plan_refresh(city).why
    assert plan_refresh(city, full=True).why == "asked for"
    infer(city)
    assert_equal_to_a_full_one(city)


# --- faults ------------------------------------------------------------------------------------------------------------


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


def test_a_lost_scheduler_is_told_and_the_work_is_kept(city, monkeypatch):
    from roadfuse_core.cluster import ClusterLostError

    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    ingest(city)
    port = 18786
    scheduler = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
                                  "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    worker = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1",
                               "--no-dashboard", "--death-timeout", "20"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        time.sleep(6)

        def kill_it(what, done, total):
            if what == "predicting" and done == 4:
                scheduler.kill()

        with pytest.raises((ClusterLostError, OSError)), open_cluster(ClusterSpec(kind=f"tcp://127.0.0.1:{port}")) as client:
            infer(city, client=client, tell=kill_it)
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    kept = list((city.workspace_path / "scratch").glob("map-*/*.npz"))
    assert len(kept) >= 4
    infer(city)
    assert_equal_to_a_full_one(city)


def test_a_full_disk_leaves_the_map_as_it_was(city, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        full = city.model_copy(update={"workspace": str(place / "work")})
        ingest(full, ["dumps/2026-03-29.parquet"])
        infer(full)
        before = layers(full)
        ingest(full, ["dumps/2026-03-30.parquet"])
        filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(filler, b"x" * 4096)
        except OSError:
            pass
        for free in (0, 200_000, 1_500_000):
            os.truncate(place / "filler", max(0, (place / "filler").stat().st_size - free))
            with pytest.raises(StoreError, match=r"o space.*run again"):
                infer(full)
            assert same(layers(full), before)
        (place / "filler").unlink()
        os.close(filler)
        infer(full)
        assert_equal_to_a_full_one(full)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# --- what comes out ----------------------------------------------------------------------------------------------------


def test_gates_are_mapped_and_sum_to_one(city):
    ingest(city)
    infer(city)
    found = layers(city)
    assert set(found) == {"probability", "road", "gate_image", "gate_gps"}
    assert np.abs(found["gate_image"].astype(int) + found["gate_gps"] - 254).max() <= 1


def test_turns_are_the_mean_of_eight(city):
    ingest(city)
    plan = plan_refresh(city)
    predictor = load_predictor(plan.model, 1.0)
    many = load_predictor(plan.model.model_copy(update={"turns": True}), 1.0)
    rng = np.random.default_rng(0)
    one = {"image": torch.from_numpy(rng.integers(0, 255, (2, 64, 64, 4), dtype=np.uint8)),
           "gps": torch.from_numpy(rng.random((2, 64, 64, 2), dtype=np.float32))}  # fmt: skip
    total = 0
    for k in range(8):
        flipped = {n: torch.from_numpy(np.ascontiguousarray(_turned(x.numpy(), k))) for n, x in one.items()}
        p = predictor.predict(predictor.prepare({k: v.numpy() for k, v in flipped.items()})).transpose(0, 2, 3, 1)
        back = p[:, :, ::-1] if k >= 4 else p
        total = total + np.rot90(back, -(k % 4), (1, 2))
    assert np.allclose(
        many.predict(many.prepare({k: v.numpy() for k, v in one.items()})).transpose(0, 2, 3, 1), total / 8, atol=1e-5
    )


def _turned(x, k):
    x = np.rot90(x, k % 4, (1, 2))
    return x[:, :, ::-1] if k >= 4 else x


def test_cog_zarr_and_stac_agree_with_proj(city, tmp_path):
    from rio_cogeo.cogeo import cog_validate

    blind = city.model_copy(update={"imagery": None})
    ingest(blind, [write_dump(city, "a", Block(100, 200, 140, 260))])
    infer(blind)
    grid, reader = city.make_grid(), MapReader(blind)
    path = write_cog(tmp_path / "p.tif", grid, lambda *w: reader.window("probability", *w), "uint8", NODATA)
    assert cog_validate(path)[0]
    data = reader.dataset()
    assert data.rio.crs == rasterio.CRS.from_string(grid.crs)
    assert data.probability.chunks is not None, "lazy"
    lon, lat = 13.2, 47.4
    east, north = Transformer.from_crs(4326, grid.crs, always_xy=True).transform(lon, lat)
    with rasterio.open(path) as source:
        row, col = source.index(east, north)
        assert all(rasterio.enums.MaskFlags.per_dataset in flags for flags in source.mask_flag_enums), "a mask inside the file"
        values = source.read(1)
        assert np.array_equal(source.dataset_mask() > 0, layers(blind)["probability"] != NODATA)
    near = data.probability.sel(x=east, y=north, method="nearest")
    assert abs(float(near.x) - east) <= 0.5
    assert abs(float(near.y) - north) <= 0.5
    assert int(near) == values[row, col]
    from datetime import UTC, datetime

    item = pystac.Item.from_file(str(write_item(tmp_path / "i.json", "x", grid, {"probability": path}, datetime.now(UTC), {})))
    west, south, easter, norther = item.bbox
    assert west < lon < easter
    assert south < lat < norther
    assert item.properties["proj:code"] == grid.crs
    assert (tmp_path / item.assets["probability"].href).exists()


def test_scores_on_dask_are_those_of_numpy_over_the_whole_mosaic(city):
    ingest(city)
    infer(city)
    with open_cluster(ClusterSpec(workers=2)) as client:
        found = score_city(city, client=client)
    assert found == score_city(city)
    with rasterio.open(city.root / "truth/roads.tif") as source:
        truth = source.read(1) > 0
    road = layers(city)["road"] == 1
    tp, fp, fn = int((road & truth).sum()), int((road & ~truth).sum()), int((~road & truth).sum())
    assert found["all"]["g_iou"] == tp / (tp + fp + fn)
    tiles = [Confusion(*(int(m[r : r + 128, c : c + 128].sum()) for m in (road & truth, road & ~truth, ~road & truth, ~road & ~truth)))
             for r in range(0, 512, 128) for c in range(0, 512, 128)]  # fmt: skip
    plain = scores(tiles)
    assert (found["all"]["a_iou"], found["all"]["a_iou_batch8"]) == (plain.a_iou, plain.a_iou_batch8)


def test_bf16_is_taken_only_where_it_changes_next_to_nothing(city, monkeypatch):
    from roadfuse_core.inference import _calibrate as calibrating

    ingest(city)
    auto = city.model_copy(update={"model": ModelSpec(weights=city.model.weights)})
    monkeypatch.setattr(calibrating, "_has_bf16", lambda: True)
    monkeypatch.setattr(calibrating, "CHANGED", -1.0)
    plan = plan_refresh(auto)
    assert plan.calibration.precision == "32"
    assert plan.calibration.batch in calibrating.CPU_BATCHES
    assert plan_refresh(auto).calibration == plan.calibration, "measured once"
