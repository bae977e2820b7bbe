"""D-LinkNet34 with image and GPS input (Sun et al. 2019, section 3.1 and figure 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._config import NetworkConfig
from roadfuse_core.models._decoder import DilatedCentre, LinkNetBlock, LinkNetHead
from roadfuse_core.models._encoder import ResNetEncoder, initialise

__all__ = ["DLinkNet34", "build_network"]


class DLinkNet34(nn.Module):
    """Encoder, dilated centre, four LinkNet blocks with added skips, head.

    31.1 M parameters at width 1 with three channels (Zhou et al. 2018).
    """

    window_multiple = 32

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        ch = config.channels
        names = list(config.modalities)
        joined = sum(config.modalities.values()) if config.fusion == "concatenate" else config.modalities[names[0]]
        s1, s2, s3, s4 = ch(64), ch(128), ch(256), ch(512)
        self.encoder = ResNetEncoder(joined, ch(64), (s1, s2, s3, s4))
        extra = names[1:] if config.fusion == "stems" else []
        self.stems = nn.ModuleDict({n: nn.Conv2d(config.modalities[n], ch(64), 7, 2, 3, bias=False) for n in extra})
        self.centre = DilatedCentre(s4)
        self.decoder4 = LinkNetBlock(s4, s3)
        self.decoder3 = LinkNetBlock(s3, s2)
        self.decoder2 = LinkNetBlock(s2, s1)
        self.decoder1 = LinkNetBlock(s1, s1)
        self.head = LinkNetHead(s1, ch(32))
        initialise(self)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of road.

        Args:
            inputs: Each modality of the configuration as (N, C, H, W) float; zeros where it is missing. Any H, W.

        Returns:
            (N, 1, H, W) logits.
        """
        names = list(self.config.modalities)
        height, width = inputs[names[0]].shape[-2:]
        padded = [_pad(inputs[n], self.window_multiple) for n in names]
        if self.stems:
            extra = torch.stack([self.stems[n](x) for n, x in zip(names[1:], padded[1:], strict=True)]).sum(0)
            e1, e2, e3, e4 = self.encoder(padded[0], extra)
        else:
            e1, e2, e3, e4 = self.encoder(torch.cat(padded, 1))
        y = self.centre(e4)  # (N, 512, H/32, W/32)
        y = self.decoder4(y) + e3  # (N, 256, H/16, W/16)
        y = self.decoder3(y) + e2  # (N, 128, H/8, W/8)
        y = self.decoder2(y) + e1  # (N, 64, H/4, W/4)
        y = self.decoder1(y)  # (N, 64, H/2, W/2)
        logits: Tensor = self.head(y)
        return logits[..., :height, :width]


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Zeros to the right and below, up to the next multiple."""
    height, width = x.shape[-2:]
    right, below = -width % multiple, -height % multiple
    return F.pad(x, (0, right, 0, below)) if right or below else x


def build_network(config: NetworkConfig) -> DLinkNet34:
    """The network that a configuration describes, freshly initialised."""
    return DLinkNet34(config)
