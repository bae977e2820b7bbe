"""The mosaic does not know how it was made."""

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from pyproj import Transformer

from roadfuse_core import inference
from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import CubeReader, cubes_path, halo_px, ingest, render
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Lattice, blocks_of
from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.inference import (
    MapReader,
    infer,
    load_predictor,
    normalise_image,
    plan_refresh,
    resolve_weights,
)
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.models import CheckpointInfo, build_network, preset, save_checkpoint
from roadfuse_core.mosaic import NODATA, PROBABILITY_SCALE, write_cog
from roadfuse_core.settings import ClusterSpec


def mosaic(city, group="map"):
    return MapReader(city, group).window("probability", 0, 0, *city.make_grid().shape)


def plain_reference(city):
    """The whole city by one loop over windows in floating point."""
    grid = city.make_grid()
    kept = plan_refresh(city).model
    predictor = load_predictor(kept, grid.resolution_m)
    lattice = Lattice(predictor.window_px, predictor.window_px // 2)
    cube = CubeReader(cubes_path(city))
    images = ImageryReader(city.imagery, find_imagery(city), grid)
    size, halo, (height, width) = lattice.window_px, halo_px(predictor.layers), grid.shape
    pad = size
    value, total = np.zeros((height + 2 * pad, width + 2 * pad)), np.zeros((height + 2 * pad, width + 2 * pad))
    for r in range(-lattice.overhang_px, height, lattice.stride_px):
        for c in range(-lattice.overhang_px, width, lattice.stride_px):
            sums = cube.sums(predictor.layers, r - halo, c - halo, size + 2 * halo, size + 2 * halo)
            rgb, valid = images.window(r, c, size, size)
            if not valid.any() and not sums["count"][halo:-halo, halo:-halo].any():
                continue
            rgba = np.concatenate([rgb, np.where(valid, 255, 0).astype(np.uint8)[None]])
            gps = render(sums, predictor.layers, halo)
            one = {
                k: torch.from_numpy(np.ascontiguousarray(x.transpose(1, 2, 0)))[None]
                for k, x in (("image", rgba), ("gps", gps))
            }
            where = (slice(r + pad, r + pad + size), slice(c + pad, c + pad + size))
            value[where] += predictor.predict(one)[0, 0].astype(float) * lattice.weight()
            total[where] += lattice.weight()
    inner = (slice(pad, pad + height), slice(pad, pad + width))
    return value[inner] / np.maximum(total[inner], 1), total[inner] > 0


@pytest.fixture
def ingested(small_city):
    ingest(small_city)
    return small_city


def test_equal_to_the_plain_reference(ingested):
    infer(ingested)
    expected, seen = plain_reference(ingested)
    got = mosaic(ingested)
    assert np.array_equal(got != NODATA, seen)
    # Batches of other sizes may move a logit by an ulp: one step of 1/254 at most.
    assert np.abs(got[seen] - expected[seen] * PROBABILITY_SCALE).max() <= 1.01
    assert np.abs(got[seen] - expected[seen] * PROBABILITY_SCALE).mean() < 0.3


def test_identical_for_any_block_size_and_number_of_workers(ingested, monkeypatch):
    infer(ingested)
    here = mosaic(ingested)
    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    infer(ingested.model_copy(update={"workspace": ingested.workspace}), group="small")
    assert np.array_equal(mosaic(ingested, "small"), here)
    for workers in (1, 2):
        with open_cluster(ClusterSpec(workers=workers)) as client:
            infer(ingested, group=f"by-{workers}", client=client)
        assert np.array_equal(mosaic(ingested, f"by-{workers}"), here)


def test_progress_is_told_every_few_seconds_whatever_the_network_takes(ingested, monkeypatch):
    monkeypatch.setattr(planning, "BLOCK_PX", 256)
    measured = planning.calibrate

    def as_slow(*asked):
        return replace(measured(*asked), window_s=window_s)

    monkeypatch.setattr(planning, "calibrate", as_slow)
    steps = []
    for window_s in (9.0, 1e-4):  # noqa: B007
        told = []
        infer(ingested, "kde", f"every-{len(steps)}", tell=lambda *t, told=told: told.append(t), full=True)
        steps.append(len({done for what, done, _ in told if what == "predicting windows"}))
    blocks = len(plan_refresh(ingested, "kde", full=True).blocks())
    assert blocks > 2
    assert steps[0] >= blocks  # one each
    assert steps[1] == 2  # the beginning, and the end


def test_a_second_run_finds_nothing_to_do(ingested):
    first = infer(ingested)
    assert infer(ingested) == first | {"unchanged": True}
    assert infer(ingested, "kde") != first


def test_a_killed_run_takes_the_blocks_that_are_whole(ingested, monkeypatch):
    monkeypatch.setattr(planning, "BLOCK_PX", 256)
    computed, again = [], []
    real = blocks_module._predict

    def dies_at_third(job, *a):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(job.block)
        return real(job, *a)

    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "_predict", dies_at_third)
        with pytest.raises(KeyboardInterrupt):
            infer(ingested)
    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "_predict", lambda job, *a: (again.append(job.block), real(job, *a))[1])
        infer(ingested)
    assert len(again) == len(blocks_of(ingested.make_grid(), 2)) - 2
    assert not set(again) & set(computed)


