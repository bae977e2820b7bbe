"""The city's cube repository: Icechunk on disk, one committer at a time, readers see whole snapshots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from icechunk import ManifestSplitCondition, ManifestSplitDimCondition, ManifestSplittingConfig
from pyproj import CRS
from zarr.codecs import ZstdCodec

from roadfuse_core.cubes._render import FIXED_POINT
from roadfuse_core.errors import NothingPublishedError, RoadFuseError, StoreError
from roadfuse_core.grid import Grid
from roadfuse_core.locks import COMMITTER, waiting_lock
from roadfuse_core.workspace import expected_repositories, holds_anything, note_repository

__all__ = [
    "FORMAT",
    "ZSTD",
    "committer_lock",
    "create_arrays",
    "grid_attributes",
    "is_untouched",
    "open_repository",
    "publish",
    "read_group",
    "storing",
    "write_coordinates",
]

MAIN = "main"
# Of the cube and its ledger; raised when either changes.
FORMAT = 2
EMPTY = "nothing was published yet; run `roadfuse ingest` or `roadfuse refresh` first"
ZSTD = (ZstdCodec(level=1),)
# Icechunk warns that commits to a local disk must not run at the same time: `committer_lock` sees to that.
icechunk.set_logs_filter("icechunk=error")


def open_repository(path: Path, create: bool = False) -> icechunk.Repository:
    """An Icechunk repository on the local disk.

    Args:
        path: Its folder.
        create: Make an empty one if there is none.

    Raises:
        NothingPublishedError: There never was one.
        StoreError: It cannot be opened, is lost, or the folder holds something else.
    """
    if not holds_anything(path):  # Icechunk would make the folder while looking into it
        if path.name in expected_repositories(path.parent):
            fix = "bring it back from where it went or from a backup, or use another workspace"
            hint = "; if no ingest ever ended well here, remove `shards`" if path.name == "cubes" else ""
            raise StoreError(f"{path}: was made and is no longer there; {fix}{hint}")
        if not create:
            raise NothingPublishedError(f"{path}: {EMPTY}")
        _create(path)
    try:
        opened = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    except icechunk.IcechunkError as error:
        short = str(error).strip().splitlines()[0].strip(" x")
        raise StoreError(f"{path}: cannot be opened ({short}); nothing was changed: run again, or, if this stays, bring "
                         "the folder back from a backup or move what does not belong there away") from error  # fmt: skip
    if create:
        note_repository(path)
    return opened


def _create(path: Path) -> None:
    """An empty repository, which gets its place when it is complete."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    splitting = ManifestSplittingConfig.from_dict(
        {ManifestSplitCondition.AnyArray(): {ManifestSplitDimCondition.DimensionName("period"): 1}}
    )
    config = icechunk.RepositoryConfig.default()
    config.manifest = icechunk.ManifestConfig(splitting=splitting)
    icechunk.Repository.create(icechunk.local_filesystem_storage(str(part)), config=config)
    part.replace(path)


@contextmanager
def committer_lock(path: Path, doing: str = "commit") -> Iterator[None]:
    """Hold the right to commit to the repositories of a workspace; another process's commit is waited for.

    Args:
        path: The workspace.
        doing: What for, as others read it who wait.
    """
    with waiting_lock(path, COMMITTER, doing):
        yield


@contextmanager
def storing(workspace: Path) -> Iterator[None]:
    """A disk that is full or fails, as one line; what was published stays as it was.

    Raises:
        StoreError: Something could not be written, or a file of the repository is missing.
    """
    try:
        yield
    except RoadFuseError:
        raise
    except (OSError, icechunk.IcechunkError) as error:
        text = str(error).strip()
        short = next(
            (line.strip(" │├╰─▶") for line in text.splitlines() if "o space" in line), text.splitlines()[0] if text else ""
        )
        if isinstance(error, icechunk.IcechunkError) and "not found" in short:
            raise StoreError(f"{workspace}: lacks a part of what it stores ({short}); restore it from a copy, or make it again "
                             "in another workspace") from error  # fmt: skip
        raise StoreError(f"{workspace}: cannot be written ({short}); all is as before: make room and run again") from error


