"""Training, validation and test tiles: disjoint in space, the same for everyone who asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pyproj import Transformer

from roadfuse_core.grid._grid import Bounds, Grid, TileIndex

__all__ = ["SPLITS", "ImpliedSplit", "SplitRule", "TaughtCity", "imply_split", "split_by", "split_tiles",
           "taught_near", "tiles_learnt"]  # fmt: skip

SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.1, 0.2)
# Edges that lie this close, as a share of a tile, are one edge: corners are products of floating-point numbers.
SAME_EDGE = 1e-6
EDGE_POINTS = 9  # of a tile's edge, where it goes from one CRS to another


@dataclass(frozen=True)
class SplitRule:
    """How tiles are shared out.

    Attributes:
        seed: Another seed, another split.
        folds: Parts of a cross validation; None for 70 / 10 / 20.
        fold: The part that is the test; the next one is the validation.
    """

    seed: int = 0
    folds: int | None = None
    fold: int = 0

    def __str__(self) -> str:
        """In words, for tables."""
        parts = "" if self.folds is None else f", fold {self.fold} of {self.folds}"
        return f"split seed {self.seed}{parts}"


@dataclass(frozen=True)
class TaughtCity:
    """A city of a training, by its name and its place on the ground.

    Attributes:
        name: Of the city file.
        grid: Its tiles.
        rule: How its tiles were shared out.
        purposes: What the rule's training, validation and test tiles were used as, each one of `SPLITS`.
    """

    name: str
    grid: Grid
    rule: SplitRule = SplitRule()
    purposes: tuple[str, str, str] = SPLITS

    def tiles(self) -> dict[TileIndex, str]:
        """What each tile was used as."""
        used_as = dict(zip(SPLITS, self.purposes, strict=True))
        return {tile: used_as[name] for tile, name in split_by(self.grid, self.rule).items()}


@dataclass(frozen=True)
class ImpliedSplit:
    """Which tiles of a city may score a network.

    Attributes:
        tiles: Split of every tile; a tile that shares ground with a training tile of the network is "train".
        source: Where the split comes from, in words.
        overlap: Test tiles that lie where the network learnt, because it learnt there from a city of another name and no
            other tile is left; 0 otherwise.
        free: The network learnt elsewhere, so that any other tile may score it too.
    """

    tiles: dict[TileIndex, str]
    source: str
    overlap: int = 0
    free: bool = False

    def named(self, name: str) -> list[TileIndex]:
        """The tiles of a split, sorted."""
        return sorted(tile for tile, split in self.tiles.items() if split == name)


def split_tiles(grid: Grid, seed: int = 0) -> dict[TileIndex, str]:
    """Each tile's split, 70 / 10 / 20 as in Sun et al. 2019.

    Tiles are ranked by a hash of their place on the CRS's lattice and of the seed, so that the split neither
    depends on the order of work nor on the machine; a grid of at least five tiles has a test tile.

    Args:
        grid: The city's grid.
        seed: Another seed, another split.

    Returns:
        "train", "validation" or "test" for every tile.
    """
    ranked = sorted(grid.tiles(), key=lambda t: _rank(grid.left_tile + t.col, grid.top_tile - t.row, seed))
    n_test = round(SHARES[2] * len(ranked))
    n_validation = round(SHARES[1] * len(ranked))
    names = ["test"] * n_test + ["validation"] * n_validation
    names += ["train"] * (len(ranked) - len(names))
    return dict(zip(ranked, names, strict=True))


def split_by(grid: Grid, rule: SplitRule) -> dict[TileIndex, str]:
    """Each tile's split by a rule: 70 / 10 / 20, or one fold of a cross validation."""
    by_shares = split_tiles(grid, rule.seed)
    if rule.folds is None:
        return by_shares
    names = {rule.fold: "test", (rule.fold + 1) % rule.folds: "validation"}
    # In the order of their ranks, which is that of the split by shares.
    return {tile: names.get(k % rule.folds, "train") for k, tile in enumerate(by_shares)}


