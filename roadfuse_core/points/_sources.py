"""Which files a dump is made of, and how each is known again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3
from fsspec.utils import glob_translate

from roadfuse_core.errors import (
    ConfigError,
    DataError,
    holds_credentials,
    printable,
    without_secrets,
)
from roadfuse_core.points._opening import PARQUET, TEXT, Opener, SourceFile, by_path, members_of, reaching
from roadfuse_core.points._other_formats import fix_for_file
from roadfuse_core.points._text import WEB, ending
from roadfuse_core.settings import City, PointsSpec
from roadfuse_core.wildcards import find_paths

__all__ = ["current_version", "find_sources", "identify", "left_out", "matches", "points_of"]

# Names of files that describe data, and those that programs hide beside it (`_SUCCESS`).
COMPANIONS = (".", "_", "readme", "licence", "license", "copying")
# Parameters of an address that grant access for a while: Amazon's, Google's, Azure's, CloudFront's and plain ones.
SIGNATURE = re.compile(
    r"(X-Amz-[^=]*|X-Goog-[^=]*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id|token|access_token|api_?key"
    r"|sv|ss|sp|se|st|sr|sig|srt|spr|sip|sdd|skoid|sktid|skt|ske|sks|skv)=",
    re.IGNORECASE,
)
# Stores that list all objects below a prefix at once, a thousand a request, however deep their names are.
FLAT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
MAGIC = re.compile(r"[*?[]")


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
    for text in patterns or points_of(city).sources:
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
    here = [text for text in sources or points_of(city).sources if "://" not in text]
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
    with reaching(url):
        store, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return [
            SourceFile(f"{scheme}://{name}", size=int(facts["size"]), version=_version(store, name, facts))
            for name, facts in _list(store, scheme, path).items()
            if facts["type"] == "file" and not name.rsplit("/", 1)[-1].startswith((".", "_")) and not name.endswith("/")
        ]


def _web_files(url: str) -> list[SourceFile]:
    """Files behind a web address: one, those that a page links to, or those of its links that a pattern matches."""
    bare = url.partition("?")[0]
    with reaching(url):
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
        with reaching(file.location):
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


def points_of(city: City) -> PointsSpec:
    if city.points is None:
        raise ConfigError("points", None, "is missing", "add a points section to ingest trajectories")
    return city.points


def _expand(files: list[SourceFile], inner: str) -> list[SourceFile]:
    """The files, with archives replaced by those of their members that a pattern picks."""
    archives = [f for f in files if ending(f.path).endswith(".zip")]
    plain = [f for f in files if not ending(f.path).endswith(".zip")]
    members = by_path(archives, lambda opener, file: _members_or_itself(opener, file, inner or "*"))
    return plain + [member for group in members for member in group]


def _members_or_itself(opener: Opener, file: SourceFile, pattern: str) -> list[SourceFile]:
    """Members of an archive; the archive itself where it is damaged, so that `check_columns` says so of it alone."""
    try:
        return members_of(opener, file, pattern)
    except DataError:
        return [file]


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
        with reaching(file.path):
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

    def one(opener: Opener, file: SourceFile) -> dict[str, Any]:
        digest = hashes.get((file.label, file.version)) or _hash(opener, file)
        return {"path": file.path, "member": file.member, "label": file.label, "version": file.version, "size": file.size,
                "hash": digest}  # fmt: skip

    return by_path(files, one)


def _hash(opener: Opener, file: SourceFile) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    if file.member or "://" in file.path:
        with opener.open(file) as stream, reaching(file.path):
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    else:
        digest.update_mmap(file.path)
    return digest.hexdigest(16)
