"""The header of a safetensors file, read, checked and made without torch: which tensors lie where.

A header comes from outside, so nothing in it is believed: a length or an offset that leads out of the file, names that
come twice, bytes that belong to no tensor or to two, sizes that do not fit their shapes are refused in one line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from icsearch.core.errors import ModelError
from icsearch.core.jsonfile import AmbiguityError, list_of, shown, unambiguous, whole

LENGTH_BYTES = 8  # of the header's length, at the beginning of a file
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
ALIGNMENT = 8  # bytes; the data begins at a multiple of it
METADATA = "__metadata__"
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}  # of one element, by safetensors' name of the type
MAX_DIMENSIONS = 64  # numpy's limit
_SIZES, _OFFSETS = list_of(whole(0)), list_of(whole(0), 2)


class HeaderError(ValueError):
    """What is wrong with a header, without the name of its file."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `start` counts from the file's first byte."""

    name: str
    dtype: str  # as safetensors writes it, such as BF16
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file in the order of their bytes, and its free-text metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """The header of a safetensors file; raises ModelError, which names the file, for one that is damaged."""
    try:
        with open(path, "rb") as file:
            return header_of(file)
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror or error}): make it readable again") from None
    except HeaderError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: HeaderError) -> ModelError:
    """The error for a file whose header is wrong."""
    return ModelError(f"shard {path.name} is truncated or damaged ({error}): download it again into {path.parent}")


def header_of(file: BinaryIO) -> Header:
    """The header of an open file, checked against its size; raises HeaderError, or OSError where it cannot be read."""
    file_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = file.read(LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length > file_bytes - LENGTH_BYTES:
        raise HeaderError(f"a header of {shown(length)} bytes in a file of {file_bytes}")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"a header of {length} bytes: expected at most {MAX_HEADER_BYTES}")
    text = file.read(length)
    document = _parse_json(text)
    metadata = document.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{METADATA} is {shown(metadata)}: expected texts by name")
    begin = LENGTH_BYTES + len(text)
    entries = [_entry(name, value, begin) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.bytes))
    reached = begin
    for entry in entries:  # each byte belongs to exactly one tensor
        if entry.start != reached or entry.bytes < 0:
            raise HeaderError(f"tensor {shown(entry.name)} begins at byte {entry.start}: expected {reached}")
        reached += entry.bytes
    if reached != file_bytes:
        raise HeaderError(f"its tensors end at byte {reached} of {file_bytes}")
    return Header(tuple(entries), metadata)


def make_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds these tensors one after another, in this order, wherever they lay."""
    document: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode(), object_pairs_hook=unambiguous)
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is no name
    except RecursionError:
        raise HeaderError("its header is nested too deeply") from None
    except AmbiguityError as error:
        raise HeaderError(f"{error} comes twice in its header") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise HeaderError(f"its header is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise HeaderError("its header is no JSON object")
    return document


def _entry(name: str, value: Any, begin: int) -> Entry:
    """One tensor of a header whose data begins at that byte of the file."""
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key, ()) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _SIZES.fits(shape) and _OFFSETS.fits(offsets)):
        raise HeaderError(f"tensor {shown(name)} is {shown(value)}: expected dtype, shape and data_offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"tensor {shown(name)} has {len(shape)} dimensions: expected at most {MAX_DIMENSIONS}")
    size = offsets[1] - offsets[0]
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * size:
        raise HeaderError(f"tensor {shown(name)} has {size} bytes for {dtype} of shape {shown(shape)}")
    return Entry(name, dtype, tuple(shape), begin + offsets[0], size)
