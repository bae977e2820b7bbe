"""The repository of published maps: arrays with coordinates, records, whole snapshots."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import rioxarray  # noqa: F401  gives data sets their `.rio`
import xarray as xr
import zarr
from numpy.typing import NDArray

from roadfuse_core.cubes import ZSTD, grid_attributes, open_repository, read_group, write_coordinates
from roadfuse_core.errors import ConfigError, NothingPublishedError, StoreError
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.mosaic import NODATA, PROBABILITY_SCALE
from roadfuse_core.settings import City

__all__ = ["MapReader", "MapRecord", "candidate", "changed_map_tiles", "map_key", "maps_path", "prepare_map", "standing_record"]

MapRecord = dict[str, Any]


def candidate(group: str) -> str:
    """Branch of a finished map that is held back."""
    return f"candidate-{group}"


def map_key(record: MapRecord) -> str:
    """A map's name among all maps of its city: the digest of what decides it, and when it was made (UTC)."""
    return f"{record['digest']}-{datetime.fromisoformat(record['made']):%Y%m%dT%H%M%S}"


def maps_path(city: City) -> Path:
    """Where the city's map repository lies."""
    return city.workspace_path / "maps"


class MapReader:
    """Reads windows of a published map.

    Args:
        city: The city.
        group: Which map.
        held: Read the candidate that is held back instead.

    Raises:
        StoreError: There is no such map yet.
    """

    def __init__(self, city: City, group: str = "map", held: bool = False) -> None:
        repository = open_repository(maps_path(city))
        if held and candidate(group) not in repository.list_branches():
            raise StoreError(f"{maps_path(city)}: no {group} is held back")
        self.snapshot = str(repository.lookup_branch(candidate(group) if held else "main"))
        root = read_group(repository, snapshot=self.snapshot)
        if group not in root:
            raise NothingPublishedError(f"{maps_path(city)}: holds no {group} yet; run `roadfuse refresh` first")
        self.folder, self.group = root[group], group
        self.record: MapRecord = dict(self.folder.attrs["record"])

    @property
    def key(self) -> str:
        """The map's name among all maps of its city."""
        return map_key(self.record)

    @property
    def arrays(self) -> list[str]:
        """`probability`, `road`, and a gate for each modality where the network has gates."""
        return [name for name, array in self.folder.arrays() if array.ndim == 2]

    def window(self, name: str, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """(height, width) uint8 of "probability" or a gate (0 … 254) or "road" (0, 1); 255 is no data; inside the grid."""
        return np.asarray(self.folder[name][row : row + height, col : col + width])

    def dataset(self) -> xr.Dataset:
        """The map as xarray reads it: lazily, with coordinates and CRS (`.rio.crs`)."""
        found = xr.open_zarr(self.folder.store, group=self.group, consolidated=False, mask_and_scale=False)
        return found.set_coords("crs")


def changed_map_tiles(city: City, group: str, since: str, now: str) -> set[TileIndex] | None:
    """Tiles of a map of which any array may differ between two snapshots of the repository; None where that cannot be told.

    Args:
        city: The city.
        group: Which map.
        since: The earlier snapshot, as `MapReader.snapshot`.
        now: The later one.
    """
    if since == now:
        return set()
    try:
        diff = open_repository(maps_path(city)).diff(from_snapshot_id=since, to_snapshot_id=now)
    except icechunk.IcechunkError:
        return None
    below = f"/{group}"
    made = diff.new_groups | diff.deleted_groups | diff.new_arrays | diff.deleted_arrays
    if any(path == below or path.startswith(f"{below}/") for path in made):
        return None
    chunks = [places for path, places in diff.updated_chunks.items() if path.startswith(f"{below}/")]
    return {TileIndex(*place) for places in chunks for place in places if len(place) == 2}


def published_snapshot(city: City) -> str | None:
    """The snapshot that readers of maps see; None where no map was ever made.

    Raises:
        StoreError: The repository cannot be read.
    """
    try:
        return str(open_repository(maps_path(city)).lookup_branch("main"))
    except NothingPublishedError:
        return None


def standing_record(city: City, group: str) -> tuple[str, MapRecord] | None:
    """The newest snapshot of the repository and the group's record; None if nothing was ever published.

    Raises:
        StoreError: The repository cannot be read.
    """
    try:
        repository = open_repository(maps_path(city))
        root = read_group(repository)
    except NothingPublishedError:
        return None
    if group not in root or "record" not in root[group].attrs:
        return None
    return str(repository.lookup_branch("main")), dict(root[group].attrs["record"])


def prepare_map(
    repository: icechunk.Repository, branch: str, group: str, grid: Grid, planes: tuple[str, ...], anew: bool
) -> None:
    """Room for a map, in a commit of its own: forks refuse uncommitted changes.

    Args:
        repository: Of maps.
        branch: Staging.
        group: Which map.
        grid: The city's grid.
        planes: "probability" and gates; "road" comes beside them.
        anew: Begin with empty arrays, whatever there was.

    Raises:
        ConfigError: The group holds maps of another grid.
    """
    session = repository.writable_session(branch)
    root = zarr.open_group(session.store)
    if group in root and root[group].attrs.get("grid") not in (None, grid_attributes(grid)["grid"]):
        raise ConfigError("grid", "…", "differs from that of the maps in the workspace", "use another workspace")
    if anew and group in root:
        del root[group]
    folder = root.require_group(group)
    folder.attrs.update(grid_attributes(grid))
    if "x" not in folder:
        write_coordinates(folder, grid)
    for name in (*planes, "road"):
        if name not in folder:
            array = folder.create_array(
                name, shape=grid.shape, chunks=(grid.tile_px, grid.tile_px), dtype="uint8", fill_value=NODATA,
                compressors=ZSTD, filters=(), dimension_names=("y", "x"),
            )  # fmt: skip
            scale = {} if name == "road" else {"scale_factor": 1 / PROBABILITY_SCALE}
            array.attrs.update({"_FillValue": NODATA, "nodata": NODATA, "grid_mapping": "crs"} | scale)
    if session.has_uncommitted_changes:
        session.commit(f"room for {group}")
