"""Encoders: stages that halve the size, numbered from the finest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._blocks import Conv2d, DoubleConv, ReLU, ResidualUnit, conv_bn_relu, max_pool_3x3

__all__ = [
    "BasicBlock",
    "Encoder",
    "PlainEncoder",
    "ResNetEncoder",
    "ResidualEncoder",
    "UNetEncoder",
    "VggEncoder",
    "WideResNetEncoder",
]

RESNET_DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class Encoder(nn.Module, ABC):
    """Stages one after the other; what a stage returns goes to the next one and, as a skip, to the decoder.

    Attributes:
        widths: Channels after each stage.
        scales: Input pixels to one of its pixels, along an edge.
    """

    widths: tuple[int, ...]
    scales: tuple[int, ...]

    @abstractmethod
    def stage(self, number: int, x: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One stage.

        Args:
            number: From 0.
            x: The input, or what the stage before returned (perhaps changed by a fusion).
            stem: Added after the first convolution of stage 0; None for nothing.

        Returns:
            Its features (N, widths[number], H, W), and the indices of its max-pooling where a decoder unpools by them.
        """

    def forward(self, x: Tensor, stem: Tensor | None = None) -> list[Tensor]:
        """The features of all stages."""
        out: list[Tensor] = []
        for number in range(len(self.widths)):
            x = self.stage(number, x, stem if number == 0 else None)[0]
            out.append(x)
        return out


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; (N, C_in, H, W) → (N, C_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + shortcut)
        return out


class ResNetEncoder(Encoder):
    """ResNet-18 or -34 (He et al. 2016) without its classifier; keys equal torchvision's.

    Args:
        c_in: Input channels.
        widths: Channels of the four stages; the stem has those of the first.
        kind: resnet18 or resnet34.
        last_stride: 1 keeps the last stage at 1/16 (PP-LinkNet as released, E-Road, DeepLabv3+).
    """

    def __init__(self, c_in: int, widths: tuple[int, int, int, int], kind: str = "resnet34", last_stride: int = 2) -> None:
        super().__init__()
        self.widths, self.scales = widths, (4, 8, 16, 16 * last_stride)
        self.conv1 = nn.Conv2d(c_in, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = ReLU()
        strides = (1, 2, 2, last_stride)
        before = widths[0]
        for number, (channels, depth) in enumerate(zip(widths, RESNET_DEPTHS[kind], strict=True)):
            blocks: OrderedDict[str, nn.Module] = OrderedDict(
                (str(k), BasicBlock(before if k == 0 else channels, channels, strides[number] if k == 0 else 1))
                for k in range(depth)
            )
            self.add_module(f"layer{number + 1}", nn.Sequential(blocks))
            before = channels

    def stage(self, number: int, x: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Encoder.stage`; the stem and its pooling belong to stage 0."""
        if number == 0:
            x = self.conv1(x)
            x = x if stem is None else x + stem
            x = max_pool_3x3(self.relu(self.bn1(x)))  # (N, C, H/4, W/4)
        return self.get_submodule(f"layer{number + 1}")(x), None


class PlainEncoder(Encoder):
    """Max-pooling by 2 before every stage but the first, then the stage's own module."""

    def __init__(self, widths: tuple[int, ...], stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.widths, self.scales = widths, tuple(2**k for k in range(len(widths)))
        self.stages = nn.ModuleList(stages)

    def stage(self, number: int, x: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Encoder.stage`; there is no stem to add to."""
        if number == 0:
            return self.stages[0](x), None
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return self.stages[number](pooled), indices


class UNetEncoder(PlainEncoder):
    """Five double convolutions (Ronneberger et al. 2015, padded, with batch norm)."""

    def __init__(self, c_in: int, widths: tuple[int, ...]) -> None:
        before = (c_in, *widths)
        super().__init__(widths, [DoubleConv(a, b) for a, b in zip(before, widths, strict=False)])


class ResidualEncoder(Encoder):
    """Pre-activated residual units, halved by stride (Zhang et al. 2018)."""

    def __init__(self, c_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths, self.scales = widths, tuple(2**k for k in range(len(widths)))
        before = (c_in, *widths)
        self.stages = nn.ModuleList(
            ResidualUnit(a, b, 1 if k == 0 else 2, k == 0) for k, (a, b) in enumerate(zip(before, widths, strict=False))
        )

    def stage(self, number: int, x: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Encoder.stage`; there is no stem to add to."""
        return self.stages[number](x), None


class VggEncoder(PlainEncoder):
    """The 13 convolutions of VGG-16 with batch norm, in five stages, and a sixth that only pools.

    SegNet (Badrinarayanan et al. 2017), DeconvNet (Noh et al. 2015) and FCN-8 (Long et al. 2015) share it.
    """

    DEPTHS = (2, 2, 3, 3, 3)

    def __init__(self, c_in: int, widths: tuple[int, int, int, int, int]) -> None:
        stages: list[nn.Module] = []
        before = c_in
        for channels, depth in zip(widths, self.DEPTHS, strict=True):
            stages.append(nn.Sequential(*(conv_bn_relu(before if k == 0 else channels, channels) for k in range(depth))))
            before = channels
        super().__init__((*widths, widths[-1]), [*stages, nn.Identity()])


class _WideUnit(nn.Module):
    """Pre-activated unit of WideResNet-38; two 3×3, or 1×1, 3×3, 1×1 where three widths are given."""

    def __init__(self, c_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        self.norm = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        layers: list[nn.Module] = []
        before = c_in
        for k, (channels, kernel) in enumerate(zip(widths, kernels, strict=True)):
            layers += [nn.BatchNorm2d(before), ReLU()] if k else []
            layers.append(nn.Conv2d(before, channels, kernel, padding=kernel // 2, bias=False))
            before = channels
        self.body = nn.Sequential(*layers)
        self.project = nn.Conv2d(c_in, widths[-1], 1, bias=False) if c_in != widths[-1] else None

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output."""
        y = self.norm(x)
        out: Tensor = self.body(y) + (x if self.project is None else self.project(y))
        return out


class WideResNetEncoder(PlainEncoder):
    """WideResNet-38 up to its fifth module, and a pooled centre (TernausNetV2, Iglovikov et al. 2018).

    Args:
        c_in: Input channels.
        widths: Channels of the stem and of the modules with 3, 3, 6 and 3 units; the units of the last one go
            through half of its channels.
    """

    UNITS = (3, 3, 6, 3)

    def __init__(self, c_in: int, widths: tuple[int, int, int, int, int]) -> None:
        stages: list[nn.Module] = [nn.Conv2d(c_in, widths[0], 3, padding=1, bias=False)]
        for k, units in enumerate(self.UNITS):
            c, before = widths[k + 1], widths[k]
            inner = (max(1, c // 2), c) if k == len(self.UNITS) - 1 else (c, c)
            stages.append(nn.Sequential(*(_WideUnit(before if u == 0 else c, inner) for u in range(units))))
        super().__init__((*widths, widths[-1]), [*stages, nn.Identity()])