def publish(repository: icechunk.Repository, snapshot: str, base: str) -> None:
    """Move `main` to a finished snapshot in one step.

    Raises:
        StoreError: `main` is no longer where the work began.
        IcechunkError: It cannot be written; `storing` says so in one line.
    """
    try:
        repository.reset_branch(MAIN, snapshot, from_snapshot_id=base)
    except icechunk.IcechunkError as error:
        if repository.lookup_branch(MAIN) == base:
            raise  # nobody did: the disk is full, or fails
        raise StoreError("somebody else published meanwhile; nothing was changed, run again") from error


def read_group(repository: icechunk.Repository, branch: str = MAIN, snapshot: str | None = None) -> zarr.Group:
    """The root group of a snapshot, read-only; the newest of a branch unless one is named.

    Raises:
        NothingPublishedError: The branch still is as it was made.
        StoreError: The snapshot cannot be read.
    """
    try:
        session = repository.readonly_session(snapshot_id=snapshot) if snapshot else repository.readonly_session(branch)
        try:
            return zarr.open_group(session.store, mode="r")
        except FileNotFoundError as error:
            # Zarr says so too where the snapshot's own file is lost.
            if not snapshot and is_untouched(repository, branch):
                raise NothingPublishedError(EMPTY) from error
            raise
    except (icechunk.IcechunkError, OSError, ValueError) as error:
        short = str(error).strip().splitlines()[0].strip(" x")
        raise StoreError(f"{_place(repository)}: cannot be read ({short}); nothing was changed, run again") from error


def _place(repository: icechunk.Repository) -> str:
    """The folder of a repository, out of how Icechunk shows its storage."""
    shown = str(repository.storage)
    return shown.partition("path=")[2].rstrip(")") or shown


def is_untouched(repository: icechunk.Repository, branch: str) -> bool:
    """Whether nothing was ever committed to a branch.

    Raises:
        icechunk.IcechunkError: Its newest snapshot cannot be read.
    """
    return next(iter(repository.ancestry(branch=branch))).parent_id is None


def grid_attributes(grid: Grid) -> dict[str, Any]:
    """What a reader needs to place the arrays, and what a later run compares with its own grid."""
    return {"crs": grid.crs, "grid": json.loads(json.dumps(grid.__dict__)), "GeoTransform": list(grid.affine.to_gdal())}


def create_arrays(root: zarr.Group, grid: Grid, names: tuple[str, ...], period: str) -> None:
    """Empty `period/NAME` (period, y, x) and `total/NAME` (y, x), one chunk a tile; empty chunks take no space."""
    root.attrs.update(grid_attributes(grid) | {"period": period, "arrays": list(names), "format": FORMAT})
    height, width = grid.shape
    for folder in ("period", "total"):
        group = root.require_group(folder)
        group.attrs.update(grid_attributes(grid))
        write_coordinates(group, grid)
        for name in names:
            count = name == "count" or name.endswith("_count")
            lead: tuple[int, ...] = (0,) if folder == "period" else ()
            array = group.create_array(
                name, shape=(*lead, height, width), chunks=(*(1 for _ in lead), grid.tile_px, grid.tile_px),
                dtype="uint32" if count else "int64", fill_value=0, compressors=ZSTD, filters=(),
                dimension_names=(*(("period",) if lead else ()), "y", "x"),
            )  # fmt: skip
            array.attrs.update({"units_per_1": FIXED_POINT[name], "grid_mapping": "crs"})
    root.require_group("ledger").attrs.update({"dumps": {}})


def write_coordinates(group: zarr.Group, grid: Grid) -> None:
    """Arrays `x`, `y` (metres, pixel centres) and `crs` (CF grid mapping), by which xarray and rioxarray place the others."""
    b, res = grid.bounds, grid.resolution_m
    for name, values in (
        ("y", b.top - (np.arange(grid.shape[0]) + 0.5) * res),
        ("x", b.left + (np.arange(grid.shape[1]) + 0.5) * res),
    ):
        array = group.create_array(name, shape=values.shape, dtype="float64", chunks=values.shape, dimension_names=(name,))
        array[:] = values
        array.attrs.update({"units": "m", "standard_name": f"projection_{name}_coordinate"})
    crs = group.create_array("crs", shape=(), dtype="int64")
    transform = " ".join(str(v) for v in grid.affine.to_gdal())
    crs.attrs.update({"crs_wkt": CRS.from_user_input(grid.crs).to_wkt(), "GeoTransform": transform})
