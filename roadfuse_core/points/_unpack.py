"""Members of archives and remote text become plain files beside the shards."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path

from roadfuse_core.errors import (
    DataError,
    StoreError,
)
from roadfuse_core.files import replacing
from roadfuse_core.points._opening import Opener, SourceFile, naming

__all__ = ["materialise", "require_plausible"]

# Text of trajectories packs to a third or a tenth; what packs better than this, and is large, is no such text.
MOST_PACKED = 100
BOMB_BYTES = 100_000_000


def materialise(files: list[SourceFile], scratch: Path) -> list[str]:
    """Paths or URLs that can be read at any place; members of archives are unpacked below a scratch folder, in order.

    Raises:
        DataError: A member is damaged, or unpacks to more than is likely or than there is room for.
    """
    out = []
    with Opener() as opener:
        for number, file in enumerate(files):
            if not file.member:
                out.append(file.location)
                continue
            target = scratch / f"{number:06d}{Path(file.member).suffix}"
            with naming(file):
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


def _unpack(opener: Opener, file: SourceFile, target: Path) -> None:
    """Unpack a member; a damaged one, or one without room, leaves nothing behind."""
    require_plausible(file, opener.archive(file).getinfo(file.member))
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if file.size > free:
        raise StoreError(f"{target.parent}: cannot be written ({file.shown} unpacks to {file.size:,} bytes, and {free:,} are "
                         "free: no space left); all is as before: make room and run again")  # fmt: skip
    with replacing(target) as part, opener.open(file) as stream, part.open("wb") as copy:
        shutil.copyfileobj(stream, copy)


def require_plausible(file: SourceFile, member: zipfile.ZipInfo) -> None:
    """Refuse a member that unpacks to far more than trajectories do.

    Raises:
        DataError: It is large, and more than `MOST_PACKED` times as large as in the archive.
    """
    if member.file_size > BOMB_BYTES and member.file_size > MOST_PACKED * max(1, member.compress_size):
        raise DataError(
            f"points.sources: {file.shown} would unpack {member.compress_size:,} bytes to {member.file_size:,}, more than "
            f"{MOST_PACKED} times as many; unpack it yourself if that is right"
        )
