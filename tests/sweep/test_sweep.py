"""The sweep against whole forwards, bit for bit, and against transformers' own sharing."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

import tiny
from icsearch.core.errors import ModelError, NonFiniteLossError, OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.sweep.branches import Batch, cut_batches
from icsearch.sweep.sweep import Sweeper, naive_nll, sequence_nll

LENGTH = 40


@pytest.fixture(scope="module")
def dsa(family_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(family_checkpoint)))


def random_batches(sequences: int = 5, batch_size: int = 2, length: int = LENGTH, seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCABULARY, (sequences, length), generator=generator)
    return cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), batch_size)


def all_patterns(num_layers: int) -> list[Pattern]:
    return [Pattern("F" + "".join(rest)) for rest in itertools.product("FS", repeat=num_layers - 1)]


def sweep_all(dsa: model.DsaModel, patterns: list[Pattern], waves: list[list[Batch]]) -> dict[str, list[float]]:
    """Losses of patterns over several waves, joined in sequence order."""
    sweeper = Sweeper(dsa)
    results = [sweeper.sweep(patterns, wave).nll for wave in waves]
    return {str(p): [value for result in results for value in result[str(p)]] for p in patterns}


def test_sweep_equals_naive_for_every_pattern(dsa: model.DsaModel) -> None:
    batches = random_batches()
    patterns = all_patterns(6)
    swept = sweep_all(dsa, patterns, [batches])
    for pattern in patterns:
        assert swept[str(pattern)] == naive_nll(dsa, pattern, batches), pattern


def test_sweep_equals_naive_with_several_threads(dsa: model.DsaModel) -> None:
    """Few patterns on one batch: where other processes are at work, threads wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches, patterns = random_batches(sequences=2), all_patterns(6)[::10]
        swept = sweep_all(dsa, patterns, [batches])
        assert swept == {str(p): naive_nll(dsa, p, batches) for p in patterns}
    finally:
        torch.set_num_threads(before)


def test_patterns_differ(dsa: model.DsaModel) -> None:
    """The equalities here would be empty if sharing changed nothing."""
    swept = sweep_all(dsa, all_patterns(6), [random_batches()])
    assert len({tuple(losses) for losses in swept.values()}) == len(swept)


@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_sweeps_and_waves_gives_the_same_bits(dsa: model.DsaModel, seed: int) -> None:
    batches = random_batches(sequences=7)
    patterns = all_patterns(6)[:12]
    whole = sweep_all(dsa, patterns, [batches])
    chance = random.Random(seed)
    shuffled = chance.sample(patterns, len(patterns))
    cut, wave_cut = chance.randrange(1, len(patterns)), chance.randrange(1, len(batches))
    for part in (shuffled[:cut], shuffled[cut:]):
        split = sweep_all(dsa, part, [batches[:wave_cut], batches[wave_cut:]])
        assert split == {str(p): whole[str(p)] for p in part}


def test_layer_runs_are_the_nodes_of_the_tree(dsa: model.DsaModel, family_checkpoint: Path) -> None:
    layout = inspect(open_checkpoint(str(family_checkpoint)))
    trunk = Pattern.full(6)
    patterns = [trunk.flip(layer) for layer in (1, 2, 3, 4, 5)]
    by_hand = sum(6 - layer for layer in (1, 2, 3, 4, 5)) + 5  # the trunk runs layers 0 to 4
    assert layout.count_layer_runs(patterns) == by_hand
    result = Sweeper(dsa).sweep(patterns, random_batches(sequences=3))
    assert result.layer_sequences == by_hand * 3


@pytest.mark.parametrize("seed", range(6))
def test_judge_native_indexer_types(glm_checkpoint: Path, seed: int) -> None:
    """transformers' own sharing of glm_moe_dsa gives the same loss for a random pattern, bit for bit."""
    chance = random.Random(seed)
    pattern = Pattern("F" + "".join(chance.choice("FS") for _ in range(5)))
    batches = random_batches(seed=seed)
    swept = sweep_all(loading.load(open_checkpoint(str(glm_checkpoint))), [pattern], [batches])[str(pattern)]
    config = GlmMoeDsaConfig.from_pretrained(glm_checkpoint)
    config.indexer_types = ["full" if letter == "F" else "shared" for letter in str(pattern)]
    native = AutoModelForCausalLM.from_pretrained(glm_checkpoint, config=config, attn_implementation="sdpa").eval()
    losses = []
    with torch.inference_mode():
        for batch in batches:
            states = native.model(batch.input_ids, use_cache=False).last_hidden_state
            losses += sequence_nll(states, native.lm_head, batch.input_ids, batch.counted).tolist()
    assert swept == losses


