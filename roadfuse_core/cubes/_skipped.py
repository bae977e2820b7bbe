"""Files that are left out of a dump: too young, damaged, or changed; the others enter, and these once they are right."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dask.distributed import Client

from roadfuse_core.cluster import Progress, run_jobs
from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.files import DamagedFileError, read_record, write_record
from roadfuse_core.points import Part, SourceFile, check_columns, current_version, materialise, read_batches
from roadfuse_core.settings import City, PointsSpec

__all__ = [
    "SkippedFile",
    "changed_files",
    "damaged_files",
    "forget_readable",
    "read_skipped",
    "sift",
    "split_off_young",
    "write_skipped",
]

# What a file, and not the machine, is to blame for.
FAULTS = (ConfigError, DataError, FileNotFoundError, zipfile.BadZipFile, zlib.error, EOFError)
Found = TypeVar("Found")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedFile:
    """A file of the city's sources that is in no dump.

    Attributes:
        label: Its name, as the ledger would have it.
        version: Of the file when it was looked at.
        reason: One line for people.
        damaged: Whether somebody must see to it; otherwise it only waits.
    """

    label: str
    version: str
    reason: str
    damaged: bool


def _record(city: City) -> Path:
    return city.workspace_path / "skipped.json"


def read_skipped(city: City) -> list[SkippedFile]:
    """The files that the latest ingest of the city's sources left out."""
    try:
        return [SkippedFile(**f) for f in read_record(_record(city))["files"]]
    except FileNotFoundError:
        return []
    except DamagedFileError as error:
        log.warning("%s; the next ingest makes it again", error)
        return []


def write_skipped(city: City, skipped: Sequence[SkippedFile]) -> None:
    """Keep the list for `read_skipped`, with the settings that the files were looked at with."""
    if skipped or _record(city).exists():
        record = {"settings": _settings_digest(city.points), "files": [asdict(s) for s in skipped]}
        write_record(_record(city), record)


def _settings_digest(spec: PointsSpec | None) -> str:
    settings = spec.model_dump(mode="json", exclude={"sources", "settle_s"}) if spec else {}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _remembered(city: City) -> dict[tuple[str, str], SkippedFile]:
    """Damaged files by name and version, as long as they would be read with the same settings."""
    try:
        same = read_record(_record(city))["settings"] == _settings_digest(city.points)
    except (FileNotFoundError, DamagedFileError):
        return {}
    return {(s.label, s.version): s for s in read_skipped(city) if s.damaged} if same else {}


def split_off_young(city: City, files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SkippedFile]]:
    """Files that were left alone for `points.settle_s` seconds and are not known to be damaged; and the others.

    Objects of a store appear complete, so that their age does not matter.
    """
    settle_s = city.points.settle_s if city.points else 0
    known, now_s = _remembered(city), time.time()
    good, left = list[SourceFile](), list[SkippedFile]()
    for file in files:
        age_s = now_s - int(file.version.split("-")[0]) / 1e9 if settle_s and "://" not in file.path else settle_s
        if age_s < settle_s:
            reason = (
                f"{file.label} changed {max(age_s, 0):,.0f} s ago, and points.settle_s is {settle_s:g}; a later run takes it"
            )
            left.append(SkippedFile(file.label, file.version, reason, damaged=False))
        elif (file.label, file.version) in known:
            left.append(known[file.label, file.version])
        else:
            good.append(file)
    return good, left


def sift(
    files: list[SourceFile], look: Callable[[list[SourceFile]], list[Found]]
) -> tuple[list[tuple[SourceFile, Found]], list[SkippedFile]]:
    """What a look at many files finds in each of them; of files that cannot be read, why.

    Args:
        files: Which.
        look: One result a file; raises when any of them is damaged. It is then asked again about fewer of them.
    """
    try:
        return list(zip(files, look(files), strict=True)), []
    except FAULTS as error:
        if len(files) == 1:
            return [], [SkippedFile(files[0].label, files[0].version, _line(files[0], error), damaged=True)]
    half = len(files) // 2
    good, left = sift(files[:half], look)
    more, others = sift(files[half:], look)
    return good + more, left + others


def _line(file: SourceFile, error: Exception) -> str:
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line if file.label in line or file.path in line else f"points.sources: {file.label} cannot be read ({line})"


def changed_files(files: Iterable[SourceFile]) -> list[SkippedFile]:
    """Those that are no longer in the version in which they were found."""
    changed = [f for f in files if current_version(f) not in (f.version, None)]
    why = "changed while it was read; run again when it is complete"
    return [SkippedFile(f.label, f.version, f"points.sources: {f.label} {why}", damaged=False) for f in changed]


@dataclass(frozen=True)
class _Look:
    """A job that reads a file to its end."""

    city: City
    file: SourceFile
    scratch: str


def _read_through(job: _Look) -> SkippedFile | None:
    """Why a file cannot be read to its end; None if it can."""
    assert job.city.points is not None
    scratch = Path(job.scratch) / hashlib.blake2b(job.file.label.encode(), digest_size=8).hexdigest()

    def look(files: list[SourceFile]) -> list[None]:
        check_columns(job.city, files)
        (path,) = materialise(files, scratch / "unpacked")
        for _ in read_batches(_bare(job.city.points), Part((path,)), False, scratch / "spill"):
            pass
        return [None]

    return next(iter(sift([job.file], look)[1]), None)


def _bare(spec: PointsSpec | None) -> Any:
    return spec.model_copy(update={"sources": ("-",)}) if spec else spec


def damaged_files(city: City, files: Iterable[SourceFile], client: Client | None, tell: Progress) -> list[SkippedFile]:
    """Those that cannot be read to their end; found by reading each of them."""
    with tempfile.TemporaryDirectory(dir=city.workspace_path) as scratch:
        jobs = [_Look(city, f, scratch) for f in files]
        found = run_jobs(client, _read_through, jobs, "looking for damaged files", tell)
    return [f for f in found if f is not None]


def forget_readable(city: City, client: Client | None, tell: Progress) -> None:
    """Look once more at files that were damaged: what was wrong may have been the disk's, not theirs."""
    skipped = read_skipped(city)
    damaged = [SourceFile(*_parted(s.label), version=s.version) for s in skipped if s.damaged]
    there = [f for f in damaged if current_version(f) == f.version]
    still = {s.label for s in damaged_files(city, there, client, tell)} if there else set()
    write_skipped(city, [s for s in skipped if s.label in still])


def _parted(label: str) -> tuple[str, str]:
    path, _, member = label.partition("::")
    return path, member
