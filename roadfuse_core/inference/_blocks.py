"""What a worker does: predict the windows that start in a block, then assemble blocks from what all left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import torch
import zarr
from dask.distributed import WorkerPlugin, get_worker
from icechunk import IcechunkError
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from safetensors import safe_open
from torch import Tensor

from roadfuse_core.cubes import Chunks
from roadfuse_core.errors import DataError, StoreError
from roadfuse_core.grid import Block, Grid, Lattice
from roadfuse_core.inference._coverage import pixels_of
from roadfuse_core.inference._evidence import Evidence, reach_px, read_region
from roadfuse_core.inference._predictor import DeviceFullError, Predictor, PredictorRef, predictor_of
from roadfuse_core.inference._scratch import BlockReport, Failure, left_report, save_block
from roadfuse_core.mosaic import NODATA, Accumulator

__all__ = [
    "AssembleJob",
    "BlockJob",
    "LoadModel",
    "assemble_block",
    "predict_block",
    "predict_chain",
    "region_of",
    "windows_of",
]

AHEAD = 2  # batches that are cut while one is computed
PENDING = 2  # batches whose answers are on their way or are added
# What bad data and a bad device raise; everything else is a bug and stops the refresh.
FAULTS = (DataError, StoreError, RasterioError, IcechunkError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class BlockJob:
    """One block to predict.

    Attributes:
        evidence: What to read.
        model: Who predicts.
        lattice: The city's windows.
        block: Whose windows.
        wanted: Packed bits, one for each window that starts in the block, row-major.
        batch: Windows a forward pass.
        scratch: Folder for what the block leaves.
        lenient: Go on without windows that fail.
        threads: That cut windows, and as many that add them up.
    """

    evidence: Evidence
    model: PredictorRef
    lattice: Lattice
    block: Block
    wanted: bytes
    batch: int
    scratch: str
    lenient: bool = False
    threads: int = 1

    @property
    def file(self) -> Path:
        """What the block leaves, whole."""
        return Path(self.scratch) / f"{self.block.row0}-{self.block.col0}.safetensors"


class LoadModel(WorkerPlugin):
    """Loads the model when a worker starts, also one that was started again; no weights travel through the graph."""

    idempotent = True

    def __init__(self, ref: PredictorRef, resolution_m: float) -> None:
        self.ref, self.resolution_m = ref, resolution_m
        self.name = f"roadfuse-model-{ref.digest}-{ref.precision}-{ref.turns}"

    def setup(self, worker: Any) -> None:
        """Called by Dask on each worker."""
        predictor_of(self.ref, self.resolution_m)


def windows_of(job: BlockJob) -> list[tuple[int, int]]:
    """Corners of the wanted windows that start in the block."""
    every = job.lattice.windows(job.block)
    bits = np.unpackbits(np.frombuffer(job.wanted, np.uint8), count=len(every))
    return [place for place, wanted in zip(every, bits, strict=True) if wanted]


def region_of(lattice: Lattice, block: Block) -> Block:
    """The rectangle that a block's windows cover; past the grid on all sides."""
    rows, cols = lattice.starts(block.row0, block.row1), lattice.starts(block.col0, block.col1)
    if not rows or not cols:
        return Block(block.row0, block.col0, block.row0, block.col0)
    return Block(rows[0], cols[0], rows[-1] + lattice.window_px, cols[-1] + lattice.window_px)


def predict_chain(jobs: tuple[BlockJob, ...]) -> list[BlockReport]:
    """Predict blocks one after the other; other threads read the next one's evidence, cut windows, add them up and write."""
    with ThreadPoolExecutor(1, "reader") as reader, open_crew(jobs[0].threads) as crew:
        ahead, saved = reader.submit(read_ahead, jobs[0]), []
        for k, job in enumerate(jobs):
            now = ahead
            if k + 1 < len(jobs):
                ahead = reader.submit(read_ahead, jobs[k + 1])
            saved.append(predict_block(job, now, crew))
        return [block.result() for block in saved]


@dataclass(frozen=True)
class Crew:
    """Threads beside the one that talks to the device.

    Attributes:
        cutters: As many threads as there are adders; they cut windows.
        adders: Each a thread of its own, which adds its share of every window's rows.
        writer: One thread that saves blocks.
    """

    cutters: Executor
    adders: tuple[Executor, ...]
    writer: Executor


@contextmanager
def open_crew(threads: int) -> Iterator[Crew]:
    """Threads for a chain of blocks; at the end what they have been given is done."""
    with ExitStack() as opened:
        yield Crew(
            opened.enter_context(ThreadPoolExecutor(threads, "cutter")),
            tuple(opened.enter_context(ThreadPoolExecutor(1, f"adder-{k}")) for k in range(threads)),
            opened.enter_context(ThreadPoolExecutor(1, "writer")),
        )


@dataclass(frozen=True)
class _Read:
    """Evidence as the predictor takes it.

    Attributes:
        tensors: (H, W, channels) by name.
        evident: (H, W), where there is a point or a valid image pixel.
        known: (H, W), where the map may say something.
    """

    tensors: dict[str, Tensor]
    evident: NDArray[np.bool_]
    known: NDArray[np.bool_]