def test_all_full_is_the_unmodified_model(dsa: model.DsaModel, family_checkpoint: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(family_checkpoint, attn_implementation="sdpa").eval()
    ids = random_batches()[0].input_ids
    with torch.inference_mode():
        expected = plain(ids, use_cache=False).logits
        assert torch.equal(dsa.model(ids, use_cache=False).logits, expected)
        with dsa.running(Pattern.full(6)):
            assert torch.equal(dsa.model(ids, use_cache=False).logits, expected)


def test_shared_layers_never_call_their_indexer(dsa: model.DsaModel) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("the indexer of an S layer ran")

    sweeper, batches = Sweeper(dsa), random_batches()
    sweeper.sweep([Pattern.full(6)], batches)  # capturing the calls runs the unmodified model once
    hooks = [slot.inner.register_forward_pre_hook(forbidden) for slot in dsa.slots[1:] if slot.inner is not None]
    try:
        sweeper.sweep([Pattern("FSSSSS")], batches)
        with pytest.raises(AssertionError, match="S layer ran"):
            sweeper.sweep([Pattern("FSSSSF")], batches)
    finally:
        for hook in hooks:
            hook.remove()


def test_state_dict_keeps_the_names_of_the_model(dsa: model.DsaModel, family_checkpoint: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(family_checkpoint)
    assert list(dsa.model.state_dict()) == list(plain.state_dict())


def test_loss_mask_counts_only_what_it_says(dsa: model.DsaModel) -> None:
    (batch,) = random_batches(sequences=2, batch_size=2)
    nothing = Batch(0, batch.input_ids, torch.zeros_like(batch.counted))
    half = batch.counted.clone()
    half[:, LENGTH // 2 :] = False
    pattern = Pattern.full(6)
    (first,) = [naive_nll(dsa, pattern, [Batch(0, batch.input_ids, half)])]
    (second,) = [naive_nll(dsa, pattern, [Batch(0, batch.input_ids, ~half)])]
    assert naive_nll(dsa, pattern, [nothing]) == [0.0, 0.0]
    assert np.add(first, second) == pytest.approx(naive_nll(dsa, pattern, [batch]))


def test_nan_names_layer_and_sequence(dsa: model.DsaModel) -> None:
    batches = random_batches(sequences=4)
    weight = dsa.layers[3].self_attn.o_proj.weight
    saved = weight.clone()
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteLossError, match=r"sequence 0 under FFFFFF .* decoder layer 3"):
            Sweeper(dsa).sweep([Pattern.full(6)], batches)
    finally:
        weight.data.copy_(saved)


@pytest.mark.parametrize("layer", [1, 4])
def test_nan_is_traced_through_the_blocks_of_a_pipeline(family_checkpoint: Path, tmp_path: Path, layer: int) -> None:
    """Weights that are finite and make states that are not: each block goes on from what the one before has left."""
    copy = Path(shutil.copytree(family_checkpoint, tmp_path / "copy"))
    tiny.overflow_in(copy, layer)
    (batch, *_), pattern, arriving = random_batches(sequences=4), Pattern("FSFFSF"), None
    found = []
    for held in (range(3), range(3, 6)):
        sweeper = Sweeper(loading.load(open_checkpoint(str(copy)), layers=held))
        where, arriving = sweeper.trace(pattern, batch, 1, arriving)
        found.append(where)
        if where:
            break
    assert found == ["", f"decoder layer {layer}"][-1 - layer // 3 :]
    whole = Sweeper(loading.load(open_checkpoint(str(copy))))
    with pytest.raises(NonFiniteLossError, match=rf"sequence 0 under FSFFSF is nan, first seen behind {found[-1]}:"):
        whole.sweep([pattern], [batch])


def test_out_of_memory_names_the_option(dsa: model.DsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real failed allocation, larger than any machine's memory, inside a layer."""

    def greedy_layer(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.float32)

    sweeper, batches = Sweeper(dsa), random_batches()
    sweeper.sweep([Pattern.full(6)], batches)  # the calls are captured by now
    monkeypatch.setattr(dsa.layers[2], "forward", greedy_layer)
    with pytest.raises(OutOfMemoryError, match="--memory"):
        sweeper.sweep([Pattern.full(6)], batches)


def test_shared_first_in_a_pass_is_an_error(dsa: model.DsaModel) -> None:
    calls = dsa.capture_calls(random_batches()[0].input_ids)
    states = dsa.embed(random_batches()[0].input_ids)
    with pytest.raises(ModelError, match="no F layer ran before"):
        dsa.run_layer(3, states, calls[3], model.SelectionStore(Pattern("FSSSSS")))


def test_bfloat16_sweep_equals_naive(family_checkpoint: Path) -> None:
    dsa = loading.load(open_checkpoint(str(family_checkpoint)), dtype="bfloat16")
    patterns, batches = all_patterns(6)[::7], random_batches()
    swept = sweep_all(dsa, patterns, [batches])
    assert swept == {str(p): naive_nll(dsa, p, batches) for p in patterns}
