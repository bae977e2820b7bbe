"""The shipped files: small, whole, with their recipe, and from the recipe in the repository."""

import importlib
import json
from pathlib import Path

import pytest

import roadfuse_core.weights
from flows.demo import DEMO_SEED
from roadfuse_core.inference import choose_weights, load_predictor, resolve_weights
from roadfuse_core.models import read_checkpoint_info
from roadfuse_core.training import load_recipe

FOLDER = Path(roadfuse_core.weights.__file__).parent
NETWORKS = ("fused", "image", "gps")


def test_shipped_weights_are_at_most_five_megabytes():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(NETWORKS)
    for path in FOLDER.glob("*.safetensors"):
        assert path.stat().st_size <= 5e6


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recipe_inside_is_the_one_in_the_repository(name):
    info = read_checkpoint_info(FOLDER / f"{name}.safetensors")
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert info.recipe == recipe.model_dump(mode="json")
    assert json.loads((FOLDER / f"{name}.json").read_text()) == info.model_dump(mode="json")


def test_the_demo_city_and_the_test_cities_were_never_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    seeds = importlib.import_module("train_weights").CITIES
    assert not {*seeds["train"], *seeds["sparse"]} & {DEMO_SEED, *seeds["validation"], *seeds["test"]}


def test_shipped_names_load():
    for name in (*NETWORKS, "kde"):
        predictor = load_predictor(resolve_weights(name, Path()), 1.0)
        assert (bool(predictor.layers), "image" in predictor.rasters) == (name != "image", name in ("fused", "image"))


def test_the_default_follows_what_a_city_has(small_city):
    assert choose_weights(small_city) == "fused"
    assert choose_weights(small_city, "kde") == "kde"
    assert choose_weights(small_city.model_copy(update={"imagery": None})) == "gps"
    assert choose_weights(small_city.model_copy(update={"points": None})) == "image"
