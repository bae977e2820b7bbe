"""Which files a dump is made of, and what each of them holds."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from fsspec.utils import glob_translate
from pyproj import CRS

from roadfuse_core.errors import ConfigError, DataError, StoreError
from roadfuse_core.files import replacing
from roadfuse_core.grid import fit_projection
from roadfuse_core.points._footer import stated_rows
from roadfuse_core.points._text_rows import estimate_rows
from roadfuse_core.settings import City, PointsSpec

__all__ = [
    "SourceFile",
    "check_columns",
    "current_version",
    "empty_files",
    "find_sources",
    "identify",
    "matches",
    "materialise",
    "single_precision_step",
]

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".txt", ".tsv", ".gz")
METRES_PER_DEGREE = 111_195.0
# Text of trajectories packs to a third or a tenth; what packs better than this, and is large, is no such text.
MOST_PACKED = 100
BOMB_BYTES = 100_000_000
LITTER = ("__MACOSX/*", "*/.*", ".*")
# Files that are opened at the same time: an object store answers after tens of milliseconds, whatever it is asked.
OPEN_AT_ONCE = 16
# Stores that list all objects below a prefix at once, a thousand a request, however deep their names are.
FLAT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
MAGIC = re.compile(r"[*?[]")

Found = TypeVar("Found")


@dataclass(frozen=True)
class SourceFile:
    """A file of a dump, or one member of an archive.

    Attributes:
        path: Absolute path of the file or archive, or its URL in an object store.
        member: Name inside the archive; empty for plain files.
        size: Bytes when it was found; of a member, unpacked.
        version: Of the file or archive when it was found: its time of change in nanoseconds with its size, or an ETag.
    """

    path: str
    member: str = ""
    size: int = field(default=0, compare=False)
    version: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """How messages and the ledger name it."""
        return f"{self.path}::{self.member}" if self.member else self.path

    @property
    def is_parquet(self) -> bool:
        """By its ending."""
        return (self.member or self.path).lower().endswith(PARQUET)


def find_sources(
    city: City, patterns: list[str] | None = None, archived: Callable[[str], bool] | None = None
) -> list[SourceFile]:
    """The files behind the city's sources, sorted, each once, also where links lead to it twice or in circles.

    Args:
        city: Its `points.sources` are folders or globs, relative to the city file or URLs such as `s3://bucket/…`;
            `archive.zip::pattern` picks members, and litter of archives (`__MACOSX`, hidden files) is never picked.
        patterns: Instead of the city's own.
        archived: Whether a source, absolute, may match nothing, because what it once matched was ingested.

    Raises:
        ConfigError: A source matches nothing and may not, or a file is of an unknown kind.
        DataError: An object store does not answer.
    """
    found: set[SourceFile] = set()
    for text in patterns or _points(city).sources:
        outer, _, inner = text.partition("::")
        listed = _remote_files(outer) if "://" in outer else _local_files(str(city.path(outer)))
        files = _expand(listed, inner)
        if not files and not (archived and archived(outer if "://" in outer else str(city.path(outer)))):
            raise ConfigError("points.sources", text, "matches no file", "correct the path or the pattern")
        found.update(files)
    for file in found:
        if not (file.member or file.path).lower().endswith((*PARQUET, *TEXT, ".zip")):
            raise ConfigError("points.sources", file.label, "is neither Parquet nor text", f"use {', '.join(PARQUET + TEXT)}")
    return sorted(found, key=lambda f: f.label)


def _local_files(where: str) -> list[SourceFile]:
    """Files of a glob, or all data files below a folder, hive-partitioned or not; of equal files one name."""
    if Path(where).is_dir():
        found = [p for p in _walk(where) if not Path(p).name.startswith((".", "_"))]
    else:
        found = [p for p in glob.glob(where, recursive=True) if Path(p).is_file()]
    names = {os.path.realpath(p): p for p in sorted(found, reverse=True)}.values()
    return [_local_file(name) for name in names]


def _local_file(path: str) -> SourceFile:
    stat = os.stat(path)
    return SourceFile(path, size=stat.st_size, version=f"{stat.st_mtime_ns}-{stat.st_size}")


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder; linked folders are entered, each once."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = [f for f in sorted(folders) if os.path.realpath(f"{here}/{f}") not in seen]
        yield from (f"{here}/{n}" for n in names if Path(here, n).is_file())


def _remote_files(url: str) -> list[SourceFile]:
    """Objects behind a URL, with what the listing says of them: no object is asked for by itself."""
    scheme = url.split("://")[0]
    with _reaching(url):
        store, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return [
            SourceFile(f"{scheme}://{name}", size=int(facts["size"]), version=_version(store, name, facts))
            for name, facts in _list(store, scheme, path).items()
            if facts["type"] == "file" and not name.rsplit("/", 1)[-1].startswith((".", "_")) and not name.endswith("/")
        ]


def _list(store: Any, scheme: str, path: str) -> dict[str, dict[str, Any]]:
    """Facts by name of the objects behind a path or a glob, in as few listings as the store can do."""
    magic = MAGIC.search(path)
    if magic is None:
        return dict(store.find(path, detail=True))
    root, _, stem = path[: magic.start()].rpartition("/")
    deep = "/" in path[magic.start() :] or "**" in path
    if scheme not in FLAT_STORES or not root or (stem and not deep):
        return dict(store.glob(path, detail=True))
    # fsspec's glob would list every folder by itself.
    facts = store.find(root, prefix=stem, detail=True).values() if deep else store.ls(root, detail=True)
    wanted = re.compile(glob_translate(path))
    return {f["name"]: f for f in facts if wanted.match(f["name"])}


def _version(store: Any, name: str, facts: dict[str, Any]) -> str:
    """An object's ETag, or what else its store has to tell one content from another."""
    return str(facts.get("ETag") or facts.get("etag") or store.ukey(name)).strip('"')


