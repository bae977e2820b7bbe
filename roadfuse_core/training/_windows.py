"""Windows of training: which place, and what happens to it, drawn from the recipe's seed and the window's number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from roadfuse_core.training._ground import UNKNOWN, Cells, Ground
from roadfuse_core.training._recipe import Augmentation, Recipe, View

__all__ = [
    "Batch",
    "BlankWindows",
    "Draws",
    "StillWindows",
    "TrainingWindows",
    "Window",
    "WindowOrder",
    "collate",
    "draw",
    "share_of_batch",
    "source_side_px",
    "stillness",
]

# Streams of random numbers that belong to a window's number.
PLACE, CHANGE = 71, 72


@dataclass
class Draws:
    """What is done to each window of a batch; the fields are (N, …) float32 tensors.

    Attributes:
        matrix: (N, 2, 2) from offsets (x, y) of the output's centre to offsets of the source's centre, pixels.
        gamma: Exponent of the tone curve.
        gain: (N, 3) factor of each colour.
        lift: Added to all colours.
        saturation: Factor on the distance to grey.
        contrast: Factor on the distance to the window's mean.
        blur_px: Standard deviation of a blur; 0 for none.
        noise: Standard deviation of noise on colours, which are 0 … 1.
        fog: Opacity of a veil.
        keep: Share of the points that stay.
        coarse: Factor of a coarser raster on which positions are floored; 1 for none.
        sigma_px: Standard deviation of noise on positions.
        omit: (N, 2) corner (x, y) of a square of half the window without points; infinite for none.
        blank: (N, 2) the same without image.
        has_image: 1 or 0.
        has_gps: 1 or 0.
    """

    matrix: Tensor
    gamma: Tensor
    gain: Tensor
    lift: Tensor
    saturation: Tensor
    contrast: Tensor
    blur_px: Tensor
    noise: Tensor
    fog: Tensor
    keep: Tensor
    coarse: Tensor
    sigma_px: Tensor
    omit: Tensor
    blank: Tensor
    has_image: Tensor
    has_gps: Tensor


@dataclass
class Window:
    """A window as read, and what will be done to it.

    Attributes:
        image: (4 or 6, S, S) uint8, as `Ground.window` gives it.
        label: (S, S) uint8.
        cells: Pixels with points, counted from the square's corner.
        change: Values of `Draws` for this window.
        key: Seed of everything random that is drawn on the device.
        tile: Number of the tile that it scores; -1 in training.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    cells: Cells
    change: dict[str, NDArray[np.float32]]
    key: int
    tile: int = -1


