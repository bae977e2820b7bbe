"""Lidar beside images: read, taught, mapped, and told when it changes."""

import os
import re

import numpy as np
import pytest
import rasterio
import torch
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.check import check_city
from roadfuse_core.inference import MapReader, infer, load_predictor, plan_refresh, resolve_weights
from roadfuse_core.labels import open_map
from roadfuse_core.models import load_checkpoint
from roadfuse_core.report._pictures import overview_pictures
from roadfuse_core.settings import InvalidCityError, load_city
from roadfuse_core.training import SUITE, lay_ground, load_recipe, score_network, train
from roadfuse_core.training._augment import prepare
from roadfuse_core.training._windows import StillWindows, TrainingWindows, collate
from tests.unit.test_training import TINY, city  # noqa: F401

LOW, HIGH = 200.0, 240.0  # metres above the sea, of roads and of all else


@pytest.fixture
def flown(city, tmp_path):
    """The small city with heights: two files of float32 in metres, roads low; the rest of the city was not flown."""
    grid = city.make_grid()
    road, _ = open_map(city, *city.truth, grid).window(0, 0, *grid.shape)
    noise = np.random.default_rng(0).normal(0, 4, grid.shape)
    heights = (np.where(road, LOW, HIGH) + noise).astype(np.float32)
    write(city, tmp_path / "a.tif", heights[:, :300], 0)
    write(city, tmp_path / "b.tif", heights[:, 300:420], 300)
    raw = yaml.safe_load((city.root / "city.yaml").read_text())
    raw |= {"lidar": {"sources": [str(tmp_path / "?.tif")], "value_range": [190, 250]}, "workspace": str(city.workspace_path)}
    path = city.root / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path, heights


def write(city, path, values, col):
    grid = city.make_grid()
    with rasterio.open(path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1, dtype="float32",
                       nodata=-9999, crs=grid.crs, transform=grid.affine @ rasterio.Affine.translation(col, 0)) as dst:  # fmt: skip
        dst.write(values, 1)


def taught(path, tmp_path, **fields):
    network = {"preset": "preconv-lidar", "width": 0.125}
    recipe = tmp_path / "lidar.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"cities": [str(path)], "network": network, "window_px": 128} | fields))
    return load_recipe(recipe)


def expected(heights, grid_shape):
    """About -2 … 2 where there is lidar, else 0."""
    out = np.zeros(grid_shape, np.float32)
    bytes_ = np.rint(np.clip((heights[:, :420] - 190) * 255 / 60, 0, 255))
    out[:, :420] = bytes_ * 4 / 255 - 2
    return out


def test_training_and_inference_see_the_same_lidar(flown, tmp_path):
    path, heights = flown
    there = load_city(path)
    recipe, grid = taught(path, tmp_path), there.make_grid()
    ground = lay_ground(there, grid.tiles(), "roads", recipe.view(), tmp_path)
    seen = prepare(collate([StillWindows(recipe.view(), [ground])[k] for k in range(3)]), recipe.view()).inputs["lidar"]
    right = expected(heights, grid.shape)
    for k, t in enumerate(grid.tiles()[:3]):
        tile = right[t.row * 128 : t.row * 128 + 128, t.col * 128 : t.col * 128 + 128]
        assert np.abs(seen[k, 0].numpy() - tile).max() < 1e-3, "a level is 0.016"
    assert 0 < (right == 0).mean() < 1
    done = train(taught(path, tmp_path), tmp_path / "run", threads=1)
    predictor = load_predictor(resolve_weights(str(done.checkpoint), tmp_path), grid.resolution_m)
    held = predictor.prepare({"lidar": np.stack([np.array([[0, 128, 255]], np.uint8), np.array([[255, 255, 0]], np.uint8)], 2)})
    assert held["lidar"][0, :, 0].tolist() == pytest.approx([-2, 128 * 4 / 255 - 2, 0], abs=1e-6)
    assert predictor.rasters == ("image", "lidar")


def test_turns_move_lidar_with_the_image(flown, tmp_path):
    path, _ = flown
    recipe = taught(path, tmp_path, augmentation={"camera": 0, "fog": 0, "blank": 0, "drop_image": 0, "drop_gps": 0})
    there = load_city(path)
    ground = lay_ground(there, there.make_grid().tiles(), "roads", recipe.view(), tmp_path)
    windows = TrainingWindows(recipe, [ground], 0)
    batch = [windows[k] for k in range(8)]
    for window in batch:
        window.image[4], window.image[5] = window.image[0], window.image[3]
    made = prepare(collate(batch), recipe.view())
    assert made.inputs["lidar"].std() > 0.1
    assert torch.allclose(made.inputs["lidar"][:, 0], made.inputs["image"][:, 0], atol=1e-4)


