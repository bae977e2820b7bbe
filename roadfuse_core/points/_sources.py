"""Which files a dump is made of, and what each of them holds."""

from __future__ import annotations

import errno
import fnmatch
import lzma
import os
import re
import shutil
import tempfile
import time
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

from roadfuse_core.errors import (
    ConfigError,
    DataError,
    RoadFuseError,
    StoreError,
    holds_credentials,
    printable,
    without_secrets,
)
from roadfuse_core.files import replacing
from roadfuse_core.grid import fit_projection
from roadfuse_core.points._footer import stated_rows
from roadfuse_core.points._layout import layout_of_parquet, layout_of_text, point_number, texts_of
from roadfuse_core.points._other_formats import fix_for_column, fix_for_file
from roadfuse_core.points._text import WEB, Head, ending, is_packed, read_head
from roadfuse_core.points._text_rows import estimate_rows
from roadfuse_core.points._times import is_number
from roadfuse_core.settings import City, CsvSpec, PointsSpec
from roadfuse_core.wildcards import find_paths

__all__ = [
    "SourceFile",
    "check_columns",
    "current_version",
    "empty_files",
    "find_sources",
    "identify",
    "left_out",
    "matches",
    "materialise",
    "open_bytes",
    "single_precision_step",
]

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".txt", ".tsv", ".gz")
METRES_PER_DEGREE = 111_195.0
# Text of trajectories packs to a third or a tenth; what packs better than this, and is large, is no such text.
MOST_PACKED = 100
BOMB_BYTES = 100_000_000
# Names of files that describe data, and those that programs hide beside it (`_SUCCESS`).
COMPANIONS = (".", "_", "readme", "licence", "license", "copying")
# Parameters of an address that grant access for a while: Amazon's, Google's, Azure's, CloudFront's and plain ones.
SIGNATURE = re.compile(
    r"(X-Amz-[^=]*|X-Goog-[^=]*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id|token|access_token|api_?key"
    r"|sv|ss|sp|se|st|sr|sig|srt|spr|sip|sdd|skoid|sktid|skt|ske|sks|skv)=",
    re.IGNORECASE,
)
LITTER = ("__MACOSX/*", "*/.*", ".*")
# Files that are opened at the same time: an object store answers after tens of milliseconds, whatever it is asked.
OPEN_AT_ONCE = 16
# Stores that list all objects below a prefix at once, a thousand a request, however deep their names are.
FLAT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
MAGIC = re.compile(r"[*?[]")

# What unpacking raises: damaged archives and streams, encrypted members, unknown methods.
UNPACKING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError)

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


def find_sources(
    city: City, patterns: Sequence[str | SourceFile] | None = None, archived: Callable[[str], bool] | None = None
) -> list[SourceFile]:
    """The files behind the city's sources, sorted, each once, also where links lead to it twice or in circles.

    Args:
        city: Its `points.sources` are folders or globs, relative to the city file or URLs such as `s3://bucket/…`;
            `archive.zip::pattern` picks members, and litter of archives (`__MACOSX`, hidden files) is never picked.
        patterns: Instead of the city's own; what was found before is taken as it is.
        archived: Whether a source, absolute, may match nothing, because what it once matched was ingested.

    Raises:
        ConfigError: A source matches nothing and may not, or a file is of an unknown kind.
        DataError: An object store does not answer.
    """
    found: set[SourceFile] = set()
    for text in patterns or _points(city).sources:
        if isinstance(text, SourceFile):
            found.add(text)
            continue
        listed, inner = _listed(city, text)
        files = _expand(listed, inner)
        if not files and not (archived and archived(_absolute(city, text))):
            raise _nothing(city, text)
        found.update(files)
    for file in found:
        _require_name(file)
        if not ending(file.member or file.path).endswith((*PARQUET, *TEXT, ".zip")):
            fix = fix_for_file(file.member or file.path, PARQUET + TEXT)
            raise ConfigError("points.sources", file.shown, "is neither Parquet nor text", fix)
    return sorted(found, key=lambda f: f.label)


def _absolute(city: City, text: str) -> str:
    """A source without the members of an archive, as a path or URL that stands for itself."""
    outer, _ = _parted(city, text)
    return outer if "://" in outer or "\0" in outer else str(city.path(outer))


def _nothing(city: City, text: str) -> ConfigError:
    """Why a source gives no file: there is none, or there are files of other kinds."""
    others = left_out(city, [text])
    if not others:
        return ConfigError("points.sources", text, "matches no file", "correct the path or the pattern")
    shown = ", ".join(printable(Path(path).name) for path in others[:3]) + (", …" if len(others) > 3 else "")
    return ConfigError(
        "points.sources", text, f"holds neither Parquet nor text, but {shown}", fix_for_file(others[0], PARQUET + TEXT)
    )


