"""Losses of the papers: every one a mean over samples, over pixels whose label is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from roadfuse_core.models._base import Network, Prediction
from roadfuse_core.models._pointrend import sample_points

__all__ = ["LOSSES", "bce", "bce_dice", "deep_loss", "dice", "distance_weighted_bce", "focal", "road_distance"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
NEAR = 0.3


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over the known pixels of each sample, then over samples; (N, …) → ()."""
    weighed = (values * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    return weighed.mean()


def bce(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Binary cross entropy.

    Args:
        logits: (N, …).
        labels: The same shape, 0 or 1.
        known: The same shape, 1 where the label is known.
    """
    return _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), known)


def dice(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """1 - (2·Σpt + 1) / (Σp + Σt + 1), of each sample; arguments as of `bce`."""
    p, t = (logits.sigmoid() * known).flatten(1), (labels * known).flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


def bce_dice(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Their sum (Sun et al. 2019 and CMMPNet, as released); arguments as of `bce`."""
    return bce(logits, labels, known) + dice(logits, labels, known)


def focal(logits: Tensor, labels: Tensor, known: Tensor, alpha: float = 0.25, gamma: float = 0.5) -> Tensor:
    """-α_t·(1 - p_t)^γ·log p_t, with α on road and 1 - α elsewhere (PP-LinkNet as released); arguments as of `bce`."""
    log_p = -F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    weight = alpha * labels + (1 - alpha) * (1 - labels)
    return _mean(-weight * (1 - log_p.exp()).clamp(min=1e-6) ** gamma * log_p, known)


def road_distance(labels: Tensor) -> Tensor:
    """Exact Euclidean distance of each pixel's centre to the nearest road's, on the labels' device.

    Args:
        labels: (N, 1, H, W), above 0 is road.

    Returns:
        (N, 1, H, W) float pixels; infinite in samples without road.
    """
    h, w = labels.shape[-2:]
    row = torch.arange(h, device=labels.device, dtype=torch.float32)[:, None]
    road = labels > 0
    above = torch.where(road, row, -torch.inf).cummax(2).values
    below = torch.where(road, row, torch.inf).flip(2).cummin(2).values.flip(2)
    column = torch.minimum(row - above, below - row) ** 2  # to the nearest road of the same column
    best = torch.full_like(column, torch.inf)
    place = torch.arange(w, device=labels.device, dtype=torch.float32)
    for k in range(w):
        best = torch.minimum(best, column[..., k : k + 1] + (place - k) ** 2)
    return best.sqrt()


def distance_weighted_bce(logits: Tensor, labels: Tensor, known: Tensor, distance: Tensor | None = None) -> Tensor:
    """E-Road's loss: -(1/N)·Σ [α1·t·log y + α2·e^g(l)·(1 - t)·log(1 - y)].

    g(l) is l / max l up to 0.3·max l and 0.3 beyond; α1 and α2 are the shares of the other class in a sample. A sample
    without road has α2 = 0 by the formula and would teach nothing: its pixels weigh 1.

    Args:
        logits: (N, 1, H, W).
        labels: The same shape.
        known: The same shape.
        distance: `road_distance` of the labels, if it is at hand.
    """
    far = road_distance(labels) if distance is None else distance
    some = torch.isfinite(far)
    far = torch.where(some, far, 0.0)
    g = (far / far.flatten(1).amax(1).clamp(min=1)[:, None, None, None]).clamp(max=NEAR)
    road = (labels * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    share = road[:, None, None, None]
    weight = labels * (1 - share) + (1 - labels) * share * g.exp()
    weight = torch.where(some, weight, 1.0)
    return _mean(weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), known)


LOSSES: dict[str, Loss] = {
    "bce": bce, "dice": dice, "bce+dice": bce_dice, "focal": focal, "focal-paper": partial(focal, alpha=0.5),
    "distance": distance_weighted_bce,
}  # fmt: skip


def deep_loss(network: Network, prediction: Prediction, labels: Tensor, known: Tensor, loss: Loss) -> Tensor:
    """The loss of the logits and, by their weights, of all auxiliary logits.

    Labels are reduced to an auxiliary's scale by their maximum, so that thin roads survive; a reduced pixel is known if
    any of its pixels is. Point logits are compared, by cross entropy, with the labels at their points.

    Args:
        network: Whose weights of auxiliary logits apply.
        prediction: Its prediction in training.
        labels: (N, 1, H, W), 0 or 1.
        known: The same shape.
        loss: One of `LOSSES`.
    """
    total = loss(prediction.logits, labels, known)
    m = network.window_multiple
    padding = (0, -labels.shape[-1] % m, 0, -labels.shape[-2] % m)
    whole, sure = F.pad(labels * known, padding), F.pad(known, padding)
    for name, weight in network.auxiliary_weights.items():
        logits = prediction.auxiliary[name]
        if logits.dim() == 2:
            at = prediction.maps[name]
            expected, there = (sample_points(x, at).squeeze(1).round() for x in (whole, sure))
            total = total + weight * bce(logits, expected, there)
            continue
        factor = whole.shape[-1] // logits.shape[-1]
        small, there = (F.max_pool2d(x, factor) for x in (whole, sure))
        total = total + weight * loss(logits, small, there)
    return total
