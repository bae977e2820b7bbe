"""Batches of windows, read ahead of the step that takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from roadfuse_core.training._windows import Batch, StillWindows, TrainingWindows, collate

__all__ = ["BatchLoader", "readers_for"]

READERS = 4  # threads beside a GPU: one reads a few hundred windows a second, a GPU trains on about as many


class BatchOrder(Sized, Protocol):
    """Numbers of each batch's windows."""

    def __iter__(self) -> Iterator[list[int]]: ...


def readers_for(device: torch.device) -> int:
    """Threads that read ahead: none on a CPU, whose cores are busy with the step itself."""
    return READERS if device.type == "cuda" else 0


class BatchLoader:
    """Batches in their order, read by threads while the steps before run.

    Threads, not processes: a rank is a Dask worker, which may have no child processes, and what takes time in reading (copies
    out of mapped files) runs beside Python's lock.

    Args:
        windows: Windows by number.
        order: Numbers of each batch's windows.
        readers: Threads; with 0 each batch is read when it is asked for.
        pinned: Into memory from which a GPU copies beside its own work.
    """

    def __init__(self, windows: TrainingWindows | StillWindows, order: BatchOrder, readers: int, pinned: bool) -> None:
        self.windows, self.order, self.readers, self.pinned = windows, order, readers, pinned

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # The order is asked where to begin now, not when the first batch is taken.
        numbers = iter(self.order)
        return self._ahead(numbers) if self.readers else map(self._read, numbers)

    def _ahead(self, order: Iterator[list[int]]) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.readers, "windows")
        waiting: deque[Future[Batch]] = deque()
        try:
            for numbers in order:
                waiting.append(pool.submit(self._read, numbers))
                if len(waiting) > self.readers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, numbers: list[int]) -> Batch:
        batch = collate([self.windows[number] for number in numbers])
        return batch.pin_memory() if self.pinned else batch
