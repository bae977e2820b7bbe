"""Smooth noise that depends on the place alone, so that blocks drawn apart fit together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fractal_grid", "noise_at", "noise_grid", "uniform_hash"]

Floats = NDArray[np.float64]


def uniform_hash(seed: int, i: NDArray[np.int64], j: NDArray[np.int64]) -> Floats:
    """Uniform numbers in [0, 1) for lattice points, by the splitmix64 finaliser."""
    with np.errstate(over="ignore"):
        z = i.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + j.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        z = z + np.uint64(seed * 0x165667B19E3779F9 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def _smooth(t: Floats) -> Floats:
    return t * t * t * (t * (t * 6 - 15) + 10)


def noise_at(seed: int, x: Floats, y: Floats, wavelength: float) -> Floats:
    """Value noise in [-1, 1] at scattered places; twice differentiable.

    Args:
        seed: One field per seed.
        x: Any unit, the same as the wavelength's.
        y: Likewise.
        wavelength: Distance of the random lattice points.

    Returns:
        One number per place.
    """
    xs, ys = np.asarray(x) / wavelength, np.asarray(y) / wavelength
    ix, iy = np.floor(xs).astype(np.int64), np.floor(ys).astype(np.int64)
    tx, ty = _smooth(xs - ix), _smooth(ys - iy)
    low = uniform_hash(seed, ix, iy) * (1 - tx) + uniform_hash(seed, ix + 1, iy) * tx
    high = uniform_hash(seed, ix, iy + 1) * (1 - tx) + uniform_hash(seed, ix + 1, iy + 1) * tx
    return 2 * (low * (1 - ty) + high * ty) - 1


def noise_grid(seed: int, x: Floats, y: Floats, wavelength: float) -> NDArray[np.float32]:
    """`noise_at` on the product of two ascending axes, (len(y), len(x)), by two small matrix products."""
    wx, ix = _weights(x / wavelength)
    wy, iy = _weights(y / wavelength)
    jx, jy = np.meshgrid(ix, iy)
    lattice = uniform_hash(seed, jx, jy).astype(np.float32)
    return np.asarray(2 * (wy @ lattice @ wx.T) - 1, np.float32)


def _weights(t: Floats) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    cell = np.floor(t).astype(np.int64)
    index = np.arange(cell.min(), cell.max() + 2)
    out = np.zeros((len(t), len(index)), np.float32)
    part = _smooth(t - cell)
    rows = np.arange(len(t))
    out[rows, cell - index[0]] = 1 - part
    out[rows, cell - index[0] + 1] = part
    return out, index


def fractal_grid(seed: int, x: Floats, y: Floats, wavelength: float, octaves: int) -> NDArray[np.float32]:
    """Sum of octaves of `noise_grid`, each half as long and half as strong; within [-1, 1]."""
    total = sum(noise_grid(seed + k, x, y, wavelength / 2**k) / 2**k for k in range(octaves))
    return np.asarray(total / (2 - 2.0 ** (1 - octaves)), np.float32)
