"""A city's map: blocks of windows on Dask workers, then blocks of mosaic, published in one step."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from dask.distributed import Client
from numpy.typing import NDArray

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import (
    CubeReader,
    committer_lock,
    cubes_path,
    grid_attributes,
    halo_px,
    open_repository,
    publish,
    read_group,
    render,
)
from roadfuse_core.errors import ConfigError, StoreError
from roadfuse_core.grid import Block, Grid, Lattice, blocks_of
from roadfuse_core.imagery import ImageryReader, find_imagery, imagery_identity
from roadfuse_core.inference._predictor import Predictor, PredictorRef, load_predictor, normalise_image, resolve_weights
from roadfuse_core.mosaic import NODATA, PROBABILITY_SCALE, Accumulator, to_probability
from roadfuse_core.settings import City, ImagerySpec

__all__ = ["Evidence", "MapReader", "MapRecord", "infer", "maps_path", "read_evidence"]

log = logging.getLogger(__name__)
BLOCK_PX = 1024
MapRecord = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Where a refresh reads from; small, and the same on every worker.

    Attributes:
        grid: The city's grid.
        cubes: Path of the cube repository; None without points.
        snapshot: Which snapshot of it.
        imagery: Imagery settings; None without images.
        images: Absolute paths.
    """

    grid: Grid
    cubes: str | None
    snapshot: str | None
    imagery: ImagerySpec | None
    images: tuple[str, ...]


@dataclass(frozen=True)
class _BlockJob:
    evidence: Evidence
    model: PredictorRef
    lattice: Lattice
    block: Block
    batch: int
    scratch: str

    @property
    def file(self) -> Path:
        return Path(self.scratch) / f"{self.block.row0}-{self.block.col0}.npz"


def maps_path(city: City) -> Path:
    """Where the city's map repository lies."""
    return city.workspace_path / "maps"


def read_evidence(city: City) -> Evidence:
    """What the city's refresh would read now.

    Raises:
        ConfigError: Imagery is missing or lies elsewhere.
        StoreError: The city has points but no cube yet.
    """
    grid, images = city.make_grid(), tuple(find_imagery(city))
    if city.imagery and not ImageryReader(city.imagery, list(images), grid).covers():
        raise ConfigError(
            "imagery.sources",
            city.imagery.sources,
            "lies outside the city's bounds",
            "correct grid.bounds or the files",
        )
    snapshot = CubeReader(cubes_path(city)).snapshot if city.points else None
    return Evidence(grid, str(cubes_path(city)) if city.points else None, snapshot, city.imagery, images)


