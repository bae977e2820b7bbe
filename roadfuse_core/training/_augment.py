"""Augmentation of a whole batch on its device: one geometric draw for image, labels and points, then each its own.

Random numbers of points and pixels are a hash of the window's key and their own number, so that they are the same on
every device, for any batch and any number of ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from kornia.enhance import adjust_gamma
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import warp_affine
from torch import Tensor

from roadfuse_core.cubes import FIXED_POINT, MEANS, Layer, halo_px
from roadfuse_core.training._ground import ROAD, UNKNOWN, arrays_of_layers
from roadfuse_core.training._recipe import View
from roadfuse_core.training._windows import Batch, Draws

__all__ = ["Prepared", "normal", "points_of", "prepare", "render_points", "uniform"]

MOST = 64  # a pixel's points go their own ways up to this number; beyond, several go together
FOG = 0.87


class Prepared(NamedTuple):
    """A batch as a network takes it.

    Attributes:
        inputs: By modality, (N, C, H, W) float32.
        present: (N,) float32 whether a window has the modality.
        labels: (N, 1, H, W) float32, 0 or 1.
        known: (N, 1, H, W) float32, 1 where the label is known.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: Tensor
    known: Tensor


def uniform(key: Tensor, number: Tensor, stream: int) -> Tensor:
    """Random numbers in [0, 1) by hashing (SplitMix64): equal arguments, equal numbers, on every device.

    Args:
        key: int64, broadcast with `number`.
        number: int64.
        stream: Another stream, other numbers.
    """
    return ((_hash(key, number, stream) >> 40) & 0xFFFFFF).float() / 2**24


def _hash(key: Tensor, number: Tensor, stream: int) -> Tensor:
    """64 bits of each (SplitMix64's finaliser); int64 arithmetic wraps."""
    offset = (stream * -4658895280553007687 + 2**63) % 2**64 - 2**63
    x = key + number * -7046029254386353131 + offset
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def normal(key: Tensor, number: Tensor, stream: int) -> Tensor:
    """Standard normal numbers (Box and Muller) of two uniform streams, `stream` and the next."""
    a, b = uniform(key, number, stream), uniform(key, number, stream + 1)
    return (-2 * torch.log1p(-a)).sqrt() * torch.cos(2 * math.pi * b)


def prepare(batch: Batch, view: View) -> Prepared:
    """Augment and render.

    Args:
        batch: On the device.
        view: How the network sees windows.
    """
    d, px = batch.draws, view.window_px
    labels, known = _labels(batch, px)
    inputs, present = {}, {}
    if view.image or view.lidar:
        moved = _moved(batch, px)
        if view.image:
            inputs["image"], present["image"] = _camera(batch, moved[:, :4], px), d.has_image
        if view.lidar:
            inputs["lidar"], present["lidar"] = _normalised(moved[:, 4:5], moved[:, 5:]), torch.ones_like(d.has_image)
    if view.layers:
        inputs["gps"], present["gps"] = _receivers(batch, view.layers, px), d.has_gps
    return Prepared(inputs, present, labels, known)


def _to_output(d: Draws, side: int, px: int) -> Tensor:
    """(N, 2, 3) from source to output in kornia's convention: pixel centres at whole numbers."""
    inverse = torch.linalg.inv(d.matrix)
    centre = d.matrix.new_tensor([(side - 1) / 2] * 2)
    shift = (px - 1) / 2 - inverse @ centre
    return torch.cat([inverse, shift[..., None]], 2)


def _labels(batch: Batch, px: int) -> tuple[Tensor, Tensor]:
    matrix = _to_output(batch.draws, batch.label.shape[-1], px)
    moved = warp_affine(batch.label[:, None].float(), matrix, (px, px), mode="nearest", padding_mode="zeros")
    return (moved == ROAD).float(), (moved != UNKNOWN).float()


def _moved(batch: Batch, px: int) -> Tensor:
    """(N, 4 or 6, px, px), 0 … 1: all bands of the image in their new places."""
    matrix = _to_output(batch.draws, batch.image.shape[-1], px)
    return warp_affine(batch.image.float(), matrix, (px, px), mode="bilinear", padding_mode="zeros") / 255


