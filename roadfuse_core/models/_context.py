"""What stands between encoder and decoder: a wider view of the coarsest features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._blocks import conv_bn_relu, relu, resize

__all__ = ["AtrousPyramid", "DilatedCentre", "PyramidPooling", "build_context"]


class DilatedCentre(nn.Module):
    """Four cascaded 3×3 convolutions with dilation 1, 2, 4, 8; the output is the input plus all four (D-LinkNet).

    At 512 channels 9.44 M parameters; (N, C, H, W) → the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the cascade."""
        total, y = x, x
        for layer in self.dilated:
            y = relu(layer(y))
            total = total + y
        return total


class PyramidPooling(nn.Module):
    """Average pooling to 1², 2², 3² and 6² bins, resized back and combined with the input (PSPNet, PP-LinkNet).

    With parameters (PP-LinkNet as released): each bin through a 1×1 convolution to a quarter of the channels, all
    concatenated with the input, 1×1 back: 0.79 M at 512 channels. Without (PP-LinkNet's paper): the bins are resized
    and added to the input. (N, C, H, W) → the same shape.
    """

    BINS = (1, 2, 3, 6)

    def __init__(self, channels: int, parameters: bool) -> None:
        super().__init__()
        quarter = max(1, channels // 4)
        self.bins = nn.ModuleList(nn.Conv2d(channels, quarter, 1) for _ in self.BINS) if parameters else None
        self.combine = nn.Conv2d(channels + len(self.BINS) * quarter, channels, 1) if parameters else None

    def forward(self, x: Tensor) -> Tensor:
        """The input with its surroundings."""
        pooled = [F.adaptive_avg_pool2d(x, n) for n in self.BINS]
        if self.bins is None or self.combine is None:
            return x + torch.stack([resize(p, x) for p in pooled]).mean(0)
        seen = [resize(F.relu(conv(p)), x) for conv, p in zip(self.bins, pooled, strict=True)]
        return F.relu(self.combine(torch.cat([x, *seen], 1)))


class AtrousPyramid(nn.Module):
    """ASPP: 1×1, three 3×3 with dilation 6, 12 and 18, and the image's mean, concatenated, 1×1 (Chen et al. 2018).

    (N, C, H, W) → (N, C_out, H, W). The mean has no batch norm: it is one pixel, which a batch of one cannot norm.
    """

    RATES = (6, 12, 18)

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(c_in, c_out, 1), *(conv_bn_relu(c_in, c_out, 3, dilation=r) for r in self.RATES)]
        )
        self.mean = nn.Conv2d(c_in, c_out, 1)
        self.combine = conv_bn_relu(c_out * 5, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The input seen at five scales."""
        mean = F.relu(self.mean(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[-2:])
        out: Tensor = self.combine(torch.cat([*(b(x) for b in self.branches), mean], 1))
        return out


def build_context(kind: str, channels: int, aspp: int) -> tuple[nn.Module, int]:
    """A context by name, and its output channels; `aspp` is the width of the atrous pyramid."""
    if kind == "aspp":
        return AtrousPyramid(channels, aspp), aspp
    made: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity, "dilated": lambda: DilatedCentre(channels), "pyramid": lambda: PyramidPooling(channels, True),
        "pyramid-free": lambda: PyramidPooling(channels, False),
    }  # fmt: skip
    return made[kind](), channels