def left_out(city: City, sources: Sequence[str] | None = None) -> list[str]:
    """Files below the folders among the sources that are taken for no data, sorted; hidden ones are not counted.

    Args:
        city: The city.
        sources: Instead of the city's own.
    """
    here = [text for text in sources or _points(city).sources if "://" not in text]
    matched = [find_paths(city.root, _parted(city, text)[0]) for text in here]
    folders = [path for paths in matched if not any(p.is_file() for p in paths) for path in paths]
    others = {path for folder in folders for path in _walk(str(folder)) if not _is_data(path)}
    return sorted(path for path in others if not Path(path).name.startswith((".", "_")))


def _require_name(file: SourceFile) -> None:
    """Refuse a name that no store and no ledger can write down."""
    try:
        file.label.encode()
    except UnicodeEncodeError as error:
        shown = file.label.encode("utf-8", "backslashreplace").decode()
        raise ConfigError("points.sources", shown, "has a name that is not UTF-8", "rename the file") from error


def _parted(city: City, text: str) -> tuple[str, str]:
    """A source's file and, of an archive, the pattern of its members; a file may have colons in its name."""
    outer, colons, inner = text.partition("::")
    if colons and "://" not in text and find_paths(city.root, text):
        return text, ""
    return outer, inner


def _listed(city: City, text: str) -> tuple[list[SourceFile], str]:
    """Files and archives behind a source, and the pattern of the archives' members."""
    outer, inner = _parted(city, text)
    if "://" not in outer:
        return _local_files(find_paths(city.root, outer)), inner
    if holds_credentials(outer):
        raise ConfigError("points.sources", without_secrets(outer), "was given with a user or password",
                          "leave them out; stores take them from the environment (AWS_ACCESS_KEY_ID, …)")  # fmt: skip
    return (_web_files(outer) if outer.startswith(WEB) else _remote_files(outer)), inner


def _local_files(matched: list[Path]) -> list[SourceFile]:
    """Files that were matched, or, where only folders were, all data files below them; of equal files one name."""
    found = [str(path) for path in matched if path.is_file()]
    if not found:
        found = [path for folder in matched for path in _walk(str(folder)) if _is_data(path)]
    names = {os.path.realpath(p): p for p in sorted(found, reverse=True)}.values()
    return [_local_file(name) for name in names]


def _local_file(path: str) -> SourceFile:
    stat = os.stat(path)
    return SourceFile(path, size=stat.st_size, version=f"{stat.st_mtime_ns}-{stat.st_size}")


def _is_data(path: str) -> bool:
    """Whether a file of a folder is one of its data files, not hidden and not a companion such as a README."""
    name = Path(path).name.lower()
    return name.endswith((*PARQUET, *TEXT, ".zip")) and not name.startswith(COMPANIONS)


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


def _web_files(url: str) -> list[SourceFile]:
    """Files behind a web address: one, those that a page links to, or those of its links that a pattern matches."""
    bare = url.partition("?")[0]
    with _reaching(url):
        store = fsspec.filesystem("http", use_listings_cache=False)
        if bare.lower().endswith((*PARQUET, *TEXT, ".zip")) and not re.search(r"[*[]", bare):
            found = [url]
        else:
            found = store.glob(bare) if re.search(r"[*[]", bare) else [name for name in store.find(bare) if _is_data(name)]
        return [_web_file(store, name) for name in found]


def _web_file(store: Any, url: str) -> SourceFile:
    """A file of the web; its signature is no part of its name, and other parameters are one as a digest."""
    facts = store.info(url)
    size = int(facts.get("size") or 0)
    changed = facts.get("ETag") or (facts.get("Last-Modified") and f"{facts['Last-Modified']}-{size}")
    # Where a server does not tell one content from another, it is read each time.
    version = str(changed or f"unknown-{time.time_ns()}").strip('"')
    bare, _, query = url.partition("?")
    told = sorted(part for part in query.split("&") if part and not SIGNATURE.match(part))
    mark = f"?{blake3('&'.join(told).encode()).hexdigest(4)}" if told else ""
    return SourceFile(bare + mark, size=size, version=version, address=url if query else "")