def _camera(batch: Batch, moved: Tensor, px: int) -> Tensor:
    """Other tone, colour, sharpness, noise and weather of an image in its place; normalised, zeros where unknown."""
    d, x, seen = batch.draws, moved[:, :3], (moved[:, 3:] > 0.999).float()
    if bool((d.gamma != 1).any()):
        x = adjust_gamma(x.clamp(0, 1), d.gamma)
    x = _blur(_toned(x, seen, d), d.blur_px)
    if bool((d.noise > 0).any()):
        x = x + _wide(d.noise) * _grain(batch.key, px)
    return _normalised(x.clamp(0, 1), moved[:, 3:]) * (1 - _square(d.blank, px))


def _normalised(x: Tensor, known: Tensor) -> Tensor:
    """0 … 1 to -2 … 2, zeros where not all of a pixel is known."""
    return (x - 0.5) / 0.25 * (known > 0.999).float()


def _toned(x: Tensor, seen: Tensor, d: Draws) -> Tensor:
    """Gain and lift, saturation, contrast about the mean of what is seen, and fog: one affine map of the colours a window."""
    grey = x.new_full((3, 3), 1 / 3)
    mix = (grey + (torch.eye(3, device=x.device) - grey) * d.saturation[:, None, None]) * d.gain[:, None, :]  # (N, 3, 3)
    area = seen.sum((1, 2, 3)).clamp(min=1)
    colour = x.flatten(2) @ seen.flatten(2).mT / area[:, None, None]  # (N, 3, 1), the mean
    mean = (mix @ colour).mean((1, 2)) + d.lift
    clear = 1 - d.fog
    shift = clear * (d.contrast * d.lift + (1 - d.contrast) * mean) + FOG * d.fog
    scale = (clear * d.contrast)[:, None, None]
    return torch.baddbmm(shift[:, None, None], scale * mix, x.flatten(2)).reshape_as(x)


def _grain(key: Tensor, px: int) -> Tensor:
    """(N, 3, px, px) uniform noise of standard deviation 1: three numbers of 21 bits from one hash."""
    bits = _hash(key[:, None, None], torch.arange(px * px, device=key.device).reshape(px, px), 20)
    parts = torch.stack([bits & 0x1FFFFF, (bits >> 21) & 0x1FFFFF, (bits >> 42) & 0x1FFFFF], 1)
    return (parts.float() / 2**21 - 0.5) * math.sqrt(12)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Only those windows that are blurred."""
    chosen = torch.nonzero(sigma > 0)[:, 0]
    if not len(chosen):
        return x
    soft = gaussian_blur2d(x[chosen], (7, 7), sigma[chosen, None].expand(-1, 2), "replicate")
    return x.index_copy(0, chosen, soft)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _square(corner: Tensor, px: int) -> Tensor:
    """(N, 1, px, px): 1 in a square of half the window with a corner (x, y)."""
    at = torch.arange(px, device=corner.device) + 0.5
    inside = (at >= corner[..., None]) & (at < corner[..., None] + px / 2)  # (N, 2, px)
    return (inside[:, 1, :, None] & inside[:, 0, None, :])[:, None].float()


def points_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch's cells as points; a cell's sums are shared out in whole numbers, so that they add up to the same.

    Returns:
        window (n,) int64; place (n, 2) float32 x and y in the source, anywhere inside the cell; sums (n, arrays)
        int64; number (n,) int64, one of its own in each window.
    """
    count = batch.sums[:, :1]
    copies = count[:, 0].clamp(max=MOST)
    cell = torch.repeat_interleave(torch.arange(len(copies), device=copies.device), copies)
    rank = torch.arange(len(cell), device=cell.device) - (copies.cumsum(0) - copies)[cell]
    n = copies[:, None]
    share, rest = torch.div(batch.sums, n, rounding_mode="floor"), batch.sums % n
    sums = share[cell] + (rank[:, None] < rest[cell])
    side = batch.image.shape[-1]
    window, place = batch.sample[cell], batch.place[cell]
    number = (place[:, 0] * side + place[:, 1]) * MOST + rank
    key = batch.key[window]
    # Inside the cell and never on its edge, so that whole turns keep it in its pixel.
    x, y = (place[:, 1 - k] + 0.02 + 0.96 * uniform(key, number, k) for k in (0, 1))
    return window, torch.stack([x, y], 1), sums, number


