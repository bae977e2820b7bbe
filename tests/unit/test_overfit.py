"""Every preset can learn: four simulated windows by heart, within a bounded number of steps.

`python -m tests.unit.test_overfit` prints the table.
"""

import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from roadfuse_core.cubes import ingest
from roadfuse_core.models import LOSSES, PRESETS, build_network, deep_loss, preset
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import draw_knobs, simulate_city
from roadfuse_core.training import TrainingWindows, collate, lay_ground, load_recipe, prepare

WIDTH, STEPS = 0.125, 600
RECIPE = {
    "name": "four-windows",
    "cities": ["city/city.yaml"],
    "network": {"preset": "d-linknet34"},
    "layers": [{"kind": "log_count", "cap": 20, "sigma_px": 1, "radius_px": 1}],
    "window_px": 128,
    "road_bias": 1.0,
    # Nothing can be learnt from zeros.
    "augmentation": {"omit": 0, "blank": 0, "drop_image": 0, "drop_gps": 0, "subsample": 0},
}
# Logits at 1/4 or coarser, resized bilinearly, cannot follow an edge; PointRend's points learn it only by sampling.
COARSE = {
    "deeplabv3plus",
    "pspnet",
    "deeproadmapper",
    "roadtracer",
    "deeproadmapper-1d",
    "roadtracer-1d",
    "fcn8",
    "l3fsn",
    "e-road-18",
    "e-road-34",
}


@cache
def windows():
    """Four windows with roads and points, the same for every preset."""
    with tempfile.TemporaryDirectory() as folder:
        path = simulate_city(Path(folder) / "city", draw_knobs(1, 512.0))
        city = load_city(path)
        ingest(city)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        loaded = load_recipe(recipe)
        ground = lay_ground(city, city.make_grid().tiles(), "roads", loaded.view(), Path(folder))
        drawn = TrainingWindows(loaded, [ground], 0)
        made = prepare(collate([drawn[k] for k in range(4)]), loaded.view())
    return made.inputs, made.labels


def shown(config):
    """The windows as a preset takes them: a lidar raster stands in the place of the trajectories."""
    inputs, labels = windows()
    given = {"image": inputs["image"], "gps": inputs["gps"], "lidar": inputs["gps"]}
    return {name: given[name] for name in config.modalities}, labels


def fit(name: str, target: float) -> tuple[float, int]:
    """Best IoU in eval mode, and the steps that it took."""
    torch.manual_seed(0)
    config = preset(name).model_copy(update={"width": WIDTH})
    network = build_network(config)
    x, labels = shown(config)
    for modality, forest in getattr(network, "forests", {}).items():
        values = x[modality].permute(0, 2, 3, 1).reshape(-1, x[modality].shape[1])
        forest.fit(values.numpy(), labels.flatten().numpy() > 0)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.3
    optimiser = torch.optim.Adam(network.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS, pct_start=0.1)
    known, best = torch.ones_like(labels), 0.0
    for step in range(1, STEPS + 1):
        network.train()
        loss = deep_loss(network, network(x), labels, known, LOSSES["bce+dice"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            best = max(best, iou(network, x, labels))
            if best >= target:
                return best, step
    return best, STEPS


def iou(network, x, labels) -> float:
    with torch.inference_mode():
        road = network.eval()(x).logits > 0
    return float((road & (labels > 0)).sum() / (road | (labels > 0)).sum())


def target_of(name: str) -> float:
    return 0.8 if name in COARSE else 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_learns_four_windows(name):
    best, _ = fit(name, target_of(name))
    assert best >= target_of(name)


if __name__ == "__main__":
    for name in sys.argv[1:] or PRESETS:
        began = time.perf_counter()
        best, steps = fit(name, target_of(name))
        print(f"{name:<28} IoU {best:.3f} (asked {target_of(name)}) after {steps} steps, {time.perf_counter() - began:.0f} s",
              flush=True)  # fmt: skip
