"""Training: what is read, what is drawn, what is rendered, and that a run is the same however it is cut."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from roadfuse_core import training
from roadfuse_core.cubes import CubeReader, Layer, cubes_path, halo_px, ingest, render
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import TileIndex
from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.settings import City, load_city
from roadfuse_core.training import (
    InvalidRecipeError,
    StillWindows,
    TrainingWindows,
    View,
    collate,
    lay_ground,
    lay_split,
    load_recipe,
    points_of,
    prepare,
    split_recipe,
    train,
)
from roadfuse_core.training import _augment as augment
from roadfuse_core.training._recipe import Augmentation
from roadfuse_core.training._splits import fraction_of
from roadfuse_core.training._windows import Draws, draw, stillness

QUANTITIES = (
    Layer(kind="binary"), Layer(kind="count", cap=3), Layer(kind="log_count", cap=20, gain=2), Layer(kind="speed", cap=20),
    Layer(kind="sin"), Layer(kind="cos"), Layer(kind="interval", cap=60),
    Layer(kind="log_count", cap=64, sigma_px=1, radius_px=1, gain=6), Layer(kind="count", sigma_px=2.5, radius_px=7),
)  # fmt: skip
BEARINGS = QUANTITIES[4:6]
TINY = {
    "name": "tiny", "cities": ["city/city.yaml"], "network": {"preset": "d-linknet34", "width": 0.0625},
    "window_px": 64, "batch": 4, "epoch_windows": 8, "stages": [{"epochs": 2}], "precision": "32",
}  # fmt: skip


@pytest.fixture(scope="module")
def city(simulated, tmp_path_factory):
    """The small city, ingested once for this module."""
    folder = tmp_path_factory.mktemp("training") / "city"
    folder.mkdir()
    for name in ("dumps", "imagery", "truth", "old_map.gpkg"):
        (folder / name).symlink_to(simulated / name)
    (folder / "city.yaml").write_text((simulated / "city.yaml").read_text())
    city = load_city(folder / "city.yaml")
    ingest(city)
    return city


@pytest.fixture
def recipe(city):
    """Makes recipes beside the city."""

    def make(**changes):
        path = city.root.parent / f"{abs(hash(str(changes)))}.yaml"
        path.write_text(yaml.safe_dump(TINY))
        return load_recipe(path, changes)

    return make


def test_names_are_exported():
    for name in training.__all__:
        assert hasattr(training, name)


# --- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"netwrk": 1}, "did you mean network"),
        ({"network": {"preset": "resnet"}}, "^network.preset: 'resnet' is wrong; `roadfuse models` lists"),
        ({"network.change": {"decoder": "segnet"}}, "^network.change: decoder 'segnet' does not fit encoder"),
        ({"network.change": {"heads": "fine"}}, "^network.change.heads: 'fine' is an unknown key; did you mean head"),
        ({"network.change": {"pyramid_levels": 9}}, "^network.change.pyramid_levels: 9 is wrong"),
        ({"network.change": {"modalities": {"image": 3, "lidar": 2}}}, "modalities: {'lidar': 2} is not what windows hold"),
        ({"network.change": {"modalities": {"image": 4, "gps": 2}}}, "modalities: {'image': 4} is not what windows hold"),
        ({"loss": "mse"}, "^loss: 'mse' is wrong; use one of bce, "),
        ({"batch": 2, "ranks": 3}, "ranks 3 are more than the windows of a batch, 2"),
        ({"epoch_windows": 2}, "less than one batch"),
        ({"augmentation.drop_image": 0.6, "augmentation.drop_gps": 0.6}, "exceed 1"),
        ({"augmentation.scale": [2, 1]}, "low ≤ high"),
        ({"split.fold": 3, "split.folds": 3}, "fold 3 does not exist"),
        ({"stages": []}, "at least 1"),
        ({"window_px": 65}, "multiple of 2"),
    ],
)
def test_wrong_recipes_are_refused_with_a_line(recipe, changes, message):
    with pytest.raises(InvalidRecipeError, match=message) as error:
        recipe(**changes)
    assert "\n" not in str(error.value)


def test_recipes_that_do_not_fit_the_data_are_refused_before_the_first_step(recipe, city, tmp_path, monkeypatch):
    def refused(match, city_changes=None, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in ("dumps", "imagery", "truth", "old_map.gpkg"):
            (folder / name).symlink_to(city.root / name)
        raw = yaml.safe_load((city.root / "city.yaml").read_text())
        raw["workspace"] = str(city.workspace_path)
        for key, value in (city_changes or {}).items():
            raw.pop(key) if value is None else raw.update({key: value})
        (folder / "city.yaml").write_text(yaml.safe_dump(raw))
        monkeypatch.setattr(training._fit, "run_stages", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(ConfigError, match=match):
            train(recipe(cities=[str(folder / "city.yaml")], **changes), folder / "run")

    refused("has no labels.roads", {"labels": None})
    refused("has no labels.buildings", stages=[{"labels": "buildings"}])
    refused("has no existing_map", {"existing_map": None}, stages=[{"labels": "existing_map"}])
    refused("has no points", {"points": None})
    refused("has no imagery", {"imagery": None})
    refused("holds no tile", {"grid": {**yaml.safe_load((city.root / "city.yaml").read_text())["grid"], "tile_px": 512}})
    refused("matches no city file", test_cities=["nowhere/*.yaml"])
    refused("is in two splits", test_cities=[str(city.root / "city.yaml")], validation_cities=[str(city.root / "city.yaml")])
    far = {"sources": ["far.tif"]}
    import rasterio

    with rasterio.open(tmp_path / "far.tif", "w", driver="GTiff", height=8, width=8, count=3, dtype="uint8", crs="EPSG:4326",
                       transform=rasterio.Affine(1e-5, 0, 100, 0, -1e-5, 10)) as dst:  # fmt: skip
        dst.write(np.ones((3, 8, 8), np.uint8))
    refused("lies outside", {"imagery": far | {"sources": [str(tmp_path / "far.tif")]}})
    with rasterio.open(tmp_path / "bare.tif", "w", driver="GTiff", height=1024, width=1024, count=1, dtype="uint8",
                       crs=city.make_grid().crs, transform=city.make_grid().affine) as dst:  # fmt: skip
        dst.write(np.zeros((1, 1024, 1024), np.uint8))
    points = yaml.safe_load((city.root / "city.yaml").read_text())["points"]
    points["columns"].pop("bearing")
    without = {"points": points, "workspace": str(tmp_path / "without-bearings")}
    ingest(City.model_validate(city.model_dump(mode="json", exclude={"root"}) | without | {"root": city.root}))
    refused("^layers: .sin. needs sin_sum, which this cube lacks", without, layers=[{"kind": "sin"}, {"kind": "cos"}])
    refused("shows nothing", {"labels": {"roads": {"path": str(tmp_path / "bare.tif")}}})
    (tmp_path / "no.safetensors").write_bytes(b"not weights")
    refused("^network.start: .* is not a RoadFuse checkpoint", **{"network.start": str(tmp_path / "no.safetensors")})
    assert not list(tmp_path.glob("*/run/recipe.json")), "a folder is not taken by what was refused"


def test_the_command_says_it_in_one_line(city, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | {"los": "bce"}))
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "train", str(tmp_path / "r.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: los: 'bce' is an unknown key; did you mean loss?\n"


@pytest.mark.parametrize("base", ["sun2019", "cmmpnet", "deepdualmapper", "pp-linknet", "e-road"])
def test_the_papers_recipes_load_and_can_be_changed(tmp_path, base):
    (tmp_path / "r.yaml").write_text(f"base: {base}\nname: x\ncities: [a]\noptimiser: {{lr: 0.5}}\n")
    made = load_recipe(tmp_path / "r.yaml")
    assert made.optimiser.kind == "adam"
    assert made.optimiser.lr == 0.5
    assert made.augmentation.drop_image == 0


def test_an_unknown_base_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("base: sun\nname: x\ncities: [a]\n")
    with pytest.raises(ConfigError, match="sun2019"):
        load_recipe(tmp_path / "r.yaml")


# --- splits and windows ------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_whole(recipe, city):
    every = set(city.make_grid().tiles())
    for changes in ({}, {"split": {"seed": 3}}, *({"split": {"folds": 4, "fold": k}} for k in range(4))):
        splits = split_recipe(recipe(**changes))
        parts = [set(next(iter(getattr(splits, k).values()))) for k in ("train", "validation", "test")]
        assert set.union(*parts) == every
        assert sum(map(len, parts)) == len(every)
    tests = [set(next(iter(split_recipe(recipe(split={"folds": 4, "fold": k})).test.values()))) for k in range(4)]
    assert set.union(*tests) == every, "every tile is a test tile once"


def test_no_test_tile_is_ever_read_in_training(recipe, city, tmp_path, monkeypatch):
    """Every rectangle that any reader returns is checked against the test tiles."""
    made = recipe()
    test = next(iter(split_recipe(made).test.values()))
    px, read = city.make_grid().tile_px, []

    def spy(owner, name, skip):
        real = getattr(owner, name)

        def watched(self, *a):
            read.append(a[skip : skip + 4])
            return real(self, *a)

        monkeypatch.setattr(owner, name, watched)

    spy(CubeReader, "window", 1)
    spy(ImageryReader, "window", 0)
    from roadfuse_core.labels._read import RasterMap

    spy(RasterMap, "window", 0)
    train(made, tmp_path / "run")
    assert len(read) > 20
    for row, col, height, width in read:
        for t in test:
            apart = (
                row >= (t.row + 1) * px or row + height <= t.row * px or col >= (t.col + 1) * px or col + width <= t.col * px
            )
            assert apart, f"tile {t} was read"
    written = json.loads((tmp_path / "run/splits.json").read_text())["test"]
    assert [tuple(t) for t in next(iter(written.values()))] == test


def test_a_window_is_the_same_whatever_came_before(recipe, tmp_path):
    made = recipe()
    grounds = lay_split(made, split_recipe(made).train, "roads", tmp_path)
    one, other = TrainingWindows(made, grounds, 0), TrainingWindows(made, grounds, 0)
    _ = [one[k] for k in (5, 1, 3)]
    for n in (0, 7, 15):
        a, b = one[n], other[n]
        assert np.array_equal(a.image, b.image)
        assert a.key == b.key
        assert all(np.array_equal(a.change[k], b.change[k]) for k in a.change)
    assert one[0].key != TrainingWindows(made, grounds, 1)[0].key, "another stage, other draws"


@given(st.integers(0, 50), st.floats(0.01, 1))
def test_a_smaller_fraction_of_the_labels_lies_inside_a_larger(seed, share):
    tiles = {"a": [TileIndex(0, k) for k in range(20)], "b": [TileIndex(1, k) for k in range(11)]}
    small, large = fraction_of(tiles, share / 2, seed), fraction_of(tiles, share, seed)
    assert sum(map(len, large.values())) == max(1, round(31 * share))
    for name, of in small.items():
        assert set(of) <= set(large[name])


# --- the renderer on the device ----------------------------------------------------------------------------------------


def test_a_still_window_is_what_the_cube_renders(city, tmp_path):
    """Ground, points and device renderer against `cubes.render`, for every kind of layer, pixel by pixel."""
    grid, cube, view = city.make_grid(), CubeReader(cubes_path(city)), View(QUANTITIES, True, 256, 2, False)
    tiles = grid.tiles()
    ground = lay_ground(city, tiles, "roads", view, tmp_path)
    still = StillWindows(view, [ground])
    images, halo = ImageryReader(city.imagery, find_imagery(city), grid), halo_px(QUANTITIES)
    chosen = [still[k] for k in (5, 6, 9)]
    made = prepare(collate(chosen), view)
    for k, n in enumerate((5, 6, 9)):
        t = tiles[n]
        row, col = t.row * 128 - 64, t.col * 128 - 64
        sums = cube.sums(QUANTITIES, row - halo, col - halo, 256 + 2 * halo, 256 + 2 * halo)
        expected = render(sums, QUANTITIES, halo)
        got = made.inputs["gps"][k].numpy()
        assert got.any()
        for layer, a, b in zip(QUANTITIES, got, expected):
            if layer.sigma_px:
                assert np.abs(a - b).max() <= 1e-6 * layer.gain * max(1, np.abs(b).max() / layer.gain)
            else:
                assert np.array_equal(a, b), layer
        rgb, _ = images.window(row, col, 256, 256)
        inside = made.inputs["image"][k].numpy()
        assert np.abs(inside - (np.rint(rgb) / 255 - 0.5) / 0.25)[:, 64:192, 64:192].max() < 1e-3, "a grey level is 0.016"
        assert made.known[k].sum() == 128 * 128, "only the tile itself is scored"


def plain_tones(x, seen, d):
    """One window (3, H, W), one step after the other."""
    x = x * d["gain"][:, None, None] + d["lift"]
    grey = x.mean(0)
    x = grey + (x - grey) * d["saturation"]
    mean = x[:, seen].mean() if seen.any() else 0
    x = mean + (x - mean) * d["contrast"]
    return x * (1 - d["fog"]) + augment.FOG * d["fog"]


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_tones_at_once_are_those_of_one_after_the_other(seed, seen_share):
    rng = np.random.default_rng(seed)
    changes = [draw(rng, Augmentation(fog=0.5), 16) for _ in range(3)]
    draws = Draws(**{k: torch.from_numpy(np.stack([c[k] for c in changes])) for k in changes[0]})
    x, seen = rng.random((3, 3, 16, 16), np.float32), rng.random((3, 1, 16, 16)) < seen_share
    made = augment._toned(torch.from_numpy(x), torch.from_numpy(seen).float(), draws).numpy()
    for got, image, known, change in zip(made, x, seen, changes):
        assert np.allclose(got * known, plain_tones(image.astype(float), known[0], change) * known, atol=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 3))
def test_points_add_up_to_their_cells(seed, count, cells):
    rng = np.random.default_rng(seed)
    sums = np.concatenate([rng.integers(1, count + 1, (cells, 1)), rng.integers(-(10**9), 10**9, (cells, 2))], 1)
    place = rng.permutation(36)[:cells]
    batch = collate([_window_of(sums, np.stack([place // 6, place % 6], 1), 6)])
    window, at, shared, number = points_of(batch)
    assert len(torch.unique(number)) == len(number)
    assert len(window) == np.minimum(sums[:, 0], augment.MOST).sum()
    flat = (at[:, 1].floor() * 6 + at[:, 0].floor()).long()
    total = torch.zeros(36, 3, dtype=torch.int64).index_add_(0, flat, shared)
    assert np.array_equal(total[place].numpy(), sums)


def _window_of(sums, place, side, change=None, key=9):
    cells = training.Cells(place[:, 0].astype(np.int32), place[:, 1].astype(np.int32), sums)
    empty = np.zeros((4, side, side), np.uint8)
    return training.Window(empty, np.ones((side, side), np.uint8), cells, stillness() | (change or {}), key)


@pytest.mark.parametrize("turn", range(8))
def test_a_turn_moves_image_label_and_points_together(city, tmp_path, turn):
    view = View(QUANTITIES[:2] + BEARINGS, True, 128, 1, False)
    ground = lay_ground(city, city.make_grid().tiles(), "roads", view, tmp_path)
    window = StillWindows(view, [ground])[6]
    still = prepare(collate([window]), view)
    matrix = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turn % 4) @ np.diag([1 - 2 * (turn // 4), 1])
    window.change["matrix"] = matrix.astype(np.float32)
    moved = prepare(collate([window]), view)

    def expected(x):
        x = torch.rot90(x, turn % 4, (2, 3)) if turn < 4 else torch.rot90(x, turn % 4, (2, 3)).flip(3)
        return x

    for a, b in ((still.labels, moved.labels), (still.inputs["gps"][:, :2], moved.inputs["gps"][:, :2])):
        assert a.any()
        assert torch.equal(expected(a), b), "one geometric draw for all"
    sin, cos = expected(still.inputs["gps"])[0, 2:]
    bearing = torch.atan2(sin, cos) - turn % 4 * np.pi / 2
    length, bearing = torch.hypot(sin, cos), -bearing if turn >= 4 else bearing
    assert length.max() > 0.9
    assert torch.allclose(moved.inputs["gps"][0, 2], length * bearing.sin(), atol=1e-5)
    assert torch.allclose(moved.inputs["gps"][0, 3], length * bearing.cos(), atol=1e-5)
    assert torch.allclose(expected(still.inputs["image"]), moved.inputs["image"], atol=1e-4)


def test_random_numbers_are_uniform_and_their_own():
    number = torch.arange(200_000)
    key = torch.tensor(12345)
    a, b = augment.uniform(key, number, 0).double(), augment.uniform(key, number, 1).double()
    assert stats.kstest(a.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a, augment.uniform(key + 1, number, 0))[0, 1]) < 0.01
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.01
    assert stats.kstest(augment.normal(key, number, 4).double().numpy(), "norm").pvalue > 1e-3


def _counts(change, n=40_000, side=256, key=9):
    """A layer of raw counts after a change, of n points spread over a window."""
    rng = np.random.default_rng(0)
    place = np.unravel_index(rng.permutation(side * side)[:n], (side, side))
    window = _window_of(np.ones((n, 1), np.int64), np.stack(place, 1), side, change, key)
    made = prepare(collate([window]), View((Layer(kind="count"),), False, side, 1, False))
    return made.inputs["gps"][0, 0]


def test_each_gps_augmentation_does_what_it_says():
    whole = _counts({})
    assert whole.sum() == 40_000
    kept = _counts({"keep": np.float32(0.3)})
    assert abs(kept.sum() / 40_000 - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
    assert bool((kept <= whole).all())
    gone = _counts({"omit": np.array([10, 200], np.float32)})
    assert not gone[200:256, 10:138].any(), "half a window, cut by the rim"
    outside = torch.ones_like(gone, dtype=torch.bool)
    outside[200:256, 10:138] = False
    assert torch.equal(gone[outside], whole[outside])
    coarse = _counts({"coarse": np.float32(0.25)})
    assert coarse.sum() == 40_000
    lattice = torch.zeros_like(coarse, dtype=torch.bool)
    lattice[::4, ::4] = True
    assert not coarse[~lattice].any()
    one = _window_of(np.full((1, 1), 64), np.array([[128, 128]]), 256, {"sigma_px": np.float32(6)})
    spread = torch.nonzero(prepare(collate([one]), View((Layer(kind="count"),), False, 256, 1, False)).inputs["gps"][0, 0])
    assert 3 < spread.float().std(0).mean() < 9
    assert _counts({"has_gps": np.float32(0)}).sum() == 0


def test_a_window_is_augmented_the_same_in_any_batch(recipe, tmp_path):
    made = recipe()
    grounds = lay_split(made, split_recipe(made).train, "roads", tmp_path)
    windows = [TrainingWindows(made, grounds, 0)[k] for k in range(4)]
    together = prepare(collate(windows), made.view())
    for k, window in enumerate(windows):
        alone = prepare(collate([window]), made.view())
        assert torch.equal(alone.labels[0], together.labels[k])
        assert torch.equal(alone.inputs["gps"][0], together.inputs["gps"][k])
        assert torch.allclose(alone.inputs["image"][0], together.inputs["image"][k], atol=1e-5)
