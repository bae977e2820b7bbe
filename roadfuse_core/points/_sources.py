"""Which files a dump is made of, and what each of them holds."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.settings import City, PointsSpec

__all__ = ["SourceFile", "check_columns", "empty_files", "find_sources", "identify", "materialise"]

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".txt", ".tsv", ".gz")
LITTER = ("__MACOSX/*", "*/.*", ".*")


@dataclass(frozen=True)
class SourceFile:
    """A file of a dump, or one member of an archive.

    Attributes:
        path: Absolute path of the file or archive.
        member: Name inside the archive; empty for plain files.
    """

    path: str
    member: str = ""

    @property
    def label(self) -> str:
        """How messages and the ledger name it."""
        return f"{self.path}::{self.member}" if self.member else self.path

    @property
    def is_parquet(self) -> bool:
        """By its ending."""
        return (self.member or self.path).lower().endswith(PARQUET)


def find_sources(city: City, patterns: list[str] | None = None) -> list[SourceFile]:
    """The files behind the city's sources, sorted, each once.

    Args:
        city: Its `points.sources` are globs relative to the city file; `archive.zip::pattern` picks members, and
            litter of archives (`__MACOSX`, hidden files) is never picked.
        patterns: Instead of the city's own.

    Raises:
        ConfigError: A source matches nothing, or a file is of an unknown kind.
    """
    spec = _points(city)
    found: set[SourceFile] = set()
    for text in patterns or spec.sources:
        outer, _, inner = text.partition("::")
        where = str(city.path(outer))
        # A folder stands for all data files below it, hive-partitioned or not.
        paths = sorted(glob.glob(f"{where}/**" if Path(where).is_dir() else where, recursive=True))
        files = [f for p in paths if Path(p).is_file() for f in _expand(p, inner)]
        if Path(where).is_dir():
            files = [f for f in files if not Path(f.path).name.startswith((".", "_"))]
        if not files:
            raise ConfigError("points.sources", text, "matches no file", "correct the path or the pattern")
        found.update(files)
    for file in found:
        if not (file.member or file.path).lower().endswith(PARQUET + TEXT):
            raise ConfigError("points.sources", file.label, "is neither Parquet nor text", f"use {', '.join(PARQUET + TEXT)}")
    return sorted(found, key=lambda f: f.label)


def _points(city: City) -> PointsSpec:
    if city.points is None:
        raise ConfigError("points", None, "is missing", "add a points section to ingest trajectories")
    return city.points


def _expand(path: str, inner: str) -> list[SourceFile]:
    if not path.lower().endswith(".zip"):
        return [SourceFile(path)]
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"points.sources: {path} is not a readable zip ({error}); copy it again") from error
    names = [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in LITTER)]
    return [SourceFile(path, n) for n in names if fnmatch.fnmatch(n, inner or "*")]


class _Opener:
    """Opens files and members of archives as bytes; each archive's directory is read once."""

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
            self.archives[path] = zipfile.ZipFile(path)
        return self.archives[path]

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's bytes, as stored: gzip is not unpacked."""
        return self.archive(file.path).open(file.member) if file.member else open(file.path, "rb")


def identify(files: list[SourceFile]) -> list[dict[str, object]]:
    """Each file's label, size in bytes and content hash (BLAKE3, 16 bytes, hexadecimal)."""
    with _Opener() as opener:
        return [asdict(f) | {"label": f.label, **_content(opener, f)} for f in files]


def _content(opener: _Opener, file: SourceFile) -> dict[str, object]:
    digest = blake3(max_threads=blake3.AUTO)
    if not file.member:
        digest.update_mmap(file.path)
        return {"size": Path(file.path).stat().st_size, "hash": digest.hexdigest(16)}
    size = 0
    with opener.open(file) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "hash": digest.hexdigest(16)}


