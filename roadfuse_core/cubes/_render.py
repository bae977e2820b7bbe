"""From integer sums to the layers that a network sees; scales are frozen, never taken from the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FIXED_POINT", "MEANS", "Layer", "halo_px", "render"]

# Array name → integer units per unit of the quantity.
FIXED_POINT = {"count": 1, "speed_sum": 1000, "speed_count": 1, "sin_sum": 10_000, "cos_sum": 10_000,
               "bearing_count": 1, "interval_sum": 1000, "interval_count": 1}  # fmt: skip
Kind = Literal["binary", "count", "log_count", "speed", "sin", "cos", "interval"]
# Layers that are a mean: the sum, and the number of samples in it.
MEANS: dict[str, tuple[str, str]] = {
    "speed": ("speed_sum", "speed_count"),
    "sin": ("sin_sum", "bearing_count"),
    "cos": ("cos_sum", "bearing_count"),
    "interval": ("interval_sum", "interval_count"),
}


class Layer(BaseModel):
    """One layer of GPS input (Sun et al. 2019, section 3.1; logarithm before the Gaussian as in CMMPNet).

    Attributes:
        kind: binary (any point), count, log_count = log(1+n)/log(1+cap), or a mean per pixel: speed (m/s),
            sin and cos of the bearing (-1 … 1), interval (seconds). Where a mean has no sample it is 0.
        cap: The value that becomes 1; larger ones stay at 1 for log_count, and means are divided by it.
        sigma_px: Standard deviation of a Gaussian that smooths the layer; 0 for none.
        radius_px: Half the kernel's size; size 3 is radius 1.
        gain: Factor on the finished layer, so that a lone point is not lost beside the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field(description="binary, count, log_count, speed, sin, cos or interval")
    cap: float = Field(1.0, gt=0, description="the value that becomes 1")
    sigma_px: float = Field(0.0, ge=0, description="standard deviation of a Gaussian; 0 for none")
    radius_px: int = Field(0, ge=0, description="half the size of its kernel")
    gain: float = Field(1.0, gt=0, description="factor on the finished layer")

    @property
    def arrays(self) -> tuple[str, ...]:
        """The cube arrays that this layer reads; of a bearing both components, so that it can be turned."""
        if self.kind in ("sin", "cos"):
            return ("sin_sum", "cos_sum", "bearing_count")
        return MEANS.get(self.kind, ("count",))


def halo_px(layers: Sequence[Layer]) -> int:
    """Pixels around a window that smoothing needs."""
    return max((layer.radius_px for layer in layers if layer.sigma_px > 0), default=0)


def render(sums: Mapping[str, NDArray[np.int64]], layers: Sequence[Layer], halo: int | None = None) -> NDArray[np.float32]:
    """Layers of one window.

    Args:
        sums: (H + 2·halo, W + 2·halo) integers for every array that the layers read, in fixed-point units.
        layers: What to render, in channel order.
        halo: Pixels of context on every side; at least `halo_px(layers)`, which is the default.

    Returns:
        (len(layers), H, W) float32. The same values come out for any window that covers a pixel.
    """
    halo = halo_px(layers) if halo is None else halo
    crop = slice(halo, -halo) if halo else slice(None)
    shape = next(iter(sums.values()))[crop, crop].shape
    out = np.empty((len(layers), *shape), np.float32)
    for channel, layer in enumerate(layers):
        out[channel] = _layer(sums, layer)[crop, crop]
    return out


def _layer(sums: Mapping[str, NDArray[np.int64]], layer: Layer) -> NDArray[np.float32]:
    if layer.kind in MEANS:
        total, samples = (sums[name] for name in MEANS[layer.kind])
        unit = FIXED_POINT[MEANS[layer.kind][0]] * layer.cap
        out = (total / (np.maximum(samples, 1) * unit)).astype(np.float32)
    else:
        count = sums["count"].astype(np.float32)
        out = {"binary": lambda: (count > 0).astype(np.float32), "count": lambda: count / np.float32(layer.cap),
               "log_count": lambda: np.minimum(np.log1p(count) / np.float32(np.log1p(layer.cap)), 1)}[layer.kind]()  # fmt: skip
    if layer.sigma_px > 0:
        away = np.arange(-layer.radius_px, layer.radius_px + 1)
        weights = np.exp(-0.5 * (away / layer.sigma_px) ** 2)
        out = _smooth(np.ascontiguousarray(out, np.float32), (weights / weights.sum()).astype(np.float32))
    return out * np.float32(layer.gain)


@njit(cache=True, nogil=True)
def _smooth(x, weights):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """A symmetric separable kernel with zeros outside, (H, W) float32; each pixel by the same additions, wherever it lies.

    A test compares it with SciPy's filter.
    """
    height, width = x.shape
    n = len(weights)
    radius = n // 2
    wide = np.zeros((height + 2 * radius, width), np.float32)
    row = np.zeros(width + 2 * radius, np.float32)
    for i in range(height):
        row[radius : radius + width] = x[i]
        out = wide[i + radius]
        for k in range(n):
            w, part = weights[k], row[k : k + width]
            for j in range(width):
                out[j] += w * part[j]
    made = np.zeros((height, width), np.float32)
    for i in range(height):
        out = made[i]
        for k in range(n):
            w, part = weights[k], wide[i + k]
            for j in range(width):
                out[j] += w * part[j]
    return made
