"""Every preset can learn: four simulated windows by heart, within a bounded number of steps.

`python -m tests.unit.test_overfit` prints the table.
"""

import sys
import time
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from roadfuse_core.cubes import Layer
from roadfuse_core.models import LOSSES, PRESETS, build_network, deep_loss, preset
from roadfuse_core.training import draw_city, draw_knobs, window_batch

WIDTH, PX, STEPS = 0.125, 128, 600
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
    """Four windows with roads, the same for every preset."""
    city = draw_city(draw_knobs(1, 512.0))
    layers = [Layer(kind="log_count", cap=20, sigma_px=1, radius_px=1)]
    for seed in range(100):  # without those whose augmentation took a modality away: nothing can be learnt from zeros
        inputs, labels = window_batch([city], layers, PX, 4, np.random.default_rng(seed))
        gps, image = (np.asarray(inputs[k]) for k in ("gps", "image"))
        if min((gps > 0.02).mean((1, 2, 3)).min() * 3, (image != 0).mean((1, 2, 3)).min()) > 0.1:
            return {k: torch.as_tensor(v) for k, v in inputs.items()}, torch.as_tensor(labels)
    raise AssertionError("no four windows with roads, points and image")


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
