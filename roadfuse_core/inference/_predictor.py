"""Who turns evidence into probabilities: a network, or kernel density."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roadfuse_core.cubes import Layer
from roadfuse_core.errors import ConfigError
from roadfuse_core.models import load_checkpoint, read_checkpoint_info

__all__ = ["KdeModel", "Predictor", "PredictorRef", "load_predictor", "normalise_image", "resolve_weights"]

SHIPPED = {"default": "fused.safetensors", "kde": "kde.json"}


class Predictor(Protocol):
    """Anything that maps windows of evidence to road probabilities."""

    name: str
    layers: tuple[Layer, ...]
    uses_image: bool
    window_px: int

    def predict(self, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Probabilities in [0, 1].

        Args:
            inputs: "image" (N, 3, H, W), normalised, zeros where unknown; "gps" (N, layers, H, W). A city without
                imagery or without points leaves one out, and the network knows it as missing.

        Returns:
            (N, H, W) float32.
        """


class PredictorRef(BaseModel):
    """A predictor by its file: what travels to workers instead of weights.

    Attributes:
        path: Checkpoint or KDE file.
        digest: Hash of its content; part of a refresh's identity.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    digest: str


class KdeModel(BaseModel):
    """Kernel density: road where the Gaussian-smoothed density of points exceeds a threshold (Davies et al. 2006).

    Attributes:
        sigma_m: Standard deviation of the kernel, metres.
        threshold_per_m2: Points per square metre from which a pixel is road.
        tuned_on: Which tiles of which city decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma_m: float = Field(gt=0)
    threshold_per_m2: float = Field(gt=0)
    tuned_on: str

    def layer(self, resolution_m: float) -> Layer:
        """The density in points per square metre, as the cube renders it."""
        sigma = self.sigma_m / resolution_m
        return Layer(kind="count", sigma_px=sigma, radius_px=math.ceil(3 * sigma), gain=1 / resolution_m**2)


class KdePredictor:
    """p = d / (d + threshold): one half exactly at the threshold, and pointwise, so that it knows no seams."""

    uses_image = False
    window_px = 256

    def __init__(self, model: KdeModel, resolution_m: float) -> None:
        self.name, self.model = "kde", model
        self.layers: tuple[Layer, ...] = (model.layer(resolution_m),)

    def predict(self, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Density to probability; (N, 1, H, W) → (N, H, W)."""
        density = inputs["gps"][:, 0]
        return density / (density + np.float32(self.model.threshold_per_m2))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for the forward pass, as on Dask's workers: another number may change a logit's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NetworkPredictor:
    """A checkpoint's network on the worker's device: bfloat16 on GPUs, float32 on one thread on CPUs."""

    def __init__(self, path: Path) -> None:
        network, info = load_checkpoint(path)
        self.name = path.stem
        self.layers = tuple(Layer.model_validate(layer) for layer in info.layers)
        self.uses_image = "image" in info.network.modalities
        self.window_px = info.window_px
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(self, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """One forward pass."""
        tensors = {
            name: torch.from_numpy(inputs[name]).to(self.device, memory_format=torch.channels_last)
            for name in self.network.config.modalities
            if name in inputs
        }
        with _one_thread(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.network(tensors).logits
        return np.asarray(logits.float().sigmoid()[:, 0].cpu().numpy())


def normalise_image(rgb: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """0 … 255 to about -2 … 2; zero where unknown."""
    return np.where(valid, (rgb / 255 - 0.5) / 0.25, 0).astype(np.float32)


def resolve_weights(weights: str, root: Path) -> PredictorRef:
    """The file behind `model.weights`: a shipped name, or a path relative to the city file.

    Raises:
        ConfigError: No such file.
    """
    if weights in SHIPPED:
        path = Path(str(resources.files("roadfuse_core.weights") / SHIPPED[weights]))
    else:
        path = (root / weights).resolve()
    if not path.is_file():
        raise ConfigError(
            "model.weights", weights, "is neither a shipped name nor a file", f"use {', '.join(SHIPPED)} or a path"
        )
    if path.suffix == ".safetensors":
        read_checkpoint_info(path)
    else:
        _read_kde(path)
    return PredictorRef(path=path, digest=hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest())


def _read_kde(path: Path) -> KdeModel:
    try:
        return KdeModel.model_validate(json.loads(path.read_text()))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "model.weights", str(path), "is neither a checkpoint nor a tuned KDE", "make one with `roadfuse tune`"
        ) from error


def load_predictor(ref: PredictorRef, resolution_m: float) -> Predictor:
    """The predictor behind a file, ready to run on this worker's device."""
    if ref.path.suffix == ".safetensors":
        return NetworkPredictor(ref.path)
    return KdePredictor(_read_kde(ref.path), resolution_m)
