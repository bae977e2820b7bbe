"""How long a training will take: a few of its steps, run on made-up windows of its size."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from roadfuse_core.cluster import default_ranks
from roadfuse_core.models import build_network
from roadfuse_core.settings import load_city
from roadfuse_core.training._ground import NOT_ROAD, ROAD, Cells, arrays_of_layers
from roadfuse_core.training._module import RoadModule
from roadfuse_core.training._recipe import Recipe
from roadfuse_core.training._splits import Splits
from roadfuse_core.training._windows import Batch, Window, collate, draw, source_side_px

__all__ = ["estimate_seconds", "made_up_batch"]

TIMED_STEPS = 3
POINTS_SHARE = 0.02  # of the pixels of a made-up window that hold points


def estimate_seconds(recipe: Recipe, splits: Splits) -> float:
    """Time that all stages and their validations will take on this machine, without reading the tiles.

    A few steps are run for real, on made-up windows of the recipe's size; nothing is written. Where several ranks share
    a batch, one rank's part is timed.

    Args:
        recipe: What would be trained.
        splits: Its tiles, as `check_recipe` returns them.

    Returns:
        Seconds.
    """
    epochs = sum(stage.epochs for stage in recipe.stages)
    ranks = recipe.ranks or min(default_ranks(), recipe.batch)
    windows = max(1, recipe.batch // ranks)
    step_s = _step_seconds(recipe, windows)
    # A window of the validation goes forward alone, about a third of a step's operations.
    window_s = step_s / windows / 3
    validation_s = window_s * _validation_windows(recipe, splits) / ranks
    return epochs * (recipe.epoch_steps * step_s + validation_s)


def _validation_windows(recipe: Recipe, splits: Splits) -> int:
    count = 0
    for city, tiles in splits.validation.items():
        across = -(-load_city(Path(city)).grid.tile_px // recipe.window_px)
        count += len(tiles) * across**2
    return count


def _step_seconds(recipe: Recipe, windows: int) -> float:
    """Median time of a step, the first one left out."""
    # A schedule made for fewer steps than are timed could not go on.
    constant = recipe.optimiser.model_copy(update={"schedule": "constant"})
    recipe = recipe.model_copy(update={"optimiser": constant})
    network = build_network(recipe.network_config())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    watch = _StepWatch()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=TIMED_STEPS + 1,
        precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
        gradient_clip_val=recipe.optimiser.clip,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: list[Batch] = [made_up_batch(recipe, windows, seed) for seed in range(TIMED_STEPS + 1)]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(RoadModule(network, recipe, 0), loader)
    return float(np.median(np.diff(watch.ends_s)))


class _StepWatch(Callback):
    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        outputs["loss"].item()  # waits for the device
        self.ends_s.append(time.perf_counter())


def made_up_batch(recipe: Recipe, windows: int, seed: int) -> Batch:
    """Random windows as large as the recipe's, with points on some of their pixels, as augmentation takes them.

    Args:
        recipe: Window, layers and augmentation.
        windows: How many.
        seed: Another seed, other windows.
    """
    rng = np.random.default_rng(seed)
    return collate([_made_up_window(recipe, rng) for _ in range(windows)])


def _made_up_window(recipe: Recipe, rng: np.random.Generator) -> Window:
    side, view = source_side_px(recipe), recipe.view()
    image = rng.integers(0, 256, (6 if view.lidar else 4, side, side), np.uint8)
    label = rng.choice(np.array([NOT_ROAD, ROAD], np.uint8), (side, side))
    arrays = arrays_of_layers(view.layers)
    cells = int(POINTS_SHARE * side**2) if arrays else 0
    row, col = rng.integers(0, side, (2, cells), np.int32)
    sums = np.ones((cells, len(arrays)), np.int64)
    change = draw(rng, recipe.augmentation, recipe.window_px)
    return Window(image, label, Cells(row, col, sums), change, int(rng.integers(2**62)))
