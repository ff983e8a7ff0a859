"""Shards without some tensors: the bytes of the others, as safetensors reads them."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icsearch.core.errors import ModelError, ShardError
from icsearch.engines import copy
from icsearch.engines.copy import rewrite_shard, rewritten_bytes
from icsearch.model.header import BITS, Entry, make_header, read_header

RANDOM = torch.Generator().manual_seed(0)
TENSORS = {
    "double": torch.randn(3, generator=RANDOM, dtype=torch.float64),
    "single": torch.randn(2, 3, generator=RANDOM),
    "half": torch.randn(5, generator=RANDOM).bfloat16(),
    "eighth": torch.randn(7, generator=RANDOM).to(torch.float8_e4m3fn),
    "other eighth": torch.randn(3, generator=RANDOM).to(torch.float8_e5m2),
    "mask": torch.tensor([True, False, True]),
    "whole": torch.arange(4),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "source.safetensors", {"format": "pt", "odd": "é"})
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize("dropped", [*([name] for name in TENSORS), ["half", "double"], [], ["not there"]])
def test_the_others_keep_their_bits(source: Path, tmp_path: Path, dropped: list[str]) -> None:
    target = tmp_path / "target.safetensors"
    rewrite_shard(source, target, dropped)
    found = load_file(target)
    assert found.keys() == TENSORS.keys() - set(dropped)
    for name, tensor in found.items():
        expected = TENSORS[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "odd": "é"}
    assert target.stat().st_size == rewritten_bytes(read_header(source), dropped)


def test_all_lie_aligned_whatever_the_source(tmp_path: Path) -> None:
    """A writer that does not sort by type, whose float32 lies at an odd byte."""
    tensors = {"odd": b"abc", "single": bytes(range(8))}
    entries = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    entries["single"] = {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}
    text = json.dumps(entries).encode()
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    rewrite_shard(source, target, [])
    content = target.read_bytes()
    for entry in read_header(target).entries:
        assert entry.start % (BITS[entry.dtype] // 8) == 0
        assert content[entry.start : entry.start + entry.bytes] == tensors[entry.name]


def test_a_small_buffer_is_enough(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_BUFFER_BYTES", 5)
    rewrite_shard(source, tmp_path / "target", ["half"])
    assert load_file(tmp_path / "target").keys() == TENSORS.keys() - {"half"}


def test_a_large_shard_needs_little_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    entry = Entry("large", "U8", (2**26,), 0, 2**26)
    source.write_bytes(make_header([entry, Entry("spare", "U8", (1,), 0, 1)], {}))
    os.truncate(source, source.stat().st_size + 2**26 + 1)
    tracemalloc.start()
    try:
        rewrite_shard(source, tmp_path / "target", ["spare"])
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert [one.bytes for one in read_header(tmp_path / "target").entries] == [2**26]


def test_a_damaged_source_is_one_line(source: Path, tmp_path: Path) -> None:
    os.truncate(source, source.stat().st_size - 1)
    with pytest.raises(ModelError, match="truncated or damaged"):
        rewrite_shard(source, tmp_path / "target", ["half"])
    assert not (tmp_path / "target").exists()


def test_a_source_that_ends_while_it_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_and_make(*arguments: object) -> bytes:
        os.truncate(source, source.stat().st_size - 1)
        return make_header(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(copy, "make_header", cut_and_make)
    with pytest.raises(ShardError, match="ends 1 bytes early"):
        rewrite_shard(source, tmp_path / "target", [])


def test_nothing_is_written_over(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(FileExistsError):
        rewrite_shard(source, source, ["half"])
    assert source.read_bytes() == before
