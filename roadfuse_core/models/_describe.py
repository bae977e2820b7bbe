"""Size and cost of a network, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from roadfuse_core.models._config import NetworkConfig
from roadfuse_core.models._network import build_network

__all__ = ["Description", "describe"]

SIZE = 512


@dataclass(frozen=True)
class Description:
    """Facts of a network.

    Attributes:
        parameters: Trainable numbers.
        gflops: Billion floating-point operations (a multiplication and an addition are two) of one 512² window.
        window_multiple: Inputs are padded to a multiple of this.
    """

    parameters: int
    gflops: float
    window_multiple: int


def describe(config: NetworkConfig) -> Description:
    """Build a network without memory and count."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network = build_network(config).eval()
        network({name: torch.empty(1, c, SIZE, SIZE) for name, c in config.modalities.items()})
    parameters = sum(p.numel() for p in network.parameters())
    return Description(parameters, counter.get_total_flops() / 1e9, network.window_multiple)