def _receivers(batch: Batch, layers: tuple[Layer, ...], px: int) -> Tensor:
    """GPS augmentation on points (Sun et al. 2019, section 3.3), then the layers."""
    d, side = batch.draws, batch.label.shape[-1]
    window, place, sums, number = points_of(batch)
    key = batch.key[window]
    inverse = torch.linalg.inv(d.matrix)
    out = (inverse[window] @ (place - side / 2)[..., None])[..., 0] + px / 2
    if bool((d.coarse < 1).any()):
        r = d.coarse[window, None]
        out = torch.where(r < 1, torch.floor(torch.floor(out * r) / r) + 0.5, out)
    if bool((d.sigma_px > 0).any()):
        shift = torch.stack([normal(key, number, 4 + 2 * k) for k in (0, 1)], 1)
        out = out + d.sigma_px[window, None] * shift
    corner = d.omit[window]
    omitted = ((out >= corner) & (out < corner + px / 2)).all(1)
    sums = _turned(sums, arrays_of_layers(layers), d.matrix, window)
    kept = (uniform(key, number, 10) < d.keep[window]) & ~omitted & (d.has_gps[window] > 0)
    return render_points(window[kept], out[kept], sums[kept], len(batch), layers, px)


def _turned(sums: Tensor, arrays: tuple[str, ...], matrix: Tensor, window: Tensor) -> Tensor:
    """Bearings turn with their window: sums of sine and cosine, clockwise from north, by whole turns and reflections."""
    if "sin_sum" not in arrays:
        return sums
    sin, cos = arrays.index("sin_sum"), arrays.index("cos_sum")
    signs = matrix.sign().long().mT[window]  # of the way back, from source to output
    east, south = sums[:, sin], -sums[:, cos]
    out = sums.clone()
    out[:, sin] = signs[:, 0, 0] * east + signs[:, 0, 1] * south
    out[:, cos] = -(signs[:, 1, 0] * east + signs[:, 1, 1] * south)
    return out


def render_points(window: Tensor, place: Tensor, sums: Tensor, n: int, layers: tuple[Layer, ...], px: int) -> Tensor:
    """The layers of `cubes.render`, for a whole batch of points on their device.

    Args:
        window: (m,) int64.
        place: (m, 2) x and y, pixels of the output; points up to the layers' halo outside count for smoothing.
        sums: (m, arrays) int64, in the order of `arrays_of_layers`.
        n: Windows.
        layers: What to render.
        px: Edge of the output.

    Returns:
        (n, len(layers), px, px) float32: counts and means as `cubes.render` makes them, smoothed ones within 1e-6 of
        the layer's gain.
    """
    arrays, halo = arrays_of_layers(layers), halo_px(layers)
    side = px + 2 * halo
    cell = torch.floor(place).long() + halo
    inside = ((cell >= 0) & (cell < side)).all(1)
    flat = (window * side + cell[:, 1]) * side + cell[:, 0]
    # Integers add up to the same in any order, on GPUs too.
    flat, sums = flat[inside], sums[inside]
    total = torch.zeros(len(arrays), n * side * side, dtype=torch.int64, device=sums.device)
    by_name = {name: total[k].index_add_(0, flat, sums[:, k]).reshape(n, side, side) for k, name in enumerate(arrays)}
    return torch.stack([_layer(by_name, layer, halo) for layer in layers], 1)


def _layer(sums: dict[str, Tensor], layer: Layer, halo: int) -> Tensor:
    if layer.kind in MEANS:
        total, samples = (sums[name] for name in MEANS[layer.kind])
        unit = FIXED_POINT[MEANS[layer.kind][0]] * layer.cap
        out = (total.double() / (samples.clamp(min=1) * unit)).float()
    else:
        count = sums["count"].float()
        if layer.kind == "binary":
            out = (count > 0).float()
        elif layer.kind == "count":
            out = count / layer.cap
        else:
            out = (torch.log1p(count) / math.log1p(layer.cap)).clamp(max=1)
    inner = slice(halo, out.shape[-1] - halo)
    out = _smooth(out, layer.sigma_px, layer.radius_px, halo) if layer.sigma_px > 0 else out[:, inner, inner]
    return out * layer.gain


def _smooth(x: Tensor, sigma: float, radius: int, halo: int) -> Tensor:
    """Separable Gaussian; (N, S, S) → (N, S - 2·halo, S - 2·halo). A product with a band matrix: faster than a convolution."""
    side = x.shape[-1]
    at = torch.arange(side, dtype=torch.float64)
    away = at[None, :] - at[halo : side - halo, None]
    weights = torch.where(away.abs() <= radius, torch.exp(-0.5 * (away / sigma) ** 2), 0.0)
    whole = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2).sum()
    band = (weights / whole).to(x.device, torch.float32)
    return band @ (x @ band.T)
