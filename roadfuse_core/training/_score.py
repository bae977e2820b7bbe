"""A network against labelled tiles, as they are or made worse on purpose."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.metrics import Confusion, Scores, scores
from roadfuse_core.models import Network
from roadfuse_core.training._augment import prepare
from roadfuse_core.training._ground import Ground
from roadfuse_core.training._module import confusion_sums
from roadfuse_core.training._recipe import View
from roadfuse_core.training._windows import StillWindows, Window, collate

__all__ = ["SUITE", "Damage", "Scored", "measure_speed", "score_network", "to_device"]

Change = Callable[[np.random.Generator, int], dict[str, Any]]


@dataclass(frozen=True)
class Damage:
    """One way to make the evidence worse.

    Attributes:
        family: Which curve it belongs to.
        level: Where on that curve.
        change: Values of `Draws` for one window, from its own random numbers and its edge in pixels.
    """

    family: str
    level: float
    change: Change


def _attack(rng: np.random.Generator, px: int) -> dict[str, Any]:
    """A quarter of the image and another quarter of the points are gone (DeepDualMapper, section 5.5)."""
    first, second = rng.permutation(4)[:2]
    corner = [np.array([k % 2, k // 2]) * px / 2 for k in (first, second)]
    return {"blank": corner[0], "omit": corner[1]}


def _always(**values: Any) -> Change:
    return lambda rng, px: values


SUITE: tuple[Damage, ...] = (
    Damage("none", 0, _always()),
    Damage("information loss", 1, _attack),
    *(Damage("fog", v, _always(fog=v)) for v in (0.25, 0.5, 0.75)),
    *(Damage("GPS volume", 1 / v, _always(keep=1 / v)) for v in (2, 4, 8, 16, 32, 64)),
    *(Damage("sub-resolution", v, _always(coarse=v)) for v in (0.5, 0.25, 0.125)),
    *(Damage("GPS noise, px", v, _always(sigma_px=v)) for v in (2, 5, 10)),
    Damage("no image", 1, _always(has_image=0)),
    Damage("no GPS", 1, _always(has_gps=0)),
)


@dataclass(frozen=True)
class Scored:
    """What a network reached.

    Attributes:
        scores: Over all tiles.
        by_city: g_iou of each ground, in order.
    """

    scores: Scores
    by_city: tuple[float, ...]


class _Damaged(StillWindows):
    """Still windows with one damage; the same for every network, by the window's number."""

    damage: Damage = SUITE[0]

    def __getitem__(self, number: int) -> Window:
        window = super().__getitem__(number)
        change = self.damage.change(np.random.default_rng([self.key, 91, number]), self.view.window_px)
        window.change |= {k: np.asarray(v, np.float32) for k, v in change.items()}
        return window


def to_device(network: Network) -> Network:
    """The network on this process's GPU, if it has one."""
    return network.to("cuda:0") if torch.cuda.is_available() else network


@torch.inference_mode()
def score_network(
    network: Network, view: View, grounds: Sequence[Ground], damage: Damage = SUITE[0], tell: Progress = quiet
) -> Scored:
    """Scores over all tiles of some grounds; a tile is an image.

    Args:
        network: In eval mode, on its device.
        view: How it sees windows.
        grounds: Labelled tiles.
        damage: What is done to the evidence.
        tell: Progress.
    """
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    windows = _Damaged(view, grounds, key=1)
    windows.damage = damage
    counts = np.zeros((windows.n_tiles, 4), np.int64)
    done = 0
    for batch in DataLoader(windows, batch_size=view.batch, collate_fn=collate):
        batch = batch.to(device)
        made = prepare(batch, view)
        with torch.autocast(device.type, torch.bfloat16, enabled=view.bf16):
            logits = network(made.inputs, made.present).logits
        np.add.at(counts, batch.tile.cpu().numpy(), confusion_sums(logits, made).cpu().numpy())
        done += len(batch)
        tell(f"scoring, {damage.family} {damage.level:g}", done, len(windows))
    return Scored(_scores(counts), _by_city(counts, grounds))


@torch.inference_mode()
def measure_speed(network: Network, view: View, repeats: int = 15) -> float:
    """Windows a second of a network alone, on one thread of a CPU or on its GPU; the median of some batches of random input.

    Args:
        network: In eval mode, on its device.
        view: Its window, batch and precision.
        repeats: Batches that are timed, after three that are not.
    """
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape, threads = (view.window_px, view.window_px), torch.get_num_threads()
    inputs = {n: torch.rand(view.batch, c, *shape, device=device) for n, c in network.config.modalities.items()}
    seconds = []
    torch.set_num_threads(1)
    try:
        for _ in range(3 + repeats):
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=view.bf16):
                network(inputs).logits.max().item()  # to the CPU: a GPU has finished then
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return view.batch / statistics.median(seconds[3:])


def _scores(counts: NDArray[np.int64]) -> Scores:
    return scores([Confusion(*(int(v) for v in row)) for row in counts])


def _by_city(counts: NDArray[np.int64], grounds: Sequence[Ground]) -> tuple[float, ...]:
    ends = np.cumsum([len(g.tiles) for g in grounds])
    return tuple(_scores(counts[b - len(g.tiles) : b]).g_iou for g, b in zip(grounds, ends, strict=True))
