"""GGUF files: which layers llama.cpp runs with an indexer, read from a file, and set in a copy of one."""

from __future__ import annotations

import mmap
import os
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

from icsearch.core.files import check_new, naming, sync_directory
from icsearch.core.jsonfile import MAX_LAYERS, shown
from icsearch.core.pattern import FULL
from icsearch.engines.engine import GGUF_KEY
from icsearch.model.config import Backbone, EngineConfigError

ARCHITECTURE = "glm-dsa"
MODEL_TYPE = "glm_moe_dsa"
_INDEXER_TENSOR = re.compile(r"blk\.(\d+)\.indexer\.")
# what its reader raises on other files
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, RecursionError)


def read_gguf(path: Path) -> tuple[dict[str, Any], Backbone]:
    """The key of the pattern, where the file has it, and the decoder layers of the model; EngineConfigError."""
    reader = _open(path)
    field = reader.get_field(GGUF_KEY)
    return ({} if field is None else {GGUF_KEY: field.contents()}), _backbone(reader, path)


def write_gguf(letters: str, source: Path, out: Path) -> list[str]:
    """Copy a GGUF file with the array of these letters set, all else as it is; returns what could not be checked.

    `out` appears whole or not at all. Raises EngineConfigError for a file of another model, with another number of
    layers, or without the indexer of an F layer, and where `out` exists.
    """
    reader = _open(source)
    backbone = _backbone(reader, source)
    if backbone.num_layers != len(letters):
        raise EngineConfigError(
            f"{source} has {backbone.num_layers} layers without multi-token prediction, the pattern {len(letters)}: "
            "give the GGUF of the model that the pattern was found on"
        )
    notes = _check_indexers(reader, letters, source)
    check_new(out, EngineConfigError)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with naming(out):
            _write(reader, letters, temporary)
            os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(out.parent)
    return notes


def _open(path: Path) -> Any:
    """gguf's reader of a file of the architecture that has the key."""
    gguf = _package()
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        name = None if architecture is None else architecture.contents()
    except OSError as error:
        raise EngineConfigError(f"cannot read {path} ({error.strerror or error}): expected a GGUF file") from None
    except _UNREADABLE as error:
        raise EngineConfigError(f"{path} cannot be read as GGUF ({error}): convert the checkpoint again") from None
    if name != ARCHITECTURE:
        raise EngineConfigError(
            f"{path} has the architecture {shown(name)}: expected {ARCHITECTURE}, the one whose key {GGUF_KEY} is known"
        )
    return reader


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise EngineConfigError("GGUF files need the gguf package: pip install 'icsearch[gguf]'") from None
    return gguf


def _backbone(reader: Any, path: Path) -> Backbone:
    """The layers of the file: its blocks without those of multi-token prediction, which come last."""
    counts = []
    for key, default in (("block_count", None), ("nextn_predict_layers", 0)):
        field = reader.get_field(f"{ARCHITECTURE}.{key}")
        counts.append(default if field is None else field.contents())
    blocks, extra = counts
    if not isinstance(blocks, int) or not isinstance(extra, int) or not 0 < blocks - extra <= MAX_LAYERS or extra < 0:
        raise EngineConfigError(
            f"{path} has block_count {shown(blocks)} and nextn_predict_layers {shown(extra)}: expected whole numbers, "
            "the first one larger; convert the checkpoint again"
        )
    return Backbone(blocks - extra, tuple(range(blocks - extra)), MODEL_TYPE, mtp_layers=extra)


def _check_indexers(reader: Any, letters: str, source: Path) -> list[str]:
    """Refuse F where the file has no indexer; a file that is one of several shards cannot be checked."""
    split = reader.get_field("split.count")
    if split is not None and split.contents() > 1:
        return [f"{source} is one of {split.contents()} shards: that its F layers have an indexer was not checked"]
    if not reader.tensors:
        return [f"{source} holds no tensors: that its F layers have an indexer was not checked"]
    there = {int(found[1]) for tensor in reader.tensors if (found := _INDEXER_TENSOR.match(tensor.name))}
    wrong = [layer for layer, letter in enumerate(letters) if letter == FULL and layer not in there]
    if wrong:
        raise EngineConfigError(
            f"{source} has no indexer for layers {wrong}, but the pattern has F there: only F to S edits are possible; "
            "convert a checkpoint that has these indexers"
        )
    return []


def _write(reader: Any, letters: str, path: Path) -> None:
    gguf = _package()
    array, boolean = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
    writer = gguf.GGUFWriter(path, ARCHITECTURE, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    for field in reader.fields.values():
        if field.name in ("general.architecture", GGUF_KEY) or field.name.startswith("GGUF."):
            continue
        kind, *inner = field.types
        if kind == array and (not inner or inner[0] == array):
            raise EngineConfigError(f"{field.name} is an empty or nested array, which the gguf package cannot write")
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_key_value(GGUF_KEY, [letter == FULL for letter in letters], array, sub_type=boolean)
    for tensor in reader.tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
    finally:
        writer.close()


# --- a header walked through before the package's reader trusts its lengths ---------------------------------------

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type


class _Cursor:
    """A place in the file. Whatever is behind its end raises ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 8
        (version,) = struct.unpack_from("<I", data, 4)
        self.order = "<" if version & 0xFFFF else ">"

    def number(self, kind: str) -> int:
        """The next unsigned integer: I for 4 bytes, Q for 8."""
        place = self.at
        self.skip(struct.calcsize(kind))
        return int(struct.unpack_from(self.order + kind, self.data, place)[0])

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"something of {size} bytes reaches behind the end of the file")

    def skip_values(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            return self.skip(_SIZES[kind] * count)
        for _ in range(count):
            if kind == _STRING:
                self.skip(self.number("Q"))
            elif kind == _ARRAY:
                inner = self.number("I")
                self.skip_values(inner, self.number("Q"))
            else:
                raise ValueError(f"a value of the unknown type {kind}")
        return None


def check_header(path: Path) -> None:
    """Walk through keys and tensor names; raises ValueError where a length cannot be, and OSError."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < 24 or data[:4] != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        cursor = _Cursor(data)
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        for _ in range(keys):
            cursor.skip(cursor.number("Q"))
            cursor.skip_values(cursor.number("I"), 1)
        for _ in range(tensors):
            cursor.skip(cursor.number("Q"))
            cursor.skip(8 * cursor.number("I"))
            cursor.skip(4 + 8)
