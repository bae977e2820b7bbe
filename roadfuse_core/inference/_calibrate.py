"""Batch size and precision, found by measurement once for a model on a device, and kept."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from roadfuse_core.errors import ConfigError
from roadfuse_core.files import DamagedFileError, read_record, write_record
from roadfuse_core.inference._predictor import (
    DeviceFullError,
    Precision,
    Predictor,
    PredictorRef,
    device_name,
    free_memory,
    load_predictor,
)
from roadfuse_core.settings import ModelSpec

__all__ = ["Calibration", "calibrate", "halve_batch", "software_versions"]

log = logging.getLogger(__name__)
CPU_BATCHES, GPU_BATCHES = (1, 2, 4, 8), (8, 16, 32, 64, 128)
ENOUGH = 0.97  # of the best throughput: a smaller batch pads less
# bf16 is taken where at most so many pixels change sides, on windows of this city.
CHANGED = 0.002


@dataclass(frozen=True)
class Calibration:
    """How a model runs on the workers' device.

    Attributes:
        device: In words.
        batch: Windows a forward pass; every batch has this size, so that no logit depends on the cut.
        precision: Of the forward pass.
        window_s: Seconds of a window in such a batch.
        changed: Share of pixels that bf16 moved across one half; 0 where it was not tried.
        network_bytes: Memory of the weights and of what a forward pass holds, roughly.
        software: Versions of what computes; after an upgrade other batches may be fastest, and answers round otherwise.
    """

    device: str
    batch: int
    precision: Precision
    window_s: float
    changed: float
    network_bytes: int
    software: dict[str, str]


def software_versions() -> dict[str, str]:
    """What decides how evidence is read, rendered, predicted and rounded; part of a map's identity."""
    libraries = {name: version(name) for name in ("roadfuse", "torch", "numpy", "numba", "scipy", "rasterio", "pyproj")}
    return libraries | {"gdal": rasterio.__gdal_version__, "proj": rasterio.__proj_version__}


def calibrate(
    ref: PredictorRef, spec: ModelSpec, resolution_m: float, sample: dict[str, NDArray[Any]], folder: Path
) -> Calibration:
    """What the settings ask for, and for the rest what is fastest; measured once, then read from the folder.

    Args:
        ref: The model.
        spec: `batch` and `precision`, None or "auto" where they are to be found.
        resolution_m: Of the city.
        sample: Some windows of the city, (N, H, W, channels) each, as they are read.
        folder: Of calibrations.

    Raises:
        ConfigError: No batch, or not the one that is asked for, fits the device.
    """
    path, software = _file(ref, spec, folder), software_versions()
    kept = _kept(path)
    if kept and kept.software == software:
        return kept
    try:
        found = _measure(ref, spec, resolution_m, sample)
    except (torch.OutOfMemoryError, DeviceFullError) as error:
        fix = "take another device or a smaller network" if spec.batch is None else "lower model.batch"
        raise ConfigError("model.batch", spec.batch, f"does not fit the memory of {device_name()}", fix) from error
    finally:
        free_memory()
    log.info("%s on %s: batch %d, %s, %.1f ms a window", ref.path.stem, found.device, found.batch, found.precision,
             1e3 * found.window_s)  # fmt: skip
    write_record(path, asdict(found))
    return found


def _kept(path: Path) -> Calibration | None:
    """What was measured before; None where there is nothing, or nothing of this form."""
    try:
        record = read_record(path)
    except (FileNotFoundError, DamagedFileError):
        return None
    return Calibration(**record) if record.keys() == Calibration.__annotations__.keys() else None


