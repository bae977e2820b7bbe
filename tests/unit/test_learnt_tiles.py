"""No network is scored where it learnt: which tiles a checkpoint implies, and what of the product asks it."""

import json

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import ingest
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Grid, SplitRule, TaughtCity, TileIndex, imply_split, make_grid, split_by, split_tiles
from roadfuse_core.models import read_checkpoint_info
from roadfuse_core.settings import load_city
from roadfuse_core.training import _suite, check_recipe, load_recipe, split_recipe, train
from tests.unit.test_training import TINY, city  # noqa: F401

RULES = st.builds(SplitRule, seed=st.integers(0, 9)) | st.builds(
    SplitRule, seed=st.integers(0, 9), folds=st.integers(3, 6), fold=st.integers(0, 2)
)
OTHER = 3  # a seed whose test tiles on the small city are partly those of seed 7
# Names and purposes: tiles by the rule, a city that teaches in full, and one that is kept in full.
PURPOSES = st.sampled_from([("train", "validation", "test"), ("train", "train", "train"), ("test", "test", "test")])


def grids(crs="EPSG:32633"):
    return st.builds(
        Grid, crs=st.just(crs), resolution_m=st.sampled_from([0.3, 0.5, 1.0]), tile_px=st.sampled_from([64, 96, 160]),
        left_tile=st.integers(3000, 3004), top_tile=st.integers(9000, 9004), tiles_y=st.integers(1, 7), tiles_x=st.integers(1, 7),
    )  # fmt: skip


def share_ground(grid: Grid, tile: TileIndex, other: Grid, other_tile: TileIndex) -> bool:
    a, b = grid.tile_bounds(tile), other.tile_bounds(other_tile)
    wide, high = min(a.right, b.right) - max(a.left, b.left), min(a.top, b.top) - max(a.bottom, b.bottom)
    return wide > 1e-3 and high > 1e-3


@given(grids(), grids(), RULES, PURPOSES)
def test_a_test_tile_shares_no_ground_with_a_training_tile(grid, trained, rule, purposes):
    taught = TaughtCity("a", trained, rule, purposes)
    implied = imply_split("a", grid, [taught], SplitRule())
    assert set(implied.tiles) == set(grid.tiles())
    learnt = [t for t, purpose in taught.tiles().items() if purpose != "test"]
    for tile in implied.named("test"):
        assert not any(share_ground(grid, tile, trained, t) for t in learnt)
    apart = not any(share_ground(grid, a, trained, b) for a in grid.tiles() for b in trained.tiles())
    assert implied.free == apart
    if apart:
        assert implied.tiles == split_tiles(grid)


@given(grids(), RULES)
def test_the_same_city_has_the_tiles_of_its_training(grid, rule):
    assert imply_split("a", grid, [TaughtCity("a", grid, rule)], SplitRule(99)).tiles == split_by(grid, rule)


def test_a_city_in_another_crs_is_recognised():
    """The same ground in another zone's metres: of its tiles, those that touch a training tile are none of the test."""
    box = (17.6, 47.40, 17.7, 47.46)
    trained, grid = make_grid(box, 1.0, 512, "EPSG:32633"), make_grid(box, 1.0, 256, "EPSG:32634")
    implied = imply_split("a", grid, [TaughtCity("a", trained, SplitRule(), ("train", "train", "test"))], SplitRule())
    share = len(implied.named("test")) / grid.n_tiles
    assert 0.03 < share < 0.17, "about a fifth, without those that lie across an edge of a test tile"
    away = make_grid((-60, -10, -59.95, -9.95), 1.0, 256)
    assert imply_split("a", away, [TaughtCity("a", trained)], SplitRule(3)).free


def test_another_name_in_the_same_place_is_told():
    grid = Grid("EPSG:32633", 1.0, 64, 10, 50, 5, 6)
    part = imply_split("b", grid, [TaughtCity("a", grid, SplitRule(4))], SplitRule())
    assert part.tiles == split_by(grid, SplitRule(4))
    assert part.source == "split seed 4 of the training, which learnt in the same place from a"
    every = imply_split("b", grid, [TaughtCity("a", grid, SplitRule(4), ("train",) * 3)], SplitRule())
    assert (every.overlap, len(every.named("test"))) == (6, 6)
    assert imply_split("a", grid, [TaughtCity("a", grid, SplitRule(4), ("train",) * 3)], SplitRule()).named("test") == []


