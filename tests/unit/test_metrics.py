"""Scores against plain arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from roadfuse_core.metrics import Confusion, confusion, scores

masks = arrays(bool, (6, 7))


@given(masks, masks, masks)
def test_counts_are_a_partition_of_the_known(p, t, known):
    c = confusion(p, t, known)
    assert sum(c) == known.sum()
    assert c.tp == (p & t & known).sum()
    assert c.fp == (p & ~t & known).sum()
    assert c.fn == (~p & t & known).sum()
    assert c.tn == (~p & ~t & known).sum()


@given(masks, masks)
def test_iou_is_symmetric_and_within_zero_and_one(p, t):
    every = np.ones_like(p)
    a, b = confusion(p, t, every).iou, confusion(t, p, every).iou
    assert (math.isnan(a) and math.isnan(b)) or (a == b and 0 <= a <= 1)


@given(st.lists(st.builds(Confusion, *[st.integers(0, 50)] * 4), min_size=1, max_size=30))
def test_g_iou_is_that_of_all_tiles_as_one(tiles):
    s = scores(tiles)
    tp, fp, fn, _ = (sum(c) for c in zip(*tiles, strict=True))
    if tp + fp + fn:
        assert s.g_iou == pytest.approx(tp / (tp + fp + fn))
        assert s.f1 == pytest.approx(2 * s.g_iou / (1 + s.g_iou))
    else:
        assert math.isnan(s.g_iou)


def test_tiles_without_road_are_left_out_and_counted():
    s = scores([Confusion(1, 1, 0, 2), Confusion(0, 0, 0, 4), Confusion(2, 0, 0, 2), Confusion(0, 0, 0, 0)])
    assert s.a_iou == pytest.approx(0.75)
    assert (s.tiles, s.tiles_without_road) == (3, 1)


def test_batches_of_eight_in_order():
    tiles = [Confusion(1, 0, 0, 0)] * 8 + [Confusion(0, 1, 0, 0)] * 4
    assert scores(tiles).a_iou_batch8 == pytest.approx(0.5)
    assert scores(tiles).a_iou == pytest.approx(8 / 12)
