"""What a GPU machine must prove, in at most 8 minutes: python scripts/gpu_check.py [FOLDER]; exit code 1 where a row fails.

Inference: the engine against the bare forward pass of the same network, the same bytes when run again, and the CPU's bytes
within the tolerances below. Training: one rank learns, repeats its weights, and augmentation takes a small share of a step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from roadfuse_core.cubes import ingest
from roadfuse_core.inference import MapReader, infer, load_predictor, plan_refresh
from roadfuse_core.models import LOSSES, CheckpointInfo, Network, build_network, deep_loss, save_checkpoint
from roadfuse_core.settings import City, load_city
from roadfuse_core.simulate import CityKnobs, simulate_city
from roadfuse_core.training import Prepared, Recipe, load_recipe, made_up_batch, prepare, train

MINUTES = 8.0
ENGINE = 0.90  # of the bare forward pass, at least
# A GPU adds up in another order than a CPU, and its convolutions round float32 to 11 bits (TF32). Probabilities are 0 … 254.
LEVELS = 3  # by which a probability may differ from the CPU's
ODD_SHARE = 1e-3  # of the pixels, which may differ by more
AUGMENTATION = 0.10  # of a training step, at most
REPEAT = 1e-3  # greatest difference of weights between two equal trainings: some gradients have no kernel that repeats


@dataclass(frozen=True)
class Sizes:
    """How large the checks are.

    Attributes:
        city_m: Edge of the city that is timed; a quarter of it is a tile.
        small_m: Edge of the city that the CPU predicts too.
        preset: Network.
        width: Its factor on all channel numbers.
        window_px: Edge of a window of training and inference.
        batch: Windows a training step.
        steps: Training steps.
        runs: Paired runs of the engine and the bare forward pass.
    """

    city_m: float = 4096
    small_m: float = 1024
    preset: str = "roadfuse"
    width: float = 1.0
    window_px: int = 512
    batch: int = 8
    steps: int = 60
    runs: int = 3


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        check: What was checked.
        found: In words, with its unit.
        wanted: The same; empty where a figure is only told.
        good: Whether it is so.
    """

    check: str
    found: str
    wanted: str = ""
    good: bool = True


def make_city(folder: Path, size_m: float) -> City:
    """A simulated city of sixteen tiles, ingested."""
    knobs = CityKnobs(seed=8, size_m=size_m, tile_px=int(size_m / 4), days=2, points_per_day=int(size_m**2 / 60))
    city = load_city(simulate_city(folder, knobs, os.cpu_count() or 1))
    ingest(city)
    return city


def make_weights(folder: Path, sizes: Sizes) -> Path:
    """A network of the wanted size, untrained; its batch norms have the statistics of one batch."""
    recipe = make_recipe(sizes)
    torch.manual_seed(0)
    network = build_network(recipe.network_config()).train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        made = prepare(made_up_batch(recipe, 2, 0), recipe.view())
        network(made.inputs, made.present)
    path = folder / "untrained.safetensors"
    layers = [layer.model_dump() for layer in recipe.view().layers]
    info = CheckpointInfo(network=network.config, layers=layers, resolution_m=1.0, window_px=sizes.window_px, recipe={})
    save_checkpoint(path, network.eval(), info)
    return path


def make_recipe(sizes: Sizes, cities: tuple[str, ...] = ("-",)) -> Recipe:
    """One epoch of the wanted size."""
    network = {"preset": sizes.preset, "width": sizes.width}
    return Recipe(
        name="gpu-check", cities=cities, network=network, window_px=sizes.window_px, batch=sizes.batch, ranks=1,
        epoch_windows=sizes.batch * sizes.steps, stages=({"epochs": 1},),
    )  # fmt: skip


def with_model(city: City, weights: Path, precision: str) -> City:
    """The city under a network and a precision."""
    model = city.model.model_copy(update={"weights": str(weights), "precision": precision})
    return city.model_copy(update={"model": model})