def infer(
    city: City, weights: str | None = None, group: str = "map", client: Client | None = None, tell: Progress = quiet
) -> MapRecord:
    """Predict the whole city and publish the map.

    A map whose evidence and model have not changed stands as it is. A killed run goes on with the blocks it has.

    Args:
        city: The city, ingested.
        weights: Instead of `model.weights`.
        group: Which map of the repository is replaced: "map", or "baseline".
        client: Dask; None works in this process, with the same bytes as result.
        tell: Progress.

    Returns:
        The map's record: digest, snapshot, window and nodata counts, provenance.

    Raises:
        ConfigError: The model cannot use what the city has.
        StoreError: Another process is writing.
    """
    ref = resolve_weights(weights or city.model.weights, city.root)
    with committer_lock(city.workspace_path):
        evidence = read_evidence(city)
        predictor = load_predictor(ref, evidence.grid.resolution_m)
        _require_fit(city, predictor, evidence)
        lattice = Lattice(predictor.window_px, predictor.window_px // 2)
        digest = _digest(evidence, ref, lattice, city.model.threshold)
        standing = _standing(city, group, digest)
        if standing:
            log.info("%s: nothing changed since %s", group, standing["made"])
            return standing
        return _predict_city(city, evidence, ref, lattice, digest, group, client, tell)


def _require_fit(city: City, predictor: Predictor, evidence: Evidence) -> None:
    if not predictor.uses_image and evidence.cubes is None:
        raise ConfigError("model.weights", city.model.weights, "needs trajectories, and the city has none", "add points")
    if not predictor.layers and not evidence.images:
        raise ConfigError("model.weights", city.model.weights, "needs imagery, and the city has none", "add imagery")
    if evidence.cubes:
        CubeReader(Path(evidence.cubes), evidence.snapshot).require(predictor.layers)


def _digest(evidence: Evidence, ref: PredictorRef, lattice: Lattice, threshold: float) -> str:
    images = imagery_identity(list(evidence.images))
    settings = evidence.imagery.model_dump(mode="json") if evidence.imagery else None
    text = json.dumps([evidence.grid.__dict__, evidence.snapshot, settings, images, ref.digest, lattice.__dict__, threshold])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _standing(city: City, group: str, digest: str) -> MapRecord | None:
    try:
        root = read_group(open_repository(maps_path(city)))
    except StoreError:
        return None
    record = dict(root[group].attrs["record"]) if group in root else {}
    return record if record.get("digest") == digest else None


def _predict_city(
    city: City, evidence: Evidence, ref: PredictorRef, lattice: Lattice, digest: str, group: str,
    client: Client | None, tell: Progress,
) -> MapRecord:  # fmt: skip
    grid = evidence.grid
    scratch = city.workspace_path / "scratch" / f"{group}-{digest}"
    scratch.mkdir(parents=True, exist_ok=True)
    blocks = blocks_of(grid, max(1, BLOCK_PX // grid.tile_px))
    jobs = [_BlockJob(evidence, ref, lattice, b, city.model.batch, str(scratch)) for b in blocks]
    windows = run_jobs(client, predict_block, jobs, "predicting blocks", tell)
    repository = open_repository(maps_path(city), create=True)
    base = repository.lookup_branch("main")
    staging = f"refresh-{group}"
    if staging in repository.list_branches():
        repository.delete_branch(staging)
    repository.create_branch(staging, base)
    _prepare(repository, staging, group, grid)
    session = repository.writable_session(staging)
    fork, threshold = session.fork(), int(np.ceil(city.model.threshold * PROBABILITY_SCALE))
    mosaics = [_MosaicJob(fork, group, job, tuple(j for j in jobs if _meets(j, job.block)), threshold) for job in jobs]
    done = run_jobs(client, assemble_block, mosaics, "writing the mosaic", tell)
    session.merge(*(d[0] for d in done))
    made = datetime.now(UTC)
    record = {
        "digest": digest, "made": made.isoformat(timespec="seconds"), "model": ref.path.name, "model_digest": ref.digest,
        "cubes_snapshot": evidence.snapshot, "images": len(evidence.images), "threshold": city.model.threshold,
        "window_px": lattice.window_px, "stride_px": lattice.stride_px, "windows": sum(windows),
        "nodata_px": sum(d[1] for d in done), "road_px": sum(d[2] for d in done),
    }  # fmt: skip
    root = zarr.open_group(session.store)
    root[group].attrs["record"] = record
    snapshot = str(session.commit(f"{group} by {ref.path.name}"))
    publish(repository, snapshot, base)
    repository.create_tag(f"{group}-{made:%Y%m%dT%H%M%S%f}", snapshot)
    repository.delete_branch(staging)
    shutil.rmtree(scratch, ignore_errors=True)
    return record


def _prepare(repository: Any, branch: str, group: str, grid: Grid) -> None:
    """Empty arrays in a commit of their own; forks refuse uncommitted changes."""
    session = repository.writable_session(branch)
    root = zarr.open_group(session.store)
    folder = root.require_group(group)
    if folder.attrs.get("grid") not in (None, grid_attributes(grid)["grid"]):
        raise ConfigError("grid", "…", "differs from that of the maps in the workspace", "use another workspace")
    folder.attrs.update(grid_attributes(grid))
    for name in ("probability", "road"):
        if name not in folder:
            array = folder.create_array(
                name, shape=grid.shape, chunks=(grid.tile_px, grid.tile_px), dtype="uint8", fill_value=NODATA,
                dimension_names=("y", "x"),
            )  # fmt: skip
            scale = {"scale_factor": 1 / PROBABILITY_SCALE} if name == "probability" else {}
            array.attrs.update({"nodata": NODATA, "grid_mapping": "crs"} | scale)
    if session.has_uncommitted_changes:
        session.commit(f"room for {group}")


@lru_cache(maxsize=2)
def _predictor(ref: PredictorRef, resolution_m: float) -> Predictor:
    """Loaded once a worker process, never sent through the graph."""
    return load_predictor(ref, resolution_m)


@lru_cache(maxsize=2)
def _readers(evidence: Evidence) -> tuple[CubeReader | None, ImageryReader | None]:
    cube = CubeReader(Path(evidence.cubes), evidence.snapshot) if evidence.cubes else None
    images = ImageryReader(evidence.imagery, list(evidence.images), evidence.grid) if evidence.imagery else None
    return cube, images


def _region(lattice: Lattice, block: Block) -> Block:
    """The rectangle that a block's windows cover; past the grid on all sides."""
    rows, cols = lattice.starts(block.row0, block.row1), lattice.starts(block.col0, block.col1)
    if not rows or not cols:
        return Block(block.row0, block.col0, block.row0, block.col0)
    return Block(rows[0], cols[0], rows[-1] + lattice.window_px, cols[-1] + lattice.window_px)


def _meets(job: _BlockJob, block: Block) -> bool:
    r = _region(job.lattice, job.block)
    return r.row0 < block.row1 and r.row1 > block.row0 and r.col0 < block.col1 and r.col1 > block.col0


def predict_block(job: _BlockJob) -> int:
    """Predict the windows that start in a block and leave their sums in its scratch file.

    Windows without a point and without a valid image pixel are skipped.

    Returns:
        How many windows were predicted. A block whose file is whole is not computed again.
    """
    if job.file.exists():
        with np.load(job.file) as held:
            return int(held["windows"])
    predictor = _predictor(job.model, job.evidence.grid.resolution_m)
    region = _region(job.lattice, job.block)
    out = Accumulator(region.row0, region.col0, region.row1 - region.row0, region.col1 - region.col0)
    inputs, evident = _read_region(job.evidence, predictor, region)
    size, weight = job.lattice.window_px, job.lattice.weight()
    places = [p for p in job.lattice.windows(job.block) if _cut(evident, p, region, size).any()]
    for first in range(0, len(places), job.batch):
        chosen = places[first : first + job.batch]
        batch = {name: _batch(x, chosen, region, size, job.batch) for name, x in inputs.items()}
        for (row, col), probability in zip(chosen, predictor.predict(batch), strict=False):
            out.add(row, col, probability, weight)
    part = job.file.with_suffix(".part.npz")
    np.savez(part, sums=out.sums, windows=len(places))
    part.rename(job.file)
    return len(places)


def _batch(x: NDArray[np.float32], places: list[tuple[int, int]], region: Block, size: int, full: int) -> NDArray[np.float32]:
    """(full, C, size, size): windows, then zeros. One shape for every batch, so that a logit never depends on it."""
    out = np.zeros((full, len(x), size, size), np.float32)
    for k, place in enumerate(places):
        out[k] = _cut(x, place, region, size)
    return out


def _cut(x: NDArray[Any], place: tuple[int, int], region: Block, size: int) -> NDArray[Any]:
    r, c = place[0] - region.row0, place[1] - region.col0
    return x[..., r : r + size, c : c + size]


def _read_region(
    evidence: Evidence, predictor: Predictor, region: Block
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
    """Every input over a rectangle, and where there is any evidence."""
    cube, images = _readers(evidence)
    row, col, height, width = region.row0, region.col0, region.row1 - region.row0, region.col1 - region.col0
    inputs: dict[str, NDArray[np.float32]] = {}
    evident = np.zeros((height, width), bool)
    if cube:
        halo = halo_px(predictor.layers)
        sums = cube.sums(predictor.layers, row - halo, col - halo, height + 2 * halo, width + 2 * halo)
        if predictor.layers:
            inputs["gps"] = render(sums, predictor.layers, halo)
        evident |= sums["count"][halo : halo + height, halo : halo + width] > 0
    if images and predictor.uses_image:
        rgb, valid = images.window(row, col, height, width)
        inputs["image"] = normalise_image(rgb, valid)
        evident |= valid
    return inputs, evident


@dataclass(frozen=True)
class _MosaicJob:
    session: Any
    group: str
    own: _BlockJob
    sources: tuple[_BlockJob, ...]
    threshold: int


def assemble_block(job: _MosaicJob) -> tuple[Any, int, int]:
    """Add up what all blocks left over this one, and write its tiles.

    Returns:
        The fork with the written chunks, the number of pixels without data, and of road.
    """
    block = job.own.block
    total = np.zeros((2, block.row1 - block.row0, block.col1 - block.col0), np.uint32)
    for source in job.sources:
        region = _region(source.lattice, source.block)
        r0, r1 = max(region.row0, block.row0), min(region.row1, block.row1)
        c0, c1 = max(region.col0, block.col0), min(region.col1, block.col1)
        with np.load(source.file) as held:
            sums = held["sums"]
        total[:, r0 - block.row0 : r1 - block.row0, c0 - block.col0 : c1 - block.col0] += sums[
            :, r0 - region.row0 : r1 - region.row0, c0 - region.col0 : c1 - region.col0
        ]
    probability = to_probability(total)
    nodata = probability == NODATA
    road = np.where(nodata, NODATA, probability >= job.threshold).astype(np.uint8)
    folder = zarr.open_group(job.session.store)[job.group]
    where = (slice(block.row0, block.row1), slice(block.col0, block.col1))
    folder["probability"][where], folder["road"][where] = probability, road
    return job.session, int(nodata.sum()), int((road == 1).sum())


class MapReader:
    """Reads windows of a published map.

    Raises:
        StoreError: There is no such map yet.
    """

    def __init__(self, city: City, group: str = "map") -> None:
        root = read_group(open_repository(maps_path(city)))
        if group not in root:
            raise StoreError(f"{maps_path(city)}: holds no {group} yet; run `roadfuse refresh` first")
        self.folder = root[group]
        self.record: MapRecord = dict(self.folder.attrs["record"])

    def window(self, name: str, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """(height, width) uint8 of "probability" (0 … 254) or "road" (0, 1); 255 is no data; inside the grid."""
        return np.asarray(self.folder[name][row : row + height, col : col + width])
