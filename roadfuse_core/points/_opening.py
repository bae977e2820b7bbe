"""Files, objects and members of archives as bytes, with errors that name them."""

from __future__ import annotations

import errno
import fnmatch
import lzma
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import fsspec

from roadfuse_core.errors import (
    ConfigError,
    DataError,
    RoadFuseError,
    StoreError,
    printable,
    without_secrets,
)
from roadfuse_core.points._text import WEB, ending

__all__ = ["PARQUET", "TEXT", "Opener", "SourceFile", "by_path", "members_of", "naming", "open_bytes", "reaching"]

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".txt", ".tsv", ".gz")
# Files that are opened at the same time: an object store answers after tens of milliseconds, whatever it is asked.
OPEN_AT_ONCE = 16
# What unpacking raises: damaged archives and streams, encrypted members, unknown methods.
UNPACKING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError)
LITTER = ("__MACOSX/*", "*/.*", ".*")
Found = TypeVar("Found")


@dataclass(frozen=True)
class SourceFile:
    """A file of a dump, or one member of an archive.

    Attributes:
        path: Absolute path of the file or archive, or its URL in an object store.
        member: Name inside the archive; empty for plain files.
        size: Bytes when it was found; of a member, unpacked.
        version: Of the file or archive when it was found: its time of change in nanoseconds with its size, or an ETag.
        address: Where it is read, if that is not its path: a URL with a signature, which neither ledger nor message holds.
    """

    path: str
    member: str = ""
    size: int = field(default=0, compare=False)
    version: str = field(default="", compare=False)
    address: str = field(default="", compare=False, repr=False)

    @property
    def label(self) -> str:
        """How messages and the ledger name it."""
        return f"{self.path}::{self.member}" if self.member else self.path

    @property
    def location(self) -> str:
        """Where its bytes are read."""
        return self.address or self.path

    @property
    def shown(self) -> str:
        """Its label in one line that holds no secret, for messages."""
        return printable(without_secrets(self.label))

    @property
    def is_parquet(self) -> bool:
        """By its ending."""
        return ending(self.member or self.path).endswith(PARQUET)


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Errors of object stores, which come in many classes, as one line."""
    try:
        yield
    except ImportError as error:
        fix = "install roadfuse[s3]" if where.startswith(("s3://", "s3a://")) else "install it"
        raise ConfigError("points.sources", where, f"needs a package ({error})", fix) from None
    except Exception as error:
        if "://" not in where or isinstance(error, (ConfigError, DataError)):
            raise
        short = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"points.sources: cannot read {where} ({short}); check the URL, AWS_ENDPOINT_URL and the credentials"
        ) from None  # what stores and servers raise shows addresses as they are


def by_path(files: Sequence[SourceFile], look: Callable[[Opener, SourceFile], Found]) -> list[Found]:
    """What is found in each file, in the files' order; files are opened side by side, members of an archive one by one."""
    places_of: dict[str, list[int]] = {}
    for place, file in enumerate(files):
        places_of.setdefault(file.path, []).append(place)

    def look_at(places: list[int]) -> list[tuple[int, Found]]:
        with Opener() as opener:
            return [(place, _named_look(opener, files[place])) for place in places]

    def _named_look(opener: Opener, file: SourceFile) -> Found:
        with naming(file):
            return look(opener, file)

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        found = dict(pair for pairs in pool.map(look_at, places_of.values()) for pair in pairs)
    return [found[place] for place in range(len(files))]


@contextmanager
def naming(file: SourceFile) -> Iterator[None]:
    """Errors of a file, its packing and the system as one line; what the system lacks is no fault of the file."""
    try:
        yield
    except RoadFuseError:
        raise
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise StoreError(
                f"{file.shown}: too many files are open; raise the limit (ulimit -n 4096) and run again"
            ) from error
        if error.errno not in (None, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL):
            raise
        raise DataError(f"points.sources: {file.shown} cannot be read ({error.strerror or error}); check the file") from error
    except UNPACKING as error:
        raise DataError(
            f"points.sources: {file.shown} cannot be unpacked ({printable(str(error))}); copy it again, or unpack it yourself"
        ) from error


class Opener:
    """Opens files, objects and members of archives as bytes; each archive's directory is read once."""

    def __init__(self) -> None:
        self.archives: dict[str, zipfile.ZipFile] = {}

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *_: object) -> None:
        for archive in self.archives.values():
            archive.close()

    def archive(self, file: SourceFile) -> zipfile.ZipFile:
        """An open archive."""
        path = file.path
        if path not in self.archives:
            self.archives[path] = zipfile.ZipFile(open_bytes(file.location))
        return self.archives[path]

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's bytes, as stored: gzip is not unpacked."""
        return self.archive(file).open(file.member) if file.member else open_bytes(file.location)


def open_bytes(path: str) -> IO[bytes]:
    """A file or an object of a store, for reading at any place.

    Raises:
        DataError: The store does not answer.
    """
    if "://" not in path:
        return open(path, "rb")
    with reaching(path):
        store, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
        opened: IO[bytes] = store.open(name, "rb")
        return _in_ranges(store, name, opened) if path.startswith(WEB) else opened


def _in_ranges(store: Any, url: str, opened: IO[bytes]) -> IO[bytes]:
    """A file of the web that can be read at any place: as it is where the server gives ranges, else as a copy."""
    try:
        opened.seek(-1, os.SEEK_END)
        opened.read(1)
        opened.seek(0)
        return opened
    except (ValueError, OSError):
        opened.close()
    copy: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    with store.open(url, "rb", block_size=0) as stream:
        shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


def members_of(opener: Opener, file: SourceFile, pattern: str) -> list[SourceFile]:
    """Members of an archive whose names a pattern picks, without litter.

    Raises:
        DataError: The archive cannot be read, or two members have one name.
    """
    try:
        members = [m for m in opener.archive(file).infolist() if not m.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"points.sources: {file.shown} is not a readable zip ({error}); copy it again") from error
    picked = [m for m in members if fnmatch.fnmatch(m.filename, pattern)]
    picked = [m for m in picked if not any(fnmatch.fnmatch(m.filename, litter) for litter in LITTER)]
    names = [m.filename for m in picked]
    if twice := next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None:
        raise DataError(
            f"points.sources: {file.shown} holds two members called {printable(twice)}; unpack it, or pack it again"
        )
    return [SourceFile(file.path, m.filename, m.file_size, file.version, file.address) for m in picked]
