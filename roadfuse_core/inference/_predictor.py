"""Who turns evidence into probabilities: a network, or kernel density."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from roadfuse_core.cubes import Layer
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import TaughtCity
from roadfuse_core.models import Prediction, fold_norms, load_checkpoint, read_checkpoint_info
from roadfuse_core.settings import City

__all__ = [
    "DeviceFullError",
    "KdeModel",
    "Precision",
    "Predictor",
    "PredictorFacts",
    "PredictorRef",
    "choose_weights",
    "device_name",
    "free_memory",
    "load_predictor",
    "normalise_image",
    "predictor_of",
    "read_facts",
    "read_kde",
    "require_target",
    "resolve_weights",
]

SHIPPED = {"fused": "fused.safetensors", "image": "image.safetensors", "gps": "gps.safetensors", "kde": "kde.json"}
Precision = Literal["32", "bf16"]


class DeviceFullError(RuntimeError):
    """A batch does not fit into the device's memory."""


@dataclass(frozen=True)
class PredictorFacts:
    """What a predictor takes and gives; known from its file without its weights.

    Attributes:
        layers: GPS layers in channel order; none without GPS.
        rasters: Which it takes, of "image" and "lidar".
        window_px: Edge of a window.
        planes: What it gives for each pixel: "probability", then gates.
        target: The class that it finds; None for density, which finds what it was tuned on.
    """

    layers: tuple[Layer, ...]
    rasters: tuple[str, ...]
    window_px: int
    planes: tuple[str, ...]
    target: str | None = None


def read_facts(ref: PredictorRef, resolution_m: float) -> PredictorFacts:
    """What the predictor behind a file takes and gives."""
    if ref.path.suffix != ".safetensors":
        kde = KdePredictor(read_kde(ref.path), resolution_m)
        return PredictorFacts(kde.layers, kde.rasters, kde.window_px, kde.planes)
    info = read_checkpoint_info(ref.path)
    layers = tuple(Layer.model_validate(layer) for layer in info.layers)
    if ref.turns:
        _ = [_partner(layers, layer) for layer in layers]
    gated = info.network.fusion in ("gated", "roadfuse")
    planes = ("probability", *(f"gate_{n}" for n in info.network.modalities if gated))
    rasters = tuple(n for n in info.network.modalities if n in ("image", "lidar"))
    return PredictorFacts(layers, rasters, info.window_px, planes, info.target)


def require_target(city: City, facts: PredictorFacts) -> None:
    """Raise ConfigError unless the predictor finds what the city's map is to show."""
    if facts.target not in (None, city.target):
        raise ConfigError("target", city.target, f"is not what the model finds: {facts.target}", "set it, or change the model")


