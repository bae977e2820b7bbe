"""Where the model of a map learnt, and so which tiles may score the map."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Grid, ImpliedSplit, SplitRule, TaughtCity, imply_split, split_tiles, taught_near
from roadfuse_core.inference._map import MapRecord
from roadfuse_core.inference._predictor import PredictorRef, choose_weights, read_kde, resolve_weights
from roadfuse_core.models import read_checkpoint_info
from roadfuse_core.settings import City

__all__ = ["Learnt", "learnt_by", "split_of_map"]


class Learnt(BaseModel):
    """What the record of a map keeps of its model's training.

    Attributes:
        cities: Cities of the training that share ground with the map; None where the model does not say.
        rule: How the training shared out tiles.
    """

    model_config = ConfigDict(frozen=True)

    cities: tuple[TaughtCity, ...] | None
    rule: SplitRule


def learnt_by(model: PredictorRef, grid: Grid) -> Learnt:
    """Where a model learnt, as far as it matters to a grid."""
    if model.path.suffix == ".safetensors":
        info = read_checkpoint_info(model.path)
        cities, rule = info.taught, SplitRule(**info.recipe.get("split") or {})
    else:
        cities, rule = read_kde(model.path).taught, SplitRule()
    return Learnt(cities=None if cities is None else taught_near(grid, cities), rule=rule)


def split_of_map(city: City, record: MapRecord) -> ImpliedSplit:
    """Which tiles of a city may score one of its maps; none that the map's model learnt from is of the test.

    Args:
        city: The city.
        record: Of the map. Where it does not say, for it was made by an earlier version, the city's model does, if it is the
            same still.

    Returns:
        The split, and in words where it comes from. It has no test tile where the model learnt from all of the city.
    """
    grid = city.make_grid()
    learnt = _stored(city, record, grid)
    if learnt is None:
        return ImpliedSplit(split_tiles(grid), f"{SplitRule()}; the map does not say which tiles its model learnt from")
    split = imply_split(city.name, grid, learnt.cities, learnt.rule)
    if set(split.tiles.values()) == {"test"}:  # kernel density beside it needs training tiles
        return ImpliedSplit(split_tiles(grid), f"{SplitRule()}; the training kept away from the whole city")
    return split


def _stored(city: City, record: MapRecord, grid: Grid) -> Learnt | None:
    if "learnt" in record:
        return Learnt.model_validate(record["learnt"])
    try:
        model = resolve_weights(choose_weights(city), city.root)
    except ConfigError:
        return None
    return learnt_by(model, grid) if model.digest == record["model_digest"] else None
