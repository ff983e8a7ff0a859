"""GGUF files: a copy of a real one with the pattern set, read back by llama.cpp's own reader."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.engines.engine import GGUF_KEY
from icsearch.engines.gguf import read_gguf, write_gguf
from icsearch.engines.read import import_pattern
from icsearch.model.config import EngineConfigError

LAYERS = 4


def make(path: Path, arch: str = "glm-dsa", indexers: tuple[int, ...] = (0, 1, 2, 3, 4), **keys: Any) -> Path:
    """A small GGUF: four layers and one of multi-token prediction, quantised and plain tensors, arrays of all kinds."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_custom_alignment(64)
    writer.add_block_count(keys.pop("blocks", LAYERS + 1))
    writer.add_uint32(f"{arch}.nextn_predict_layers", 1)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "für", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_float32(f"{arch}.rope.freq_base", 8e6)
    writer.add_bool(f"{arch}.expert_weights_norm", True)
    for key, value in keys.items():
        writer.add_array(GGUF_KEY, value) if key == "types" else writer.add_uint16(key.replace("_", "."), value)
    random = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", random.normal(size=(8, 32)).astype(np.float32))
    for layer in indexers:
        values = random.normal(size=(4, 32)).astype(np.float32)
        quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.indexer.attn_k.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Everything in a file but its counts: keys with their types, and tensors with type, shape and bytes."""
    reader = gguf.GGUFReader(path)
    keys = {name: (field.types, field.contents()) for name, field in reader.fields.items() if "GGUF." not in name}
    tensors = {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    return keys, tensors


@pytest.mark.parametrize("before", [{}, {"types": [True, True, True, True]}])
def test_a_copy_differs_in_the_one_key(tmp_path: Path, before: dict[str, Any]) -> None:
    old = make(tmp_path / "old.gguf", **before)
    assert write_gguf("FSFS", old, tmp_path / "new.gguf") == []
    (old_keys, old_tensors), (keys, tensors) = contents(old), contents(tmp_path / "new.gguf")
    types = keys.pop(GGUF_KEY)
    assert types == ([gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL], [True, False, True, False])
    old_keys.pop(GGUF_KEY, None)
    assert keys == old_keys
    assert list(tensors) == list(old_tensors)
    assert tensors == old_tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.gguf", "old.gguf"]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_gguf("FSFS", make(tmp_path / "old.gguf"), tmp_path / "new.gguf")
    keys, backbone = read_gguf(tmp_path / "new.gguf")
    assert (keys, backbone.num_layers, backbone.mtp_layers) == ({GGUF_KEY: [True, False, True, False]}, LAYERS, 1)
    found = import_pattern(str(tmp_path / "new.gguf"))
    assert (found.pattern.letters, found.engine.name, found.model_type) == ("FSFS", "llamacpp", "glm_moe_dsa")


def test_arrays_of_numbers_are_read_too(tmp_path: Path) -> None:
    assert import_pattern(str(make(tmp_path / "old.gguf", types=[1, 0, 0, 1]))).pattern.letters == "FSSF"


def test_a_file_without_the_key_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match="which ones llama.cpp then takes is not known here"):
        import_pattern(str(make(tmp_path / "old.gguf")))


def test_only_layers_with_an_indexer_can_be_full(tmp_path: Path) -> None:
    old = make(tmp_path / "old.gguf", indexers=(0, 2))
    with pytest.raises(EngineConfigError, match=r"no indexer for layers \[1\], but the pattern has F there"):
        write_gguf("FFSS", old, tmp_path / "new.gguf")
    assert write_gguf("FSFS", old, tmp_path / "new.gguf") == []


def test_a_shard_cannot_be_checked(tmp_path: Path) -> None:
    old = make(tmp_path / "old.gguf", indexers=(), split_count=2)
    (note,) = write_gguf("FSFS", old, tmp_path / "new.gguf")
    assert "one of 2 shards" in note


@pytest.mark.parametrize(
    ("letters", "options", "words"),
    [
        ("FSF", {}, "has 4 layers without multi-token prediction, the pattern 3"),
        ("FSFS", {"arch": "llama"}, "has the architecture 'llama': expected glm-dsa"),
        ("FSFS", {"blocks": 1}, "block_count 1 and nextn_predict_layers 1: expected whole numbers"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, letters: str, options: dict[str, Any], words: str) -> None:
    old = make(tmp_path / "old.gguf", **options)
    with pytest.raises(EngineConfigError, match=words):
        write_gguf(letters, old, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    old = make(tmp_path / "old.gguf")
    before = old.read_bytes()
    with pytest.raises(EngineConfigError, match="exists: give another --out"):
        write_gguf("FSFS", old, old)
    assert old.read_bytes() == before


def test_cut_files_are_refused(tmp_path: Path) -> None:
    whole = make(tmp_path / "old.gguf").read_bytes()
    for size in (0, 3, 10, 40, 150, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(EngineConfigError, match="cannot be read as GGUF|has the architecture"):
            write_gguf("FSFS", tmp_path / "cut.gguf", tmp_path / "new.gguf")


@settings(deadline=None)
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes are changed: an array of 2^63 elements is not gone through one by one."""
    directory = tmp_path_factory.mktemp("damaged")
    whole = bytearray(make(directory / "old.gguf", types=[True, False, True, True]).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(600, len(whole) - 8)))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8) | st.just(b"\0" * 8))
        whole[at : at + len(new)] = new
    (directory / "new.gguf").write_bytes(whole)
    try:
        keys, backbone = read_gguf(directory / "new.gguf")
    except EngineConfigError as error:
        assert "\n" not in str(error)
    else:
        assert backbone.num_layers >= 1 and keys.keys() <= {GGUF_KEY}


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(tmp_path / "old.gguf")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_gguf("FSFS", old, tmp_path / "new.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, there = make(tmp_path / "old.gguf"), builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return there(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineConfigError, match=r"pip install 'icsearch\[gguf\]'"):
        read_gguf(old)