def read_ahead(job: BlockJob) -> _Read | BlockReport:
    """The evidence of a block, or the report of an earlier run that left it whole; one with failures is tried again."""
    left = left_report(job.file)
    if left and not left.failed:
        return left
    predictor = predictor_of(job.model, job.evidence.grid.resolution_m)
    return _read(job, predictor, region_of(job.lattice, job.block))


def _read(job: BlockJob, predictor: Predictor, at: Block) -> _Read:
    region = read_region(job.evidence, predictor.layers, predictor.rasters, at, reach_px(job.lattice.window_px))
    return _Read(predictor.prepare(region.inputs), region.evident, region.known)


def predict_block(job: BlockJob, ahead: Future[_Read | BlockReport], crew: Crew) -> Future[BlockReport]:
    """Predict the wanted windows that start in a block and leave their sums in its scratch file.

    Windows without a point and without a valid image pixel are skipped. A block whose file is whole is not computed again.
    Where something fails, a strict job leaves no file and tells what; a lenient one tries window by window, and leaves a
    file without those that fail.

    Args:
        job: The block.
        ahead: Its evidence, read meanwhile; or the report of an earlier run.
        crew: Threads that cut and add up windows and save, while others are predicted.

    Returns:
        The report, when the file is there.

    Raises:
        DeviceFullError: A batch of more than one window does not fit the device.
    """
    predictor = predictor_of(job.model, job.evidence.grid.resolution_m)
    region = region_of(job.lattice, job.block)
    out = Accumulator(region, len(predictor.planes))
    try:
        found = ahead.result()
        if isinstance(found, BlockReport):
            return crew.writer.submit(lambda: found)
        failed: list[Failure] = []
        done = _predict(job, predictor, region, windows_of(job), out, crew, found)
    except FAULTS as error:
        if isinstance(error, DeviceFullError) and job.batch > 1:
            raise
        if not job.lenient:
            report = BlockReport(0, tuple(Failure(*p, _line(error)) for p in windows_of(job)), _address())
            return crew.writer.submit(lambda: report)
        out = Accumulator(region, len(predictor.planes))
        done, failed = _one_by_one(job, predictor, out, crew)
    return crew.writer.submit(_save, job, out, BlockReport(done, tuple(failed), _address()))


def _save(job: BlockJob, out: Accumulator, report: BlockReport) -> BlockReport:
    save_block(job.file, out.parts(job.lattice), report)
    return report


def _predict(
    job: BlockJob, predictor: Predictor, at: Block, places: list[tuple[int, int]], out: Accumulator, crew: Crew,
    read: _Read | None = None,
) -> int:  # fmt: skip
    """Read a rectangle and predict the windows in it that hold evidence; returns their number."""
    if not places:
        return 0
    read = read or _read(job, predictor, at)
    size = job.lattice.window_px
    evident = [p for p in places if _cut(read.evident, p, at, size).any()]
    batches = [evident[first : first + job.batch] for first in range(0, len(evident), job.batch)]
    pinned, weight = getattr(predictor, "pinned", False), job.lattice.weight()
    cut: deque[tuple[dict[str, Tensor], list[Future[None]]]] = deque()
    added: deque[list[Future[None]]] = deque()
    for k in range(len(batches) + AHEAD):
        if k < len(batches):
            cut.append(_start_cutting(read.tensors, batches[k], at, size, job.batch, pinned, crew))
        if k >= AHEAD:
            inputs, cutting = cut.popleft()
            _wait(cutting)
            answers = _begin(predictor, inputs)
            if len(added) == PENDING:
                _wait(added.popleft())
            added.append(_start_adding(out, read.known, batches[k - AHEAD], answers, at, weight, crew))
    for adding in added:
        _wait(adding)
    return len(evident)


def _begin(predictor: Predictor, inputs: dict[str, Tensor]) -> Callable[[], NDArray[np.float32]]:
    """A forward pass that is started; one that cannot be is made."""
    if begin := getattr(predictor, "begin", None):
        return begin(inputs)  # type: ignore[no-any-return]
    made = predictor.predict(inputs)
    return lambda: made


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _start_cutting(
    tensors: dict[str, Tensor], places: list[tuple[int, int]], region: Block, size: int, full: int, pinned: bool, crew: Crew
) -> tuple[dict[str, Tensor], list[Future[None]]]:
    """(full, size, size, C) of each input: windows, then zeros, and their cutting under way, shared out among the threads.

    One shape for every batch, so that a logit never depends on it.
    """
    out = {n: torch.empty(full, size, size, x.shape[2], dtype=x.dtype, pin_memory=pinned) for n, x in tensors.items()}

    def cut(first: int) -> None:
        for k in range(first, full, len(crew.adders)):
            for name, x in tensors.items():
                if k < len(places):
                    r, c = places[k][0] - region.row0, places[k][1] - region.col0
                    out[name][k].copy_(x[r : r + size, c : c + size])
                else:
                    out[name][k].zero_()

    return out, [crew.cutters.submit(cut, first) for first in range(len(crew.adders))]