def halve_batch(now: Calibration, ref: PredictorRef, spec: ModelSpec, folder: Path, why: str) -> None:
    """Keep half the batch from now on: a map by batches of two sizes would not equal one by a single size.

    Args:
        now: What did not fit.
        ref: Its model.
        spec: As in `calibrate`.
        folder: Of calibrations.
        why: What the device said.
    """
    path = _file(ref, spec, folder)
    log.warning("%s: a batch of %d does not fit %s (%s); from now on %d. Remove %s to measure again",
                ref.path.stem, now.batch, now.device, why, now.batch // 2, path)  # fmt: skip
    write_record(path, asdict(replace(now, batch=now.batch // 2)))


def _file(ref: PredictorRef, spec: ModelSpec, folder: Path) -> Path:
    asked = f"{ref.digest}-{device_name().replace(' ', '-')}-{spec.precision}-{spec.batch or 'auto'}{'-turns' * ref.turns}"
    return folder / f"{asked}.json"


def _measure(ref: PredictorRef, spec: ModelSpec, resolution_m: float, sample: dict[str, NDArray[Any]]) -> Calibration:
    """Everything that is not asked for.

    Raises:
        DeviceFullError: No batch fits the device.
    """
    precision, changed = _precision(ref, spec, resolution_m, sample)
    predictor = load_predictor(ref.model_copy(update={"precision": precision}), resolution_m)
    sizes = (spec.batch,) if spec.batch else GPU_BATCHES if torch.cuda.is_available() else CPU_BATCHES
    measured = {n: _window_seconds(predictor, sample, n) for n in sizes}
    fastest = min(measured.values())
    if fastest == float("inf"):
        raise DeviceFullError(f"batches of {', '.join(map(str, sizes))}")
    batch = next(n for n in sizes if measured[n] * ENOUGH <= fastest)
    memory = _network_bytes(predictor, sample, batch)
    return Calibration(device_name(), batch, precision, measured[batch], changed, memory, software_versions())


def _precision(
    ref: PredictorRef, spec: ModelSpec, resolution_m: float, sample: dict[str, NDArray[Any]]
) -> tuple[Precision, float]:
    if spec.precision != "auto":
        return spec.precision, 0.0
    if ref.path.suffix != ".safetensors" or not _has_bf16():
        return "32", 0.0
    exact, half = (load_predictor(ref.model_copy(update={"precision": p}), resolution_m) for p in ("32", "bf16"))
    a, b = (p.predict(p.prepare(sample))[:, 0] > 0.5 for p in (exact, half))
    changed = float(np.mean(a != b))
    faster = _window_seconds(half, sample, 2) < _window_seconds(exact, sample, 2)
    return ("bf16" if faster and changed <= CHANGED else "32"), changed


def _has_bf16() -> bool:
    """Whether the chip multiplies bfloat16 itself."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _window_seconds(predictor: Predictor, sample: dict[str, NDArray[Any]], batch: int) -> float:
    """The best of three, after one to warm up; infinite where it does not fit the device."""
    held = len(next(iter(sample.values())))
    inputs = {k: v[torch.arange(batch) % held] for k, v in predictor.prepare(sample).items()}
    best = float("inf")
    try:
        for run in range(4):
            began = time.perf_counter()
            predictor.predict(inputs)
            best = min(best, (time.perf_counter() - began) / batch) if run else best
    except (torch.OutOfMemoryError, DeviceFullError):
        return float("inf")
    return best


def _network_bytes(predictor: Predictor, sample: dict[str, NDArray[Any]], batch: int) -> int:
    """Weights, and the largest outputs of a forward pass that are held together, roughly."""
    network: nn.Module | None = getattr(predictor, "network", None)
    if network is None:
        return 0
    weights = sum(p.numel() * 4 for p in network.parameters())
    sizes: dict[nn.Module, int] = {}

    def note(part: nn.Module, _: object, made: object) -> None:
        if isinstance(made, Tensor):
            sizes[part] = made.numel() * 4

    hooks = [m.register_forward_hook(note) for m in network.modules() if not list(m.children())]
    predictor.predict({k: v[:1] for k, v in predictor.prepare(sample).items()})
    for hook in hooks:
        hook.remove()
    return 2 * weights + batch * sum(sorted(sizes.values())[-8:])
