"""Reading tensors straight from shards, with safetensors' own loader as the judge."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icsearch.core.errors import ModelError, ShardError
from icsearch.model.shards import Shards

TENSORS = {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "eighth": torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    "powers": torch.tensor([[1.0, 0.25], [2.0**-127, 2.0**127]]).to(torch.float8_e8m0fnu),
    "whole": torch.arange(11),
    "mask": torch.tensor([True, False, True]),
    "single": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """The tensors in two shards; an odd header, so that nothing in them is aligned by chance."""
    names = sorted(TENSORS)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"{number}.safetensors", {"odd": "x" * number})
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_tensors_are_those_of_safetensors(paths: list[Path]) -> None:
    shards = Shards(paths)
    expected = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert shards.keys() == expected.keys()
    for name, tensor in expected.items():
        found = shards[name][...]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        assert shards[name].get_shape() == list(tensor.shape)
        assert (shards[name].on_meta().dtype, shards[name].on_meta().shape) == (tensor.dtype, tensor.shape)


def test_memory_is_aligned(paths: list[Path]) -> None:
    shards = Shards(paths)
    assert all(shards[name][...].data_ptr() % 64 == 0 for name in shards)


def test_bytes_are_counted(paths: list[Path]) -> None:
    shards = Shards(paths)
    assert shards.bytes_read == 0
    for _ in range(2):
        shards["single"][...]
    assert shards.bytes_read == 2 * 24 * 4


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def replaced(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


DAMAGES = {
    "shorter": (shorter, "not the file any more"),
    "gone": (Path.unlink, "No such file"),
    "replaced": (replaced, "not the file any more"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_shard_that_is_lost_later_is_named(paths: list[Path], case: str) -> None:
    shards = Shards(paths)
    damage, reason = DAMAGES[case]
    damage(paths[1])
    with pytest.raises(ShardError, match=rf"shard 1\.safetensors .*{reason}.* the same command continues") as caught:
        shards["single"][...]
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert torch.equal(shards["half"][...], TENSORS["half"])


def test_a_file_that_ends_while_it_is_read(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between the look at its size and the reading of its bytes."""
    shards = Shards(paths)
    monkeypatch.setattr("icsearch.model.shards._identity", lambda status, known=shards["single"].shard.identity: known)
    shorter(paths[1])
    with pytest.raises(ShardError, match=r"it ends \d+ bytes early"):
        for name in load_file(paths[0]).keys() ^ TENSORS.keys():
            shards[name][...]


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))
    with pytest.raises(ModelError, match="unknown type F99"):
        Shards([path])["x"][...]
