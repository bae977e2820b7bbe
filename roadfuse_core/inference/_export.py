"""Published maps as files that follow them at the cost of what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.files import DamagedFileError, digest_of, read_record, write_record
from roadfuse_core.grid import TileIndex
from roadfuse_core.inference._map import MapReader, changed_map_tiles
from roadfuse_core.mosaic import export_map
from roadfuse_core.settings import City

__all__ = ["export_array"]

FORM = 1  # of the files; raised when other bytes come out for the same map


def export_array(
    city: City, reader: MapReader, name: str, how: Literal["average", "mode"], path: Path, tell: Progress = quiet
) -> Path:
    """Write an array of a map as a cloud-optimised GeoTIFF, or bring the file of an earlier map up to date.

    Tiles that did not change since are copied from the file, if it is as it was written.

    Args:
        city: The city.
        reader: The map.
        name: "probability", "road" or a gate.
        how: Overviews: the mean, or the value that most pixels have.
        path: Where to.
        tell: Progress, in tiles of the file that were made.

    Returns:
        The path.

    Raises:
        StoreError: It cannot be written; what was there stays.
    """
    note = city.workspace_path / "outputs" / f"{path.name}.json"
    changed = _changed(city, reader, name, path, note)
    made = 0
    if changed != set():
        made = export_map(path, city.make_grid(), lambda *w: reader.window(name, *w), how, changed)
    tell(f"exporting {name}", made, made)
    facts = {"form": FORM, "array": name, "group": reader.group, "snapshot": reader.snapshot}
    write_record(note, facts | {"digest": digest_of(path)})
    return path


def _changed(city: City, reader: MapReader, name: str, path: Path, note: Path) -> set[TileIndex] | None:
    """Tiles of the map that may differ from the file; None where all must be written."""
    try:
        kept = read_record(note)
        same = (kept["form"], kept["group"], kept["array"]) == (FORM, reader.group, name)
        intact = same and digest_of(path) == kept["digest"]
    except (FileNotFoundError, DamagedFileError, KeyError):
        return None
    return changed_map_tiles(city, reader.group, kept["snapshot"], reader.snapshot) if intact else None
