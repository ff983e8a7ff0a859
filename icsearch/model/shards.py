"""The tensors of a checkpoint, read straight from its safetensors shards, and counted.

They are read, not mapped: a shard that shrinks or goes away while a run reads it is then an error that names it, where
a mapping would kill the process. Each tensor gets memory of its own, which torch aligns: no matrix product can then
depend on where in a shard its weight lies.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icsearch.core.errors import ModelError, ShardError
from icsearch.model.header import Entry, HeaderError, damaged, header_of

# What block scales may be stored in that transformers' own table of types leaves out: powers of two, a byte each.
OF_SCALES = {"F8_E8M0": torch.float8_e8m0fnu}


class Shards(dict[str, "StoredTensor"]):
    """All tensors of a checkpoint by name, none of them read yet; `bytes_read` counts what has been."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self.bytes_read = 0
        self._lock = threading.Lock()  # transformers reads in several threads
        for path in paths:
            try:
                with open(path, "rb") as file:
                    shard = _Shard(path, _identity(os.fstat(file.fileno())))
                    header = header_of(file)
            except OSError as error:
                raise _unreadable(path, error.strerror or str(error)) from None
            except HeaderError as error:
                raise damaged(path, error) from None
            for entry in header.entries:
                if (known := self.get(entry.name)) is not None:
                    raise ModelError(
                        f"tensor {entry.name} is in two shards, {known.shard.path.name} and {path.name} of "
                        f"{path.parent}: expected it once; download the checkpoint again"
                    )
                self[entry.name] = StoredTensor(entry, shard, self)

    def count(self, size: int) -> None:
        """Take note of so many bytes that were read."""
        with self._lock:
            self.bytes_read += size


@dataclass(frozen=True)
class _Shard:
    """One file, and what tells it from another that takes its name while a run is at work."""

    path: Path
    identity: tuple[int, int, int]

    def read(self, start: int, size: int) -> torch.Tensor:
        """uint8 [size], the bytes from `start` on; raises ShardError where they are not there any more."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise _unreadable(self.path, "it is not the file any more that it was when the run began")
                buffer = torch.empty(size, dtype=torch.uint8)
                missing = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers
                file.seek(start)
                while missing:
                    count = file.readinto(missing)
                    if not count:
                        raise _unreadable(self.path, f"it ends {len(missing)} bytes early")
                    missing = missing[count:]
                return buffer
        except OSError as error:
            raise _unreadable(self.path, error.strerror or str(error)) from None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard. It answers as safetensors' own slices do, which transformers' loading asks for."""

    entry: Entry
    shard: _Shard
    shards: Shards

    def get_dtype(self) -> str:
        """As safetensors writes it, such as BF16."""
        return self.entry.dtype

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def __getitem__(self, everything: Any) -> torch.Tensor:
        """The tensor, on the CPU, whatever part of it is asked for: transformers asks for all of it."""
        data = self.shard.read(self.entry.start, self.entry.bytes)
        self.shards.count(self.entry.bytes)
        return data.view(self.torch_dtype).view(self.entry.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ModelError for a type that torch does not have, or transformers' loading does not know."""
        from transformers.modeling_utils import str_to_torch_dtype

        known = {**str_to_torch_dtype, **OF_SCALES}
        name, dtype = self.entry.name, self.entry.dtype
        if dtype not in known:
            raise ModelError(f"tensor {name} in {self.shard.path} has the unknown type {dtype}: convert it")
        return known[dtype]

    def on_meta(self) -> torch.Tensor:
        """Shape and type alone; nothing is read."""
        return torch.empty(self.entry.shape, dtype=self.torch_dtype, device="meta")


def read_rate(paths: Iterable[Path], most: int = 2**28) -> float:
    """Bytes a second that the middle of the largest shard is read at, from the disk where the system lets us ask so."""
    path = max(paths, key=lambda shard: shard.stat().st_size)
    with open(path, "rb", buffering=0) as file:
        size = min(most, path.stat().st_size)
        start = (path.stat().st_size - size) // 2
        if hasattr(os, "posix_fadvise"):  # else what is cached of it counts as read
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        began, done, buffer = time.perf_counter(), 0, bytearray(min(size, 2**24))
        while done < size and (count := file.readinto(buffer)):
            done += count
    return done / max(time.perf_counter() - began, 1e-9)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _unreadable(path: Path, why: str) -> ShardError:
    return ShardError(
        f"shard {path.name} of {path.parent} cannot be read ({why}): make it readable again; what is in the journal is "
        "safe, and the same command continues"
    )
