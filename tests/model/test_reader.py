"""Weights read in parts: the bits of transformers' own loading, whichever parts, and what is left on meta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from icsearch.core.errors import OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.model.shape import CPU, DISK
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import Sweeper, naive_nll

loading.quiet_transformers()
SHARDED = {"num_hidden_layers": 8}  # tiny.save_checkpoint cuts these into shards of 40 kB


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers in shards that hold parts of several layers each."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("sharded"), request.param, **SHARDED)


def load(directory: Path, **options: Any) -> DsaModel:
    return loading.load(open_checkpoint(str(directory)), **options)


def transformers_own(directory: Path, dtype: str = "float32") -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval()


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those too that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits of the same type."""
    assert found.keys() == expected.keys()
    return [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_that_transformers_loads(sharded: Path, dtype: str) -> None:
    dsa, expected = load(sharded, dtype=dtype), tensors_of(transformers_own(sharded, dtype))
    assert differing(tensors_of(dsa.model), expected) == []
    assert not any(parameter.requires_grad for parameter in dsa.model.parameters())
    assert dsa.model.generation_config.to_dict() == transformers_own(sharded, dtype).generation_config.to_dict()


def test_losses_are_those_of_transformers_own_loading(sharded: Path) -> None:
    """The weights lie elsewhere in memory: no matrix product may notice."""
    ids = torch.randint(0, tiny.VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    theirs = DsaModel(transformers_own(sharded).requires_grad_(False))
    for pattern in (Pattern.full(8), Pattern("FSFSSFFS")):
        assert naive_nll(load(sharded), pattern, batches) == naive_nll(theirs, pattern, batches)


@pytest.mark.parametrize("held", [range(0, 3), range(3, 5), range(5, 8), range(0, 8)])
def test_only_the_layers_asked_for_are_read(sharded: Path, held: range) -> None:
    dsa, expected = load(sharded, layers=held), tensors_of(transformers_own(sharded))
    wanted = [f"model.layers.{index}." for index in held]
    wanted += ["model.embed_tokens."] if 0 in held else []
    wanted += ["model.norm.", "lm_head."] if 7 in held else []
    there = {name: one for name, one in dsa.model.named_parameters() if not one.is_meta}
    assert there.keys() == {name for name, _ in dsa.model.named_parameters() if name.startswith(tuple(wanted))}
    assert all(torch.equal(one, expected[name]) for name, one in there.items())
    assert dsa.held == held
    assert dsa.weights.bytes_read == sum(one.nbytes for name, one in expected.items() if name.startswith(tuple(wanted)))
    assert dsa.device == torch.device("cpu")


def test_streamed_layers_are_resident_ones(sharded: Path) -> None:
    resident, streamed = load(sharded, dtype="bfloat16"), load(sharded, dtype="bfloat16", offload=DISK)
    before = streamed.weights.bytes_read
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())
    for _ in range(2):
        for index, layer in enumerate(streamed.layers):
            with streamed.holding(index):
                assert differing(tensors_of(layer), tensors_of(resident.layers[index])) == []
                assert not any(parameter.requires_grad for parameter in layer.parameters())
            assert all(parameter.is_meta for parameter in layer.parameters())
    of_layers = sum(one.nbytes for one in tensors_of(load(sharded).decoder.layers).values())  # float32, as on disk
    assert streamed.weights.bytes_read - before == 2 * of_layers


def test_streamed_layers_of_one_process_of_several(sharded: Path) -> None:
    dsa = load(sharded, layers=range(2, 5), offload=DISK)
    for index in dsa.held:
        with dsa.holding(index):
            assert not any(parameter.is_meta for parameter in dsa.layers[index].parameters())
    with pytest.raises(IndexError, match="decoder layer 5 is not among"), dsa.holding(5):
        pass


@pytest.mark.parametrize("block_elements", [None, 2000])
def test_streamed_sweeps_have_the_bits_of_resident_ones(sharded: Path, block_elements: int | None) -> None:
    ids = torch.randint(0, tiny.VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(1))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    patterns = [Pattern.full(8), *(Pattern.full(8).flip(layer) for layer in range(1, 8))]
    resident, streamed = (load(sharded, block_elements=block_elements, offload=where) for where in ("none", DISK))
    expected = Sweeper(resident).sweep(patterns, batches)
    before = streamed.weights.bytes_read
    found = Sweeper(streamed).sweep(patterns, batches)
    assert replace(found, weight_bytes=0) == expected
    size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert 0 < streamed.weights.bytes_read - before <= 1.05 * size  # one wave, all candidates


@pytest.mark.parametrize("held", [range(0, 2), range(4, 6), range(2, 4), None])
def test_tied_embeddings(tmp_path: Path, held: range | None) -> None:
    """The LM head is the embedding; a process that has the last layer needs it too."""
    directory = tiny.save_checkpoint(tmp_path, tie_word_embeddings=True)
    dsa, expected = load(directory, layers=held), transformers_own(directory)
    embedding, head = dsa.model.get_input_embeddings().weight, dsa.lm_head.weight
    if held == range(2, 4):
        assert embedding.is_meta and head.is_meta
        return
    assert embedding is head
    assert torch.equal(head, expected.lm_head.weight)


def test_layers_of_a_tied_head_that_the_checkpoint_calls_by_the_other_name(tmp_path: Path) -> None:
    """A checkpoint may hold the tied weight as the LM head's alone."""
    from safetensors.torch import load_file, save_file

    directory = tiny.save_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    dsa = load(directory)
    assert dsa.model.get_input_embeddings().weight is dsa.lm_head.weight
    assert torch.equal(dsa.lm_head.weight, tensors["lm_head.weight"])


def test_native_shared_layers_stream(tmp_path: Path) -> None:
    types = ["full", "full", "shared", "full", "shared", "shared"]
    directory = tiny.save_checkpoint(tmp_path, indexer_types=types)
    ids = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    patterns = [Pattern("FFSFSS"), Pattern("FSSSSS")]
    expected = Sweeper(load(directory)).sweep(patterns, batches)
    swept = Sweeper(load(directory, offload=DISK)).sweep(patterns, batches)
    assert replace(swept, weight_bytes=0) == expected
    last = load(directory, layers=range(4, 6), block_elements=2000)  # no indexer at all in this process
    assert last.blockwise is not None


def test_nan_in_a_streamed_layer_is_refused_when_it_comes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from icsearch.core.errors import ModelError

    directory = tiny.save_checkpoint(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.4.mlp.experts.2.up_proj.weight"][1, 2] = float("inf")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    dsa = load(directory, offload=DISK)
    with dsa.holding(3):
        pass
    with pytest.raises(ModelError, match=r"1 of \d+ values of model.layers.4.mlp.experts.gate_up_proj"), dsa.holding(4):
        pass


def test_layers_that_rest_in_cpu_memory_are_resident_ones(sharded: Path) -> None:
    """On a CPU device nothing is gained by it, but the order of things is that of any device."""
    resident, offloaded = load(sharded, dtype="bfloat16"), load(sharded, dtype="bfloat16", offload=CPU)
    assert all(parameter.is_meta for layer in offloaded.layers for parameter in layer.parameters())
    for _ in range(2):
        for index, layer in enumerate(offloaded.layers):
            with offloaded.holding(index):
                assert differing(tensors_of(layer), tensors_of(resident.layers[index])) == []
                assert not any(parameter.requires_grad for parameter in layer.parameters())
            assert all(parameter.is_meta for parameter in layer.parameters())
    assert offloaded.weights.bytes_read == 2 * sum(one.nbytes for one in tensors_of(resident.decoder.layers).values())


def test_memory_that_runs_out_in_a_conversion_is_an_error(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps such an error for its report, and leaves the parameter as it was: on meta, here."""
    from transformers.core_model_loading import MergeModulelist

    def full(self: Any, tensors: dict[str, list[torch.Tensor]], *args: Any, **more: Any) -> Any:
        if next(iter(tensors.values()))[0].is_meta:
            return merge(self, tensors, *args, **more)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 byte")

    merge = MergeModulelist.convert
    monkeypatch.setattr(MergeModulelist, "convert", full)
    with pytest.raises(OutOfMemoryError, match="can't allocate memory: 1 byte") as caught:
        load(sharded)
    assert "\n" not in str(caught.value)
