"""PointRend: uncertain pixels are decided once more by a small network (Kirillov et al. 2020, E-Road section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PointRend", "sample_points", "uncertain_points"]

OVERSAMPLING = 4.5
IMPORTANT = 0.8
TRAINING_POINTS = 162
# Of the pixels of every step of the rendering; E-Road gives no number for inference.
RENDERED_SHARE = 1 / 16


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Features at points, bilinear.

    Args:
        features: (N, C, H, W).
        points: (N, P, 2) x and y from 0 to 1 over the map's edges.

    Returns:
        (N, C, P).
    """
    # Half precision places points on a raster of its own.
    exact = torch.promote_types(features.dtype, torch.float32)
    grid = 2 * points[:, :, None].to(exact) - 1
    return F.grid_sample(features.to(exact), grid, align_corners=False, padding_mode="border").squeeze(3).to(features.dtype)


def uncertain_points(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pixels whose probability is nearest to 0.5 (E-Road, equation 7).

    Args:
        logits: (N, 1, H, W).
        count: How many.

    Returns:
        (N, P) pixel numbers and (N, P, 2) their centres, x and y from 0 to 1.
    """
    h, w = logits.shape[-2:]
    place = logits.flatten(1).abs().topk(min(count, h * w), dim=1, largest=False).indices
    centre = torch.stack([(place % w + 0.5) / w, (place // w + 0.5) / h], 2)
    return place, centre.to(logits.dtype)


class PointRend(nn.Module):
    """The point head: an MLP of three hidden layers of 256, the coarse prediction appended before each.

    Args:
        c_fine: Channels of the fine features.
        hidden: Width of the hidden layers.
    """

    def __init__(self, c_fine: int, hidden: int) -> None:
        super().__init__()
        widths = (c_fine, hidden, hidden, hidden)
        self.layers = nn.ModuleList(nn.Conv1d(c + 1, hidden, 1) for c in widths[:3])
        self.logit = nn.Conv1d(hidden + 1, 1, 1)

    def decide(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(N, P) logits from (N, 1, P) coarse logits and (N, C, P) fine features."""
        x = fine
        for layer in self.layers:
            x = F.relu(layer(torch.cat([x, coarse], 1)))
        out: Tensor = self.logit(torch.cat([x, coarse], 1)).squeeze(1)
        return out

    def points(self, coarse: Tensor, fine: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Logits at points for training: of k·N random ones the β·N most uncertain, the others at random.

        Args:
            coarse: (N, 1, h, w) logits.
            fine: (N, C, H, W) features.
            generator: Of the points.

        Returns:
            (N, P) logits and (N, P, 2) x and y from 0 to 1.
        """
        n = len(coarse)
        many = torch.rand(n, int(OVERSAMPLING * TRAINING_POINTS), 2, device=coarse.device, generator=generator)
        many = many.to(torch.promote_types(coarse.dtype, torch.float32))
        chosen = int(IMPORTANT * TRAINING_POINTS)
        order = sample_points(coarse, many).squeeze(1).abs().argsort(1)[:, :chosen]
        at = torch.cat([many.gather(1, order[..., None].expand(-1, -1, 2)), many[:, : TRAINING_POINTS - chosen]], 1)
        return self.decide(sample_points(coarse, at), sample_points(fine, at)), at

    def render(self, coarse: Tensor, fine: Tensor, steps: int) -> Tensor:
        """Double the size some times, and decide the most uncertain pixels anew each time.

        Args:
            coarse: (N, 1, h, w) logits.
            fine: (N, C, H, W) features.
            steps: How often.

        Returns:
            (N, 1, h·2^steps, w·2^steps) logits.
        """
        logits = coarse
        for _ in range(steps):
            logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
            count = max(1, int(logits.shape[-2] * logits.shape[-1] * RENDERED_SHARE))
            place, at = uncertain_points(logits, count)
            decided = self.decide(sample_points(coarse, at), sample_points(fine, at))
            logits = logits.flatten(1).scatter(1, place, decided).reshape(logits.shape)
        return logits