@contextmanager
def _reaching(where: str) -> Iterator[None]:
    """Errors of object stores, which come in many classes, as one line."""
    try:
        yield
    except ImportError as error:
        raise ConfigError("points.sources", where, f"needs a package ({error})", "install roadfuse[s3]") from error
    except Exception as error:
        if "://" not in where or isinstance(error, (ConfigError, DataError)):
            raise
        short = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"points.sources: cannot read {where} ({short}); check the URL, AWS_ENDPOINT_URL and the credentials"
        ) from error


def _points(city: City) -> PointsSpec:
    if city.points is None:
        raise ConfigError("points", None, "is missing", "add a points section to ingest trajectories")
    return city.points


def _expand(files: list[SourceFile], inner: str) -> list[SourceFile]:
    """The files, with archives replaced by those of their members that a pattern picks."""
    archives = [f for f in files if f.path.lower().endswith(".zip")]
    plain = [f for f in files if not f.path.lower().endswith(".zip")]
    members = _by_path(archives, lambda opener, file: _members_or_itself(opener, file, inner or "*"))
    return plain + [member for group in members for member in group]


def _members_or_itself(opener: _Opener, file: SourceFile, pattern: str) -> list[SourceFile]:
    """Members of an archive; the archive itself where it is damaged, so that `check_columns` says so of it alone."""
    try:
        return _members(opener, file, pattern)
    except DataError:
        return [file]


def _members(opener: _Opener, file: SourceFile, pattern: str) -> list[SourceFile]:
    try:
        members = [m for m in opener.archive(file.path).infolist() if not m.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"points.sources: {file.path} is not a readable zip ({error}); copy it again") from error
    picked = [m for m in members if fnmatch.fnmatch(m.filename, pattern)]
    picked = [m for m in picked if not any(fnmatch.fnmatch(m.filename, litter) for litter in LITTER)]
    return [SourceFile(file.path, m.filename, m.file_size, file.version) for m in picked]


def _by_path(files: Sequence[SourceFile], look: Callable[[_Opener, SourceFile], Found]) -> list[Found]:
    """What is found in each file, in the files' order; files are opened side by side, members of an archive one by one."""
    places_of: dict[str, list[int]] = {}
    for place, file in enumerate(files):
        places_of.setdefault(file.path, []).append(place)

    def look_at(places: list[int]) -> list[tuple[int, Found]]:
        with _Opener() as opener:
            return [(place, look(opener, files[place])) for place in places]

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        found = dict(pair for pairs in pool.map(look_at, places_of.values()) for pair in pairs)
    return [found[place] for place in range(len(files))]


class _Opener:
    """Opens files, objects and members of archives as bytes; each archive's directory is read once."""

    def __init__(self) -> None:
        self.archives: dict[str, zipfile.ZipFile] = {}

    def __enter__(self) -> _Opener:
        return self

    def __exit__(self, *_: object) -> None:
        for archive in self.archives.values():
            archive.close()

    def archive(self, path: str) -> zipfile.ZipFile:
        """An open archive."""
        if path not in self.archives:
            self.archives[path] = zipfile.ZipFile(self._bytes(path))
        return self.archives[path]

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's bytes, as stored: gzip is not unpacked."""
        return self.archive(file.path).open(file.member) if file.member else self._bytes(file.path)

    @staticmethod
    def _bytes(path: str) -> IO[bytes]:
        if "://" not in path:
            return open(path, "rb")
        with _reaching(path):
            store, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
            opened: IO[bytes] = store.open(name, "rb")
        return opened