# --- the product -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(city, tmp_path_factory):
    """A network that learnt by split seed 7, its run's folder beside the city."""
    folder = tmp_path_factory.mktemp("seven")
    path = folder / "recipe.yaml"
    recipe = TINY | {"cities": [str(city.root / "city.yaml")], "stages": [{"epochs": 1}], "split": {"seed": 7}}
    path.write_text(yaml.safe_dump(recipe))
    train(load_recipe(path), folder / "run", threads=1)
    return folder


@pytest.fixture
def scored_tiles(monkeypatch):
    """The tiles that a suite read, by city."""
    read, real = {}, _suite.lay_ground

    def watched(city, tiles, *others):
        read.setdefault(city.name, []).append(list(tiles))
        return real(city, tiles, *others)

    monkeypatch.setattr(_suite, "lay_ground", watched)
    return read


def tiles_of(run, name):
    (tiles,) = json.loads((run / "splits.json").read_text())[name].values()
    return [TileIndex(*t) for t in tiles]


def suite(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_suite_scores_the_tiles_that_the_recipe_kept(city, seven, tmp_path, scored_tiles):
    kept = tiles_of(seven / "run", "test")
    default = sorted(t for t, name in split_tiles(city.make_grid()).items() if name == "test")
    assert set(default) & set(tiles_of(seven / "run", "train")), "or the test could not fail"
    weights = seven / "run/checkpoint.safetensors"
    made = suite(city.root / "city.yaml", "--suite", "--weights", weights, "--out", tmp_path)
    assert made.exit_code == 0, made.output
    assert scored_tiles == {city.name: [kept]}
    told = f"{len(kept)} tiles, split seed 7 of the training"
    assert f"{city.name}, run: {told}" in made.output
    table = pd.read_csv(tmp_path / "suite.csv")
    assert set(table.tiles_from) == {"split seed 7 of the training"}
    assert told in (tmp_path / "suite.html").read_text()


def test_the_suite_knows_a_city_whose_file_and_tiles_have_changed(city, seven, tmp_path, scored_tiles):
    raw = yaml.safe_load((city.root / "city.yaml").read_text())
    raw["grid"]["tile_px"] = 64
    raw["workspace"] = str(tmp_path / "work")
    for name in ("dumps", "imagery", "truth", "old_map.gpkg"):
        (tmp_path / name).symlink_to(city.root / name)
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(raw))
    moved = load_city(tmp_path / "moved.yaml")
    ingest(moved)
    made = suite(tmp_path / "moved.yaml", "--suite", "--weights", seven / "run/checkpoint.safetensors", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    learnt = [t for name in ("train", "validation") for t in tiles_of(seven / "run", name)]
    ((tiles,),) = scored_tiles.values()
    assert len(tiles) > len(tiles_of(seven / "run", "test"))
    assert not any(share_ground(moved.make_grid(), a, city.make_grid(), b) for a in tiles for b in learnt)


def with_info(source, target, **changes):
    """A checkpoint with other facts in it."""
    with safe_open(source, "pt") as file:
        facts = json.loads(file.metadata()["roadfuse"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in changes.items():
        facts.pop(key) if value is None else facts.update({key: value})
    save_file(state, target, metadata={"roadfuse": json.dumps(facts)})
    return target


def test_a_checkpoint_of_before_is_scored_by_its_recipe_and_the_table_says_so(city, seven, tmp_path, scored_tiles):
    old = with_info(seven / "run/checkpoint.safetensors", tmp_path / "old.safetensors", taught=None)
    assert read_checkpoint_info(old).taught is None
    made = suite(city.root / "city.yaml", "--suite", "--weights", old, "--out", tmp_path)
    assert scored_tiles == {city.name: [tiles_of(seven / "run", "test")]}
    assert "split seed 7; the checkpoint does not say which tiles the network learnt from" in made.output


def test_networks_of_a_suite_are_scored_on_tiles_of_which_none_learnt(city, seven, tmp_path, scored_tiles):
    first = seven / "run/checkpoint.safetensors"
    fact = facts_of(first)
    elsewhere = fact | {"name": "far", "grid": fact["grid"] | {"left_tile": 0}}
    other = with_info(first, tmp_path / "other.safetensors", taught=[fact | {"rule": {"seed": OTHER}}])
    far = with_info(first, tmp_path / "far.safetensors", taught=[elsewhere])
    kept = [{t for t, name in split_by(city.make_grid(), SplitRule(seed)).items() if name == "test"} for seed in (7, OTHER)]
    shared = sorted(kept[0] & kept[1])
    assert 0 < len(shared) < len(kept[0]), "or the test could not fail"
    weights = [text for path in (first, other, far) for text in ("--weights", path)]
    made = suite(city.root / "city.yaml", "--suite", *weights, "--out", tmp_path)
    assert made.exit_code == 0, made.output
    assert scored_tiles == {city.name: [shared] * 3}


def facts_of(checkpoint):
    (taught,) = json.loads(read_checkpoint_info(checkpoint).model_dump_json())["taught"]
    return taught


def re_line(made, words):
    assert isinstance(made.exception, ConfigError), made.output
    assert "\n" not in str(made.exception)
    return words in str(made.exception)


def test_a_city_that_taught_in_full_is_refused(city, seven, tmp_path, scored_tiles):
    first = seven / "run/checkpoint.safetensors"
    taught = with_info(first, tmp_path / "all.safetensors", taught=[facts_of(first) | {"purposes": ["train"] * 3}])
    made = suite(city.root / "city.yaml", "--suite", "--weights", taught, "--out", tmp_path / "out")
    assert re_line(made, f"--suite: '{city.name}' has no tile that is a test tile of all")
    assert not scored_tiles
    assert not (tmp_path / "out").exists()


def test_a_network_may_not_begin_with_one_that_learnt_from_its_test_tiles(city, seven, tmp_path):
    recipe = TINY | {"cities": [str(city.root / "city.yaml")]}
    recipe["network"] = TINY["network"] | {"start": str(seven / "run/checkpoint.safetensors")}
    path = tmp_path / "r.yaml"
    for seed, refused in ((0, True), (7, False)):
        path.write_text(yaml.safe_dump(recipe | {"split": {"seed": seed}}))
        made = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
        assert bool(made.exception) == refused, made.output
        if refused:
            assert re_line(made, "network.start")
            assert "validation or test tiles of" in str(made.exception)
    path.write_text(yaml.safe_dump(recipe | {"split": {"seed": 7}, "stages": [{"epochs": 1}]}))
    done = train(load_recipe(path), tmp_path / "run", threads=1)
    assert len(read_checkpoint_info(done.checkpoint).taught) == 2, "what its start learnt from, too"


def test_a_city_that_is_named_twice_may_not_teach_its_own_test_tiles(city, tmp_path):
    (tmp_path / "city.yaml").write_text((city.root / "city.yaml").read_text())
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(TINY | {"cities": [str(city.root / "city.yaml")], "test_cities": [str(tmp_path / "city.yaml")]})
    )
    with pytest.raises(ConfigError, match=r"^cities: 'simulated-3' learns from \d+ tiles that another file keeps"):
        split_recipe(load_recipe(path))


def test_the_checkpoint_says_what_the_splits_say(city, seven):
    info = read_checkpoint_info(seven / "run/checkpoint.safetensors")
    implied = info.split_of(city.name, city.make_grid())
    for name in ("train", "validation", "test"):
        assert implied.named(name) == tiles_of(seven / "run", name)
    assert check_recipe(load_recipe(seven / "recipe.yaml")).test == {
        str(city.root / "city.yaml"): tiles_of(seven / "run", "test")
    }
