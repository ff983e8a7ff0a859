"""GGUF files: which layers llama.cpp runs with an indexer, read from a file, and set in a copy of one.

Through llama.cpp's own `gguf` package, which is an optional part of the installation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from icsearch.engines.backbone import Backbone, EngineConfigError
from icsearch.engines.gguf_scan import check_header
from icsearch.engines.keys import GGUF_KEY
from icsearch.files import check_new, naming, sync_directory
from icsearch.jsonfile import MAX_LAYERS, shown
from icsearch.pattern import FULL

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
    _copy(reader, letters, out)
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


def _copy(reader: Any, letters: str, out: Path) -> None:
    """Write the file anew beside its place, then move it there."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with naming(out):
            _write(reader, letters, temporary)
            os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(out.parent)


def _write(reader: Any, letters: str, path: Path) -> None:
    gguf = _package()
    array, boolean = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
    writer = gguf.GGUFWriter(path, ARCHITECTURE, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    for field in reader.fields.values():
        if field.name not in ("general.architecture", GGUF_KEY) and not field.name.startswith("GGUF."):
            _copy_field(writer, field, array)
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


def _copy_field(writer: Any, field: Any, array: Any) -> None:
    kind, *inner = field.types
    if kind == array and (not inner or inner[0] == array):
        raise EngineConfigError(f"{field.name} is an empty or nested array, which the gguf package cannot write")
    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1] if inner else None)
