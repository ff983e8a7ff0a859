"""Layers that share keys and values beside selections: what they leave forks with a branch, and travels with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import Made, random_batches, random_ids
from test_bits import all_patterns, stock
from test_commands import fixed, pattern_of, refused

from icsearch.cli import app
from icsearch.core.errors import ModelError, OutOfMemoryError, ShardError
from icsearch.core.pattern import Pattern
from icsearch.core.text import format_bytes
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.families.calls import Handed, hand_on, map_tensors, take_up, tensors_of
from icsearch.model.layout import inspect
from icsearch.model.slot import SelectionStore
from icsearch.sweep.branches import InCpuMemory, LayerBlock
from icsearch.sweep.similarity import SimilaritySweep, direct_similarity
from icsearch.sweep.sweep import Sweeper, naive_nll
from several import launched, torchrun

# Layers 2 and 3 use the latents of 0 and 1, one of which has RoPE; and a source that is replaced by a later one.
SHARING: list[dict[str, Any]] = [
    {"kv_source_layers": [0, 1, 0, 1], "no_rope_layers": [1, 0, 1, 0]},
    {"kv_source_layers": [0, 0, 2, 2], "no_rope_layers": [1, 1, 1, 1]},
]


@pytest.mark.parametrize("changes", SHARING, ids=["two kinds", "replaced"])
@pytest.mark.parametrize("block_elements", [None, 2000])
def test_a_sweep_is_whole_forwards(made: Made, changes: dict[str, Any], block_elements: int | None) -> None:
    dsa = loading.load(open_checkpoint(str(made("mistral_large4", **changes))), block_elements=block_elements)
    batches, patterns = random_batches(), all_patterns(dsa)
    swept = Sweeper(dsa).sweep(patterns, batches).nll
    for pattern in patterns:
        assert swept[pattern.letters] == naive_nll(dsa, pattern, batches), pattern
    assert len({tuple(losses) for losses in swept.values()}) == len(patterns)


@torch.inference_mode()
def test_all_full_is_the_unmodified_model(made: Made) -> None:
    checkpoint, ids = made("mistral_large4", **SHARING[0]), random_ids()
    dsa = loading.load(open_checkpoint(str(checkpoint)))
    expected = stock(checkpoint, "mistral_large4")(input_ids=ids, use_cache=False).logits
    assert torch.equal(dsa.lm_head(dsa.final_hidden_states(ids, dsa.start_pattern)), expected)


def test_keys_that_no_layer_has_made(
    made: Made, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default only some layers have RoPE: the last ones look for keys that the layer they name never had."""
    checkpoint = made("mistral_large4", kv_source_layers=[0, 0, 2, 2])
    line = refused(capsys, "greedy", *fixed(checkpoint, tokens, tmp_path / "run", "--num-shared", 1))
    assert "decoder layer 3 cannot be run (KeyError: 'nope')" in line
    assert "mend config.json" in line


@pytest.mark.parametrize("error", [KeyError("x"), IndexError("x"), TypeError("x"), AttributeError("x")])
def test_a_layer_that_does_not_fit_is_named_and_other_errors_are_left_alone(made: Made, error: Exception) -> None:
    dsa = loading.load(open_checkpoint(str(made("mistral_large4"))))
    batches, patterns = random_batches(), all_patterns(dsa)[:1]
    for raised, expected in (
        (error, ModelError),
        (MemoryError("x"), OutOfMemoryError),
        (ShardError("x"), ShardError),
        (ValueError("x"), ValueError),
    ):
        dsa.layers[2].forward = raising(raised)
        with pytest.raises(expected) as caught:
            Sweeper(dsa).sweep(patterns, batches)
        named = f"decoder layer 2 cannot be run ({type(raised).__name__}: " in str(caught.value)
        assert named is (raised is error)


def test_an_error_of_our_own_code_does_not_blame_the_config(made: Made) -> None:
    dsa = loading.load(open_checkpoint(str(made("mistral_large4"))))
    dsa.layers[2].forward = lambda *_, **__: format_bytes(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Sweeper(dsa).sweep(all_patterns(dsa)[:1], random_batches())


def raising(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward


def test_similarity(made: Made) -> None:
    dsa = loading.load(open_checkpoint(str(made("mistral_large4", **SHARING[0]))))
    (batch,) = random_batches(2)
    found = SimilaritySweep(dsa, 8).run([batch])[0].cosine
    for layer in range(1, 4):
        for source in range(layer):
            assert found[layer][source] == direct_similarity(dsa, batch, 8, layer, source)


def test_the_plan_counts_it(made: Made) -> None:
    """As many numbers as the branches of a sweep hold beside their selections."""
    source = open_checkpoint(str(made("mistral_large4", **SHARING[0])))
    dsa, (batch,) = loading.load(source), random_batches(2)
    branches, _ = LayerBlock(dsa).advance({Pattern("FSSS"): 0}, [batch], Sweeper(dsa)._nothing)
    handed = branches[0].selections[0]
    assert isinstance(handed, Handed)
    left = sum(one.numel() for one in tensors_of(handed)) - handed.selection.numel()
    assert left == inspect(source).left_numbers * batch.input_ids.numel()
    assert inspect(open_checkpoint(str(made("mistral_large4")))).left_numbers == 0


@pytest.mark.slow
@pytest.mark.alone
def test_a_pipeline_and_streamed_weights(made: Made, tokens: Path, tmp_path: Path) -> None:
    checkpoint, options = made("mistral_large4", **SHARING[0]), ["--num-shared", 2, "--stages", 1]
    for out, more in (("alone", []), ("streamed", ["--offload", "disk"])):
        arguments = ["greedy", *fixed(checkpoint, tokens, tmp_path / out, *options, *more)]
        assert app._run([str(one) for one in arguments], debug=False) == 0
    result = launched(torchrun(2), ["greedy", *fixed(checkpoint, tokens, tmp_path / "two", *options, "--pp", 2)])
    assert result.returncode == 0, result.stderr
    steps = [pattern_of(tmp_path / out)["steps"] for out in ("alone", "streamed", "two")]
    assert steps[0] == steps[1] == steps[2]


def test_what_nobody_changed_is_handed_on_as_it_is() -> None:
    """So that states of S layers share it in memory."""
    latents = {"shared": {"rope": (torch.ones(2),)}}
    taken = Handed(torch.zeros(1), latents)
    store = take_up(SelectionStore(Pattern("FS")), taken)
    assert hand_on(store, taken) is taken
    store.more = {"shared": {"rope": (torch.ones(2),)}}
    assert hand_on(store, taken) is not taken
    assert hand_on(take_up(SelectionStore(Pattern("FS")), taken.selection), None) is taken.selection


def test_it_rests_in_cpu_memory_as_copies() -> None:
    taken = Handed(torch.zeros(1), {"shared": {"rope": (torch.ones(2), torch.ones(3))}})
    rested = InCpuMemory(torch.device("cpu")).put(taken)
    pairs = list(zip(tensors_of(rested), tensors_of(taken), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)
    assert map_tensors(None, torch.neg) is None
