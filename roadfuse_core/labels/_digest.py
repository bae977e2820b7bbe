"""Whether labels are still the same."""

from __future__ import annotations

import glob
from pathlib import Path

from blake3 import blake3

from roadfuse_core.errors import ConfigError
from roadfuse_core.imagery import RASTER_SUFFIXES, open_raster
from roadfuse_core.settings import City, MapSpec

__all__ = ["labels_digest"]

# Formats of several files with one stem.
WITH_COMPANIONS = (".shp", ".tab", ".mif")


def labels_digest(city: City) -> str | None:
    """A digest of what the city's map is scored against: the class, how it is drawn, and the content of its files.

    Scores against labels of different digests cannot be compared. Moving the files does not change it.

    Returns:
        16 hexadecimal digits; None for a city without labels.

    Raises:
        ConfigError: The file of the labels is missing.
        DataError: It is a raster that cannot be read.
    """
    if city.truth is None:
        return None
    spec, key = city.truth
    digest = blake3(max_threads=blake3.AUTO)
    digest.update(f"{city.target} {spec.model_dump_json(exclude={'path'})}".encode())
    for path in _files_of(city.path(spec.path), spec, f"{key}.path"):
        digest.update(path.name.encode())
        digest.update_mmap(path)
    return digest.hexdigest(8)


def _files_of(path: Path, spec: MapSpec, key: str) -> list[Path]:
    """The file and those that are read with it."""
    if not path.is_file():
        raise ConfigError(key, spec.path, "does not exist", "correct the path")
    if path.suffix.lower() in RASTER_SUFFIXES:
        with open_raster(str(path), key, spec.crs) as raster:
            return sorted({path, *map(Path, raster.source.files)})
    if path.suffix.lower() in WITH_COMPANIONS:
        return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [path]