def _web_version(file: SourceFile) -> str | None:
    """A web file's version now; of a server that does not tell, the one that was made up when it was found."""
    try:
        with _reaching(file.location):
            now = _web_file(fsspec.filesystem("http", use_listings_cache=False), file.location).version
    except DataError:  # also where the signature was not kept
        return None
    return file.version if now.startswith("unknown-") else now


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
        fix = "install roadfuse[s3]" if where.startswith(("s3://", "s3a://")) else "install it"
        raise ConfigError("points.sources", where, f"needs a package ({error})", fix) from None
    except Exception as error:
        if "://" not in where or isinstance(error, (ConfigError, DataError)):
            raise
        short = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"points.sources: cannot read {where} ({short}); check the URL, AWS_ENDPOINT_URL and the credentials"
        ) from None  # what stores and servers raise shows addresses as they are


def _points(city: City) -> PointsSpec:
    if city.points is None:
        raise ConfigError("points", None, "is missing", "add a points section to ingest trajectories")
    return city.points


def _expand(files: list[SourceFile], inner: str) -> list[SourceFile]:
    """The files, with archives replaced by those of their members that a pattern picks."""
    archives = [f for f in files if ending(f.path).endswith(".zip")]
    plain = [f for f in files if not ending(f.path).endswith(".zip")]
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


def _by_path(files: Sequence[SourceFile], look: Callable[[_Opener, SourceFile], Found]) -> list[Found]:
    """What is found in each file, in the files' order; files are opened side by side, members of an archive one by one."""
    places_of: dict[str, list[int]] = {}
    for place, file in enumerate(files):
        places_of.setdefault(file.path, []).append(place)

    def look_at(places: list[int]) -> list[tuple[int, Found]]:
        with _Opener() as opener:
            return [(place, _named_look(opener, files[place])) for place in places]

    def _named_look(opener: _Opener, file: SourceFile) -> Found:
        with _naming(file):
            return look(opener, file)

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        found = dict(pair for pairs in pool.map(look_at, places_of.values()) for pair in pairs)
    return [found[place] for place in range(len(files))]


@contextmanager
def _naming(file: SourceFile) -> Iterator[None]:
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


class _Opener:
    """Opens files, objects and members of archives as bytes; each archive's directory is read once."""

    def __init__(self) -> None:
        self.archives: dict[str, zipfile.ZipFile] = {}

    def __enter__(self) -> _Opener:
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
    with _reaching(path):
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
        if file.path.startswith(WEB):
            return _web_version(file)
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
    """Paths or URLs that can be read at any place; members of archives are unpacked below a scratch folder, in order.

    Raises:
        DataError: A member is damaged, or unpacks to more than is likely or than there is room for.
    """
    out = []
    with _Opener() as opener:
        for number, file in enumerate(files):
            if not file.member:
                out.append(file.location)
                continue
            target = scratch / f"{number:06d}{Path(file.member).suffix}"
            with _naming(file):
                if not _is_unpacked(target, opener.archive(file).getinfo(file.member)):
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
    _require_plausible(file, opener.archive(file).getinfo(file.member))
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if file.size > free:
        raise StoreError(f"{target.parent}: cannot be written ({file.shown} unpacks to {file.size:,} bytes, and {free:,} are "
                         "free: no space left); all is as before: make room and run again")  # fmt: skip
    with replacing(target) as part, opener.open(file) as stream, part.open("wb") as copy:
        shutil.copyfileobj(stream, copy)


def _require_plausible(file: SourceFile, member: zipfile.ZipInfo) -> None:
    """Refuse a member that unpacks to far more than trajectories do.

    Raises:
        DataError: It is large, and more than `MOST_PACKED` times as large as in the archive.
    """
    if member.file_size > BOMB_BYTES and member.file_size > MOST_PACKED * max(1, member.compress_size):
        raise DataError(
            f"points.sources: {file.shown} would unpack {member.compress_size:,} bytes to {member.file_size:,}, more than "
            f"{MOST_PACKED} times as many; unpack it yourself if that is right"
        )


def empty_files(city: City, files: list[SourceFile]) -> list[SourceFile]:
    """Files that hold no rows: none in Parquet, nothing behind the header, if there is one, in text."""
    layout = _points(city).csv
    empty = _by_path(files, lambda opener, file: _is_empty(opener, file, layout))
    return [file for file, is_empty in zip(files, empty, strict=True) if is_empty]


def _is_empty(opener: _Opener, file: SourceFile, layout: CsvSpec) -> bool:
    if file.is_parquet:
        with opener.open(file) as stream:
            return int(pq.read_metadata(stream).num_rows) == 0
    head = _head(file, opener, layout)
    return head.whole and not head.rows


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
            return estimate_rows(stream, file.size, is_packed(file.label), _points(city).csv.header)

    return _by_path(files, rows)


