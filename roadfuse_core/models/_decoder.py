"""The parts of D-LinkNet after its encoder (Zhou et al. 2018, as used by Sun et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DilatedCentre", "LinkNetBlock", "LinkNetHead"]


class DilatedCentre(nn.Module):
    """Four cascaded 3×3 convolutions with dilation 1, 2, 4, 8; the output is the input plus all four.

    At 512 channels 9.44 M parameters; (N, C, H, W) → the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the cascade."""
        total, y = x, x
        for layer in self.dilated:
            y = F.relu(layer(y))
            total = total + y
        return total


class LinkNetBlock(nn.Module):
    """1×1 to a quarter of the channels, 3×3 transposed with stride 2, 1×1; (N, C, H, W) → (N, C_out, 2H, 2W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        middle = max(1, c_in // 4)
        self.conv1 = nn.Conv2d(c_in, middle, 1)
        self.norm1 = nn.BatchNorm2d(middle)
        self.deconv2 = nn.ConvTranspose2d(middle, middle, 3, stride=2, padding=1, output_padding=1)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, c_out, 1)
        self.norm3 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.deconv2(x)))  # (N, C/4, 2H, 2W)
        return F.relu(self.norm3(self.conv3(x)))


class LinkNetHead(nn.Module):
    """4×4 transposed convolution with stride 2, 3×3, 3×3 to one logit; (N, C, H, W) → (N, 1, 2H, 2W)."""

    def __init__(self, c_in: int, middle: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(c_in, middle, 4, stride=2, padding=1)
        self.conv = nn.Conv2d(middle, middle, 3, padding=1)
        self.logit = nn.Conv2d(middle, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.logit(F.relu(self.conv(F.relu(self.deconv(x)))))
        return out
