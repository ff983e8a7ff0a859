"""A safetensors shard without some of its tensors: the bytes of the others, copied piece by piece.

Nothing is decoded, so any type is copied as it is, in the same bits, with one small buffer however large the shard is.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from icsearch.errors import ShardError
from icsearch.files import naming
from icsearch.weights.header import BITS, Entry, Header, HeaderError, damaged, header_of, make_header

_BUFFER_BYTES = 2**22


def kept_entries(header: Header, dropped: Collection[str]) -> list[Entry]:
    """The tensors that stay, those of larger elements first, as safetensors orders them: so all lie aligned."""
    kept = [entry for entry in header.entries if entry.name not in dropped]
    return sorted(kept, key=lambda entry: -BITS.get(entry.dtype, 0))


def rewritten_bytes(header: Header, dropped: Collection[str]) -> int:
    """Size of the file that `rewrite_shard` writes."""
    kept = kept_entries(header, dropped)
    return len(make_header(kept, header.metadata)) + sum(entry.bytes for entry in kept)


def rewrite_shard(source: Path, target: Path, dropped: Collection[str]) -> None:
    """Write a new file with all tensors but the dropped ones, and bring it to the disk.

    Raises ModelError for a damaged source, ShardError for one that ends early, OSError where nothing can be written.
    """
    with naming(source), open(source, "rb", buffering=0) as file:
        try:
            header = header_of(file)
        except HeaderError as error:
            raise damaged(source, error) from None
        kept = kept_entries(header, dropped)
        with naming(target), open(target, "xb") as out:
            out.write(make_header(kept, header.metadata))
            for entry in kept:
                _copy_range(file, out, entry, source)
            out.flush()
            os.fsync(out.fileno())


def _copy_range(file: BinaryIO, out: BinaryIO, entry: Entry, source: Path) -> None:
    file.seek(entry.start)
    left = entry.bytes
    while left:
        block = file.read(min(left, _BUFFER_BYTES))
        if not block:
            raise ShardError(f"{source} ends {left} bytes early, in {entry.name}: was it changed? Repeat the command")
        out.write(block)
        left -= len(block)