def bare_seconds(city: City, windows: int) -> float:
    """Time of the forward passes alone, in the engine's batch, on inputs at hand."""
    plan = plan_refresh(city)
    predictor = load_predictor(plan.model, city.grid.resolution_m)
    n, size = plan.calibration.batch, predictor.window_px
    rng = np.random.default_rng(0)
    image = np.full((n, size, size, 4), 255, np.uint8)
    points = rng.random((n, size, size, len(predictor.layers)), dtype=np.float32)
    inputs = predictor.prepare({"image": image, "gps": points})
    predictor.predict(inputs)
    began = time.perf_counter()
    for _ in range(-(-windows // n)):
        predictor.predict(inputs)
    return time.perf_counter() - began


def check_engine(city: City, runs: int) -> list[Row]:
    """The engine against the bare forward pass, in paired runs, and its square kilometres an hour."""
    infer(city, group="warm", full=True)
    ratios, hours = [], []
    for run in range(runs):
        began = time.perf_counter()
        windows = infer(city, group=f"run-{run}", full=True)["windows"]
        seconds = time.perf_counter() - began
        ratios.append(bare_seconds(city, windows) / seconds)
        hours.append(np.prod(city.make_grid().shape) * city.grid.resolution_m**2 / 1e6 / seconds * 3600)
    ratio = statistics.median(ratios)
    return [
        Row("inference, engine / bare forward pass", f"{ratio:.2f}", f"at least {ENGINE}", ratio >= ENGINE),
        Row("inference, one process", f"{statistics.median(hours):,.0f} km² an hour"),
    ]


def probability(city: City, group: str) -> np.ndarray:
    """(height, width) int16 of a published map."""
    return MapReader(city, group).window("probability", 0, 0, *city.make_grid().shape).astype(np.int16)


def predict_on_cpu(city: City, group: str) -> None:
    """The same map by a process that sees no GPU."""
    code = (
        "import sys; from roadfuse_core.inference import infer; from roadfuse_core.settings import City; "
        "from pathlib import Path; text, root, group = sys.argv[1:]; "
        "infer(City.model_validate_json(text).model_copy(update={'root': Path(root)}), group=group, full=True)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, city.model_dump_json(exclude={"root"}), str(city.root), group]
    subprocess.run(command, check=True, env=environment)


def check_bytes(city: City, weights: Path, predict_elsewhere: Callable[[City, str], None] = predict_on_cpu) -> list[Row]:
    """The same bytes when run again, in both precisions, and the CPU's within a tolerance in float32."""
    rows = []
    for precision in ("32", "bf16"):
        chosen = with_model(city, weights, precision)
        for group in ("once", "twice"):
            infer(chosen, group=f"{group}-{precision}", full=True)
        differing = int((probability(chosen, f"once-{precision}") != probability(chosen, f"twice-{precision}")).sum())
        rows.append(Row(f"inference again, {precision}", f"{differing} pixels differ", "none", not differing))
    single = with_model(city, weights, "32")
    predict_elsewhere(single, "elsewhere")
    away = np.abs(probability(single, "once-32") - probability(single, "elsewhere"))
    odd = float((away > LEVELS).mean())
    wanted = f"at most {ODD_SHARE:.1%} by more than {LEVELS} of 254"
    return [*rows, Row("inference, GPU against CPU, float32", f"{odd:.3%}, greatest {away.max()}", wanted, odd <= ODD_SHARE)]


def check_training(city: City, folder: Path, sizes: Sizes) -> list[Row]:
    """One rank learns, and two equal trainings end with equal weights."""
    recipe_file = folder / "recipe.yaml"
    facts = make_recipe(sizes, (str(city.root / "city.yaml"),)).model_dump(mode="json", exclude={"root"})
    recipe_file.write_text(yaml.safe_dump(facts))
    recipe, seconds = load_recipe(recipe_file), []
    for name in ("one", "two"):
        began = time.perf_counter()
        train(recipe, folder / name)
        seconds.append(time.perf_counter() - began)
    losses = pd.read_csv(folder / "one/log/stage-0/metrics.csv").loss.dropna().to_numpy()
    ends = max(1, len(losses) // 3)
    first, last = losses[:ends].mean(), losses[-ends:].mean()
    a, b = (load_file(folder / name / "checkpoint.safetensors") for name in ("one", "two"))
    apart = max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
    return [
        Row("training, one rank, loss", f"{first:.3f} → {last:.3f}", "falls", bool(last < first)),
        Row("training again, weights", f"apart by {apart:.1e}", f"at most {REPEAT:.0e}", apart <= REPEAT),
        Row("training, with reading and validation", f"{sizes.steps / min(seconds):.1f} steps/s"),
    ]


def check_augmentation(sizes: Sizes, device: torch.device) -> list[Row]:
    """Augmentation's share of a step, and the memory that a step takes."""
    recipe = make_recipe(sizes)
    network = build_network(recipe.network_config()).to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    batch = made_up_batch(recipe, sizes.batch, 0)
    parts = []
    for _ in range(3 + min(sizes.steps, 20)):
        times = [now(device)]
        made = prepare(batch.to(device), recipe.view())
        times.append(now(device))
        _step(network, optimiser, made, recipe)
        times.append(now(device))
        parts.append(np.diff(times))
    augment_s, rest_s = np.median(parts[3:], 0)
    share = augment_s / (augment_s + rest_s)
    rows = [Row("augmentation and rendering", f"{share:.1%} of a step", f"at most {AUGMENTATION:.0%}", share <= AUGMENTATION)]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        rows.append(Row(f"memory of {sizes.batch} windows of {sizes.window_px} px", f"{peak:.1f} GiB"))
    return rows


def _step(network: Network, optimiser: torch.optim.Optimizer, made: Prepared, recipe: Recipe) -> None:
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        said = network(made.inputs, made.present)
    exact = said._replace(logits=said.logits.float(), auxiliary={k: v.float() for k, v in said.auxiliary.items()})
    loss = deep_loss(network, exact, made.labels, made.known, LOSSES[recipe.loss])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_checks(folder: Path, sizes: Sizes, device: torch.device) -> list[Row]:
    """All rows, the time of all of them last."""
    began = time.perf_counter()
    weights = make_weights(folder, sizes)
    small = make_city(folder / "small", sizes.small_m)
    # First, while nothing else has allocated: memory is the peak of a step.
    rows = check_augmentation(sizes, device)
    rows += check_bytes(small, make_weights_for_cpu(folder / "slim", sizes))
    rows += check_training(small, folder, replace(sizes, batch=min(sizes.batch, 4)))
    rows += check_engine(with_model(make_city(folder / "city", sizes.city_m), weights, "bf16"), sizes.runs)
    minutes = (time.perf_counter() - began) / 60
    return [*rows, Row("all of this", f"{minutes:.1f} minutes", f"at most {MINUTES:g}", minutes <= MINUTES)]


def make_weights_for_cpu(folder: Path, sizes: Sizes) -> Path:
    """A slim network of the same kind, so that a CPU predicts a small city in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_weights(folder, replace(sizes, width=sizes.width / 8, window_px=sizes.window_px // 2))


def show(rows: list[Row], where: str) -> None:
    """The table."""
    table = Table("check", "found", "wanted", "", box=None, title=where)
    for row in rows:
        table.add_row(row.check, row.found, row.wanted, "" if not row.wanted else "ok" if row.good else "FAILS")
    Console().print(table)


def main() -> int:
    """Run all checks on this machine's first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="for cities and runs; by default one that is removed")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        told = f"no GPU: PyTorch {torch.__version__} finds none; check nvidia-smi, CUDA_VISIBLE_DEVICES and PyTorch's build"
        print(told, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as text:
        folder = a.folder or Path(text)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run_checks(folder, Sizes(), torch.device("cuda:0"))
    show(rows, f"{torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
