"""One training step by its parts: reading, GPS augmentation and rendering, image augmentation, the network.

python -m tests.benchmarks.training [--preset NAME] [--width W] [--window PX] [--batch N] [--points N] [--steps N]

On a GPU machine the default is the full-size network in bfloat16 there, with steps a second and memory.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from roadfuse_core.models import LOSSES, build_network, deep_loss
from roadfuse_core.training import Cells, Recipe, Window, collate
from roadfuse_core.training import _augment as augment
from roadfuse_core.training._module import RoadModule
from roadfuse_core.training._windows import draw


def made_up_batch(recipe: Recipe, side: int, points: int):
    """Windows with so many points each, along lines as on roads."""
    windows = []
    for k in range(recipe.batch):
        rng = np.random.default_rng([7, k])
        along, line = rng.uniform(0, side, points), rng.integers(0, 12, points)
        place = np.stack([along, (line + 0.5) * side / 12 + rng.normal(0, 4, points)], 1)
        cell, count = np.unique(np.floor(place[:, ::1]).astype(np.int32).clip(0, side - 1), axis=0, return_counts=True)
        image = rng.integers(0, 255, (4, side, side), dtype=np.uint8)
        image[3] = 255
        label = rng.integers(1, 3, (side, side), dtype=np.uint8)
        cells = Cells(cell[:, 0], cell[:, 1], count[:, None].astype(np.int64))
        windows.append(Window(image, label, cells, draw(rng, recipe.augmentation, recipe.window_px), int(rng.integers(2**62))))
    return collate(windows)


def main() -> None:
    """Print milliseconds of each part, their medians, and the share of the GPS part in the step."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cmmpnet-d-linknet34" if gpu else "roadfuse-compact")
    parser.add_argument("--width", type=float, default=None)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=30 if gpu else 5)
    a = parser.parse_args()
    network = {"preset": a.preset, "width": a.width}
    recipe = Recipe(name="benchmark", cities=("-",), network=network, window_px=a.window, batch=a.batch)
    device = torch.device("cuda:0" if gpu else "cpu")
    net = build_network(recipe.network_config()).to(device, memory_format=torch.channels_last)  # as training does
    module = RoadModule(net, recipe, 0).to(device)
    optimiser = torch.optim.AdamW(net.parameters())
    side = 2 * int(np.ceil((a.window + 2 * recipe.view().halo_px) * recipe.augmentation.scale[1] / 2)) + 2
    held = made_up_batch(recipe, side, a.points)
    parts: dict[str, list[float]] = {k: [] for k in ("to device", "GPS", "image and labels", "network, loss, optimiser")}

    def timed(name, function, *arguments):
        began = time.perf_counter()
        out = function(*arguments)
        if gpu:
            torch.cuda.synchronize()
        parts[name].append((time.perf_counter() - began) * 1e3)
        return out

    def step(prepared):
        with torch.autocast(device.type, torch.bfloat16):
            p = net(prepared.inputs, prepared.present)
        exact = type(p)(
            p.logits.float(), {k: v.float() for k, v in p.auxiliary.items()}, {k: v.float() for k, v in p.maps.items()}
        )
        loss = deep_loss(net, exact, prepared.labels, prepared.known, LOSSES[recipe.loss])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def pictures(batch):
        return augment._camera(batch, augment._moved(batch, a.window), a.window), augment._labels(batch, a.window)

    view = recipe.view()
    for _ in range(a.steps + 2):
        batch = timed("to device", held.to, device)
        if view.layers:
            timed("GPS", augment._receivers, batch, view.layers, a.window)
        timed("image and labels", pictures, batch)
        prepared = module.prepared(batch)
        timed("network, loss, optimiser", step, prepared)
    middle = {k: statistics.median(v[2:]) for k, v in parts.items() if v}
    whole = sum(middle.values())
    where = torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"training step, {a.preset}, {a.batch} × {a.window}², {a.points:,} points a window, bf16, {where}")
    for name, ms in middle.items():
        print(f"  {name:<26}{ms:9.1f} ms  {ms / whole:6.1%}")
    print(
        f"  {1e3 / whole:.2f} steps/s; GPS augmentation and rendering take {middle.get('GPS', 0) / whole:.1%} of the step (target 10 %)"
    )
    if gpu:
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
