"""Decoders: blocks from the coarsest features to the finest, then a head of logits."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._blocks import (
    Directional,
    DoubleConv,
    LinkNetBlock,
    ReLU,
    ResidualUnit,
    Up,
    conv_bn_relu,
    relu,
    resize,
    upsampler,
)
from roadfuse_core.models._encoder import Encoder

__all__ = ["DECODERS", "Decoder", "FineHead", "LinkNetDecoder", "LinkNetHead", "UNetDecoder"]

Skips = Sequence[Tensor]
Indices = Sequence[Tensor | None]


class Decoder(nn.Module, ABC):
    """Blocks one after the other; a fusion may look at, and change, what stands between them.

    Attributes:
        widths: Channels after each block.
        scales: Input pixels to one pixel after each block, along an edge.
        head: From the last block's features to logits at the input's size.
    """

    widths: tuple[int, ...]
    scales: tuple[int, ...]
    head: nn.Module

    @abstractmethod
    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """One block.

        Args:
            number: From 0, the coarsest.
            x: The context's output, or what the block before returned.
            skips: Features of all encoder stages, finest first.
            indices: Their max-pooling indices.

        Returns:
            (N, widths[number], H / scales[number], W / scales[number]).
        """

    def forward(self, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """All blocks and the head: (N, 1, H, W) logits."""
        for number in range(len(self.widths)):
            x = self.block(number, x, skips, indices)
        out: Tensor = self.head(x)
        return out


class LinkNetHead(nn.Module):
    """Upsampling by 2, 3×3, 3×3 to one logit (D-LinkNet); (N, C, H, W) → (N, 1, 2H, 2W)."""

    def __init__(self, c_in: int, middle: int, how: Up = "transposed") -> None:
        super().__init__()
        self.deconv = upsampler(c_in, middle, how, 4)
        self.conv = nn.Conv2d(middle, middle, 3, padding=1)
        self.logit = nn.Conv2d(middle, 1, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """(N, middle, 2H, 2W) before the logit."""
        return relu(self.conv(relu(self.deconv(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.logit(self.features(x))
        return out


class FineHead(nn.Module):
    """Ours: what leaves LinkNet's decoder at half size meets the input anew, at half and at full size, then one logit.

    LinkNet's finest skip is at a quarter of the size, which says where an edge lies to a few pixels.
    """

    def __init__(self, c_in: int, width: int, middle: int, how: Up) -> None:
        super().__init__()
        self.look = conv_bn_relu(c_in, middle)
        self.shrink = conv_bn_relu(middle, width, stride=2)
        self.mix_half = conv_bn_relu(2 * width, width)
        self.deconv = upsampler(width, middle, how, 4)
        self.mix_full = conv_bn_relu(2 * middle, middle)
        self.logit = nn.Conv2d(middle, 1, 3, padding=1)

    def forward(self, last: Tensor, x: Tensor) -> Tensor:
        """Logits (N, 1, H, W) of the decoder's last features (N, width, H/2, W/2) and the input (N, C, H, W)."""
        full = self.look(x)
        last = last + self.mix_half(torch.cat([last, self.shrink(full)], 1))
        out: Tensor = self.logit(self.mix_full(torch.cat([relu(self.deconv(last)), full], 1)))
        return out


