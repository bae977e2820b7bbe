"""ResNet-34 encoder (He et al. 2016) with torchvision's key names."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["BasicBlock", "ResNetEncoder"]

RESNET34_DEPTHS = (3, 4, 6, 3)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; (N, C_in, H, W) → (N, C_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + shortcut)
        return out


class ResNetEncoder(nn.Module):
    """Stem and four stages; keys equal torchvision's `resnet34` without `fc`.

    Args:
        c_in: Input channels.
        stem: Channels after the 7×7 stem.
        stages: Channels of the four stages.
        depths: Blocks of the four stages.
    """

    def __init__(
        self,
        c_in: int,
        stem: int,
        stages: tuple[int, int, int, int],
        depths: tuple[int, int, int, int] = RESNET34_DEPTHS,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = stem
        for number, (channels, depth) in enumerate(zip(stages, depths, strict=True), start=1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict(
                (str(k), BasicBlock(before if k == 0 else channels, channels, 2 if k == 0 and number > 1 else 1))
                for k in range(depth)
            )
            self.add_module(f"layer{number}", nn.Sequential(blocks))
            before = channels

    def forward(self, x: Tensor, extra_stem: Tensor | None = None) -> list[Tensor]:
        """Feature maps of the four stages.

        Args:
            x: (N, C, H, W), H and W multiples of 32.
            extra_stem: (N, stem, H/2, W/2) added to the stem's convolution, or None.

        Returns:
            Four maps at 1/4, 1/8, 1/16 and 1/32 of the size.
        """
        y = self.conv1(x)
        y = y if extra_stem is None else y + extra_stem
        y = self.maxpool(self.relu(self.bn1(y)))  # (N, stem, H/4, W/4)
        out = []
        for number in range(1, 5):
            y = self.get_submodule(f"layer{number}")(y)
            out.append(y)
        return out


def initialise(module: nn.Module) -> None:
    """He initialisation of convolutions, ones and zeros in batch norms, as ResNet is trained from scratch."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
