"""Only what changed, and what happens when something fails: a map is whole, equal to a full one, or as before."""

import shutil
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

from roadfuse_core.check import check_city
from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import Layer, expire, ingest
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Block, Grid, Lattice
from roadfuse_core.inference import MapReader, _calibrate, infer, load_predictor, plan_refresh
from roadfuse_core.inference._coverage import cells_of, windows_meeting, windows_over
from roadfuse_core.inference._predictor import turn_bearings
from roadfuse_core.metrics import Confusion, score_city, scores
from roadfuse_core.models import CheckpointInfo, build_network, preset, save_checkpoint
from roadfuse_core.mosaic import NODATA, write_cog, write_item
from roadfuse_core.settings import City, ClusterSpec, InvalidCityError, ModelSpec, load_city

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


def test_a_block_may_hold_no_evidence_although_its_windows_reach_a_tile_that_has_some(city, monkeypatch):
    monkeypatch.setattr("roadfuse_core.inference._plan.BLOCK_PX", 128)
    blind = city.model_copy(update={"imagery": None})
    ingest(blind, [write_dump(blind, "corner", Block(245, 245, 250, 250))])
    plan = plan_refresh(blind)
    record = infer(blind)
    assert 0 < record["windows"] < plan.windows
    assert not record["failed"]
    assert set(np.unique(layers(blind)["road"][:128, :128])) == {NODATA}


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


def test_what_cannot_be_told_is_predicted_anew(city, monkeypatch):
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    other = city.model_copy(update={"model": city.model.model_copy(update={"threshold": 0.4})})
    assert plan_refresh(other).why == "changed: threshold"
    ingest(city, ["dumps/2026-03-30.parquet"])
    assert plan_refresh(city).why == ""
    from datetime import UTC, datetime, timedelta

    expire(city, datetime.now(UTC) + timedelta(days=1), False, None)
    assert "expired" in plan_refresh(city).why
    # Software that may round otherwise: a map of both would not equal a full one.
    monkeypatch.setattr(_calibrate, "version", lambda name: "9.9")
    assert "software" in plan_refresh(city).why
    assert plan_refresh(city, full=True).why == "asked for"
    infer(city)
    assert_equal_to_a_full_one(city)


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


@pytest.mark.parametrize("k", range(8))
def test_bearings_turn_with_their_window(k):
    """East, north and back, by angles."""
    layers = (Layer(kind="count"), Layer(kind="cos", gain=2), Layer(kind="sin"), Layer(kind="sin", gain=2), Layer(kind="cos"))
    angle, length = np.random.default_rng(1).uniform((0, 0), (2 * np.pi, 1), (30, 2)).T
    x = np.stack(
        [length, 2 * length * np.cos(angle), length * np.sin(angle), 2 * length * np.sin(angle), length * np.cos(angle)]
    )
    to = (angle - k % 4 * np.pi / 2) * (-1 if k >= 4 else 1)
    expected = np.stack([length, 2 * length * np.cos(to), length * np.sin(to), 2 * length * np.sin(to), length * np.cos(to)])
    got = turn_bearings(torch.from_numpy(x)[None, :, :, None], layers, k)
    assert np.allclose(got[0, :, :, 0], expected, atol=1e-12)


def test_a_lone_sine_cannot_be_turned(city, tmp_path):
    config = preset("d-linknet34-gps").model_copy(update={"width": 0.0625, "modalities": {"gps": 2}})
    path = tmp_path / "lone.safetensors"
    lone = [{"kind": "sin"}, {"kind": "cos", "gain": 2}]
    save_checkpoint(path, build_network(config).eval(), CheckpointInfo(network=config, layers=lone, resolution_m=1, window_px=64, recipe={}))  # fmt: skip
    ingest(city)
    turning = city.model_copy(update={"model": ModelSpec(weights=str(path), turns=True)})
    with pytest.raises(ConfigError, match=r"^model\.turns: True needs a layer cos beside sin; train with both"):
        plan_refresh(turning)
    with pytest.raises(InvalidCityError, match=r"model\.turns: True needs a layer cos beside sin"):
        check_city(turning)
    plan_refresh(turning.model_copy(update={"model": ModelSpec(weights=str(path))}))


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
    assert found.subsets["all"]["g_iou"] == tp / (tp + fp + fn)
    tiles = [Confusion(*(int(m[r : r + 128, c : c + 128].sum()) for m in (road & truth, road & ~truth, ~road & truth, ~road & ~truth)))
             for r in range(0, 512, 128) for c in range(0, 512, 128)]  # fmt: skip
    plain = scores(tiles)
    assert (found.subsets["all"]["a_iou"], found.subsets["all"]["a_iou_batch8"]) == (plain.a_iou, plain.a_iou_batch8)


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
