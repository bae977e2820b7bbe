"""Random forests of RFNorm, fitted before the network learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roadfuse_core.errors import ConfigError
from roadfuse_core.models import Network
from roadfuse_core.training._augment import prepare
from roadfuse_core.training._ground import Ground
from roadfuse_core.training._recipe import Recipe
from roadfuse_core.training._windows import TrainingWindows, collate

__all__ = ["fit_forests"]

WINDOWS, PIXELS = 32, 20_000
SAMPLE = 73  # stream of random numbers, beside those of windows


def fit_forests(network: Network, recipe: Recipe, grounds: Sequence[Ground]) -> None:
    """Fit each modality's forest to known pixels of the first windows of the first stage (Parajuli et al. 2018).

    Networks without forests stay as they are. The same recipe and data give the same forests, in every process.

    Raises:
        ConfigError: Those windows hold no road, or nothing else.
    """
    forests = getattr(network, "forests", None)
    if forests is None:
        return
    windows = TrainingWindows(recipe, grounds, 0)
    made = prepare(collate([windows[k] for k in range(min(WINDOWS, len(windows)))]), recipe.view())
    known = np.flatnonzero(made.known.flatten().numpy() > 0)
    chosen = np.random.default_rng([recipe.seed, SAMPLE]).permutation(known)[:PIXELS]
    road = made.labels.flatten().numpy()[chosen] > 0
    if road.all() or not road.any():
        raise ConfigError(
            "network.preset", recipe.network.preset, "finds one kind of pixel in its first windows", "raise batch"
        )
    for name, forest in forests.items():
        values = made.inputs[name].permute(0, 2, 3, 1).flatten(0, 2).numpy()
        forest.fit(values[chosen], road, recipe.seed)
