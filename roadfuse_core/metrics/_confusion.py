"""Confusion counts and the scores that follow from them (DESIGN.md, Metrics)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Confusion", "Scores", "confusion", "scores"]


class Confusion(NamedTuple):
    """Pixels by prediction and label, where the label is known; pixels without a prediction count as not road."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def iou(self) -> float:
        """Intersection over union of road; NaN where neither has any."""
        union = self.tp + self.fp + self.fn
        return self.tp / union if union else float("nan")


def confusion(predicted: NDArray[np.bool_], label: NDArray[np.bool_], known: NDArray[np.bool_]) -> Confusion:
    """Counts over the known pixels of arrays of one shape."""
    p, t = predicted & known, label & known
    tp, positive, true, every = int((p & t).sum()), int(p.sum()), int(t.sum()), int(known.sum())
    return Confusion(tp, positive - tp, true - tp, every - positive - true + tp)


@dataclass(frozen=True)
class Scores:
    """Scores of some tiles; NaN where there is nothing to divide by.

    Attributes:
        a_iou: Mean IoU of the tiles that have any.
        a_iou_batch8: Mean of the IoU of tiles joined by eight in row-major order, as Sun et al. 2019 and CMMPNet evaluate.
        g_iou: Sum of intersections over sum of unions: all tiles as one map.
        precision: Of road pixels predicted.
        recall: Of road pixels labelled.
        f1: Harmonic mean of both.
        tiles: Tiles with known pixels.
        tiles_without_road: Those with road in neither label nor prediction, left out of `a_iou`.
    """

    a_iou: float
    a_iou_batch8: float
    g_iou: float
    precision: float
    recall: float
    f1: float
    tiles: int
    tiles_without_road: int


def scores(tiles: Sequence[Confusion]) -> Scores:
    """Scores of tiles in row-major order."""
    tiles = [t for t in tiles if sum(t)]
    ious = [t.iou for t in tiles if not np.isnan(t.iou)]
    batches = [_total(tiles[k : k + 8]).iou for k in range(0, len(tiles), 8)]
    batches = [b for b in batches if not np.isnan(b)]
    whole = _total(tiles)
    return Scores(
        a_iou=_ratio(sum(ious), len(ious)), a_iou_batch8=_ratio(sum(batches), len(batches)), g_iou=whole.iou,
        precision=_ratio(whole.tp, whole.tp + whole.fp), recall=_ratio(whole.tp, whole.tp + whole.fn),
        f1=_ratio(2 * whole.tp, 2 * whole.tp + whole.fp + whole.fn), tiles=len(tiles),
        tiles_without_road=len(tiles) - len(ious),
    )  # fmt: skip


def _total(tiles: Sequence[Confusion]) -> Confusion:
    return Confusion(*(sum(column) for column in zip(*tiles, strict=True))) if tiles else Confusion(0, 0, 0, 0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
