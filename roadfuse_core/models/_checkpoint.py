"""A checkpoint: weights as safetensors, with everything needed to rebuild and feed the network inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Grid, ImpliedSplit, SplitRule, TaughtCity, imply_split
from roadfuse_core.models._base import Network
from roadfuse_core.models._config import NetworkConfig
from roadfuse_core.models._network import build_network

__all__ = ["CheckpointInfo", "load_checkpoint", "read_checkpoint_info", "save_checkpoint", "target_of"]

HALF_MAX = torch.finfo(torch.float16).max


class CheckpointInfo(BaseModel):
    """What travels with the weights.

    Attributes:
        network: How to rebuild the network.
        layers: The GPS layers it was trained on, as the cubes' renderer takes them, in channel order.
        resolution_m: Pixel size that it was trained at.
        window_px: Window size that it was trained at.
        recipe: The training recipe, seeds included.
        taught: Cities that it learnt from, was validated on, or was kept from, those of the checkpoint that it began with
            included; None where a checkpoint does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig
    layers: list[dict[str, object]]
    resolution_m: float
    window_px: int
    recipe: dict[str, Any]
    taught: tuple[TaughtCity, ...] | None = None

    def split_of(self, city: str, grid: Grid) -> ImpliedSplit:
        """Which tiles of a city may score this network.

        Args:
            city: The city's name.
            grid: Its grid.
        """
        rule = SplitRule(**self.recipe.get("split") or {})
        return imply_split(city, grid, self.taught, rule)

    @property
    def target(self) -> str:
        """The class that the network finds."""
        stages = self.recipe.get("stages") or [{}]
        return target_of(stages[-1].get("labels", "roads"))


def target_of(labels: str) -> str:
    """The class that the labels of a recipe's last stage show; those of an existing map are roads."""
    return "roads" if labels == "existing_map" else labels


def save_checkpoint(path: Path, network: Network, info: CheckpointInfo, half: bool = True) -> None:
    """Write weights and configuration to one file.

    Args:
        path: Ends in .safetensors.
        network: The network.
        info: Its configuration; `info.network` must be the network's.
        half: Store floating-point weights as float16 (half the size, exact to 11 bits); arrays with values that are too large
            for it stay as they are.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() and (v.abs() < HALF_MAX).all() else v for k, v in state.items()}
    save_file(state, path, metadata={"roadfuse": info.model_dump_json()})


def read_checkpoint_info(path: Path) -> CheckpointInfo:
    """The configuration inside a checkpoint, without its weights.

    Raises:
        ConfigError: The file is missing or is not a RoadFuse checkpoint.
    """
    if not path.is_file():
        raise ConfigError("model.weights", str(path), "does not exist", "give a .safetensors checkpoint or `default`")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})["roadfuse"]
        return CheckpointInfo.model_validate(json.loads(text))
    except (SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        raise ConfigError(
            "model.weights", str(path), f"is not a RoadFuse checkpoint ({type(error).__name__})",
            "give a file written by this version's training",
        ) from error  # fmt: skip


def load_checkpoint(path: Path) -> tuple[Network, CheckpointInfo]:
    """The network of a checkpoint, float32, in eval mode, on the CPU.

    Raises:
        ConfigError: The file is not a checkpoint, its weights do not fit its configuration, or one is not finite.
    """
    info = read_checkpoint_info(path)
    network = build_network(info.network)
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    wanted = network.state_dict()
    for key in sorted(wanted.keys() | state.keys()):
        if key not in wanted or key not in state or wanted[key].shape != state[key].shape:
            raise ConfigError("model.weights", str(path), f"does not fit its network at {key}", "train it again")
        if not (state[key].isfinite() | ~wanted[key].isfinite()).all():  # a forest that was never fitted holds infinities
            raise ConfigError("model.weights", str(path), f"holds numbers that are not finite at {key}", "train it again")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False), info
