"""Which tiles of which city are for what."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import SPLITS, SplitRule, TaughtCity, TileIndex, tiles_learnt
from roadfuse_core.models import read_checkpoint_info
from roadfuse_core.settings import City, load_city
from roadfuse_core.training._ground import Ground, lay_ground
from roadfuse_core.training._recipe import Recipe
from roadfuse_core.wildcards import find_paths

__all__ = ["Splits", "city_files", "fraction_of", "lay_split", "split_recipe", "taught_cities"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Which tiles of which city are for what; disjoint in space.

    Attributes:
        train: Tiles by city file.
        validation: The same.
        test: The same.
    """

    train: dict[str, list[TileIndex]]
    validation: dict[str, list[TileIndex]]
    test: dict[str, list[TileIndex]]


def city_files(recipe: Recipe, texts: Sequence[str], key: str) -> list[Path]:
    """City files behind paths and globs of a recipe, sorted.

    Raises:
        ConfigError: One matches nothing.
    """
    out: list[Path] = []
    for text in texts:
        found = find_paths(recipe.root, text)
        if not found:
            raise ConfigError(key, text, "matches no city file", "correct the path, or simulate and ingest cities first")
        out += [path.resolve() for path in found]
    return sorted(set(out))


def split_recipe(recipe: Recipe) -> Splits:
    """The tiles of every split.

    Raises:
        ConfigError: A city is in two splits, a split is empty, or a fraction of the labels is no tile.
    """
    cities = city_files(recipe, recipe.cities, "cities")
    validation = city_files(recipe, recipe.validation_cities, "validation_cities")
    test = city_files(recipe, recipe.test_cities, "test_cities")
    for one, other in ((cities, validation), (cities, test), (validation, test)):
        if both := set(one) & set(other):
            raise ConfigError("cities", str(min(both)), "is in two splits", "name it in one of them")
    by_file = _taught_by_file(recipe, cities, validation, test)
    _require_apart(recipe, by_file)
    out: dict[str, dict[str, list[TileIndex]]] = {name: {} for name in SPLITS}
    for path, city in by_file.items():
        for tile, name in city.tiles().items():
            out[name].setdefault(str(path), []).append(tile)
    for name, tiles in out.items():
        if not tiles:
            raise ConfigError("split", name, "holds no tile", "give more cities, smaller tiles, or another split")
    return Splits(**{name: {c: sorted(t) for c, t in by.items()} for name, by in out.items()})


def taught_cities(recipe: Recipe) -> tuple[TaughtCity, ...]:
    """The cities that decide a recipe's weights, with the purposes of their tiles; those of its start included."""
    files = (city_files(recipe, getattr(recipe, key), key) for key in ("cities", "validation_cities", "test_cities"))
    return (*_taught_by_file(recipe, *files).values(), *_taught_at_start(recipe))


def _taught_at_start(recipe: Recipe) -> tuple[TaughtCity, ...]:
    """Cities of the checkpoint that the recipe begins with."""
    if recipe.network.start is None:
        return ()
    taught = read_checkpoint_info(recipe.root / recipe.network.start).taught
    if taught is None:
        log.warning(
            "network.start: %s does not say which tiles it learnt from; test tiles may be among them", recipe.network.start
        )
    return taught or ()


def _require_apart(recipe: Recipe, by_file: dict[Path, TaughtCity]) -> None:
    """Refuse a recipe that would validate or test on ground from which its network learns, or has learnt before."""
    before = _taught_at_start(recipe)
    for path, city in by_file.items():
        twins = [other for other_path, other in by_file.items() if other_path != path]
        if tiles := _kept_and_taught(city, twins):
            raise ConfigError(
                "cities", city.name, f"learns from {tiles} tiles that another file keeps for validation or test",
                "name each city once",
            )  # fmt: skip
        if tiles := _kept_and_taught(city, before):
            raise ConfigError(
                "network.start", recipe.network.start, f"learnt from {tiles} validation or test tiles of {city.name}",
                "use the split of its recipe, or begin with another checkpoint",
            )  # fmt: skip


def _kept_and_taught(city: TaughtCity, others: Iterable[TaughtCity]) -> int:
    """How many tiles that a city keeps for validation or test are training tiles of cities of the same name."""
    learnt = tiles_learnt(city.grid, [other for other in others if other.name == city.name])
    return sum(purpose != "train" and tile in learnt for tile, purpose in city.tiles().items())


def _taught_by_file(
    recipe: Recipe, cities: Sequence[Path], validation: Sequence[Path], test: Sequence[Path]
) -> dict[Path, TaughtCity]:
    rule = SplitRule(recipe.split.seed, recipe.split.folds, recipe.split.fold)
    # Where whole cities are kept for a purpose, the tiles of the others need not serve it.
    shared = ("train", "train" if validation else "validation", "train" if test else "test")
    purposes: dict[Path, tuple[str, str, str]] = dict.fromkeys(cities, shared)
    purposes |= dict.fromkeys(validation, ("validation",) * 3) | dict.fromkeys(test, ("test",) * 3)
    return {path: _taught(load_city(path), rule, used_as) for path, used_as in purposes.items()}


def _taught(city: City, rule: SplitRule, purposes: tuple[str, str, str]) -> TaughtCity:
    return TaughtCity(city.name, city.make_grid(), rule, purposes)


def lay_split(
    recipe: Recipe, tiles: dict[str, list[TileIndex]], labels: str, out: Path, tell: Progress = quiet
) -> list[Ground]:
    """The grounds of some tiles of some cities, in the order of their files."""
    view = recipe.view()
    return [lay_ground(load_city(Path(c)), t, labels, view, out, tell) for c, t in sorted(tiles.items())]


def fraction_of(tiles: dict[str, list[TileIndex]], share: float, seed: int) -> dict[str, list[TileIndex]]:
    """A share of the tiles, at least one, the smaller share always inside the larger."""
    every = [(c, t) for c, of in sorted(tiles.items()) for t in of]
    order = np.random.default_rng([seed, 81]).permutation(len(every))
    chosen = sorted(every[k] for k in order[: max(1, round(share * len(every)))])
    out: dict[str, list[TileIndex]] = {}
    for c, t in chosen:
        out.setdefault(c, []).append(t)
    return out
