"""Every family through the slots: the unmodified model's bits, the sweep against whole forwards, S layers at rest."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_batches import Made, random_batches, random_ids

import icsearch
import tiny_families
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.families.attention import Core
from icsearch.model.layout import inspect
from icsearch.model.model import DsaModel
from icsearch.model.slot import IndexerSlot, SelectionStore
from icsearch.sweep.similarity import SimilaritySweep, direct_similarity
from icsearch.sweep.sweep import Sweeper, naive_nll

LAYERS = {"dots3_note": (0, 2, 3), "deepseek_v4": (1, 3, 4), "glm5_next": (0, 2, 4), "minimax_m3_vl": (1, 2, 3)}
LAYERS |= {"qwen4_exp": (1, 2, 3)}
GATED = {
    "axk2",
    "hy_v4",
    "hy_v4_vl",
    "dots3_note",
    "deepseek_v4",
    "qwen4_exp",
}  # between core attention and its projection
WRAPPERS = {"hy_v4_vl", "mistral_large4", "dots3_note", "glm5_next", "minimax_m3_vl", "qwen4_exp"}


def stock(checkpoint: Path, family: str) -> Any:
    return getattr(transformers, tiny_families.CLASSES[family]).from_pretrained(checkpoint).eval()


def all_patterns(dsa: DsaModel) -> list[Pattern]:
    return [Pattern("F" + "".join(rest)) for rest in itertools.product("FS", repeat=len(dsa.slots) - 1)]


def test_letters_count_dsa_layers_alone(checkpoint: Path, family: str, dsa: DsaModel) -> None:
    layout = inspect(open_checkpoint(str(checkpoint)))
    assert layout.layer_indices == tuple(dsa.layer_indices) == LAYERS.get(family, (0, 1, 2, 3))
    assert layout.model_type == family
    assert layout.wrapper_config == (family in WRAPPERS)


@torch.inference_mode()
def test_all_full_is_the_unmodified_model(checkpoint: Path, family: str, dsa: DsaModel) -> None:
    ids = random_ids()
    expected = stock(checkpoint, family)(input_ids=ids, use_cache=False).logits
    with dsa.running(dsa.start_pattern):
        assert torch.equal(dsa.model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(dsa.lm_head(dsa.final_hidden_states(ids, dsa.start_pattern)), expected)


@torch.inference_mode()
def test_layer_by_layer_is_the_unmodified_model_too(checkpoint: Path, family: str, dsa: DsaModel) -> None:
    """Calls recorded without layers, token ids filled in, the model's end by our own."""
    (batch,) = random_batches(2)
    (states,) = Sweeper(dsa).block.advance({dsa.start_pattern: 0}, [batch], Sweeper(dsa)._nothing)[0][0].hidden_states
    expected = stock(checkpoint, family)(input_ids=batch.input_ids, use_cache=False).logits
    assert torch.equal(dsa.lm_head(dsa.final_norm(states)), expected)


def test_sweep_equals_naive_for_every_pattern(dsa: DsaModel) -> None:
    batches, patterns = random_batches(), all_patterns(dsa)
    swept = Sweeper(dsa).sweep(patterns, batches).nll
    for pattern in patterns:
        assert swept[pattern.letters] == naive_nll(dsa, pattern, batches), pattern
    assert len({tuple(losses) for losses in swept.values()}) == len(patterns)


@pytest.mark.parametrize(("family", "changes"), [("qwen4_exp", tiny_families.NGRAMS), ("deepseek_v4", {})])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_layers_that_take_token_ids(made: Made, family: str, changes: dict[str, Any], offload: str) -> None:
    """N-gram embeddings and experts by token: the ids are each batch's own."""
    directory, batches = made(family, **changes), random_batches(4)
    resident = loading.load(open_checkpoint(str(directory)))
    expected = naive_nll(resident, Pattern("FSS"), batches)
    dsa = loading.load(open_checkpoint(str(directory)), offload=offload)
    assert Sweeper(dsa).sweep([Pattern("FSS")], batches).nll["FSS"] == expected
    with torch.inference_mode():
        calls, states = dsa.capture_calls(batches[0].input_ids), dsa.embed(batches[0].input_ids)
        with dsa.holding(0):
            own, others = (
                dsa.run_layer(0, states, calls[0].on(batch.input_ids), SelectionStore(Pattern("FSS")))
                for batch in batches
            )
    assert not torch.equal(own, others)


def test_bfloat16(checkpoint: Path) -> None:
    dsa = loading.load(open_checkpoint(str(checkpoint)), dtype="bfloat16")
    batches, cheapest = random_batches(2), Pattern("F" + "S" * (len(dsa.slots) - 1))
    assert Sweeper(dsa).sweep([cheapest], batches).nll[cheapest.letters] == naive_nll(dsa, cheapest, batches)


