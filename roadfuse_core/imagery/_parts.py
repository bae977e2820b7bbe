"""What a raster is made of: the files that a virtual one refers to, and those beside it that change what is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

__all__ = ["FilePart", "parts_of"]

# GDAL reads overviews, a mask and corrections from files beside a raster.
BESIDE = (".ovr", ".msk", ".aux.xml")
HEAD_BYTES = 4096
MISSING = -1
ARCHIVES = ("/vsizip/", "/vsitar/", "/vsigzip/", "/vsi7z/", "/vsirar/", "/vsisubfile/", "/vsisparse/")


class FilePart(NamedTuple):
    """A file behind a raster, as it is now.

    Attributes:
        path: As the raster names it, absolute where it is a local file.
        size: Bytes; -1 where there is no such file, or where it lies elsewhere and is not watched.
        changed_ns: Time of the last change, nanoseconds since 1970; 0 where there is none.
    """

    path: str
    size: int
    changed_ns: int


def parts_of(path: str) -> tuple[FilePart, ...]:
    """Files other than itself that a raster is read from, sorted; of virtual rasters also those within those they name.

    Args:
        path: The raster's file.

    Raises:
        OSError: A file cannot be read.
    """
    found: set[str] = set()
    waiting = [path]
    while waiting:
        one = waiting.pop()
        new = {name for name in (*_named(one), *_beside(one)) if name not in found and name != path}
        found |= new
        waiting += [name for name in new if os.path.isfile(name)]
    return tuple(_part(name) for name in sorted(found))


def _part(name: str) -> FilePart:
    try:
        now = os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return FilePart(name, MISSING, 0)
    return FilePart(name, now.st_size, now.st_mtime_ns)


def _beside(path: str) -> Iterator[str]:
    return (path + ending for ending in BESIDE if os.path.isfile(path + ending))


def _named(path: str) -> Iterator[str]:
    """What a virtual raster names as its sources; nothing for files of other kinds."""
    with open(path, "rb") as file:
        if b"<VRTDataset" not in file.read(HEAD_BYTES):
            return
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError:  # GDAL will tell
        return
    for element in root.iter():
        if element.tag in ("SourceFilename", "SourceDataset") and element.text:
            beside = element.get("relativeToVRT", "0") == "1" or element.get("relativetoVRT", "0") == "1"
            yield _local(element.text.strip(), Path(path).parent if beside else Path.cwd())


def _local(name: str, folder: Path) -> str:
    """The local file that GDAL would open for a name, of a member of an archive the archive; else the name as it is.

    Names may say more than a file: `/vsizip/a.zip/b.tif`, `vrt://a.tif?bands=1`, `NETCDF:"a.nc":band`.
    """
    plain = name
    while plain.startswith(ARCHIVES):
        plain = plain.removeprefix("/").partition("/")[2]
    if plain.startswith(("/vsi", "<")):
        return name
    words = [plain.strip("{}"), *(word for text in re.split(r'[:"?]', plain) for word in (text, text.lstrip("/")) if word)]
    for place in (folder / word for word in words):
        for file in (place, *place.parents):
            if file.is_file():
                return os.path.normpath(file.absolute())
    return os.path.normpath((folder / plain).absolute()) if plain == name and ":" not in name else name