def _start_adding(
    out: Accumulator, known: NDArray[np.bool_], places: list[tuple[int, int]], answers: Callable[[], NDArray[np.float32]],
    region: Block, weight: NDArray[np.uint32], crew: Crew,
) -> list[Future[None]]:  # fmt: skip
    """Add a batch's windows when its answers are there, a share of the rows in each thread."""

    def add(share: int) -> None:
        for (row, col), planes in zip(places, answers(), strict=False):
            seen = _cut(known, (row, col), region, len(weight))
            out.add(row, col, planes, weight, seen, (share, len(crew.adders)))

    return [adder.submit(add, share) for share, adder in enumerate(crew.adders)]


def _one_by_one(job: BlockJob, predictor: Predictor, out: Accumulator, crew: Crew) -> tuple[int, list[Failure]]:
    """Each window from its own reading, so that a damaged file costs only the windows that see the damage."""
    size, done, failed = job.lattice.window_px, 0, []
    for row, col in windows_of(job):
        try:
            done += _predict(job, predictor, Block(row, col, row + size, col + size), [(row, col)], out, crew)
        except FAULTS as error:
            if isinstance(error, DeviceFullError) and job.batch > 1:
                raise
            failed.append(Failure(row, col, _line(error)))
    return done, failed


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _address() -> str | None:
    try:
        return str(get_worker().address)
    except ValueError:
        return None


def _cut(x: NDArray[Any], place: tuple[int, int], region: Block, size: int) -> NDArray[Any]:
    r, c = place[0] - region.row0, place[1] - region.col0
    return x[..., r : r + size, c : c + size]


@dataclass(frozen=True)
class AssembleJob:
    """One block to write.

    Attributes:
        session: A fork of the staging session.
        group: Which map.
        grid: The city's grid.
        lattice: Its windows.
        block: Which pixels.
        sources: Blocks whose windows reach it.
        cells: (rows, cols) bool, the cells that share a pixel with the block: which may change; all others keep their value.
        planes: "probability" and gates.
        threshold: Probability, 0 … 254, from which a pixel is road.
    """

    session: icechunk.session.ForkSession
    group: str
    grid: Grid
    lattice: Lattice
    block: Block
    sources: tuple[BlockJob, ...]
    cells: NDArray[np.bool_] = field(compare=False)
    planes: tuple[str, ...] = ("probability",)
    threshold: int = 127


def assemble_block(job: AssembleJob) -> tuple[Any, NDArray[np.int64]]:
    """Add up what all blocks left over this one, and write its tiles where they differ from what stands.

    Returns:
        The fork with the written chunks, and by how many the pixels without data and of road have grown.
    """
    block = job.block
    with ExitStack() as open_files:
        left = [open_files.enter_context(safe_open(source.file, "np")) for source in job.sources]
        made = Accumulator(block, len(job.planes)).values(left)  # (planes, h, w)
    chunks = Chunks(job.session.store, zarr.open_group(job.session.store))
    fresh = pixels_of(job.cells, job.lattice, block)
    road = np.where(made[0] == NODATA, NODATA, made[0] >= job.threshold).astype(np.uint8)
    layers = dict(zip((*job.planes, "road"), (*made, road), strict=True))
    tiles = [(place, at) for place, at in _tiles(job.grid, block) if fresh[at].any()]
    wanted = [(f"{job.group}/{name}", place, layers[name][at], fresh[at]) for place, at in tiles for name in layers]
    held = chunks.read_all([(path, place) for path, place, *_ in wanted])
    grown = np.zeros(2, np.int64)
    for (path, place, values, new), old in zip(wanted, held, strict=True):
        grown += _write_tile(chunks, path, place, values, new, old)
    chunks.flush()
    return job.session, grown


def _tiles(grid: Grid, block: Block) -> list[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Place of each tile of a block, and its pixels counted from the block's corner."""
    px = grid.tile_px
    return [
        ((r // px, c // px), (slice(r - block.row0, r - block.row0 + px), slice(c - block.col0, c - block.col0 + px)))
        for r in range(block.row0, block.row1, px)
        for c in range(block.col0, block.col1, px)
    ]


def _write_tile(
    chunks: Chunks, path: str, place: tuple[int, int], values: NDArray[np.uint8], fresh: NDArray[np.bool_],
    held: NDArray[np.uint8] | None,
) -> NDArray[np.int64]:  # fmt: skip
    """Write a chunk if it changes; by how many pixels without data and of road grew, told for the road alone."""
    old = np.full(values.shape, NODATA, np.uint8) if held is None else held.reshape(values.shape)
    new = np.where(fresh, values, old)
    if not np.array_equal(new, old):
        if (new == NODATA).all():
            chunks.remove(path, place)
        else:
            chunks.write(path, place, new)
    if not path.endswith("/road"):
        return np.zeros(2, np.int64)
    return np.array([np.count_nonzero(new == v) - np.count_nonzero(old == v) for v in (NODATA, 1)])