class LinkNetDecoder(Decoder):
    """Blocks that halve the scale, skips added, over a ResNet (Chaurasia and Culurciello 2017)."""

    def __init__(self, encoder: Encoder, c_in: int, middle: int, how: Up) -> None:
        super().__init__()
        w, s = encoder.widths, encoder.scales
        self.widths = (w[2], w[1], w[0], w[0])
        self.scales = (s[2], s[1], s[0], s[0] // 2)
        before = (c_in, *self.widths)
        steps = (s[3] // s[2], 2, 2, 2)
        self.blocks = nn.ModuleList(LinkNetBlock(before[k], self.widths[k], how, steps[k]) for k in range(4))
        self.head = LinkNetHead(w[0], middle, how)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        x = self.blocks[number](x)
        return x + skips[2 - number] if number < 3 else x


class UNetDecoder(Decoder):
    """Upsample, concatenate the skip, convolve; down to the encoder's finest stage, then 1×1.

    Args:
        encoder: Any whose stages halve the size from 1 on.
        c_in: Channels of the context.
        how: The upsampling.
        residual: Residual units instead of double convolutions (Res-U-Net, DRUNet).
        plain_up: Upsampling keeps its input's channels and a 3×3 convolution comes before it (TernausNetV2).
    """

    def __init__(self, encoder: Encoder, c_in: int, how: Up, residual: bool = False, plain_up: bool = False) -> None:
        super().__init__()
        self.widths = tuple(reversed(encoder.widths[:-1]))
        self.scales = tuple(reversed(encoder.scales[:-1]))
        before = (c_in, *self.widths)
        ups, mixes = [], []
        for a, b in zip(before, self.widths, strict=False):
            up = upsampler(a, b, how, 4 if plain_up else 2)
            ups.append(nn.Sequential(conv_bn_relu(a, a), up, ReLU()) if plain_up else up)
            mixes.append(ResidualUnit(2 * b, b) if residual else conv_bn_relu(2 * b, b) if plain_up else DoubleConv(2 * b, b))
        self.ups, self.mixes = nn.ModuleList(ups), nn.ModuleList(mixes)
        self.head = nn.Conv2d(self.widths[-1], 1, 1)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        out: Tensor = self.mixes[number](torch.cat([self.ups[number](x), skips[-2 - number]], 1))
        return out


class UnpoolingDecoder(Decoder):
    """Max-unpooling by the encoder's indices, then convolutions that mirror it (SegNet), or transposed ones (DeconvNet).

    DeconvNet goes through two layers of 4,096 channels, 7×7 and 1×1, at the coarsest scale; they keep the size here, so
    that any input size will do.
    """

    DEPTHS = (3, 3, 3, 2, 2)

    def __init__(self, encoder: Encoder, c_in: int, deconv: bool, how: Up) -> None:
        super().__init__()
        outputs = (*reversed(encoder.widths[:4]), encoder.widths[0])
        self.widths, self.scales = outputs, tuple(reversed(encoder.scales[:-1]))
        self.bottom: nn.Module = nn.Identity()
        if deconv:
            wide = 8 * c_in
            self.bottom = nn.Sequential(conv_bn_relu(c_in, wide, 7), conv_bn_relu(wide, wide, 1), conv_bn_relu(wide, c_in, 7))
        blocks = []
        before = c_in
        for channels, depth in zip(outputs, self.DEPTHS, strict=True):
            steps = [before] * depth + [channels]
            blocks.append(nn.Sequential(*(_mirror(a, b, deconv, how) for a, b in itertools.pairwise(steps))))
            before = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(outputs[-1], 1, 1 if deconv else 3, padding=0 if deconv else 1)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        x = self.bottom(x) if number == 0 else x
        where = indices[len(indices) - 1 - number]
        assert where is not None
        out: Tensor = self.blocks[number](_unpool(x, where))
        return out


def _mirror(c_in: int, c_out: int, deconv: bool, how: Up) -> nn.Module:
    """A layer of the decoder; DeconvNet's transposed 3×3 may be the 1D decoder's four directions."""
    if not deconv:
        return conv_bn_relu(c_in, c_out)
    quarter = c_out // 4
    conv = nn.ConvTranspose2d(c_in, c_out, 3, 1, 1, bias=False)
    layer = conv if how == "transposed" else Directional(c_in, (quarter, quarter, quarter, quarter))
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), ReLU())


def _unpool(x: Tensor, indices: Tensor) -> Tensor:
    """Values back to where their maxima were; windows do not overlap, so that each place is written once."""
    n, c, h, w = x.shape
    out = x.new_zeros(n, c, 4 * h * w)
    return out.scatter(2, indices.flatten(2), x.flatten(2)).reshape(n, c, 2 * h, 2 * w)


class FcnDecoder(Decoder):
    """FCN-8: 7×7 and 1×1 at 1/32, a score of every scale, summed from coarse to fine, the last step ×8 (Long et al. 2015)."""

    def __init__(self, encoder: Encoder, c_in: int, scores: int) -> None:
        super().__init__()
        self.widths, self.scales = (scores, scores, scores), (16, 8, 1)
        wide = 8 * c_in
        self.bottom = nn.Sequential(
            conv_bn_relu(c_in, wide, 7), conv_bn_relu(wide, wide, 1), nn.Conv2d(wide, scores, 1)
        )  # fmt: skip
        # The features of pool4 and pool3 are those that enter the stages at 1/16 and 1/8.
        self.sides = nn.ModuleList(nn.Conv2d(encoder.widths[k], scores, 1) for k in (3, 2))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(scores, scores, 4, 2, 1) for _ in range(2))
        self.last = nn.ConvTranspose2d(scores, scores, 16, 8, 4)
        self.head = nn.Conv2d(scores, 1, 1)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        if number == 2:
            out: Tensor = self.last(x)
            return out
        x = self.bottom(x) if number == 0 else x
        # Pooled features of a stage: what its successor has pooled.
        side = self.sides[number](F.max_pool2d(skips[3 - number], 2))
        up: Tensor = self.ups[number](x)
        return up + side


