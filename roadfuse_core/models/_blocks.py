"""Small blocks that encoders and decoders are made of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Affine",
    "Conv2d",
    "Directional",
    "DoubleConv",
    "LinkNetBlock",
    "ReLU",
    "ResidualUnit",
    "conv_bn_relu",
    "initialise",
    "max_pool_3x3",
    "relu",
    "resize",
    "upsampler",
    "without_norms",
]

Up = Literal["transposed", "1d", "1d-released"]


def conv_bn_relu(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size at stride 1, batch norm, ReLU; (N, C_in, H, W) → (N, C_out, …)."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), ReLU())


def relu(x: Tensor) -> Tensor:
    """max(x, 0), in place.

    For predictions on a CPU in bfloat16 by its bits as whole numbers, whose sign is the same: the same for every number (a
    NaN may become 0), and faster than by PyTorch's way through float32.
    """
    if x.requires_grad or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.relu(x, inplace=True)
    x.view(torch.int16).clamp_min_(0)
    return x


class ReLU(nn.ReLU):
    """`relu` as a module."""

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        """max(input, 0), in place."""
        return relu(input)


class Conv2d(nn.Conv2d):
    """A convolution that, of 1×1 with a stride, steps before it multiplies when it learns on a CPU.

    The same numbers; PyTorch 2.13 (oneDNN) writes beyond its memory on the way back where fewer than 16 channels lie last.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, …)."""
        if self.kernel_size != (1, 1) or input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        down, right = self.stride
        return F.conv2d(input[..., ::down, ::right], self.weight, self.bias)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def max_pool_3x3(x: Tensor) -> Tensor:
    """Max-pooling of 3×3 at stride 2, past the rim by a pixel; (N, C, H, W) → (N, C, ⌈H/2⌉, ⌈W/2⌉).

    For predictions on a CPU rows and then columns are compared as a whole: exactly the same, and faster for the few
    channels of compact networks, where PyTorch's loop over the pixels does not fill its vectors.
    """
    if x.requires_grad or x.device.type != "cpu" or x.shape[-2] % 2 or x.shape[-1] % 2:
        return F.max_pool2d(x, 3, 2, 1)
    rows = torch.maximum(x[..., 0::2, :], x[..., 1::2, :])
    rows[..., 1:, :] = torch.maximum(rows[..., 1:, :], x[..., 1:-1:2, :])
    both = torch.maximum(rows[..., 0::2], rows[..., 1::2])
    both[..., 1:] = torch.maximum(both[..., 1:], rows[..., 1:-1:2])
    return both


class Affine(nn.Module):
    """A factor and a shift of each channel: a batch norm that does not look at the batch; (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled and shifted."""
        return x * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]


def without_norms(module: nn.Module) -> None:
    """Put an `Affine` in the place of every batch norm."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, Affine(part.num_features))
        else:
            without_norms(part)


class DoubleConv(nn.Sequential):
    """Two 3×3 convolutions with batch norm and ReLU (U-Net); (N, C_in, H, W) → (N, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(conv_bn_relu(c_in, c_out), conv_bn_relu(c_out, c_out))


class ResidualUnit(nn.Module):
    """Pre-activated residual unit (Zhang et al. 2018, deep residual U-Net); (N, C_in, H, W) → (N, C_out, H/s, W/s).

    The first unit of a network takes raw channels and convolves them before any norm (`first`).
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        norm: list[nn.Module] = [] if first else [nn.BatchNorm2d(c_in), nn.ReLU()]
        self.body = nn.Sequential(
            *norm,
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
        )
        self.shortcut = nn.Sequential(Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


def _shear(x: Tensor) -> Tensor:
    """Shift row i right by i: anti-diagonals become columns; (N, C, H, W) → (N, C, H, W + H - 1), zeros around."""
    n, c, h, w = x.shape
    return F.pad(x, (0, h)).flatten(2)[..., : h * (w + h - 1)].reshape(n, c, h, w + h - 1)


def _unshear(x: Tensor, width: int) -> Tensor:
    """The inverse of `_shear`; (N, C, H, W + H - 1) → (N, C, H, W)."""
    n, c, h, _ = x.shape
    return F.pad(x.flatten(2), (0, h)).reshape(n, c, h, width + h)[..., :width]


class Directional(nn.Module):
    """Four sets of one-dimensional transposed convolutions of length 9, concatenated (Sun et al. 2019, equation 1).

    y_I[i, j] = Σ_t x[i + I_h·t, j + I_w·t] · k[r - t] for I = (0, 1), (1, 0), (1, 1), (-1, 1) and r = 4. Diagonals are
    sheared into columns, so that maps may have any height and width. (N, C, H, W) → (N, filters, H, W).

    Args:
        c_in: Input channels.
        filters: Filters of each direction. Paper: four quarters. Released code: 2 : 2 : 1 : 1 with half as many again.
    """

    RADIUS = 4

    def __init__(self, c_in: int, filters: tuple[int, int, int, int]) -> None:
        super().__init__()
        length, r = 2 * self.RADIUS + 1, self.RADIUS
        across, down = ((1, length), (0, r)), ((length, 1), (r, 0))
        self.horizontal = nn.ConvTranspose2d(c_in, filters[0], across[0], padding=across[1])
        self.vertical = nn.ConvTranspose2d(c_in, filters[1], down[0], padding=down[1])
        self.forward_diagonal = nn.ConvTranspose2d(c_in, filters[2], down[0], padding=down[1])
        self.backward_diagonal = nn.ConvTranspose2d(c_in, filters[3], across[0], padding=across[1])

    def forward(self, x: Tensor) -> Tensor:
        """All four directions, in this order."""
        width = x.shape[-1]
        mirrored = self.forward_diagonal(_shear(x.flip(-1)))
        falling = _unshear(mirrored, width).flip(-1)
        rising = _unshear(self._up_right(_shear(x)), width)
        return torch.cat([self.horizontal(x), self.vertical(x), falling, rising], 1)

    def _up_right(self, sheared: Tensor) -> Tensor:
        """Along columns of the sheared map, where t runs upwards: (-1, 1) is i - t, j + t."""
        weight = self.backward_diagonal.weight.transpose(2, 3).flip(2)
        return F.conv_transpose2d(sheared, weight, self.backward_diagonal.bias, padding=(self.RADIUS, 0))


def upsampler(c_in: int, c_out: int, how: Up, kernel: int) -> nn.Module:
    """(N, C_in, H, W) → (N, C_out, 2H, 2W).

    Args:
        c_in: Input channels.
        c_out: Output channels; at least 4 for the one-dimensional ones.
        how: A transposed convolution; or the 1D decoder as in the paper (four quarters, ×2 bilinear) or as released
            (2 : 2 : 1 : 1 with 1.5 times the filters and nearest ×2; both diagonals are right, which they are not there).
        kernel: Of the transposed convolution: 2, 3 or 4.
    """
    if how == "transposed":
        padding = {2: 0, 3: 1, 4: 1}[kernel]
        return nn.ConvTranspose2d(c_in, c_out, kernel, 2, padding, output_padding=int(kernel == 3))
    if how == "1d":
        quarter = c_out // 4
        filters = (c_out - 3 * quarter, quarter, quarter, quarter)
        return nn.Sequential(Directional(c_in, filters), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    quarter = max(1, c_out // 4)
    released = Directional(c_in, (2 * quarter, 2 * quarter, quarter, quarter))
    return nn.Sequential(released, nn.Conv2d(6 * quarter, c_out, 1), nn.Upsample(scale_factor=2, mode="nearest"))


class LinkNetBlock(nn.Module):
    """1×1 to a quarter of the channels, upsampling by 2, 1×1, each with batch norm and ReLU (Zhou et al. 2018).

    (N, C, H, W) → (N, C_out, 2H, 2W), or the same size where `scale` is 1 (PP-LinkNet's undivided last stage).
    """

    def __init__(self, c_in: int, c_out: int, how: Up = "transposed", scale: int = 2) -> None:
        super().__init__()
        middle = max(4, c_in // 4)
        self.conv1 = nn.Conv2d(c_in, middle, 1)
        self.norm1 = nn.BatchNorm2d(middle)
        self.deconv2 = upsampler(middle, middle, how, 3) if scale == 2 else nn.ConvTranspose2d(middle, middle, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, c_out, 1)
        self.norm3 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.norm2(self.deconv2(x)))  # (N, C/4, 2H, 2W)
        return relu(self.norm3(self.conv3(x)))


def initialise(module: nn.Module) -> None:
    """He initialisation of convolutions, ones and zeros in batch norms, as ResNet is trained from scratch."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
