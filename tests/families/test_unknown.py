"""A family that nobody here has seen, with code of its own: searched by what it has, or refused with what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy_code
from family_batches import random_batches, random_ids
from test_bits import all_patterns
from test_commands import fixed, pattern_of, refused, run

import icsearch
import tiny
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.model.slot import IndexerSlot, Returned, SelectionStore
from icsearch.sweep.sweep import Sweeper, naive_nll

CODE = Path(toy_code.__file__)
REMOTE = "--trust-remote-code"


@pytest.fixture(autouse=True)
def _modules_of_our_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies a checkpoint's code before it runs it: not into the home of whoever runs the tests."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules"))
    yield


def save_toy(directory: Path, twist: str = "", **changes: int) -> Path:
    """A checkpoint with its code beside it, as a hub repository has it."""
    torch.manual_seed(0)
    model = toy_code.ToyForCausalLM(toy_code.ToyConfig(twist=twist, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    shutil.copy(CODE, directory / "toy_code.py")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "toy_code.ToyConfig", "AutoModelForCausalLM": "toy_code.ToyForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    tiny.save_tokenizer(directory)
    return directory


def load(directory: Path) -> DsaModel:
    return loading.load(open_checkpoint(str(directory)), trust_remote_code=True)


def test_it_is_searched(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = save_toy(tmp_path / "toy")
    dsa, batches = load(toy), random_batches(2)
    swept = Sweeper(dsa).sweep(patterns := all_patterns(dsa), batches).nll
    for pattern in patterns:
        assert swept[pattern.letters] == naive_nll(dsa, pattern, batches)
    assert len({tuple(losses) for losses in swept.values()}) == len(patterns)
    status, _, err = run(capsys, "greedy", *fixed(toy, tokens, tmp_path / "run", "--num-shared", 2, REMOTE))
    assert status == 0, err
    assert pattern_of(tmp_path / "run")["model"]["model_type"] == "toy_sparse"
    arguments = fixed(toy, tokens, tmp_path / "streamed", "--num-shared", 2, REMOTE, "--offload", "disk")
    assert run(capsys, "greedy", *arguments)[0] == 0
    assert pattern_of(tmp_path / "streamed")["loss"] == pattern_of(tmp_path / "run")["loss"]


@torch.inference_mode()
def test_a_pattern_is_applied_to_it_and_taken_off(tmp_path: Path) -> None:
    """Its layers are called `blocks`."""
    toy, ids = save_toy(tmp_path / "toy"), random_ids()
    model = icsearch.load(str(toy), trust_remote_code=True)
    unmodified, modules = model(ids).logits, dict(model.named_modules())
    for letters in ("FSFS", "FSSS"):
        assert icsearch.apply_pattern(model, letters) is model
        dsa = load(toy)
        expected = dsa.lm_head(dsa.final_hidden_states(ids, Pattern(letters)))
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(icsearch.load(str(toy), letters, trust_remote_code=True)(ids).logits, expected)
        assert not torch.equal(expected, unmodified)
    assert dict(icsearch.restore(model).named_modules()) == modules
    assert torch.equal(model(ids).logits, unmodified)


def test_its_attention_cannot_be_heard(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It calls torch's attention by itself, and not through transformers' registry."""
    arguments = fixed(save_toy(tmp_path / "toy"), tokens, tmp_path / "run", "--num-shared", 1, REMOTE)
    line = refused(capsys, "dp-baseline", *arguments)
    assert "called transformers' attention functions 0 times in one layer" in line


def test_a_selection_among_other_values(tmp_path: Path) -> None:
    """An indexer that returns its scores too, as transformers' may one day (#48863): the losses of one that does not.

    Swept, by the model's own forward, with a pattern applied, and on a later stage of a pipeline, where an S layer is
    called before any indexer has been.
    """
    batches, ids = random_batches(2), random_ids()
    plain, beside = (load(save_toy(tmp_path / name, name)) for name in ("", "scores beside"))
    swept = Sweeper(beside).sweep(patterns := all_patterns(beside), batches)
    assert swept == Sweeper(plain).sweep(patterns, batches)
    for pattern in patterns:
        assert swept.nll[pattern.letters] == naive_nll(beside, pattern, batches)
    model = icsearch.load(str(tmp_path / "scores beside"), "FSSF", trust_remote_code=True)
    with torch.inference_mode(), plain.running(Pattern("FSSF")):
        assert torch.equal(model(ids).logits, plain.model(ids).logits)
    indexer = toy_code.Chooser(toy_code.ToyConfig(twist="scores beside"))
    slot = IndexerSlot(indexer, 1, Returned())
    slot.store = SelectionStore(Pattern("FS"), chosen := torch.zeros(1, 20, 8, dtype=torch.int64))
    assert slot(torch.randn(1, 20, 32)) == (None, chosen)


@pytest.mark.parametrize(
    ("twist", "expected"),
    [
        ("silent", "Chooser does not say how many tokens it selects: expected the attributes"),
        ("past the call", "DSA layer 0 ran as F and did not call its indexer"),
        ("two selections", "the indexer of DSA layer 0 returned a tuple: expected one tensor"),
        ("twice", "decoder layer 0 has 2 modules `indexer`: expected one"),
        ("backwards", "calls 0 decoder layers in order and then layer 3: expected each layer once"),
        ("fewer", "calls 3 decoder layers in order and then none of the others"),
        ("again", "calls 4 decoder layers in order and then layer 0: expected each layer once"),
        ("fading", "changes the states between decoder layers 0 and 1"),
        ("first states", "hands decoder layer 0 something that follows from the text"),
        ("renamed ids", "hands decoder layer 0 something that follows from the text"),
        ("louder", "does more between its last decoder layer and its logits"),
    ],
)
def test_what_was_missing(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], twist: str, expected: str
) -> None:
    toy = save_toy(tmp_path / "toy", twist)
    assert expected in refused(capsys, "greedy", *fixed(toy, tokens, tmp_path / "run", "--num-shared", 1, REMOTE))


def test_code_is_not_run_unasked(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = save_toy(tmp_path / "toy")
    assert REMOTE in refused(capsys, "greedy", *fixed(toy, tokens, tmp_path / "run", "--num-shared", 1))
