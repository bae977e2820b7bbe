"""ResNet weights as torchvision publishes them, from a file that the user gives."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.models._encoder import ResNetEncoder

__all__ = ["inflate_stem", "load_resnet_weights"]

CLASSIFIER = ("fc.weight", "fc.bias")


def load_resnet_weights(network: nn.Module, path: Path) -> int:
    """Fill every ResNet encoder of published width with a file's weights.

    Args:
        network: With ResNet-18 or -34 encoders, one or more (both branches of CMMPNet).
        path: `.pth` or `.safetensors` with torchvision's keys; the classifier is passed over.

    Returns:
        How many encoders were filled.

    Raises:
        ConfigError: The file is missing, or no encoder has the published width.
        DataError: The file is no state dict, or does not fit; one line for each key.
    """
    state = {k: v for k, v in _read(path).items() if k not in CLASSIFIER}
    encoders = [m for m in network.modules() if isinstance(m, ResNetEncoder) and m.widths == (64, 128, 256, 512)]
    if not encoders:
        raise ConfigError("weights", str(path), "fits no encoder of this network", "use a ResNet preset at width 1")
    for encoder in encoders:
        fitted = dict(state)
        if "conv1.weight" in state and state["conv1.weight"].dim() == 4:
            fitted["conv1.weight"] = inflate_stem(state["conv1.weight"], encoder.conv1.in_channels)
        wrong = _mismatches(encoder.state_dict(), fitted)
        if wrong:
            raise DataError("\n".join(f"{path}: {line}" for line in wrong))
        encoder.load_state_dict(fitted)
    return len(encoders)


def inflate_stem(weight: Tensor, channels: int) -> Tensor:
    """A stem for RGB, made for another number of channels.

    Args:
        weight: (64, 3, 7, 7).
        channels: Wanted; with 3 or more the first three are RGB and the others get the mean of RGB, with fewer all get
            the mean, enlarged so that a grey image excites the stem as before.

    Returns:
        (64, channels, 7, 7).
    """
    if channels == weight.shape[1]:
        return weight
    mean = weight.mean(1, keepdim=True)
    if channels < weight.shape[1]:
        return (mean * weight.shape[1] / channels).repeat(1, channels, 1, 1)
    return torch.cat([weight, mean.repeat(1, channels - weight.shape[1], 1, 1)], 1)


# What PyTorch raises on bytes that are no weights: it takes them for an old file, and runs them as a pickle.
READING = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError("weights", str(path), "does not exist", "give the file that torchvision publishes")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except READING as error:
        raise DataError(f"{path}: is not a file of weights ({type(error).__name__}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: holds no plain state dict; save `model.state_dict()`")
    return state


def _mismatches(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    lines = [f"lacks {key}" for key in wanted if key not in given]
    lines += [f"holds {key}, which the encoder has not" for key in given if key not in wanted]
    return lines + [
        f"{key} has shape {tuple(given[key].shape)}, the encoder's is {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
