"""Which tiles of which city are for what."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import TileIndex, split_tiles
from roadfuse_core.settings import City, load_city
from roadfuse_core.training._ground import Ground, lay_ground
from roadfuse_core.training._recipe import Recipe

__all__ = ["Splits", "city_files", "fraction_of", "lay_split", "split_recipe"]


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
        found = sorted(glob.glob(str(recipe.root / Path(text).expanduser()), recursive=True))
        if not found:
            raise ConfigError(key, text, "matches no city file", "correct the path, or simulate and ingest cities first")
        out += [Path(f).resolve() for f in found]
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
    out: dict[str, dict[str, list[TileIndex]]] = {"train": {}, "validation": {}, "test": {}}
    for path in cities:
        for tile, name in _split_city(load_city(path), recipe).items():
            # Where whole cities are kept for a purpose, the tiles of the others need not serve it.
            name = "train" if (name == "test" and test) or (name == "validation" and validation) else name
            out[name].setdefault(str(path), []).append(tile)
    for name, paths in (("validation", validation), ("test", test)):
        out[name] |= {str(p): load_city(p).make_grid().tiles() for p in paths}
    for name, tiles in out.items():
        if not tiles:
            raise ConfigError("split", name, "holds no tile", "give more cities, smaller tiles, or another split")
    return Splits(**{name: {c: sorted(t) for c, t in by.items()} for name, by in out.items()})


def _split_city(city: City, recipe: Recipe) -> dict[TileIndex, str]:
    grid, s = city.make_grid(), recipe.split
    if s.folds is None:
        return split_tiles(grid, s.seed)
    part = {t: k % s.folds for k, t in enumerate(split_tiles(grid, s.seed))}  # in the order of their ranks
    names = {s.fold: "test", (s.fold + 1) % s.folds: "validation"}
    return {t: names.get(k, "train") for t, k in part.items()}


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
