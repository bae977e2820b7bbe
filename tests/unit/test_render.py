"""Layers are the same whatever window looks at them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from roadfuse_core.cubes import Layer, halo_px, render

LAYERS = [
    Layer(kind="binary"),
    Layer(kind="count", cap=4, sigma_px=2, radius_px=6),
    Layer(kind="log_count", cap=64, sigma_px=1, radius_px=1, gain=6),
    Layer(kind="speed", cap=30),
    Layer(kind="sin"),
    Layer(kind="cos", sigma_px=1, radius_px=1),
    Layer(kind="interval", cap=60),
]


def _sums(seed, shape):
    rng = np.random.default_rng(seed)
    count = rng.poisson(0.4, shape)
    return {
        "count": count,
        "speed_sum": count * rng.integers(0, 30_000, shape),
        "speed_count": count,
        "sin_sum": count * rng.integers(-10_000, 10_001, shape),
        "cos_sum": count * rng.integers(-10_000, 10_001, shape),
        "bearing_count": count,
        "interval_sum": count * rng.integers(0, 60_000, shape),
        "interval_count": count,
    }


@given(st.integers(0, 1000), st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12))
def test_neighbouring_windows_agree(seed, r, c, h, w):
    halo = halo_px(LAYERS)
    sums = _sums(seed, (40 + 2 * halo, 40 + 2 * halo))
    whole = render(sums, LAYERS)
    part = render({k: v[r : r + h + 2 * halo, c : c + w + 2 * halo] for k, v in sums.items()}, LAYERS)
    assert np.array_equal(part, whole[:, r : r + h, c : c + w])


def test_values_from_the_definitions():
    sums = {k: np.zeros((5, 5), np.int64) for k in _sums(0, (1, 1))}
    for name, value in (("count", 3), ("speed_sum", 45_000), ("speed_count", 3), ("cos_sum", -30_000), ("bearing_count", 3)):
        sums[name][2, 2] = value
    binary, log, speed, cos, interval = render(
        sums,
        [Layer(kind="binary"), Layer(kind="log_count", cap=7), Layer(kind="speed"), Layer(kind="cos"), Layer(kind="interval")],
    )
    assert binary[2, 2] == 1
    assert binary.sum() == 1
    assert log[2, 2] == pytest.approx(np.log(4) / np.log(8))
    assert speed[2, 2] == pytest.approx(15.0)
    assert cos[2, 2] == pytest.approx(-1.0)
    assert not interval.any()


def test_a_cap_is_never_exceeded():
    assert render({"count": np.full((3, 3), 10**6)}, [Layer(kind="log_count", cap=64)]).max() == 1


@given(st.integers(0, 10**6), st.floats(0.5, 6), st.integers(1, 14), st.integers(1, 40), st.integers(1, 40))
def test_smoothing_is_scipys(seed, sigma, radius, height, width):
    x = np.random.default_rng(seed).poisson(0.2, (height, width)).astype(np.int64)
    got = render({"count": x}, [Layer(kind="count", sigma_px=sigma, radius_px=radius)], halo=0)[0]
    expected = x.astype(np.float64)
    for axis in (0, 1):
        expected = ndimage.gaussian_filter1d(expected, sigma, axis, mode="constant", radius=radius)
    assert np.abs(got - expected).max() <= 1e-6 * max(1, x.max())