def materialise(files: list[SourceFile], scratch: Path) -> list[str]:
    """Paths that DuckDB can open; members of archives are unpacked below a scratch folder, in order."""
    out = []
    with _Opener() as opener:
        for number, file in enumerate(files):
            if not file.member:
                out.append(file.path)
                continue
            target = scratch / f"{number:06d}{Path(file.member).suffix}"
            if not target.exists():
                scratch.mkdir(parents=True, exist_ok=True)
                part = target.with_suffix(".part")
                with opener.open(file) as stream, open(part, "wb") as copy:
                    shutil.copyfileobj(stream, copy)
                part.rename(target)
            out.append(str(target))
    return out


def empty_files(city: City, files: list[SourceFile]) -> list[SourceFile]:
    """Files that hold no rows: none in Parquet, nothing behind the header, if there is one, in text."""
    header = _points(city).csv.header
    with _Opener() as opener:
        return [f for f in files if _is_empty(opener, f, header)]


def _is_empty(opener: _Opener, file: SourceFile, header: bool) -> bool:
    if file.is_parquet:
        return int(pq.read_metadata(file.path).num_rows) == 0
    with opener.open(file) as raw, _unpacked(file, raw) as stream:
        if header:
            stream.readline()
        return not stream.read(64).strip()


def check_columns(city: City, files: list[SourceFile]) -> list[int | None]:
    """Open every Parquet footer and every text header; rows of each Parquet file, None for text.

    Raises:
        ConfigError: A named column is absent or cannot hold what it should.
        DataError: A file is truncated or is not what its ending says.
    """
    with _Opener() as opener:
        for file in files:
            if not file.is_parquet:
                _check_text(city, file, opener)
    return [_check_parquet(city, f) if f.is_parquet else None for f in files]


def _wanted(city: City) -> dict[str, str]:
    named = _points(city).columns.model_dump(exclude_none=True)
    return {k: v for k, v in named.items() if v != "filename"}


def _check_parquet(city: City, file: SourceFile) -> int:
    if file.member:
        raise ConfigError("points.sources", file.label, "is Parquet inside a zip", "unpack it; Parquet is compressed")
    try:
        footer = pq.read_metadata(file.path)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        short = str(error).split(". ")[0]
        raise DataError(f"points.sources: {file.path} is not readable Parquet ({short}); write or copy it again") from error
    for key, column in _wanted(city).items():
        _check_name(key, column, schema.names, file)
        kind = schema.field(column).type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        time = key == "time" and (pa.types.is_temporal(kind) and not pa.types.is_time(kind))
        if key != "vehicle" and not (numeric or text or time):
            raise ConfigError(f"points.columns.{key}", column, f"has type {kind} in {file.path}", "name a column of numbers")
    return int(footer.num_rows)


def _check_text(city: City, file: SourceFile, opener: _Opener) -> None:
    spec = _points(city).csv
    names = list(spec.names)
    if spec.header:
        names = [n.strip().strip('"').lstrip("\ufeff") for n in _first_line(file, opener).split(spec.delimiter)]
    elif not names:
        raise ConfigError("points.csv.names", names, "is empty for a file without a header", "list the columns in order")
    for key, column in _wanted(city).items():
        _check_name(key, column, names, file)


def _unpacked(file: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    packed = (file.member or file.path).lower().endswith(".gz")
    return gzip.open(raw) if packed else raw  # type: ignore[return-value]


def _first_line(file: SourceFile, opener: _Opener) -> str:
    try:
        with opener.open(file) as raw, _unpacked(file, raw) as stream:
            return stream.readline(1 << 16).decode().rstrip("\r\n")
    except (UnicodeDecodeError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"points.sources: {file.label} is not text in UTF-8 ({error}); convert or copy it again") from error


def _check_name(key: str, column: str, names: list[str], file: SourceFile) -> None:
    if column not in names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise ConfigError(f"points.columns.{key}", column, f"is not a column of {file.label}", f"it has: {shown}")
