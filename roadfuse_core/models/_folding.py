"""Batch norms as part of the convolutions before them, for prediction."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from roadfuse_core.models._base import Network
from roadfuse_core.models._blocks import Affine

__all__ = ["fold_norms"]

Conv = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm2d | Affine


def fold_norms(network: Network) -> Network:
    """Give every convolution the factor and the shift of the norm that follows it, which then does nothing.

    In eval mode both are linear: the answers are the same but for rounding, with a pass over the features
    less for each norm. Which norm follows which convolution is seen in a forward pass.

    Args:
        network: In eval mode, on the CPU; changed in place, and not to be trained or saved any more.

    Returns:
        The same network.
    """
    places = {part: name for name, part in network.named_modules()}
    for conv, norm in _neighbours(network):
        _fold(conv, norm)
        parent, _, name = places[norm].rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def _neighbours(network: Network) -> list[tuple[Conv, Norm]]:
    """Norms whose input is what a convolution has just returned, each used once."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # held, so that no two tensors are one object

    def note(part: nn.Module, given: tuple[Tensor, ...], made: Any) -> None:
        calls.append((part, given[0], made))

    hooks = [p.register_forward_hook(note) for p in network.modules() if isinstance(p, Conv | Norm)]
    shape, dtype = (2 * network.window_multiple,) * 2, next(network.parameters()).dtype
    with torch.inference_mode():
        network({name: torch.zeros(1, c, *shape, dtype=dtype) for name, c in network.config.modalities.items()})
    for hook in hooks:
        hook.remove()
    used = [part for part, _, _ in calls]
    return [
        (a, b) for (a, _, made), (b, given, _) in pairwise(calls)
        if isinstance(a, Conv) and isinstance(b, Norm) and given is made and used.count(a) == used.count(b) == 1
    ]  # fmt: skip


def _fold(conv: Conv, norm: Norm) -> None:
    mean, variance, eps = torch.zeros_like(norm.weight), torch.ones_like(norm.weight), 0.0
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, eps, norm.weight, norm.bias, transpose=isinstance(conv, nn.ConvTranspose2d)
    )