def imply_split(name: str, grid: Grid, taught: Sequence[TaughtCity] | None, recipe_rule: SplitRule) -> ImpliedSplit:
    """The split of a city's tiles that a network's training implies.

    A tile that shares ground with a training or validation tile of the network is none of the test. Tiles are compared by
    their place on the ground, so that a city whose bounds, tiles or CRS have changed since is recognised.

    Args:
        name: The city's name; cities of the training with the same name are the same city.
        grid: Its grid.
        taught: Cities of the training; None where the checkpoint does not say.
        recipe_rule: Of the training's recipe; decides where `taught` is None.

    Returns:
        The split. No tile of it may be a test tile, where all of the city taught the network.
    """
    if taught is None:
        return ImpliedSplit(
            split_by(grid, recipe_rule), f"{recipe_rule}; the checkpoint does not say which tiles the network learnt from"
        )
    near = taught_near(grid, taught)
    same = [city for city in near if city.name == name]
    if not near:
        return ImpliedSplit(split_tiles(grid), f"{SplitRule()}; the network learnt elsewhere", free=True)
    if same:
        return ImpliedSplit(_split_beside(grid, same), f"{same[0].rule} of the training")
    others = ", ".join(sorted({city.name for city in near}))
    tiles = _split_beside(grid, near)
    if "test" in tiles.values():
        return ImpliedSplit(tiles, f"{near[0].rule} of the training, which learnt in the same place from {others}")
    by_shares = split_tiles(grid)
    learnt = tiles_learnt(grid, near)
    overlap = sum(split == "test" and tile in learnt for tile, split in by_shares.items())
    return ImpliedSplit(by_shares, f"{SplitRule()}; the network learnt in the same place from {others}", overlap)


def taught_near(grid: Grid, taught: Iterable[TaughtCity]) -> tuple[TaughtCity, ...]:
    """The cities of a training that share ground with a grid."""
    return tuple(city for city in taught if _shares_ground(grid, city.grid))


def tiles_learnt(grid: Grid, taught: Iterable[TaughtCity]) -> set[TileIndex]:
    """Tiles of a grid that share ground with training tiles of some cities."""
    return _tiles_used(grid, taught_near(grid, taught), "train")


def _split_beside(grid: Grid, taught: Sequence[TaughtCity]) -> dict[TileIndex, str]:
    """Each tile as the training used its ground; where it used none, by the rule of the first city."""
    tiles = split_by(grid, taught[0].rule)
    # Ground that was used for several purposes has that of the last of them.
    for purpose in ("test", "validation", "train"):
        tiles |= dict.fromkeys(_tiles_used(grid, taught, purpose), purpose)
    return tiles


def _tiles_used(grid: Grid, taught: Iterable[TaughtCity], purpose: str) -> set[TileIndex]:
    used: set[TileIndex] = set()
    for city in taught:
        used |= _sharing(grid, city.grid, [tile for tile, name in city.tiles().items() if name == purpose])
    return used


def _shares_ground(grid: Grid, other: Grid) -> bool:
    box = _box_in(grid.crs, other.crs, other.bounds)
    # Far from where a CRS is made for, coordinates may have no finite place in it.
    return all(map(math.isfinite, box)) and bool(grid.tiles_covering(_shrunk(box, grid.tile_m)))


def _sharing(grid: Grid, other: Grid, tiles: Sequence[TileIndex]) -> set[TileIndex]:
    """Tiles of a grid that share ground with tiles of another."""
    if grid == other:
        return set(tiles)
    found: set[TileIndex] = set()
    for tile in tiles:
        box = _box_in(grid.crs, other.crs, other.tile_bounds(tile))
        found.update(grid.tiles_covering(_shrunk(box, grid.tile_m)))
    return found


def _box_in(crs: str, other_crs: str, box: Bounds) -> Bounds:
    """A box of another CRS, as the smallest box around it."""
    if crs == other_crs:
        return box
    return Bounds(*_transformer(other_crs, crs).transform_bounds(*box, densify_pts=EDGE_POINTS))


@lru_cache
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def _shrunk(box: Bounds, tile_m: float) -> Bounds:
    """Without what rounding may have added to it."""
    edge = SAME_EDGE * tile_m
    return Bounds(box.left + edge, box.bottom + edge, box.right - edge, box.top - edge)


def _rank(x: int, y: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{x}:{y}".encode(), digest_size=8).digest()
