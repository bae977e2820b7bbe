"""A city's map: predict what changed on Dask workers, assemble, publish in one step."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import icechunk
import numpy as np
import zarr
from dask.distributed import Client, KilledWorker

from roadfuse_core.cluster import Progress, quiet, run_jobs
from roadfuse_core.cubes import committer_lock, open_repository, storing
from roadfuse_core.errors import RoadFuseError, StoreError
from roadfuse_core.files import write_whole
from roadfuse_core.grid import Block
from roadfuse_core.inference._blocks import (
    AssembleJob,
    BlockJob,
    LoadModel,
    assemble_block,
    predict_chain,
    region_of,
    windows_of,
)
from roadfuse_core.inference._calibrate import halve_batch
from roadfuse_core.inference._learnt import learnt_by
from roadfuse_core.inference._map import MapRecord, candidate, maps_path, prepare_map, published_snapshot
from roadfuse_core.inference._plan import RefreshPlan, plan_refresh
from roadfuse_core.inference._predictor import DeviceFullError
from roadfuse_core.inference._publish import move_main, waiting
from roadfuse_core.inference._scratch import BlockReport, Failure
from roadfuse_core.locks import MAP, waiting_lock
from roadfuse_core.settings import City
from roadfuse_core.workspace import enter_workspace

__all__ = ["IncompleteError", "infer"]

log = logging.getLogger(__name__)
CHAIN_S = 10.0  # what a job takes about: blocks one after the other, where the next is read while one is computed
READ_S = 0.1  # what a block takes at least


class IncompleteError(RoadFuseError, RuntimeError):
    """Windows of a refresh could not be predicted, and nothing was published."""

    exit_code = 6


def infer(
    city: City, weights: str | None = None, group: str = "map", client: Client | None = None, tell: Progress = quiet,
    full: bool = False, allow_incomplete: bool = False, hold: bool = False,
) -> MapRecord:  # fmt: skip
    """Bring a map up to date and publish it.

    Only windows that see something new since the standing map are predicted, with those that they blend with; the result
    equals a full refresh, byte for byte. Where a batch does not fit the device any more, everything is predicted by half
    of it, so that one map is made by one size. A map whose evidence and model have not changed stands as it is. A killed run
    goes on with the blocks it has. While another process predicts in this workspace, it waits.

    Args:
        city: The city, ingested.
        weights: Instead of `model.weights`.
        group: Which map of the repository is replaced: "map", or "baseline".
        client: Dask; None works in this process, with the same bytes as result.
        tell: Progress.
        full: Predict everything anew.
        allow_incomplete: Publish although windows failed; they are no data, and the next refresh tries them again.
        hold: Leave the finished map as a candidate, which `release` publishes; readers see the one before.

    Returns:
        The map's record: identity, windows predicted and failed, nodata and road counts; "held" where it waits for its
        release, "unchanged" where it stood already.

    Raises:
        ConfigError: The model cannot use what the city has.
        IncompleteError: Windows failed twice; `failures/GROUP.json` in the workspace lists them.
        StoreError: Another map was published meanwhile, or a disk cannot be read or written.
    """
    workspace = city.workspace_path
    with committer_lock(workspace):
        enter_workspace(workspace)
    with waiting_lock(workspace, MAP, f"prediction of {city.name}, {group}"), storing(workspace):
        while True:
            base = published_snapshot(city)
            plan = plan_refresh(city, weights, group, full)
            if plan.standing and plan.standing["identity"] == plan.identity and not plan.standing["failed"]:
                log.info("%s: nothing changed since %s", group, plan.standing["made"])
                return plan.standing | {"unchanged": True}
            if hold and (held := waiting(city, group)) and held["identity"] == plan.identity and not held["failed"]:
                return held | {"held": True}
            scratch = city.workspace_path / "scratch" / f"{group}-{plan.digest}-{plan.block_px}"
            scratch.mkdir(parents=True, exist_ok=True)
            jobs = plan.jobs(scratch)
            try:
                reports = _predict(plan, jobs, client, tell)
                break
            except DeviceFullError as error:
                halve_batch(plan.calibration, plan.model, city.model, city.workspace_path / "calibration", str(error))
                shutil.rmtree(scratch)
        failed = [f for report in reports for f in report.failed]
        _tell_failures(city, group, failed, allow_incomplete)
        record = _publish(city, plan, base, group, jobs, reports, failed, client, tell, hold)
        shutil.rmtree(scratch, ignore_errors=True)
        return record | {"held": True} if hold else record


def _predict(plan: RefreshPlan, jobs: Sequence[BlockJob], client: Client | None, tell: Progress) -> list[BlockReport]:
    """All blocks; those that fail once more, elsewhere, and window by window."""
    if client:
        client.register_plugin(LoadModel(plan.model, plan.evidence.grid.resolution_m))
    chains = _chains(plan, jobs, client)
    found = run_jobs(client, predict_chain, chains, "predicting windows", tell, _killed, amount=_windows, expected=plan.windows)
    reports = [report for chain in found for report in chain]
    again = [k for k, report in enumerate(reports) if report.failed]
    if again:
        log.warning("%d blocks failed, the first because of %s; trying again", len(again), reports[again[0]].failed[0].why)
        lenient = [(replace(jobs[k], lenient=True),) for k in again]
        avoid = [reports[k].worker for k in again]
        second = run_jobs(client, predict_chain, lenient, "trying failed blocks again", tell, _killed, avoid)
        for k, (report,) in zip(again, second, strict=True):
            reports[k] = report
    return reports


def _chains(plan: RefreshPlan, jobs: Sequence[BlockJob], client: Client | None) -> list[tuple[BlockJob, ...]]:
    """Blocks for about `CHAIN_S`, so that progress is seen with slow networks too; shorter towards the end.

    A chain never takes more than a worker's half share of what is left, so that all workers end together.
    """
    block_s = max(READ_S, plan.windows * plan.calibration.window_s / max(1, len(jobs)))
    longest = max(1, int(CHAIN_S / block_s))
    workers = len(client.scheduler_info(n_workers=-1)["workers"]) if client else 0
    out, first = [], 0
    while first < len(jobs):
        fair = (len(jobs) - first) // (2 * workers) if workers else longest
        length = max(1, min(longest, fair))
        out.append(tuple(jobs[first : first + length]))
        first += length
    return out


def _windows(reports: Sequence[BlockReport]) -> int:
    return sum(r.windows for r in reports)


def _killed(chain: tuple[BlockJob, ...], error: Exception) -> list[BlockReport]:
    """Blocks that took several workers with them are a failure of their windows, not of the refresh."""
    if not isinstance(error, KilledWorker):
        raise error
    why = "KilledWorker: workers died of it; give them more memory"
    return [BlockReport(0, tuple(Failure(*place, why) for place in windows_of(job))) for job in chain]


def _tell_failures(city: City, group: str, failed: Sequence[Failure], allowed: bool) -> None:
    path = city.workspace_path / "failures" / f"{group}.json"
    if not failed:
        path.unlink(missing_ok=True)
        return
    write_whole(path, json.dumps([vars(f) for f in failed], indent=1))
    first = failed[0]
    line = (
        f"{group}: {len(failed)} windows could not be predicted, the first at row {first.row}, column {first.col} ({first.why})"
    )
    if not allowed:
        raise IncompleteError(
            f"{line}; nothing was published; mend the cause and run again, or pass --allow-incomplete. List: {path}"
        )
    log.warning("%s; they are no data. List: %s", line, path)


def _publish(
    city: City, plan: RefreshPlan, planned_on: str | None, group: str, jobs: Sequence[BlockJob],
    reports: Sequence[BlockReport], failed: Sequence[Failure], client: Client | None, tell: Progress, hold: bool,
) -> MapRecord:  # fmt: skip
    """Assemble on a staging branch; move `main` to it in one step and tag it, or leave it as a candidate.

    Others may commit while tiles are written, a release for instance: what was planned on another map is refused.
    """
    staging = f"refresh-{group}"
    with committer_lock(city.workspace_path):
        repository = open_repository(maps_path(city), create=True)
        base = repository.lookup_branch("main")
        if planned_on not in (base, None):
            raise StoreError(f"{maps_path(city)}: another map was published meanwhile; run again")
        if staging in repository.list_branches():
            repository.delete_branch(staging)
        repository.create_branch(staging, base)
        prepare_map(repository, staging, group, plan.evidence.grid, plan.planes, anew=plan.standing is None)
    session = repository.writable_session(staging)
    grown = _assemble(plan, group, session, jobs, client, tell)
    height, width = plan.evidence.grid.shape
    nodata, road = (plan.standing["nodata_px"], plan.standing["road_px"]) if plan.standing else (height * width, 0)
    record = {
        "digest": plan.digest, "made": datetime.now(UTC).isoformat(timespec="seconds"), "model": plan.model.path.name,
        "model_digest": plan.model.digest, "cubes_snapshot": plan.evidence.snapshot, "images": len(plan.evidence.images),
        "threshold": city.model.threshold, "window_px": plan.lattice.window_px, "stride_px": plan.lattice.stride_px,
        "precision": plan.calibration.precision, "batch": plan.calibration.batch, "windows": sum(r.windows for r in reports),
        "windows_possible": plan.of, "full": plan.standing is None, "why_full": plan.why,
        "nodata_px": nodata + grown[0], "road_px": road + grown[1], "failed": [[f.row, f.col, f.why] for f in failed],
        "learnt": learnt_by(plan.model, plan.evidence.grid).model_dump(mode="json"), "identity": plan.identity,
    }  # fmt: skip
    with committer_lock(city.workspace_path):
        if repository.lookup_branch("main") != base:
            raise StoreError(f"{maps_path(city)}: another map was published meanwhile; run again")
        zarr.open_group(session.store)[group].attrs["record"] = record
        snapshot = str(session.commit(f"{group} by {plan.model.path.name}, {record['windows']} windows"))
        repository.delete_branch(staging)
        if candidate(group) in repository.list_branches():
            repository.delete_branch(candidate(group))
        if hold:
            repository.create_branch(candidate(group), snapshot)
        else:
            move_main(repository, group, snapshot, base)
    return record


def _assemble(
    plan: RefreshPlan,
    group: str,
    session: icechunk.Session,
    predicted: Sequence[BlockJob],
    client: Client | None,
    tell: Progress,
) -> tuple[int, int]:
    """Write all blocks with changing pixels; by how many pixels without data and of road have grown."""
    fork = session.fork()
    there = [job for job in predicted if job.file.exists()]  # a block that killed its workers has left nothing
    near = _Neighbours(there, {job.block: region_of(plan.lattice, job.block) for job in there}, plan.block_px)
    jobs = []
    for block in plan.blocks():
        cells, sources = plan.cells(block), near.of(block)
        if cells.any() and (sources or plan.standing):
            jobs.append(
                AssembleJob(fork, group, plan.evidence.grid, plan.lattice, block, sources, cells, plan.planes, plan.threshold)
            )
    done = run_jobs(client, assemble_block, jobs, "writing the mosaic", tell)
    if done:
        session.merge(*(fork for fork, _ in done))
    nodata, road = np.sum([np.zeros(2, np.int64), *(grown for _, grown in done)], 0)
    return int(nodata), int(road)


class _Neighbours:
    """Which blocks' windows reach a block; looked up by place, so that a large city is no square of its blocks."""

    def __init__(self, jobs: list[BlockJob], reach: dict[Block, Block], block_px: int) -> None:
        self.jobs, self.reach, self.px = jobs, reach, block_px
        self.by_cell: dict[tuple[int, int], list[BlockJob]] = {}
        for job in jobs:
            r = reach[job.block]
            for i in range(r.row0 // self.px, (r.row1 - 1) // self.px + 1):
                for j in range(r.col0 // self.px, (r.col1 - 1) // self.px + 1):
                    self.by_cell.setdefault((i, j), []).append(job)

    def of(self, block: Block) -> tuple[BlockJob, ...]:
        """In row-major order."""
        found: dict[Block, BlockJob] = {}
        for i in range(block.row0 // self.px, (block.row1 - 1) // self.px + 1):
            for j in range(block.col0 // self.px, (block.col1 - 1) // self.px + 1):
                for job in self.by_cell.get((i, j), ()):
                    r = self.reach[job.block]
                    if r.row0 < block.row1 and r.row1 > block.row0 and r.col0 < block.col1 and r.col1 > block.col0:
                        found[job.block] = job
        return tuple(found[b] for b in sorted(found))
