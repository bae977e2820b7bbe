"""What a refresh would do: windows, blocks, memory, time; and what of the standing map it may keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.cluster import count_gpus, count_workers, threads_of_worker
from roadfuse_core.cubes import changed_tiles, halo_px, worker_memory
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.grid import Block, Bounds, Grid, Lattice, TileIndex, blocks_of
from roadfuse_core.imagery import ImageFile
from roadfuse_core.inference._blocks import BlockJob, region_of
from roadfuse_core.inference._calibrate import Calibration, calibrate
from roadfuse_core.inference._coverage import Coverage, cells_of, cells_within, whole, windows_meeting, windows_over
from roadfuse_core.inference._evidence import Evidence, files_of, reach_px, read_evidence, read_region, readers_of
from roadfuse_core.inference._map import MapRecord, standing_record
from roadfuse_core.inference._predictor import (
    PredictorFacts,
    PredictorRef,
    choose_weights,
    read_facts,
    require_target,
    resolve_weights,
)
from roadfuse_core.inference._share import choose_block_px
from roadfuse_core.settings import City, ImagerySpec

__all__ = ["RefreshPlan", "plan_refresh"]

BLOCK_PX = 1024
GPU_BLOCK_PX = 4096
SAMPLE = 4
GIB = 2**30
# A worker process with its libraries, before any data, with a margin.
PROCESS_BYTES = 600 * 2**20
Facts = dict[str, Any]


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh would do.

    Attributes:
        digest: Of everything that decides the map; an equal one stands already.
        evidence: What is read.
        model: Who predicts, and how.
        calibration: Batch, precision and speed.
        lattice: The windows.
        planes: Arrays of the map besides "road".
        threshold: Probability, 0 … 254, from which a pixel is road.
        coverage: Which windows and pixels.
        standing: The record of the map that is kept in part, or None for a map from nothing.
        base: The newest snapshot of the maps, or None.
        why: Why everything is predicted anew; empty where only changes are.
        windows: That will be predicted at most: those that may hold evidence.
        of: All windows of the city that may hold evidence.
        block_px: Edge of a block.
        memory_bytes: Of a worker.
        seconds: Expected, over all workers.
        identity: What is kept in the record, to be compared with next time.
        threads: Of a worker that cut windows, and as many that add them up.
    """

    digest: str
    evidence: Evidence
    model: PredictorRef
    calibration: Calibration
    lattice: Lattice
    planes: tuple[str, ...]
    threshold: int
    coverage: Coverage
    standing: MapRecord | None
    base: str | None
    why: str
    windows: int
    of: int
    block_px: int
    memory_bytes: int
    seconds: float
    identity: Facts
    threads: int

    def blocks(self) -> list[Block]:
        """All blocks of the grid, row-major."""
        grid = self.evidence.grid
        return blocks_of(grid, max(1, self.block_px // grid.tile_px))

    def jobs(self, scratch: Path) -> list[BlockJob]:
        """Blocks with a window to predict, those with the most batches first, so that the last ones are short."""
        found = []
        for block in self.blocks():
            wanted = self._wanted(block)
            if wanted.any():
                job = BlockJob(self.evidence, self.model, self.lattice, block, np.packbits(wanted).tobytes(),
                               self.calibration.batch, str(scratch), threads=self.threads)  # fmt: skip
                found.append((-(-int(wanted.sum()) // self.calibration.batch), job))
        return [job for _, job in sorted(found, key=lambda one: -one[0])]

    def _wanted(self, block: Block) -> NDArray[np.bool_]:
        s, over = self.lattice.stride_px, self.lattice.overhang_px
        rows, cols = (self.lattice.starts(a, b) for a, b in ((block.row0, block.row1), (block.col0, block.col1)))
        if not rows or not cols:
            return np.zeros(0, bool)
        r, c = (rows[0] + over) // s, (cols[0] + over) // s
        return self.coverage.windows[r : r + len(rows), c : c + len(cols)].reshape(-1)

    def cells(self, block: Block) -> NDArray[np.bool_]:
        """Which cells of those that share a pixel with a block may change."""
        return cells_within(self.coverage.cells, self.lattice, block)


def plan_refresh(city: City, weights: str | None = None, group: str = "map", full: bool = False) -> RefreshPlan:
    """Plan a refresh; nothing of the city is predicted, and only its calibration is written.

    Args:
        city: Ingested.
        weights: Instead of `model.weights`.
        group: Which map.
        full: Predict everything anew, whatever stands.

    Raises:
        ConfigError: The model cannot use what the city has, or a worker's memory is too small for it.
        StoreError: The city has points but no cube yet.
    """
    ref = resolve_weights(choose_weights(city, weights), city.root).model_copy(update={"turns": city.model.turns})
    evidence = read_evidence(city)
    grid = evidence.grid
    predictor = read_facts(ref, grid.resolution_m)
    _require_fit(city, predictor, evidence)
    lattice = Lattice(predictor.window_px, predictor.window_px // 2)
    images = files_of(evidence, "imagery") if "image" in predictor.rasters else []
    heights = files_of(evidence, "lidar") if "lidar" in predictor.rasters else []
    possible = _possible(evidence, lattice, images)
    calibration = calibrate(ref, city.model, grid.resolution_m, _sample(evidence, predictor, lattice, possible),
                            city.workspace_path / "calibration")  # fmt: skip
    model = ref.model_copy(update={"precision": calibration.precision})
    threshold = int(np.ceil(city.model.threshold * 254))
    identity = _identity(evidence, model, calibration, lattice, threshold, images, heights)
    standing, base, kept, why = None, None, None, "there is no map yet"
    if found := standing_record(city, group):
        base, standing = found
        kept, why = (None, "asked for") if full else _changes(city, standing, identity, evidence, predictor, lattice)
    elif other := standing_record(city, "map"):
        base = other[0]
    coverage = whole(grid, lattice, possible) if kept is None else _around(kept, possible, lattice)
    block_px, workers = BLOCK_PX, count_workers(city.cluster)
    if _on_gpus(city):
        block_px = choose_block_px(grid, lattice, coverage.windows, calibration.batch, workers, GPU_BLOCK_PX)
    windows = int(coverage.windows.sum())
    return RefreshPlan(
        digest=_hash([identity, group, base if kept is not None else None, full]), evidence=evidence, model=model,
        calibration=calibration, lattice=lattice, planes=predictor.planes, threshold=threshold, coverage=coverage,
        standing=None if kept is None else standing, base=base, why="" if kept is not None else why, windows=windows,
        of=int(possible.sum()), block_px=block_px, memory_bytes=_memory(city, predictor, grid, lattice, calibration, block_px),
        seconds=windows * calibration.window_s / workers, identity=identity,
        threads=threads_of_worker(city.cluster),
    )  # fmt: skip


def _on_gpus(city: City) -> bool:
    """Whether the city's workers have a GPU each, as far as this machine's are concerned."""
    return city.cluster.kind != "local" and count_gpus() > 0


def _require_fit(city: City, predictor: PredictorFacts, evidence: Evidence) -> None:
    if "image" not in predictor.rasters and evidence.cubes is None:
        raise ConfigError("model.weights", city.model.weights, "needs trajectories, and the city has none", "add points")
    if not predictor.layers and not evidence.images:
        raise ConfigError("model.weights", city.model.weights, "needs imagery, and the city has none", "add imagery")
    require_target(city, predictor)
    cube = readers_of(evidence).cube
    if cube:
        cube.require(predictor.layers, "model.weights")


def _possible(evidence: Evidence, lattice: Lattice, images: list[tuple[ImageFile, Bounds]]) -> NDArray[np.bool_]:
    """Windows that touch an image's box or a tile with points."""
    grid = evidence.grid
    boxes = [_pixels(grid, box, 0) for _, box in images]
    cube = readers_of(evidence).cube
    if cube:
        boxes += [_tile(grid, t) for t in cube.occupied()]
    return windows_meeting(grid, lattice, boxes)


def _tile(grid: Grid, tile: TileIndex, halo: int = 0) -> Block:
    px = grid.tile_px
    return Block(tile.row * px - halo, tile.col * px - halo, (tile.row + 1) * px + halo, (tile.col + 1) * px + halo)


def _pixels(grid: Grid, box: Bounds, beyond_px: int) -> Block:
    """A box as whole pixels, a pixel wider for the interpolation at its rim, cut to the grid and some pixels beyond it."""
    b, res, (height, width) = grid.bounds, grid.resolution_m, grid.shape
    row0, row1 = int((b.top - box.top) // res) - 1, -int((box.bottom - b.top) // res) + 1
    col0, col1 = int((box.left - b.left) // res) - 1, -int((b.left - box.right) // res) + 1
    low, height, width = -beyond_px, height + beyond_px, width + beyond_px
    return Block(max(row0, low), max(col0, low), min(row1, height), min(col1, width))


def _identity(
    evidence: Evidence, model: PredictorRef, calibration: Calibration, lattice: Lattice, threshold: int,
    images: list[tuple[ImageFile, Bounds]], heights: list[tuple[ImageFile, Bounds]],
) -> Facts:  # fmt: skip
    """What decides a map: the parts that cannot change without predicting everything, and those that can."""
    fixed = {
        "grid": asdict(evidence.grid), "imagery": _settings(evidence.imagery if images else None),
        "model": model.digest, "turns": model.turns, "precision": calibration.precision, "batch": calibration.batch,
        "device": calibration.device, "window_px": lattice.window_px, "stride_px": lattice.stride_px, "threshold": threshold,
        "points": evidence.cubes is not None, "software": calibration.software,
    }  # fmt: skip
    identity = {"fixed": fixed, "snapshot": evidence.snapshot, "images": [_raster(*one) for one in images]}
    if heights:
        fixed["lidar"] = _settings(evidence.lidar)
        identity["lidar"] = [_raster(*one) for one in heights]
    return identity


def _raster(file: ImageFile, box: Bounds) -> list[Any]:
    """A raster in a record: path, size, time, box, and what else it is read from, where there is such."""
    return [file.path, file.size, file.changed_ns, list(box), *([[list(p) for p in file.parts]] if file.parts else [])]


def _settings(spec: ImagerySpec | None) -> Facts:
    return spec.model_dump(mode="json", exclude={"sources"}) if spec else {}


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _changes(
    city: City, standing: MapRecord, identity: Facts, evidence: Evidence, predictor: PredictorFacts, lattice: Lattice
) -> tuple[NDArray[np.bool_] | None, str]:
    """Windows that see anything new since the standing map; None, and why, where that cannot be told."""
    before = standing.get("identity")
    if before is None or before["fixed"] != identity["fixed"]:
        return None, f"changed: {_difference(before, identity) or 'the format of the record'}"
    boxes = [Block(row, col, row + lattice.window_px, col + lattice.window_px) for row, col, _ in standing["failed"]]
    for kind in ("images", "lidar"):
        was, now = ([json.dumps(file) for file in facts.get(kind, [])] for facts in (before, identity))
        both = set(was) & set(now)
        # Windows at the rim see what lies beyond it.
        boxes += [
            _pixels(evidence.grid, Bounds(*json.loads(file)[3]), lattice.overhang_px)
            for file in [*was, *now] if file not in both
        ]  # fmt: skip
        if [file for file in was if file in both] != [file for file in now if file in both]:
            return None, f"changed: the order of the {kind}"
    if before["snapshot"] != identity["snapshot"]:
        try:
            halo = max(halo_px(predictor.layers), reach_px(lattice.window_px))
            boxes += [_tile(evidence.grid, t, halo) for t in changed_tiles(city, before["snapshot"])]
        except StoreError:
            return None, "the snapshot of the points behind the standing map was expired"
    return windows_meeting(evidence.grid, lattice, boxes), ""


def _difference(before: Facts | None, now: Facts) -> str:
    """Which of the facts that a map cannot be carried over differ; of the software, which versions."""
    if before is None:
        return ""
    old, new = before["fixed"], now["fixed"]
    names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    was, now_in_use = old.get("software", {}), new["software"]
    versions = sorted(k for k in was.keys() | now_in_use.keys() if was.get(k) != now_in_use.get(k))
    return ", ".join(f"software ({', '.join(versions)})" if name == "software" else name for name in names)


def _around(changed: NDArray[np.bool_], possible: NDArray[np.bool_], lattice: Lattice) -> Coverage:
    """Pixels that changed windows cover, and all windows that are blended there."""
    cells = cells_of(changed, lattice)
    return Coverage(windows_over(cells, lattice) & possible, cells)


def _sample(
    evidence: Evidence, predictor: PredictorFacts, lattice: Lattice, possible: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    """Some windows of the city, spread over it, for measurements; zeros where there is none with evidence."""
    size, places = lattice.window_px, np.argwhere(possible)
    chosen = (
        places[np.linspace(0, len(places) - 1, min(SAMPLE, len(places))).astype(int)] if len(places) else np.zeros((1, 2), int)
    )
    read = []
    for i, j in chosen:
        row, col = int(i) * lattice.stride_px - lattice.overhang_px, int(j) * lattice.stride_px - lattice.overhang_px
        try:
            read.append(read_region(evidence, predictor.layers, predictor.rasters, Block(row, col, row + size, col + size)))
        except (OSError, RuntimeError, ValueError):  # a damaged file is the refresh's to tell
            continue
    if not read:
        raise StoreError("no window of the city can be read; run `roadfuse check`")
    return {k: np.stack([r.inputs[k] for r in read]) for k in read[0].inputs}


def _memory(
    city: City, predictor: PredictorFacts, grid: Grid, lattice: Lattice, calibration: Calibration, block_px: int
) -> int:
    """Bytes that a worker needs.

    Raises:
        ConfigError: They are more than it has.
    """
    edge = max(block_px, grid.tile_px)
    region = region_of(lattice, Block(0, 0, edge, edge))
    side = region.row1 - region.row0 + 2 * max(halo_px(predictor.layers), reach_px(lattice.window_px))
    # Sums (8 bytes an array) and a layer while it is smoothed, layers, image twice, mask, accumulator, finished values.
    arrays = len({name for layer in predictor.layers for name in layer.arrays} | {"count"})
    pixel = (
        8 * arrays
        + 12
        + 4 * len(predictor.layers)
        + sum({"image": 11, "lidar": 7}[n] for n in predictor.rasters)
        + 2
        + 6 * (len(predictor.planes) + 1)
    )
    need = PROCESS_BYTES + 2 * side * side * pixel + calibration.network_bytes
    limit = 64 * GIB if _on_gpus(city) else worker_memory(city)
    if need > limit:
        problem = f"is less than the {need / GIB:.2f} GiB that a worker needs"
        fix = "give it more, take fewer workers, or lower model.batch"
        raise ConfigError("cluster.memory_gib", round(limit / GIB, 2), problem, fix)
    return need
