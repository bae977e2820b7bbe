"""What a block leaves for the assembly and for a later run: arrays, its report, and a digest of both."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from roadfuse_core.files import replacing

__all__ = ["BlockReport", "Failure", "left_report", "save_block"]

log = logging.getLogger(__name__)
Arrays = Mapping[str, NDArray[Any]]
# What reading a file raises that is not what was written.
DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, OverflowError)


@dataclass(frozen=True)
class Failure:
    """A window that could not be predicted.

    Attributes:
        row: Of the window's corner, pixels of the grid.
        col: The same.
        why: One line.
    """

    row: int
    col: int
    why: str


@dataclass(frozen=True)
class BlockReport:
    """What became of a block.

    Attributes:
        windows: Predicted.
        failed: Windows without a prediction.
        worker: Address of the worker; None in this process, or if an earlier run made the block.
    """

    windows: int
    failed: tuple[Failure, ...] = ()
    worker: str | None = None


def save_block(path: Path, arrays: Arrays, report: BlockReport) -> None:
    """Leave a block; it is there under its name when all of it is on the disk.

    Args:
        path: Where to.
        arrays: As the assembly reads them.
        report: Kept with them; not which worker it was.
    """
    told = {"windows": str(report.windows), "failed": json.dumps([asdict(f) for f in report.failed])}
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    with replacing(path) as part:
        part.write_bytes(save(whole, told | {"digest": _digest(path, told, whole)}))


def left_report(path: Path) -> BlockReport | None:
    """What an earlier run says of a block; None if there is none. One that is damaged is removed, so that it is made again.

    Raises:
        OSError: The disk cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as left:
            told = dict(left.metadata() or {})
            arrays = {name: left.get_tensor(name) for name in left.keys()}  # noqa: SIM118
        if told.pop("digest") != _digest(path, told, arrays):
            raise ValueError("another digest")
        return BlockReport(int(told["windows"]), tuple(Failure(**f) for f in json.loads(told["failed"])))
    except DAMAGE as error:
        log.warning("%s: is damaged (%s); its windows are predicted again", path, error)
        path.unlink(missing_ok=True)
        return None


def _digest(path: Path, told: Mapping[str, str], arrays: Arrays) -> str:
    """Of a block's place, report and arrays."""
    names = sorted(arrays)
    facts = [
        path.parent.name,
        path.name,
        sorted(told.items()),
        [[n, str(arrays[n].dtype), list(arrays[n].shape)] for n in names],
    ]
    digest = blake3(json.dumps(facts).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest(16)