class Constant:
    """Says one number everywhere."""

    name, layers, rasters, window_px, planes, target = "constant", (), ("image",), 64, ("probability",), None

    def __init__(self, value):
        self.value = value

    def prepare(self, inputs):
        return {k: torch.from_numpy(x) for k, x in inputs.items()}

    def predict(self, inputs):
        n, h, w, _ = inputs["image"].shape
        return np.full((n, 1, h, w), self.value, np.float32)


class Brightness(Constant):
    """Shift-equivariant: each pixel from itself alone."""

    def predict(self, inputs):
        rgba = inputs["image"].numpy().transpose(0, 3, 1, 2)
        return 1 / (1 + np.exp(-normalise_image(rgba[:, :3], rgba[:, 3:] > 0).mean(1, keepdims=True)))


@pytest.fixture
def with_predictor(monkeypatch):
    def install(predictor):
        blocks_module.predictor_of.cache_clear()
        monkeypatch.setattr(blocks_module, "predictor_of", lambda ref, resolution_m: predictor)
        monkeypatch.setattr(planning, "read_facts", lambda ref, resolution_m: predictor)

    return install


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_predictor_gives_a_constant_mosaic(ingested, with_predictor, value):
    with_predictor(Constant(value))
    infer(ingested)
    assert set(np.unique(mosaic(ingested))) == {round(value * PROBABILITY_SCALE)}


def test_a_pointwise_predictor_shows_no_seam(ingested, with_predictor):
    with_predictor(Brightness(0))
    infer(ingested)
    grid = ingested.make_grid()
    rgb, valid = ImageryReader(ingested.imagery, find_imagery(ingested), grid).window(0, 0, *grid.shape)
    expected = 254 / (1 + np.exp(-normalise_image(rgb, valid).mean(0)))
    assert np.abs(mosaic(ingested) - expected).max() <= 0.51


def test_windows_without_evidence_are_no_data(ingested):
    blind = ingested.model_copy(update={"imagery": None})
    record = infer(blind, "kde")
    assert record["windows"] <= 25
    bare = ingested.model_copy(update={"points": None})
    with pytest.raises(ConfigError, match="needs trajectories"):
        infer(bare, "kde")


def test_image_alone_and_points_alone_make_maps(ingested):
    infer(ingested.model_copy(update={"points": None}), group="image")
    infer(ingested.model_copy(update={"imagery": None}), group="points")
    assert not np.array_equal(mosaic(ingested, "image"), mosaic(ingested, "points"))


@pytest.mark.parametrize("name", ["d-linknet34-gps", "d-linknet34-image", "roadfuse", "deepdualmapper", "e-road-18"])
def test_any_preset_runs_a_city_with_what_it_has(ingested, tmp_path, name):
    """Fresh weights: the map is nonsense, but it is made from the modalities that city and network share."""
    torch.manual_seed(0)
    network = build_network(preset(name).model_copy(update={"width": 0.125})).eval()
    layers = [{"kind": "log_count", "cap": 20}] if "gps" in network.config.modalities else []
    info = CheckpointInfo(network=network.config, layers=layers, resolution_m=1, window_px=64, recipe={})
    save_checkpoint(tmp_path / "w.safetensors", network, info)
    for gone, modality in (("points", "gps"), ("imagery", "image")):
        city = ingested.model_copy(update={gone: None})
        if set(network.config.modalities) == {modality}:
            with pytest.raises(ConfigError, match=r"needs (trajectories|imagery)"):
                infer(city, str(tmp_path / "w.safetensors"), group=f"no-{gone}")
        else:
            assert infer(city, str(tmp_path / "w.safetensors"), group=f"no-{gone}")["windows"] > 0


def test_kernel_density_is_a_threshold_on_smoothed_counts(ingested):
    from scipy import ndimage

    infer(ingested, "kde")
    model = load_predictor(resolve_weights("kde", ingested.root), 1.0).model
    count = CubeReader(cubes_path(ingested)).window("count", 0, 0, 512, 512).astype(np.float32)
    radius = int(np.ceil(3 * model.sigma_m))
    density = ndimage.gaussian_filter(count, model.sigma_m, mode="constant", radius=radius)
    road = MapReader(ingested).window("road", 0, 0, 512, 512)
    assert np.array_equal(road == 1, (mosaic(ingested) >= 127) & (mosaic(ingested) != NODATA))
    clear = np.abs(density / model.threshold_per_m2 - 1) > 0.02
    assert np.array_equal((road == 1)[clear], (density > model.threshold_per_m2)[clear] & (road != NODATA)[clear])


def test_the_cog_is_valid_and_in_its_place(ingested, tmp_path):
    from rio_cogeo.cogeo import cog_validate

    infer(ingested)
    grid, reader = ingested.make_grid(), MapReader(ingested)
    path = write_cog(tmp_path / "p.tif", grid, lambda *w: reader.window("probability", *w), "uint8", NODATA)
    valid, errors, warnings = cog_validate(path)
    assert valid, (errors, warnings)
    with rasterio.open(path) as source:
        assert np.array_equal(source.read(1), mosaic(ingested))
        lon, lat = Transformer.from_crs(grid.crs, 4326, always_xy=True).transform(*source.xy(100, 200))
        east, north = Transformer.from_crs(4326, source.crs, always_xy=True).transform(lon, lat)
        assert np.allclose([(east - grid.bounds.left), (grid.bounds.top - north)], [200.5, 100.5], atol=1e-3)


def test_names_are_exported():
    for name in inference.__all__:
        assert hasattr(inference, name)
