"""The recipe of the shipped weights: a compact D-LinkNet34 on simulated cities."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from roadfuse_core.cubes import Layer
from roadfuse_core.models import Network, NetworkConfig, build_network, preset
from roadfuse_core.simulate import draw_knobs
from roadfuse_core.training._samples import TrainingCity, draw_city, window_batch

__all__ = ["CompactRecipe", "bce_dice", "train_compact"]

log = logging.getLogger(__name__)


class CompactRecipe(BaseModel):
    """Everything that decides the weights.

    Attributes:
        seed: Of initialisation, windows and augmentation.
        first_city: Seed of the first training city; the others follow it.
        cities: Number of training cities.
        size_m: Their edge, metres.
        steps: Optimiser steps.
        batch: Windows a step.
        window_px: Edge of a window.
        lr: Peak learning rate of AdamW under a one-cycle schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = "d-linknet34-compact"
    layers: tuple[Layer, ...] = (
        Layer(kind="log_count", cap=64, sigma_px=1.0, radius_px=1, gain=6.0),
        Layer(kind="log_count", cap=64, sigma_px=5.0, radius_px=12, gain=40.0),
    )
    resolution_m: float = 1.0
    seed: int = 1
    first_city: int = 1000
    cities: int = 28
    size_m: float = 1280.0
    steps: int = 6500
    batch: int = 8
    window_px: int = 256
    lr: float = 2e-3

    def network(self) -> NetworkConfig:
        """The network, with as many GPS channels as there are layers."""
        return preset(self.preset).model_copy(update={"modalities": {"image": 3, "gps": len(self.layers)}})


def bce_dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy plus Dice over the batch (Sun et al. 2019, released code)."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, labels) + dice


class _Windows(IterableDataset[tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]]):
    def __init__(self, cities: list[TrainingCity], recipe: CompactRecipe, first: int) -> None:
        self.cities, self.recipe, self.first = cities, recipe, first

    def __iter__(self):  # type: ignore[no-untyped-def] # noqa: ANN204
        r = self.recipe
        for step in range(self.first, r.steps):
            rng = np.random.default_rng([r.seed, 51, step])
            yield window_batch(self.cities, list(r.layers), r.window_px, r.batch, rng)


def train_compact(recipe: CompactRecipe, tell: Callable[[str], None], workers: int = 2) -> Network:
    """Train from scratch.

    Every window is drawn from the recipe's seed and the step's number alone.

    Args:
        recipe: What to do.
        tell: Receives a line now and then.
        workers: Processes that draw the cities.

    Returns:
        The network in eval mode, float32.
    """
    torch.manual_seed(recipe.seed)
    seeds = range(recipe.first_city, recipe.first_city + recipe.cities)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        cities = list(pool.map(draw_city, [draw_knobs(s, recipe.size_m) for s in seeds]))
    tell(f"{len(cities)} cities drawn")
    network = build_network(recipe.network()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps, pct_start=0.08)
    loader = DataLoader(_Windows(cities, recipe, 0), batch_size=None, num_workers=1, prefetch_factor=4)
    network.train()
    began, running = time.perf_counter(), 0.0
    for step, (inputs, labels) in enumerate(loader, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(inputs).logits
        loss = bce_dice(logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 100 == 0:
            tell(f"step {step}/{recipe.steps}  loss {running:.3f}  {step / (time.perf_counter() - began):.2f} steps/s")
    return network.eval()
