"""What every network is: inputs padded, missing ones masked, and one kind of answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._branch import Branch
from roadfuse_core.models._config import NetworkConfig

__all__ = ["Network", "Prediction", "Tensors", "multiple_of"]

Tensors = Mapping[str, Tensor]


class Prediction(NamedTuple):
    """What a network says.

    Attributes:
        logits: (N, 1, H, W) of road.
        auxiliary: Further logits for the loss, by name: (N, 1, h, w) at any scale, or (N, P) at points.
        maps: For people and for losses, by name: gates (N, 1, h, w) from 0 to 1, and where points are.
    """

    logits: Tensor
    auxiliary: dict[str, Tensor]
    maps: dict[str, Tensor]


class Network(nn.Module, ABC):
    """A network of a configuration; subclasses say how modalities meet.

    Attributes:
        config: What it was built from.
        window_multiple: Inputs are padded with zeros, to the right and below, to a multiple of this.
        auxiliary_weights: Weight of each auxiliary logit in the loss; the logits have weight 1.
    """

    window_multiple: int

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.names = list(config.modalities)
        self.auxiliary_weights: dict[str, float] = {}

    def settle(self) -> None:
        """Whatever begins otherwise than by He's initialisation; nothing, unless a network says so."""

    @abstractmethod
    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """The network proper.

        Args:
            x: All modalities, padded, zeros where one is absent.
            present: (N, 1, 1, 1) of each, 1 or 0.
        """

    def forward(self, inputs: Tensors, present: Tensors | None = None) -> Prediction:
        """Predict a batch.

        Args:
            inputs: Modalities (N, C, H, W) by name, any H and W; one that is left out is missing.
            present: (N,) whether each sample has a modality; absent names are there for all samples.

        Returns:
            Logits of the input's size; auxiliary logits and maps at their own scales.
        """
        shown = next(iter(inputs.values()))
        n, _, height, width = shown.shape
        there, padded = {}, {}
        for name, channels in self.config.modalities.items():
            x = inputs.get(name)
            there[name] = shown.new_full((n, 1, 1, 1), float(x is not None))
            if x is None:
                x = shown.new_zeros(n, channels, height, width)
            elif present is not None and name in present:
                there[name] = present[name].to(shown.dtype).reshape(n, 1, 1, 1)
                x = x * there[name]
            padded[name] = _pad(x, self.window_multiple)
        made = self.fuse(padded, there)
        return Prediction(made.logits[..., :height, :width], made.auxiliary, made.maps)


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Zeros to the right and below, up to the next multiple."""
    height, width = x.shape[-2:]
    right, below = -width % multiple, -height % multiple
    return F.pad(x, (0, right, 0, below)) if right or below else x


def multiple_of(*branches: nn.Module) -> int:
    return max(b.scale for b in branches if isinstance(b, Branch))
