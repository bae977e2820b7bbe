"""The shipped files: small, whole, with their recipe, and from the recipe in the repository."""

import json
from pathlib import Path

import roadfuse_core.weights
from flows.demo import DEMO_SEED
from roadfuse_core.inference import load_predictor, resolve_weights
from roadfuse_core.models import read_checkpoint_info
from roadfuse_core.training import CompactRecipe

FOLDER = Path(roadfuse_core.weights.__file__).parent


def test_shipped_weights_are_at_most_five_megabytes():
    for path in FOLDER.glob("*.safetensors"):
        assert path.stat().st_size <= 5e6


def test_the_recipe_inside_is_the_one_in_the_repository():
    info = read_checkpoint_info(FOLDER / "fused.safetensors")
    assert info.recipe == CompactRecipe().model_dump(mode="json")
    assert json.loads((FOLDER / "fused.json").read_text()) == info.model_dump(mode="json")


def test_the_demo_city_was_never_trained_on():
    recipe = CompactRecipe()
    assert DEMO_SEED not in range(recipe.first_city, recipe.first_city + recipe.cities)


def test_shipped_names_load():
    for name in ("default", "kde"):
        assert load_predictor(resolve_weights(name, Path()), 1.0).layers
