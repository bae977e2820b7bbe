"""What a training keeps to go on from: files that are whole or not there, and hold numbers and names alone."""

from __future__ import annotations

import io
import json
import logging
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from roadfuse_core.errors import StoreError
from roadfuse_core.files import replacing, write_whole

__all__ = ["StageEnd", "StateFiles", "load_state", "usable_state"]

log = logging.getLogger(__name__)


class StateFiles(TorchCheckpointIO):
    """Lightning's states in one step each; its own writing passes through another folder, maybe of another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a state, and wait until it is on the disk."""
        held = io.BytesIO()
        torch.save(checkpoint, held)  # by itself it makes a full disk a RuntimeError
        with replacing(Path(path)) as part:
            part.write_bytes(held.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a state; never more than numbers, whatever the caller allows."""
        return load_state(Path(path))


class DamagedStateError(StoreError):
    """A file that is not all of a state."""


def load_state(path: Path) -> dict[str, Any]:
    """A state, on the CPU.

    Raises:
        DamagedStateError: It is cut or empty.
        StoreError: It holds other objects than tensors, numbers and texts; making those would run code.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StoreError(f"{path}: holds more than numbers and is no state of a training; remove it, train again") from error
    except (RuntimeError, EOFError) as error:
        raise DamagedStateError(f"{path}: is not all of a state ({type(error).__name__}); remove it, train again") from error
    return state


def usable_state(path: Path) -> Path | None:
    """The path, if a training can go on from what lies there; of a damaged state it warns, and it is not taken."""
    if not path.is_file():
        return None
    try:
        load_state(path)
    except DamagedStateError as error:
        log.warning("%s; its stage begins again", str(error).partition(";")[0])
        return None
    return path


@dataclass(frozen=True)
class StageEnd:
    """What a finished stage took.

    Attributes:
        epochs: That were run.
        seconds: Of all runs that led to its end, without what was lost between a state and an interruption.
    """

    epochs: int
    seconds: float

    def write(self, path: Path) -> None:
        """Keep it."""
        write_whole(path, json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> StageEnd | None:
        """What was kept; None where the stage has not ended, or nothing that can be read says so."""
        try:
            facts = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if isinstance(facts, int):  # before seconds were kept, it was the number of epochs alone
            return StageEnd(facts, 0.0)
        return StageEnd(**facts) if isinstance(facts, dict) else None