def matches(source: str, label: str) -> bool:
    """Whether a source, absolute and without the members of an archive, may have matched a file of the ledger."""
    path = label.partition("::")[0]
    if MAGIC.search(source):
        return bool(re.compile(glob_translate(source)).match(path))
    return path == source or path.startswith(source.rstrip("/") + "/")


def current_version(file: SourceFile) -> str | None:
    """The file's version now, as `find_sources` would find it; None where it is no longer there.

    Raises:
        DataError: An object store does not answer.
    """
    try:
        if "://" not in file.path:
            return _local_file(file.path).version
        with _reaching(file.path):
            store, name = fsspec.core.url_to_fs(file.path, use_listings_cache=False)
            return _version(store, name, store.info(name)) if store.exists(name) else None
    except FileNotFoundError:
        return None


def identify(files: Sequence[SourceFile], known: Mapping[tuple[str, str], str] | None = None) -> list[dict[str, Any]]:
    """Each file's label, version, size in bytes and content hash.

    Args:
        files: The files, as `find_sources` found them.
        known: Hashes by label and version, from earlier; what is in it is not read again.

    Returns:
        One record a file; `hash` is BLAKE3, 16 bytes, hexadecimal.

    Raises:
        DataError: An object store does not answer.
    """
    hashes = known or {}

    def one(opener: _Opener, file: SourceFile) -> dict[str, Any]:
        digest = hashes.get((file.label, file.version)) or _hash(opener, file)
        return {"path": file.path, "member": file.member, "label": file.label, "version": file.version, "size": file.size,
                "hash": digest}  # fmt: skip

    return _by_path(files, one)


def _hash(opener: _Opener, file: SourceFile) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    if file.member or "://" in file.path:
        with opener.open(file) as stream, _reaching(file.path):
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    else:
        digest.update_mmap(file.path)
    return digest.hexdigest(16)


def materialise(files: list[SourceFile], scratch: Path) -> list[str]:
    """Paths or URLs that DuckDB can open; members of archives are unpacked below a scratch folder, in order.

    Raises:
        DataError: A member is damaged, or unpacks to more than is likely or than there is room for.
    """
    out = []
    with _Opener() as opener:
        for number, file in enumerate(files):
            if not file.member:
                out.append(file.path)
                continue
            target = scratch / f"{number:06d}{Path(file.member).suffix}"
            if not _is_unpacked(target, opener.archive(file.path).getinfo(file.member)):
                _unpack(opener, file, target)
            out.append(str(target))
    return out


def _is_unpacked(target: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file is the member, by the size and the checksum in the archive's directory."""
    if not target.exists() or target.stat().st_size != member.file_size:
        return False
    check = 0
    with target.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            check = zlib.crc32(chunk, check)
    return check == member.CRC


def _unpack(opener: _Opener, file: SourceFile, target: Path) -> None:
    """Unpack a member; a damaged one, or one without room, leaves nothing behind."""
    _require_plausible(file, opener.archive(file.path).getinfo(file.member))
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if file.size > free:
        raise StoreError(f"{target.parent}: cannot be written ({file.label} unpacks to {file.size:,} bytes, and {free:,} are "
                         "free: no space left); all is as before: make room and run again")  # fmt: skip
    try:
        with replacing(target) as part, opener.open(file) as stream, part.open("wb") as copy:
            shutil.copyfileobj(stream, copy)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"points.sources: {file.label} cannot be unpacked ({error}); make the archive again") from error


def _require_plausible(file: SourceFile, member: zipfile.ZipInfo) -> None:
    """Refuse a member that unpacks to far more than trajectories do.

    Raises:
        DataError: It is large, and more than `MOST_PACKED` times as large as in the archive.
    """
    if member.file_size > BOMB_BYTES and member.file_size > MOST_PACKED * max(1, member.compress_size):
        raise DataError(
            f"points.sources: {file.label} would unpack {member.compress_size:,} bytes to {member.file_size:,}, more than "
            f"{MOST_PACKED} times as many; unpack it yourself if that is right"
        )


def empty_files(city: City, files: list[SourceFile]) -> list[SourceFile]:
    """Files that hold no rows: none in Parquet, nothing behind the header, if there is one, in text."""
    header = _points(city).csv.header
    empty = _by_path(files, lambda opener, file: _is_empty(opener, file, header))
    return [file for file, is_empty in zip(files, empty, strict=True) if is_empty]