def test_a_network_learns_from_lidar_and_maps_with_it(flown, tmp_path):
    """Heights say all, and the image is shut out: what is learnt comes from them, and what is not flown stays unknown to it."""
    path, _ = flown
    change = {"modalities": {"image": 3, "lidar": 1}, "head": "fine"}
    shut = {"drop_image": 1.0, "drop_gps": 0.0, "turns": True, "scale": [1, 1]}
    recipe = taught(path, tmp_path, stages=[{"epochs": 3}], epoch_windows=80, augmentation=shut, optimiser={"lr": 0.01},
                    window_px=64, network={"preset": "d-linknet34", "width": 0.125, "change": change})  # fmt: skip
    done = train(recipe, tmp_path / "run", threads=1)
    network = load_checkpoint(done.checkpoint)[0].eval()
    there = load_city(path)
    tiles = [t for t in there.make_grid().tiles() if t.col < 3]
    ground = lay_ground(there, tiles, "roads", recipe.view(), tmp_path / "ground")
    without = next(d for d in SUITE if d.family == "no image")
    assert score_network(network, recipe.view(), [ground], without).scores.g_iou > 0.5


def test_a_change_of_lidar_is_mapped_anew_and_equals_a_full_refresh(flown, tmp_path):
    path, heights = flown
    done = train(taught(path, tmp_path), tmp_path / "run", threads=1)
    there = load_city(path)
    there = there.model_copy(update={"model": there.model.model_copy(update={"weights": str(done.checkpoint), "threshold": 0.3}),
                                     "workspace": str(tmp_path / "work"), "points": None})  # fmt: skip
    first = infer(there)
    before = MapReader(there).window("probability", 0, 0, *there.make_grid().shape)
    assert infer(there).get("unchanged")
    write(there, tmp_path / "b.tif", heights[:, 300:420] - 30, 300)
    os.utime(tmp_path / "b.tif", ns=(1, 1))
    second = infer(there)
    assert not second["full"]
    assert 0 < second["windows"] < first["windows"]
    after = MapReader(there).window("probability", 0, 0, *there.make_grid().shape)
    assert not np.array_equal(before, after)
    infer(there, group="full", full=True)
    assert np.array_equal(after, MapReader(there, "full").window("probability", 0, 0, *there.make_grid().shape))
    assert plan_refresh(there.model_copy(update={"lidar": None})).why == "changed: lidar"
    assert "Lidar" in [p.title for p in overview_pictures(there)]


def test_forests_are_fitted_before_the_network_learns(flown, tmp_path):
    path, _ = flown
    recipe = taught(path, tmp_path, network={"preset": "rfnorm-lidar", "width": 0.125})
    held = [load_checkpoint(train(recipe, tmp_path / n, threads=1).checkpoint)[0].forests["lidar"] for n in ("run", "again")]
    assert torch.equal(held[0].value, held[1].value)
    levels = torch.linspace(-2, 2, 33).reshape(1, 1, 1, -1)
    score = held[0](levels).flatten()
    assert score[levels.flatten() < -1].min() > score[levels.flatten() > 0.8].max(), "roads are low here"


def test_what_is_wrong_with_lidar_is_told_by_its_key(flown, tmp_path):
    path, _ = flown
    raw = yaml.safe_load(path.read_text())
    found = check_city(load_city(path))
    assert {"lidar: 2 files", "lidar: fused.safetensors does not take it"} <= set(found)

    def refused(message, **lidar):
        path.write_text(yaml.safe_dump(raw | {"lidar": raw["lidar"] | lidar}))
        with pytest.raises(InvalidCityError, match=message):
            check_city(load_city(path))

    refused(r"^lidar.value_range: None is needed for float32 values", value_range=None)
    refused(r"^lidar.sources: 'nowhere/\*.tif' matches no file", sources=["nowhere/*.tif"])
    far = tmp_path / "far.tif"
    with rasterio.open(far, "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", crs="EPSG:32633",
                       transform=rasterio.Affine(1, 0, 200_000, 0, -1, 5_000_000)) as dst:  # fmt: skip
        dst.write(np.ones((1, 8, 8), np.uint8))
    refused("^lidar.sources: .* lies outside grid.bounds", sources=[str(far)])
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if k != "lidar"}))
    made = CliRunner().invoke(app, ["train", str(taught(path, tmp_path).root / "lidar.yaml"), "--dry-run"])
    assert re.search("has no lidar, and the network needs it", str(made.exception))
