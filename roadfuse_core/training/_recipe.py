"""A recipe: everything that decides a network's weights, in one YAML file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from roadfuse_core.cubes import Layer, halo_px
from roadfuse_core.errors import ConfigError, RoadFuseError
from roadfuse_core.models import LOSSES, PRESETS, NetworkConfig, target_of
from roadfuse_core.settings import ClassName, describe_errors, parse_assignments, read_yaml

__all__ = [
    "Augmentation",
    "InvalidRecipeError",
    "NetworkSpec",
    "OptimiserSpec",
    "Recipe",
    "SplitSpec",
    "StageSpec",
    "View",
    "load_recipe",
    "parse_vary",
]

Share = Annotated[float, Field(ge=0, le=1)]


class InvalidRecipeError(RoadFuseError, ValueError):
    """A recipe with one or more wrong keys; one line each."""

    exit_code = 2


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NetworkSpec(_Spec):
    """Which network: a preset, and what of it is changed."""

    preset: str = Field("roadfuse-compact", description="a name that `roadfuse models` lists")
    width: float | None = Field(None, gt=0, le=4, description="factor on all channel numbers, instead of the preset's")
    change: dict[str, Any] = Field({}, description="other fields of the network's configuration, such as `up: 1d`")
    resnet: str | None = Field(None, description="file of ResNet weights as torchvision publishes them")
    start: str | None = Field(None, description="checkpoint of the same network to begin with")

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError("`roadfuse models` lists the presets")
        return value

    def config(self, layers: int) -> NetworkConfig:
        """The configuration, with as many GPS channels as there are layers."""
        base = PRESETS[self.preset].config
        modalities = {k: layers if k == "gps" else n for k, n in base.modalities.items()}
        width = {} if self.width is None else {"width": self.width}
        return NetworkConfig.model_validate(base.model_dump() | {"modalities": modalities} | width | self.change)


class SplitSpec(_Spec):
    """Which tiles of a city teach, which decide, and which are only scored."""

    seed: Seed = Field(0, description="another seed, another split")
    folds: int | None = Field(None, ge=3, le=20, description="cross validation: as many parts; else 70 / 10 / 20")
    fold: int = Field(0, ge=0, description="the part that is the test; the next one is the validation")

    @model_validator(mode="after")
    def _inside(self) -> SplitSpec:
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold {self.fold} does not exist; count from 0 to {(self.folds or 1) - 1}")
        return self


class Augmentation(_Spec):
    """What a window goes through; every number is a probability unless it says otherwise."""

    turns: bool = Field(True, description="one of the eight turns and reflections of a square")
    scale: tuple[float, float] = Field((0.75, 1.33), description="range of the factor on lengths; 1, 1 for none")
    subsample: Share = Field(0.5, description="GPS: keep a share of the points, drawn from 0.01 … 1")
    sub_resolution: Share = Field(0.2, description="GPS: floor positions to a coarser raster, factor 0.1 … 1")
    perturb: Share = Field(0.3, description="GPS: Gaussian noise on positions")
    perturb_px: float = Field(6.0, ge=0, description="GPS: greatest standard deviation of the noise, pixels")
    omit: Share = Field(0.15, description="GPS: no points in a square of half the window")
    camera: float = Field(1.0, ge=0, le=2, description="image: strength of tone, colour, contrast, blur and noise")
    fog: Share = Field(0.12, description="image: a veil of fog")
    drop_image: Share = Field(0.12, description="the whole image is missing")
    drop_gps: Share = Field(0.12, description="all points are missing")
    blank: Share = Field(0.15, description="no image in a square of half the window")

    @model_validator(mode="after")
    def _possible(self) -> Augmentation:
        if not 0.25 <= self.scale[0] <= self.scale[1] <= 4:
            raise ValueError("scale must be [low, high] with 0.25 ≤ low ≤ high ≤ 4")
        if self.drop_image + self.drop_gps > 1:
            raise ValueError("drop_image and drop_gps together exceed 1; a window keeps one of them")
        return self


class StageSpec(_Spec):
    """One pass of the schedule over the windows."""

    labels: ClassName | Literal["existing_map"] = Field(
        "roads", description="which map of the city teaches: a class of its labels, or existing_map"
    )
    epochs: int = Field(30, ge=1, le=1_000_000, description="epochs of the stage")
    label_fraction: float = Field(1.0, gt=0, le=1, description="share of the training tiles that are used")


class OptimiserSpec(_Spec):
    """How the weights move."""

    kind: Literal["adam", "adamw"] = Field("adamw", description="the optimiser")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-3, ge=0, description="of all weights")
    schedule: Literal["constant", "poly", "one-cycle", "plateau"] = Field(
        "one-cycle", description="poly: lr·(1 - t/T)^0.9; plateau: times `factor` when the validation stands still"
    )
    factor: float = Field(0.2, gt=0, lt=1, description="of the rate on a plateau")
    clip: float | None = Field(1.0, gt=0, description="greatest norm of the gradient")


@dataclass(frozen=True)
class View:
    """How a network sees windows.

    Attributes:
        layers: GPS layers; none without GPS.
        image: Whether it takes images.
        window_px: Edge of a window.
        batch: Windows at once.
        bf16: Whether it computes in half precision.
        lidar: Whether it takes lidar.
    """

    layers: tuple[Layer, ...]
    image: bool
    window_px: int
    batch: int
    bf16: bool
    lidar: bool = False

    @property
    def halo_px(self) -> int:
        """Pixels around a window that smoothing needs."""
        return halo_px(self.layers)


class Recipe(_Spec):
    """Cities in, a checkpoint out."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="lower case, digits and hyphens")]
    cities: tuple[str, ...] = Field(min_length=1, description="city files or globs, relative to the recipe")
    validation_cities: tuple[str, ...] = Field((), description="whole cities that decide; by default tiles of `cities`")
    test_cities: tuple[str, ...] = Field((), description="whole cities that are only scored; by default tiles of `cities`")
    split: SplitSpec = Field(SplitSpec(), description="which tiles are for what, where whole cities are not")
    network: NetworkSpec = Field(NetworkSpec(), description="what learns")
    layers: tuple[Layer, ...] = Field(
        (
            Layer(kind="log_count", cap=64, sigma_px=1.0, radius_px=1, gain=6.0),
            Layer(kind="log_count", cap=64, sigma_px=5.0, radius_px=12, gain=40.0),
        ),
        description="GPS layers in channel order",
    )
    loss: str = Field("bce+dice", description=f"one of {', '.join(LOSSES)}")
    stages: tuple[StageSpec, ...] = Field((StageSpec(),), description="one after the other, weights carry over")
    optimiser: OptimiserSpec = Field(OptimiserSpec(), description="how the weights move")
    augmentation: Augmentation = Field(Augmentation(), description="what windows go through")
    seed: int = Field(1, ge=0, lt=2**32, description="of initialisation, windows and augmentation")
    window_px: int = Field(256, ge=32, le=2048, multiple_of=2, description="edge of a window")
    batch: int = Field(8, ge=1, le=65_536, description="windows a step, over all ranks")
    epoch_windows: int = Field(800, ge=1, le=10**9, description="windows an epoch")
    road_bias: Share = Field(0.5, description="share of windows drawn from tiles in proportion to their road")
    precision: Literal["bf16", "32"] = Field("bf16", description="of the forward and backward pass")
    freeze_norm: Share = Field(0.2, description="share of each stage, its last, in which batch norms keep their statistics")
    patience: int | None = Field(None, ge=1, le=1_000_000, description="stop after so many epochs without a better validation")
    keep: Literal["last", "best"] = Field("last", description="weights of the last epoch, or of the best validation")
    ranks: int | None = Field(None, ge=1, le=65_536, description="processes that share the batch; by default one a GPU")
    root: Path = Field(Path(), exclude=True, description="folder of the recipe")

    @field_validator("stages")
    @classmethod
    def _some_stage(cls, value: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
        # As a length of the field it would be told beside every error within a stage.
        if not value:
            raise ValueError("give at least 1")
        return value

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        if value not in LOSSES:
            raise ValueError(f"use one of {', '.join(LOSSES)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if (self.ranks or 1) > self.batch:
            raise ValueError(f"ranks {self.ranks} are more than the windows of a batch, {self.batch}; take fewer")
        if self.epoch_windows < self.batch:
            raise ValueError(f"epoch_windows {self.epoch_windows} is less than one batch of {self.batch}")
        return self

    @property
    def target(self) -> str:
        """The class to find: what the last stage learns from; the existing map shows roads."""
        return target_of(self.stages[-1].labels)

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps an epoch; a last incomplete batch is left out."""
        return self.epoch_windows // self.batch

    def network_config(self) -> NetworkConfig:
        """The network."""
        return self.network.config(len(self.layers))

    def view(self) -> View:
        """How the network sees windows."""
        modalities = self.network_config().modalities
        layers = self.layers if "gps" in modalities else ()
        return View(layers, "image" in modalities, self.window_px, self.batch, self.precision == "bf16", "lidar" in modalities)

    def digest(self) -> str:
        """Identity of all that decides the weights."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()


def _shipped(name: object) -> dict[str, Any]:
    """A paper's recipe."""
    folder = resources.files("roadfuse_core.training.recipes")
    known = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in known:
        raise ConfigError("base", name, "is not a shipped recipe", f"use {', '.join(known)}, or leave it out")
    return dict(yaml.safe_load((folder / f"{name}.yaml").read_text()))


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key; everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        held = out.get(key)
        out[key] = _merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return out


def load_recipe(path: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The YAML file; its `base` may name a paper's recipe, whose fields it then has but for those that it states.
        changes: Values by dotted key that replace those of the file.

    Raises:
        ConfigError: The file is missing or is not YAML.
        InvalidRecipeError: Keys are unknown, missing or wrong; one line each.
    """
    raw = read_yaml(path, "recipe", "docs/training.md")
    if "base" in raw:
        raw = _merged(_shipped(raw.pop("base")), raw)
    for key, value in (changes or {}).items():
        *folders, last = key.split(".")
        at = raw
        for k, folder in enumerate(folders):
            at = at.setdefault(folder, {})
            if not isinstance(at, dict):
                raise ConfigError(
                    "recipe", key, f"goes through {'.'.join(folders[: k + 1])}, which is no mapping", "name a key"
                )
        at[last] = value
    try:
        recipe = Recipe.model_validate(raw | {"root": path.resolve().parent})
    except ValidationError as error:
        raise InvalidRecipeError("\n".join(describe_errors(error, Recipe))) from error
    try:
        modalities = recipe.network_config().modalities
    except ValidationError as error:
        raise InvalidRecipeError("\n".join(describe_errors(error, NetworkConfig, "network.change"))) from error
    windows = {"image": 3, "gps": len(recipe.layers), "lidar": 1}
    if odd := {k: n for k, n in modalities.items() if windows.get(k) != n}:
        raise InvalidRecipeError(f"network.change.modalities: {odd} is not what windows hold; they hold {windows}")
    return recipe


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=A,B` or `KEY=[A, B]` as lists of values by dotted key.

    Raises:
        ConfigError: One is something else, has no value, or names a key twice.
    """
    example = "network.preset=unet,segnet"
    pairs = [text.partition("=") for text in texts]
    listed = [f"{k}{sign}{v if not v or v.startswith('[') else f'[{v}]'}" for k, sign, v in pairs]
    out: dict[str, list[Any]] = parse_assignments("--vary", listed, example)
    if bare := [key for key, values in out.items() if not values]:
        raise ConfigError("--vary", bare[0], "has no values", f"write {example}")
    return out