def _check_parquet(city: City, file: SourceFile, opener: _Opener) -> int:
    if file.member:
        raise ConfigError("points.sources", file.shown, "is Parquet inside a zip", "unpack it; Parquet is compressed")
    with opener.open(file) as stream:
        footer, schema = _footer(stream, file)
        for key, column in _points(city).columns.named():
            _check_name(key, column, schema.names, file)
            if key != "vehicle":
                _check_type(key, column, schema.types[schema.names.index(column)], file)
        layout_of_parquet(stream, _points(city), file.shown)
        named = [column for _, column in _points(city).columns.named()]
    return stated_rows(footer, file.size, named, file.shown)


def _footer(stream: IO[bytes], file: SourceFile) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        footer = pq.read_metadata(stream)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        short = str(error).split(". ")[0]
        raise DataError(f"points.sources: {file.shown} is not readable Parquet ({short}); write or copy it again") from error
    return footer, schema


def _check_type(key: str, column: str, kind: pa.DataType, file: SourceFile) -> None:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    time = key == "time" and (pa.types.is_temporal(kind) and not pa.types.is_time(kind))
    # A writer that saw no value in a whole file knows no type.
    empty = pa.types.is_null(kind)
    if not (numeric or text or time or empty):
        raise ConfigError(f"points.columns.{key}", column, f"has type {kind} in {file.shown}", "name a column of numbers")


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
        _require_plausible(file, opener.archive(file).getinfo(file.member))
    spec = _points(city)
    head = _head(file, opener, spec.csv)
    if not spec.csv.header:
        _check_given_names(spec, head, file)
    if spec.csv.header and not {column for _, column in spec.columns.named()} <= set(head.names):
        _find_delimiter(city, file, opener)
    for key, column in spec.columns.named():
        _check_name(key, column, list(head.names), file)
        if key in ("lon", "lat"):
            _check_numbers(key, column, texts_of(head, head.names.index(column)), spec, file)
    layout_of_text(head, spec, file.label, file.shown)


def _head(file: SourceFile, opener: _Opener, layout: CsvSpec) -> Head:
    with opener.open(file) as raw:
        return read_head(raw, layout, is_packed(file.label), file.shown)


def _check_given_names(spec: PointsSpec, head: Head, file: SourceFile) -> None:
    names = list(spec.csv.names)
    if not names:
        raise ConfigError("points.csv.names", names, "is empty for a file without a header", "list the columns in order")
    cells = len(head.rows[0]) if head.rows else len(names)
    if cells > len(names) and head.rows[0][-1] == "":  # behind a separator at the end of the line
        cells -= 1
    if cells != len(names):
        raise ConfigError(
            "points.csv.names",
            names,
            f"are {len(names)} names, and {file.shown} has {cells} columns",
            "name every column in order",
        )


def _find_delimiter(city: City, file: SourceFile, opener: _Opener) -> None:
    """Say so where another separator would give the columns."""
    layout = _points(city).csv
    for other in (c for c in ",;\t| " if c != layout.delimiter):
        names = _head(file, opener, layout.model_copy(update={"delimiter": other})).names
        if {column for _, column in _points(city).columns.named()} <= set(names):
            raise ConfigError(
                "points.csv.delimiter",
                layout.delimiter,
                f"does not separate the columns of {file.shown}",
                f"set it to {other!r}",
            )


def _check_numbers(key: str, column: str, texts: list[str], spec: PointsSpec, file: SourceFile) -> None:
    """Refuse a column of positions without any number in the first rows."""
    if not texts or any(is_number(point_number(text, spec)) for text in texts):
        return
    if all(is_number(text.replace(",", ".")) for text in texts):
        raise ConfigError(
            "points.csv.decimal",
            spec.csv.decimal,
            f"does not fit numbers such as {texts[0]!r} in {file.shown}",
            "set it to ','",
        )
    raise ConfigError(
        f"points.columns.{key}", column, f"holds no number in the first rows of {file.shown}, for example {texts[0]!r}",
        "name a column of plain numbers, or write them so",
    )  # fmt: skip


def _check_name(key: str, column: str, names: list[str], file: SourceFile) -> None:
    if column not in names:
        fix = fix_for_column(column, [printable(name) for name in names], file.path)
        raise ConfigError(f"points.columns.{key}", column, f"is not a column of {file.shown}", fix)
    if names.count(column) > 1:
        raise ConfigError(f"points.columns.{key}", column, f"names several columns of {file.shown}", "give each its own name")