def test_indexers_of_shared_layers_are_never_called(dsa: DsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    for slot in dsa.slots:
        own, position = slot.inner.forward, slot.position

        def count(*args: Any, own: Any = own, position: int = position, **kwargs: Any) -> Any:
            called.append(position)
            return own(*args, **kwargs)

        monkeypatch.setattr(slot.inner, "forward", count)
    batches = random_batches(2)
    for letters in ("F" + "S" * (len(dsa.slots) - 1), "FF" + "S" * (len(dsa.slots) - 2)):
        pattern, called[:] = Pattern(letters), []
        Sweeper(dsa).sweep([pattern], batches)
        assert called == list(pattern.full_layers)
        called[:] = []
        naive_nll(dsa, pattern, batches)
        assert called == list(pattern.full_layers)


@pytest.mark.slow
@torch.inference_mode()
def test_saving_and_loading(checkpoint: Path, family: str, tmp_path: Path) -> None:
    """A model with a pattern saves the checkpoint as it was."""
    ids, letters = random_ids(), "F" + "S" * (len(LAYERS.get(family, range(4))) - 1)
    patched = icsearch.load(str(checkpoint), letters)
    expected = patched(input_ids=ids, use_cache=False).logits
    patched.save_pretrained(tmp_path)
    again = icsearch.load(str(tmp_path), letters)
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    unmodified = stock(tmp_path, family)(input_ids=ids, use_cache=False).logits
    assert torch.equal(icsearch.restore(again)(input_ids=ids, use_cache=False).logits, unmodified)
    assert not torch.equal(unmodified, expected)


def test_core_attention_under_its_own_selection_is_its_own(dsa: DsaModel) -> None:
    """What the similarity baseline compares: run again with the layer's own selection, nothing differs."""
    heard: list[int] = []

    def observe(output: torch.Tensor, selection: torch.Tensor, core: Core) -> None:
        assert torch.equal(core(selection), output)
        heard.append(len(heard))

    (batch,) = random_batches(2)
    sweeper = Sweeper(dsa)
    with dsa.observed(observe):
        sweeper.sweep([dsa.start_pattern], [batch])
    assert heard == list(range(len(dsa.slots)))


def test_similarity(checkpoint: Path, family: str, dsa: DsaModel) -> None:
    (batch,), kept = random_batches(2), inspect(open_checkpoint(str(checkpoint))).selection.kept
    sums = SimilaritySweep(dsa, kept).run([batch])[0]
    for layer in range(1, len(dsa.slots)):
        for source in range(layer):
            mean = sums.cosine[layer][source] / sums.queries
            assert 0 < mean < 0.99, (layer, source)
            assert 0 < sums.overlap[layer][source] / sums.queries < 0.99
            if family not in GATED:
                assert sums.cosine[layer][source] == direct_similarity(dsa, batch, kept, layer, source)


def test_queries_without_a_choice_attend_alike(checkpoint: Path, dsa: DsaModel) -> None:
    """Under any layer's selection the first `kept` queries attend to the same, and some query behind them does not."""
    (batch,), kept = random_batches(2), inspect(open_checkpoint(str(checkpoint))).selection.kept
    first: list[torch.Tensor] = []
    same: list[torch.Tensor] = []

    def observe(output: torch.Tensor, selection: torch.Tensor, core: Core) -> None:
        if first:
            same.append((core(first[0]) == output).flatten(2).all(-1).all(0))  # [T]
        first.append(selection)

    with dsa.observed(observe):
        Sweeper(dsa).sweep([dsa.start_pattern], [batch])
    assert all(queries[:kept].all() for queries in same)
    assert not all(queries[kept] for queries in same)


@pytest.mark.slow
def test_generating(checkpoint: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a KV cache, S layers at rest in every step; the first token is that of a forward without one."""
    letters, ids = "F" + "S" * (len(LAYERS.get(family, range(4))) - 1), random_ids(1)
    patched = icsearch.load(str(checkpoint), letters)
    called: list[int] = []
    slots = [module for module in patched.modules() if isinstance(module, IndexerSlot)]
    for slot in slots:
        monkeypatch.setattr(slot, "_compute", partial(_counted, called, slot.position, slot._compute))
    with torch.inference_mode():
        tokens = patched.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert called == [0] * 4
        assert tokens[0, -4] == patched(input_ids=ids, use_cache=False).logits[0, -1].argmax()


def _counted(called: list[int], position: int, compute: Any, *args: Any) -> Any:
    called.append(position)
    return compute(*args)