@dataclass
class Batch:
    """Windows side by side, ready for the device.

    Attributes:
        image: (N, 4 or 6, S, S) uint8: red, green, blue, 255 where known, and with lidar its band and 255 where that is known.
        label: (N, S, S) uint8.
        sample: (m,) int64 window of each cell.
        place: (m, 2) int64 row and column of each cell, from the corner of the source square.
        sums: (m, arrays) int64.
        draws: What is done.
        key: (N,) int64.
        tile: (N,) int64.
    """

    image: Tensor
    label: Tensor
    sample: Tensor
    place: Tensor
    sums: Tensor
    draws: Draws
    key: Tensor
    tile: Tensor

    def to(self, device: torch.device) -> Batch:
        """All of it on a device; from pinned memory beside what this process does next."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """All of it in memory from which a GPU copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Another batch of changed tensors."""
        tensors = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "draws"}
        draws = Draws(**{f.name: change(getattr(self.draws, f.name)) for f in fields(Draws)})
        return Batch(draws=draws, **tensors)

    def __len__(self) -> int:
        return len(self.image)


def stillness() -> dict[str, NDArray[np.float32]]:
    """Draws that change nothing."""
    values = dict(
        matrix=np.eye(2), gamma=1, gain=np.ones(3), lift=0, saturation=1, contrast=1, blur_px=0, noise=0, fog=0, keep=1,
        coarse=1, sigma_px=0, omit=np.full(2, np.inf), blank=np.full(2, np.inf), has_image=1, has_gps=1,
    )  # fmt: skip
    return {k: np.asarray(v, np.float32) for k, v in values.items()}


def draw(rng: np.random.Generator, a: Augmentation, px: int) -> dict[str, NDArray[np.float32]]:
    """What happens to one window (Sun et al. 2019, section 3.3, for points; ranges of real cameras for images).

    Every number is drawn whether it is used or not, so that switching one augmentation off leaves the others as they are.
    """
    out = stillness()
    turn, scale, chance = rng.integers(8), np.exp(rng.uniform(*np.log(a.scale))), rng.random(8)
    matrix = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), int(turn % 4)) @ np.diag([1 - 2 * (turn // 4), 1])
    out["matrix"] = (matrix if a.turns else np.eye(2)) * scale
    camera, where = rng.normal(size=9), rng.uniform(-0.5, 1, (2, 2)) * px
    level = rng.uniform(size=8)
    _draw_camera(out, camera, level, a.camera if chance[0] < 0.9 else 0)
    out["fog"] = np.asarray(0.2 + 0.5 * level[0] if chance[1] < a.fog else 0)
    if chance[2] < a.subsample:
        out["keep"] = np.asarray(0.01 + 0.99 * level[1])
    if chance[3] < a.sub_resolution:
        out["coarse"] = np.asarray(0.1 + 0.9 * level[2])
    if chance[4] < a.perturb:
        out["sigma_px"] = np.asarray(a.perturb_px * level[3])
    if chance[5] < a.omit:
        out["omit"] = where[0]
    if chance[6] < a.blank:
        out["blank"] = where[1]
    out["has_image"] = np.asarray(float(chance[7] >= a.drop_image))
    out["has_gps"] = np.asarray(float(not a.drop_image <= chance[7] < a.drop_image + a.drop_gps))
    return {k: np.asarray(v, np.float32) for k, v in out.items()}


def _draw_camera(
    out: dict[str, NDArray[np.float32]], normal: NDArray[np.float64], level: NDArray[np.float64], strength: float
) -> None:
    """Tone curve, colour balance, saturation, contrast, blur, noise."""
    s = strength
    out["gamma"] = np.exp(0.28 * s * normal[0])
    out["gain"] = np.exp(s * (0.09 * normal[1:4] + 0.16 * normal[4]))
    out["lift"] = 0.05 * s * normal[5]
    out["saturation"] = np.asarray(1 + s * (0.2 + 1.3 * level[4] - 1))
    out["contrast"] = np.exp(0.22 * s * normal[6])
    out["blur_px"] = np.asarray((0.3 + level[5]) if s and level[6] < 0.5 else 0)
    out["noise"] = np.asarray(0.035 * s * level[7])


def source_side_px(recipe: Recipe) -> int:
    """Edge of the square that is read for a window, so that every turn and scale finds its pixels; even."""
    reach = (recipe.window_px + 2 * recipe.view().halo_px) * recipe.augmentation.scale[1]
    return 2 * int(np.ceil(reach / 2)) + 2


class TrainingWindows(Dataset[Window]):
    """Windows by number; number n is the same whatever came before, and on whichever rank.

    Args:
        recipe: Seeds and sizes.
        grounds: Training tiles of each city.
        stage: Number of the stage; another stage, other draws.
    """

    def __init__(self, recipe: Recipe, grounds: Sequence[Ground], stage: int) -> None:
        self.recipe, self.grounds, self.stage = recipe, grounds, stage
        known = np.concatenate([np.asarray(g.known, float) for g in grounds])
        road = np.concatenate([np.asarray(g.road, float) for g in grounds])
        self.of = np.concatenate([np.full(len(g.tiles), k) for k, g in enumerate(grounds)])
        self.first = np.cumsum([0, *(len(g.tiles) for g in grounds)])
        bias = recipe.road_bias if road.sum() else 0.0
        share = (1 - bias) * known / known.sum() + (bias * road / road.sum() if bias else 0)
        self.cumulative = np.cumsum(share) / share.sum()
        self.side = source_side_px(recipe)

    def __len__(self) -> int:
        return sum(s.epochs for s in self.recipe.stages) * self.recipe.epoch_steps * self.recipe.batch

    def __getitem__(self, number: int) -> Window:
        r = self.recipe
        rng = np.random.default_rng([r.seed, PLACE, self.stage, number])
        n = int(np.searchsorted(self.cumulative, rng.random(), side="right"))
        ground = self.grounds[self.of[n]]
        tile, t = ground.tiles[n - self.first[self.of[n]]], ground.tile_px
        centre = np.array([tile.row, tile.col]) * t + rng.integers(0, t, 2)
        if r.window_px < t:  # stay in the tile: what lies outside may be unknown
            half = r.window_px // 2
            low = np.array([tile.row, tile.col]) * t
            centre = np.clip(centre, low + half, low + t - half)
        else:
            centre = np.array([tile.row, tile.col]) * t + t // 2 + rng.integers(-t // 4, t // 4 + 1, 2)
        row, col = (int(v) - self.side // 2 for v in centre)
        change = draw(np.random.default_rng([r.seed, CHANGE, self.stage, number]), r.augmentation, r.window_px)
        key = int(np.random.default_rng([r.seed, number, self.stage]).integers(2**62))
        image, label, cells = ground.window(row, col, self.side)
        return Window(image, label, cells, change, key)


class StillWindows(Dataset[Window]):
    """Windows side by side over all chosen tiles, unchanged; `tile` counts through the tiles of all cities.

    A tile smaller than a window is one window, centred; a larger one is cut without overlap, and what a window reaches
    beyond its tile is not scored.
    """

    def __init__(self, view: View, grounds: Sequence[Ground], key: int = 0) -> None:
        self.view, self.grounds, self.key = view, grounds, key
        self.side = view.window_px + 2 * view.halo_px + 2
        self.places: list[tuple[int, int, int, int, int, int]] = []
        px, number = view.window_px, 0
        for g, ground in enumerate(grounds):
            for tile in ground.tiles:
                t = ground.tile_px
                size = min(px, t)
                for r in range(0, t, size):
                    for c in range(0, t, size):
                        self.places.append((g, number, tile.row * t + r, tile.col * t + c, min(size, t - r), min(size, t - c)))
                number += 1
        self.n_tiles = number

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Window:
        g, tile, row, col, height, width = self.places[number]
        px = self.view.window_px
        size = min(px, self.grounds[g].tile_px)
        corner = [row - (px - size) // 2, col - (px - size) // 2]
        margin = (self.side - px) // 2
        image, label, cells = self.grounds[g].window(corner[0] - margin, corner[1] - margin, self.side)
        scored = np.zeros_like(label)
        at = (slice(row - corner[0] + margin, row - corner[0] + margin + height),
              slice(col - corner[1] + margin, col - corner[1] + margin + width))  # fmt: skip
        scored[at] = label[at]
        seed = int(np.random.default_rng([self.key, number]).integers(2**62))
        return Window(image, scored, cells, stillness(), seed, tile)


class BlankWindows(StillWindows):
    """The same windows without labels, so that nothing of them is scored."""

    def __getitem__(self, number: int) -> Window:
        return replace(super().__getitem__(number), label=np.full((self.side, self.side), UNKNOWN, np.uint8))


def share_of_batch(batch: int, rank: int, ranks: int) -> range:
    """Places of a batch that a rank reads; half-open, in the order of the ranks, and as equal as whole windows can be."""
    return range(rank * batch // ranks, (rank + 1) * batch // ranks)


class WindowOrder(Sampler[list[int]]):
    """Window numbers of one rank's batches, for the rest of the epoch that is under way.

    Number n is the n-th window that the stage draws, counted through all its epochs and over all ranks, so no two
    steps of a stage get the same window. Where to begin follows from the steps that the optimiser has made, not from
    a call at the start of an epoch: loaders ask for their first batches before any such call, and a run that goes on
    begins within an epoch.

    Args:
        recipe: Batch and steps.
        steps_done: Optimiser steps that this stage has made so far, asked whenever the loader begins to read.
        rank: Which process.
        ranks: How many share each batch.
    """

    def __init__(self, recipe: Recipe, steps_done: Callable[[], int], rank: int = 0, ranks: int = 1) -> None:
        self.epoch_steps, self.batch = recipe.epoch_steps, recipe.batch
        self.steps_done, self.rank, self.ranks = steps_done, rank, ranks

    def __len__(self) -> int:
        """Batches of a whole epoch, as a loader's length is understood."""
        return self.epoch_steps

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.steps_done()
        end = (begin // self.epoch_steps + 1) * self.epoch_steps
        return (self._batch(step) for step in range(begin, end))

    def _batch(self, step: int) -> list[int]:
        return [step * self.batch + place for place in share_of_batch(self.batch, self.rank, self.ranks)]


def collate(windows: list[Window]) -> Batch:
    """Windows of one size as a batch."""
    sizes = [len(w.cells.row) for w in windows]
    place = np.concatenate([np.stack([w.cells.row, w.cells.col], 1) for w in windows]).astype(np.int64)
    draws = {k: torch.from_numpy(np.stack([w.change[k] for w in windows])) for k in windows[0].change}
    return Batch(
        image=torch.from_numpy(np.stack([w.image for w in windows])),
        label=torch.from_numpy(np.stack([w.label for w in windows])),
        sample=torch.from_numpy(np.repeat(np.arange(len(windows)), sizes)),
        place=torch.from_numpy(place),
        sums=torch.from_numpy(np.concatenate([w.cells.sums for w in windows])),
        draws=Draws(**draws),
        key=torch.tensor([w.key for w in windows]),
        tile=torch.tensor([w.tile for w in windows]),
    )
