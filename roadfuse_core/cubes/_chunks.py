"""Whole chunks of Zarr arrays, read and written as the bytes that the specification prescribes.

Zarr's own path spends asynchronous calls and region arithmetic on every chunk. A chunk here is what
Zarr v3 stores for `bytes` (little-endian) and `zstd` (level 1, no checksum), under the default key `c/0/1/2`; a
test reads and writes the same chunks through Zarr.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import _get_loop, sync

from roadfuse_core.errors import StoreError

__all__ = ["Chunks"]

_ZSTD = Zstd(level=1)
TOGETHER = 32
_PROTOTYPE = default_buffer_prototype()


class Chunks:
    """Chunks of the arrays below one store; writes are collected and sent together.

    Args:
        store: A Zarr store.
        root: Its root group.
    """

    def __init__(self, store: Any, root: zarr.Group) -> None:
        self.store, self.root = store, root
        self.arrays: dict[str, zarr.Array] = {}
        self.waiting: list[tuple[str, bytes]] = []
        self.sent: Future[None] | None = None

    def array(self, path: str) -> zarr.Array:
        """The array's metadata, read once.

        Raises:
            StoreError: The array is stored in another way.
        """
        if path not in self.arrays:
            array = self.root[path]
            codecs = [c.to_dict()["name"] for c in array.metadata.codecs]
            if codecs != ["bytes", "zstd"] or array.metadata.chunk_key_encoding.to_dict()["name"] != "default":
                raise StoreError(f"{path}: is stored as {codecs}, not as bytes and zstd; build the cube anew")
            self.arrays[path] = array
        return self.arrays[path]

    def read(self, path: str, place: tuple[int, ...]) -> NDArray[Any] | None:
        """A chunk, read-only, flat; None where there is none."""
        return self.read_all([(path, place)])[0]

    def read_all(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> list[NDArray[Any] | None]:
        """Chunks by path and place, asked for together."""

        async def get() -> list[Any]:
            return await asyncio.gather(*(self.store.get(self._key(*one), _PROTOTYPE) for one in wanted))

        dtypes = [self.array(path).dtype.newbyteorder("<") for path, _ in wanted]
        found = zip(sync(get()), dtypes, strict=True)
        return [None if raw is None else np.frombuffer(_ZSTD.decode(raw.to_bytes()), dtype) for raw, dtype in found]

    def write(self, path: str, place: tuple[int, ...], values: NDArray[Any]) -> bytes:
        """Encode a chunk now; it is stored at some time before `flush` returns. Returns the encoded chunk."""
        encoded: bytes = _ZSTD.encode(np.ascontiguousarray(values, self.array(path).dtype.newbyteorder("<")))
        self.write_encoded(path, place, encoded)
        return encoded

    def write_encoded(self, path: str, place: tuple[int, ...], encoded: bytes) -> None:
        """Store a chunk that `write` encoded for an array of the same dtype."""
        self.waiting.append((self._key(path, place), encoded))
        if len(self.waiting) >= TOGETHER:
            self._send()

    def remove(self, path: str, place: tuple[int, ...]) -> None:
        """Forget a chunk, so that it reads as zeros."""
        sync(self.store.delete(self._key(path, place)))

    def flush(self) -> None:
        """Store all encoded chunks, and return when they are stored."""
        self._send()
        self._wait()

    def _send(self) -> None:
        """Store what waits, while the caller goes on."""
        self._wait()
        waiting, self.waiting = self.waiting, []

        async def put() -> None:
            await asyncio.gather(*(self.store.set(k, _PROTOTYPE.buffer.from_bytes(v)) for k, v in waiting))

        self.sent = asyncio.run_coroutine_threadsafe(put(), _get_loop())

    def _wait(self) -> None:
        if self.sent is not None:
            self.sent.result()
        self.sent = None

    @staticmethod
    def _key(path: str, place: tuple[int, ...]) -> str:
        return f"{path}/c/{'/'.join(map(str, place))}"
