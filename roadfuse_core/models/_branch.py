"""Encoder, context and decoder of one input, taken step by step by the fusions."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from roadfuse_core.models._config import NetworkConfig
from roadfuse_core.models._context import build_context
from roadfuse_core.models._decoder import FineHead, build_decoder
from roadfuse_core.models._encoder import (
    Encoder,
    ResidualEncoder,
    ResNetEncoder,
    UNetEncoder,
    VggEncoder,
    WideResNetEncoder,
)

__all__ = ["Branch", "Encoded", "build_encoder"]


@dataclass
class Encoded:
    """What an encoder has made so far.

    Attributes:
        skips: Features of its stages, finest first.
        indices: Their max-pooling indices.
    """

    skips: list[Tensor] = field(default_factory=list)
    indices: list[Tensor | None] = field(default_factory=list)


def build_encoder(config: NetworkConfig, c_in: int) -> Encoder:
    """The configuration's encoder for some input channels."""
    ch = config.channels
    if config.encoder.startswith("resnet"):
        return ResNetEncoder(c_in, (ch(64), ch(128), ch(256), ch(512)), config.encoder, config.last_stride)
    if config.encoder == "vgg16":
        return VggEncoder(c_in, (ch(64), ch(128), ch(256), ch(512), ch(512)))
    if config.encoder == "wideresnet38":
        return WideResNetEncoder(c_in, (ch(64), ch(128), ch(256), ch(512), ch(1024)))
    widths = (ch(64), ch(128), ch(256), ch(512), ch(1024))
    return UNetEncoder(c_in, widths) if config.encoder == "unet" else ResidualEncoder(c_in, widths)


class Branch(nn.Module):
    """A whole network of one input.

    Args:
        config: Its parts.
        c_in: Input channels.
        whole: With context and decoder; an encoder alone otherwise.
    """

    def __init__(self, config: NetworkConfig, c_in: int, whole: bool = True) -> None:
        super().__init__()
        self.encoder = build_encoder(config, c_in)
        self.scale = max(self.encoder.scales)
        if whole:
            ch = config.channels
            self.context, self.context_width = build_context(config.context, self.encoder.widths[-1], ch(256))
            self.decoder = build_decoder(config.decoder, self.encoder, self.context_width, config.up, ch(32), ch(48))
            if config.head == "fine":
                self.decoder.head = FineHead(c_in, self.decoder.widths[-1], ch(32), config.up)

    def encode(self, x: Tensor, stem: Tensor | None = None) -> Encoded:
        """All stages."""
        made = Encoded()
        for number in range(len(self.encoder.widths)):
            x = self.stage(number, x, made, stem if number == 0 else None)
        return made

    def stage(self, number: int, x: Tensor, made: Encoded, stem: Tensor | None = None) -> Tensor:
        """One stage; its features are also kept as a skip."""
        x, indices = self.encoder.stage(number, x, stem)
        made.skips.append(x)
        made.indices.append(indices)
        return x

    def decode(self, made: Encoded) -> list[Tensor]:
        """The context's output and that of every block of the decoder."""
        out: list[Tensor] = [self.context(made.skips[-1])]
        for number in range(len(self.decoder.widths)):
            out.append(self.decoder.block(number, out[-1], made.skips, made.indices))
        return out

    def logits(self, last: Tensor, x: Tensor) -> Tensor:
        """Logits (N, 1, H, W) of the decoder's last features; the fine head sees the input (N, C, H, W) again."""
        head = self.decoder.head
        out: Tensor = head(last, x) if isinstance(head, FineHead) else head(last)
        return out

    def forward(self, x: Tensor, stem: Tensor | None = None) -> Tensor:
        """Logits (N, 1, H, W) of (N, C, H, W), both multiples of `scale`."""
        return self.logits(self.decode(self.encode(x, stem))[-1], x)