class Predictor(Protocol):
    """Anything that maps windows of evidence to road probabilities."""

    name: str
    layers: tuple[Layer, ...]
    rasters: tuple[str, ...]
    window_px: int
    planes: tuple[str, ...]

    def prepare(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """What is cut into windows, made once of a whole rectangle.

        Args:
            inputs: "image" (H, W, 4) uint8, red, green, blue and 255 where known; "lidar" (H, W, 2) uint8, the same of one
                band; "gps" (H, W, layers) float32.

        Returns:
            (H, W, channels) each, on the CPU.
        """

    def predict(self, inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Probabilities in [0, 1].

        Args:
            inputs: Windows (N, H, W, channels) of what `prepare` returned. A city without imagery, lidar or points
                leaves it out, and the network knows it as missing.

        Returns:
            (N, planes, H, W) float32: road first, then what else `planes` names (gates).
        """


class PredictorRef(BaseModel):
    """A predictor by its file: what travels to workers instead of weights.

    Attributes:
        path: Checkpoint or KDE file.
        digest: Hash of its content; part of a refresh's identity.
        precision: Of the forward pass.
        turns: Average over the eight turns and reflections of a window.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    digest: str
    precision: Precision = "32"
    turns: bool = False


class KdeModel(BaseModel):
    """Kernel density: road where the Gaussian-smoothed density of points exceeds a threshold (Davies et al. 2006).

    Attributes:
        sigma_m: Standard deviation of the kernel, metres.
        threshold_per_m2: Points per square metre from which a pixel is road.
        tuned_on: Which tiles of which city decided.
        taught: The same for programs; None where it was tuned by an earlier version, or by other tiles than a rule's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma_m: float = Field(gt=0)
    threshold_per_m2: float = Field(gt=0)
    tuned_on: str
    taught: tuple[TaughtCity, ...] | None = None

    def layer(self, resolution_m: float) -> Layer:
        """The density in points per square metre, as the cube renders it."""
        sigma = self.sigma_m / resolution_m
        return Layer(kind="count", sigma_px=sigma, radius_px=math.ceil(3 * sigma), gain=1 / resolution_m**2)


class KdePredictor:
    """p = d / (d + threshold): one half exactly at the threshold, and pointwise, so that it knows no seams."""

    rasters: tuple[str, ...] = ()
    window_px = 256
    planes: tuple[str, ...] = ("probability",)

    def __init__(self, model: KdeModel, resolution_m: float) -> None:
        self.name, self.model = "kde", model
        self.layers: tuple[Layer, ...] = (model.layer(resolution_m),)

    def prepare(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The density as it is."""
        return {name: torch.from_numpy(x) for name, x in inputs.items()}

    def predict(self, inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Density to probability; (N, H, W, 1) → (N, 1, H, W)."""
        density = inputs["gps"].numpy()[..., 0][:, None]
        return np.asarray(density / (density + np.float32(self.model.threshold_per_m2)), np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for the forward pass, as on Dask's workers: another number may change a logit's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def _same_bits() -> Iterator[None]:
    """CuDNN's deterministic kernels, chosen without measurement; what runs on one stream is deterministic in cuBLAS anyway."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32):
        yield


def free_memory() -> None:
    """Give back what nobody uses any more, on a GPU to others too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "out of memory"


def device_name() -> str:
    """What computes here, in words; calibrations are kept by it."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu-{torch.backends.cpu.get_cpu_capability()}"


class NetworkPredictor:
    """A checkpoint's network on the worker's device; one CPU thread, or one GPU."""

    def __init__(self, ref: PredictorRef, resolution_m: float) -> None:
        network, _ = load_checkpoint(ref.path)
        facts = read_facts(ref, resolution_m)
        self.name, self.precision, self.turns = ref.path.stem, ref.precision, ref.turns
        self.layers, self.rasters, self.window_px, self.planes = facts.layers, facts.rasters, facts.window_px, facts.planes
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.pinned = self.device.type == "cuda"
        self.there, self.back = (torch.cuda.Stream(self.device) if self.pinned else None for _ in range(2))
        for part in fold_norms(network).modules():
            if ref.precision == "bf16" and isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                part.to(torch.bfloat16)  # as autocast would anew for every batch
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """On a CPU normalised and in its precision: a pixel lies in several windows. To a GPU bytes travel."""
        held = {name: torch.from_numpy(x) for name, x in inputs.items()}
        if self.device.type == "cpu":
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            held = {n: (x if n == "gps" else self._normalised(x)).to(dtype) for n, x in held.items()}
        return held

    @staticmethod
    def _normalised(x: Tensor) -> Tensor:
        """(…, C + 1) bytes, the last a mask, to (…, C) about -2 … 2; zero where unknown."""
        values = x[..., :-1].float().mul_(4 / 255).sub_(2)
        if x.device.type == "cpu" and bool(x[..., -1].all()):  # of a GPU the answer would have to be waited for
            return values
        return values.mul_(x[..., -1:] > 0)

    def predict(self, inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """One forward pass, waited for."""
        return self.begin(inputs)()

    @torch.inference_mode()
    def begin(self, inputs: Mapping[str, Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Start one forward pass, by kernels that give the same bits each time; a GPU is not waited for.

        Inputs travel on a stream of their own while the batch before is computed, and answers on another one. The function
        that is returned waits until this batch's answers are there.

        Raises:
            DeviceFullError: The windows do not fit into the device's memory, also when it has been tidied.
        """
        for again in (False, True):
            try:
                with _one_thread(), _same_bits():
                    return self._sent_back(self._forward(self._moved(inputs)))
            except torch.OutOfMemoryError as error:
                if again:
                    raise DeviceFullError(_first_line(error)) from None
                free_memory()
        raise AssertionError

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the device; what follows on the current stream waits for them, and nobody else."""
        with _on(self.there):
            moved = {name: x.to(self.device, non_blocking=True) for name, x in inputs.items()}
        if self.there is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.there)
            for x in moved.values():
                x.record_stream(computing)
        return moved

    def _sent_back(self, made: Tensor) -> Callable[[], NDArray[np.float32]]:
        """Start the way back of (N, planes, H, W)."""
        if self.back is None:
            here: NDArray[np.float32] = made.numpy()
            return lambda: here
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event(blocking=True)
        with _on(self.back):
            host.copy_(made, non_blocking=True)
            arrived.record(self.back)
        made.record_stream(self.back)

        def wait() -> NDArray[np.float32]:
            arrived.synchronize()
            return np.asarray(host.numpy())

        return wait

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(N, planes, H, W) float32 on the device, of inputs there."""
        tensors = {}
        for name in self.rasters:
            if name in inputs:
                x = inputs[name]
                tensors[name] = (self._normalised(x) if x.dtype == torch.uint8 else x).permute(0, 3, 1, 2)
        if "gps" in inputs and self.layers:
            tensors["gps"] = inputs["gps"].permute(0, 3, 1, 2)
        if not self.turns:
            return self._planes(tensors)
        total = None
        for k in range(8):
            turned = {n: _turn(x, k).contiguous(memory_format=torch.channels_last) for n, x in tensors.items()}
            if "gps" in turned:
                turned["gps"] = turn_bearings(turned["gps"], self.layers, k)
            back = _turn_back(self._planes(turned), k)
            total = back if total is None else total + back
        assert total is not None
        return total / 8

    def _planes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.network(tensors)
        road = prediction.logits.float().sigmoid()
        return torch.cat([road, *(self._gate(prediction, p, road) for p in self.planes[1:])], 1)

    @staticmethod
    def _gate(prediction: Prediction, plane: str, like: Tensor) -> Tensor:
        """The finest gate of a modality, at the window's size."""
        prefix = f"gate/{plane.removeprefix('gate_')}/"
        levels = [k for k in prediction.maps if k.startswith(prefix)]
        best = max(levels, key=lambda k: prediction.maps[k].shape[-1])
        size = like.shape[-2:]
        return torch.nn.functional.interpolate(prediction.maps[best].float(), size, mode="bilinear").clamp(0, 1)


def _turn(x: Tensor, k: int) -> Tensor:
    x = torch.rot90(x, k % 4, (2, 3))
    return x.flip(3) if k >= 4 else x


def _turn_back(x: Tensor, k: int) -> Tensor:
    x = x.flip(3) if k >= 4 else x
    return torch.rot90(x, -(k % 4), (2, 3))


def turn_bearings(x: Tensor, layers: tuple[Layer, ...], k: int) -> Tensor:
    """Layers of bearings on a window that was turned: what went east goes north after a quarter turn.

    Args:
        x: (N, layers, H, W), turned: k % 4 quarters counterclockwise, then from k = 4 on left and right exchanged.
        layers: Its channels.
        k: 0 … 7.

    Raises:
        ConfigError: There is a sine without its cosine, or the other way round.
    """
    if not {"sin", "cos"} & {layer.kind for layer in layers}:
        return x
    quarters, mirror = k % 4, -1 if k >= 4 else 1
    sign = {"sin": mirror * (1, -1, -1, 1)[quarters], "cos": (1, 1, -1, -1)[quarters]}
    order = [_partner(layers, layer) if quarters % 2 else i for i, layer in enumerate(layers)]
    signs = [sign.get(layer.kind, 1) for layer in layers]
    return torch.stack([x[:, i] * s for i, s in zip(order, signs, strict=True)], 1)


def _partner(layers: tuple[Layer, ...], layer: Layer) -> int:
    """The number of a bearing's other component; of any other layer its own."""
    other = layer.model_copy(update={"kind": {"sin": "cos", "cos": "sin"}.get(layer.kind, layer.kind)})
    if other not in layers:
        raise ConfigError(
            "model.turns", True, f"needs a layer {other.kind} beside {layer.kind}", "train with both, or do without turns"
        )
    return layers.index(other)


def normalise_image(rgb: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """0 … 255 to -2 … 2, as networks take it; zero where unknown."""
    return np.where(valid, (rgb.astype(np.float32) / 255 - 0.5) / 0.25, 0).astype(np.float32)


def choose_weights(city: City, weights: str | None = None) -> str:
    """`model.weights`, or what stands instead of it; `default` is the shipped network for what the city has."""
    name = weights or city.model.weights
    if name != "default":
        return name
    if city.imagery is None:
        return "gps"
    return "image" if city.points is None else "fused"


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
            "model.weights", weights, "is neither a shipped name nor a file", f"use default, {', '.join(SHIPPED)} or a path"
        )
    if path.suffix != ".safetensors":
        # Not the words on where it was tuned: a tuning that finds the same makes the same map.
        decides = read_kde(path).model_dump_json(exclude={"tuned_on"})
        return PredictorRef(path=path, digest=blake3(decides.encode()).hexdigest(8))
    read_checkpoint_info(path)
    return PredictorRef(path=path, digest=blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest(8))


def read_kde(path: Path) -> KdeModel:
    """A tuned kernel density.

    Raises:
        ConfigError: The file holds something else.
    """
    try:
        return KdeModel.model_validate(json.loads(path.read_text()))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "model.weights", str(path), "is neither a checkpoint nor a tuned KDE", "make one with `roadfuse tune`"
        ) from error


def load_predictor(ref: PredictorRef, resolution_m: float) -> Predictor:
    """The predictor behind a file, ready to run on this worker's device."""
    if ref.path.suffix == ".safetensors":
        return NetworkPredictor(ref, resolution_m)
    return KdePredictor(read_kde(ref.path), resolution_m)


@lru_cache(maxsize=2)
def predictor_of(ref: PredictorRef, resolution_m: float) -> Predictor:
    """This process's predictor, loaded once; the plugin of the workers fills it before work begins."""
    return load_predictor(ref, resolution_m)