def _is_empty(opener: _Opener, file: SourceFile, header: bool) -> bool:
    if file.is_parquet:
        with opener.open(file) as stream:
            return int(pq.read_metadata(stream).num_rows) == 0
    with opener.open(file) as raw, _unpacked(file, raw) as stream:
        if header:
            stream.readline()
        return not stream.read(64).strip()


def check_columns(city: City, files: list[SourceFile]) -> list[int]:
    """Open every Parquet footer and every text header; rows of each file, counted for Parquet, for text by its head.

    Raises:
        ConfigError: A named column is absent or cannot hold what it should.
        DataError: A file is truncated or is not what its ending says.
    """

    def rows(opener: _Opener, file: SourceFile) -> int:
        if file.path.lower().endswith(".zip") and not file.member:
            _members(opener, file, "*")
            raise DataError(f"points.sources: {file.path} was not a readable zip, and is one now; run again")
        if file.is_parquet:
            return _check_parquet(city, file, opener)
        _check_text(city, file, opener)
        with opener.open(file) as stream:
            return estimate_rows(stream, file.size, _is_packed(file), _points(city).csv.header)

    return _by_path(files, rows)


def _check_parquet(city: City, file: SourceFile, opener: _Opener) -> int:
    if file.member:
        raise ConfigError("points.sources", file.label, "is Parquet inside a zip", "unpack it; Parquet is compressed")
    try:
        with opener.open(file) as stream:
            footer = pq.read_metadata(stream)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        short = str(error).split(". ")[0]
        raise DataError(f"points.sources: {file.path} is not readable Parquet ({short}); write or copy it again") from error
    for key, column in _points(city).columns.named():
        _check_name(key, column, schema.names, file)
        kind = schema.field(column).type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        time = key == "time" and (pa.types.is_temporal(kind) and not pa.types.is_time(kind))
        # A writer that saw no value in a whole file knows no type.
        empty = pa.types.is_null(kind)
        if key != "vehicle" and not (numeric or text or time or empty):
            raise ConfigError(f"points.columns.{key}", column, f"has type {kind} in {file.path}", "name a column of numbers")
    return stated_rows(footer, file.size, [column for _, column in _points(city).columns.named()], file.label)


def single_precision_step(city: City, files: list[SourceFile]) -> float:
    """Pixels between neighbouring positions that 32 bits can hold, where a Parquet file stores such; 0 where none does."""
    spec, grid = _points(city), city.make_grid()
    box = fit_projection(grid, spec.crs).box
    metres = METRES_PER_DEGREE if CRS.from_user_input(spec.crs).is_geographic else 1.0
    step = float(np.spacing(np.float32(max(abs(v) for v in box)))) * metres / grid.resolution_m

    def in_single_precision(opener: _Opener, file: SourceFile) -> bool:
        with opener.open(file) as stream:
            schema = pq.read_schema(stream)
        return any(pa.types.is_float32(schema.field(name).type) for name in (spec.columns.lon, spec.columns.lat))

    return step if any(_by_path([f for f in files if f.is_parquet], in_single_precision)) else 0.0


def _check_text(city: City, file: SourceFile, opener: _Opener) -> None:
    if file.member:
        _require_plausible(file, opener.archive(file.path).getinfo(file.member))
    spec = _points(city).csv
    names = list(spec.names)
    if spec.header:
        names = [n.strip().strip('"').lstrip("\ufeff") for n in _first_line(file, opener).split(spec.delimiter)]
    elif not names:
        raise ConfigError("points.csv.names", names, "is empty for a file without a header", "list the columns in order")
    for key, column in _points(city).columns.named():
        _check_name(key, column, names, file)


def _is_packed(file: SourceFile) -> bool:
    """Whether a text file is compressed with gzip, by its ending."""
    return (file.member or file.path).lower().endswith(".gz")


def _unpacked(file: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    return gzip.open(raw) if _is_packed(file) else raw  # type: ignore[return-value]


def _first_line(file: SourceFile, opener: _Opener) -> str:
    try:
        with opener.open(file) as raw, _unpacked(file, raw) as stream:
            return stream.read(1 << 16).split(b"\n", 1)[0].decode().rstrip("\r")
    except (UnicodeDecodeError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"points.sources: {file.label} is not text in UTF-8 ({error}); convert or copy it again") from error


def _check_name(key: str, column: str, names: list[str], file: SourceFile) -> None:
    if column not in names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise ConfigError(f"points.columns.{key}", column, f"is not a column of {file.label}", f"it has: {shown}")