class QuarterDecoder(Decoder):
    """Features resized to 1/4, joined with the encoder's there, convolved, and a logit resized by 4.

    DeepLabv3+ (Chen et al. 2018): the skip through 1×1 to 48 channels, two 3×3 of the context's width. E-Road's ×4
    decoder: no skip, one 3×3; its PointRend head makes the rest.
    """

    def __init__(self, encoder: Encoder, c_in: int, skip: int) -> None:
        super().__init__()
        self.widths, self.scales = (c_in,), (4,)
        self.side = conv_bn_relu(encoder.widths[0], skip, 1) if skip else None
        mixes = [conv_bn_relu(c_in + skip, c_in)] + ([conv_bn_relu(c_in, c_in)] if skip else [])
        self.mix = nn.Sequential(*mixes)
        self.head = _ScaledLogit(c_in, 4)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        x = resize(x, skips[0])
        out: Tensor = self.mix(x if self.side is None else torch.cat([x, self.side(skips[0])], 1))
        return out


class CoarseDecoder(Decoder):
    """PSPNet (Zhao et al. 2017): one 3×3 on the pooled pyramid, a logit resized to the input."""

    def __init__(self, encoder: Encoder, c_in: int) -> None:
        super().__init__()
        middle = max(4, c_in // 4)
        self.widths, self.scales = (middle,), (encoder.scales[-1],)
        self.mix = conv_bn_relu(c_in, middle)
        self.head = _ScaledLogit(middle, encoder.scales[-1])

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        out: Tensor = self.mix(x)
        return out


class RoadMapperDecoder(Decoder):
    """DeepRoadMapper's segmentation (Máttyus et al. 2017): three transposed convolutions with added skips, then ×4.

    RoadTracer's paper compares with a plainer one (Bastani et al. 2018): the same without skips.
    """

    def __init__(self, encoder: Encoder, c_in: int, skips: bool, how: Up) -> None:
        super().__init__()
        w, s = encoder.widths, encoder.scales
        self.widths, self.scales, self.skips = (w[2], w[1], w[0]), (s[2], s[1], s[0]), skips
        before = (c_in, *self.widths)
        self.ups = nn.ModuleList(
            nn.Sequential(upsampler(a, b, how, 4), nn.BatchNorm2d(b), ReLU()) for a, b in zip(before, self.widths, strict=False)
        )
        self.head = nn.ConvTranspose2d(w[0], 1, 8, 4, 2)

    def block(self, number: int, x: Tensor, skips: Skips, indices: Indices) -> Tensor:
        """See `Decoder.block`."""
        up: Tensor = self.ups[number](x)
        return up + skips[2 - number] if self.skips else up


class _ScaledLogit(nn.Module):
    """One logit by 1×1, resized bilinearly by a factor."""

    def __init__(self, c_in: int, factor: int) -> None:
        super().__init__()
        self.logit, self.factor = nn.Conv2d(c_in, 1, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 1, factor·H, factor·W)."""
        return F.interpolate(self.logit(x), scale_factor=float(self.factor), mode="bilinear", align_corners=False)


DECODERS = ("linknet", "unet", "res-unet", "ternausnet", "segnet", "deconv", "fcn8", "deeplabv3+", "x4", "pspnet",
            "deeproadmapper", "roadtracer")  # fmt: skip


def build_decoder(kind: str, encoder: Encoder, c_in: int, how: Up, channels: int, low_level: int) -> Decoder:
    """A decoder by name.

    Args:
        kind: One of `DECODERS`.
        encoder: Whose skips it takes.
        c_in: Channels of the context.
        how: Upsampling, for decoders that have transposed convolutions of stride 2.
        channels: Of the heads of LinkNet (published: 32) and the scores of FCN-8.
        low_level: Channels of DeepLabv3+'s skip (published: 48).
    """
    if kind == "linknet":
        return LinkNetDecoder(encoder, c_in, channels, how)
    if kind in ("unet", "res-unet", "ternausnet"):
        return UNetDecoder(encoder, c_in, how, kind == "res-unet", kind == "ternausnet")
    if kind in ("segnet", "deconv"):
        return UnpoolingDecoder(encoder, c_in, kind == "deconv", how)
    if kind == "fcn8":
        return FcnDecoder(encoder, c_in, channels)
    if kind in ("deeplabv3+", "x4"):
        return QuarterDecoder(encoder, c_in, low_level if kind == "deeplabv3+" else 0)
    if kind == "pspnet":
        return CoarseDecoder(encoder, c_in)
    return RoadMapperDecoder(encoder, c_in, kind == "deeproadmapper", how)
