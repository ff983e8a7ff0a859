"""The demo checkpoint: a golden loss curve, and what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from icsearch import calibration, model
from icsearch.checkpoint import open_checkpoint
from icsearch.greedy import greedy
from icsearch.pattern import Pattern
from icsearch.progress import Quiet
from icsearch.record import RunRecord
from icsearch.requests import CalibrationRequest, GreedyRequest
from icsearch.sources import parse_source
from icsearch.statistics import paired_difference
from icsearch.sweep import Sweeper, cut_batches

GOLDEN = Path(__file__).parent / "data" / "demo_curve.json"
model.quiet_transformers()


def search(out: Path, sequences: int, flips: int) -> RunRecord:
    batches = CalibrationRequest("demo", "demo", num_sequences=sequences)
    return greedy(GreedyRequest(batches, out=out, num_shared=flips, threads=1), Quiet())


def test_golden_loss_curve(tmp_path: Path) -> None:
    """A change of the engine must leave the losses what they are. Other hardware rounds otherwise: 1e-4 of a loss."""
    golden = json.loads(GOLDEN.read_text())
    record = search(tmp_path / "run", golden["sequences"], golden["flips"])
    assert record.pattern.letters == golden["pattern"]
    assert record.loss(record.start_pattern.letters) == pytest.approx(golden["baseline"], rel=1e-4)
    assert [step.loss for step in record.steps()] == pytest.approx(golden["losses"], rel=1e-4)


def test_cached_batches_are_those_of_the_recipe() -> None:
    """calibration/demo holds what `icsearch calibrate demo demo` makes today."""
    checkpoint = open_checkpoint("demo")
    stored = calibration.load(Path(__file__).parent.parent / "calibration" / "demo")
    source = parse_source("demo")
    tokenizer = model.load_tokenizer(checkpoint)
    fingerprint = calibration.tokenizer_fingerprint(tokenizer)
    assert not isinstance(source, calibration.ReadyTokens)
    key = calibration.cache_key(source, fingerprint, stored.seq_len, stored.num_sequences, 0)
    assert calibration.build(source, tokenizer, key, vocab_size=1024).fingerprint == stored.fingerprint


def test_checkpoint_is_small_and_all_full() -> None:
    checkpoint = open_checkpoint("demo")
    layout = model.inspect(checkpoint)
    size = sum(path.stat().st_size for path in checkpoint.directory.iterdir())
    assert size < 12_000_000
    assert layout.start_pattern == Pattern.full(layout.num_layers)
    assert layout.num_layers >= 12
    assert layout.model_type == "glm_moe_dsa"


def test_calibration_and_held_out_share_no_text() -> None:
    first, second = (set(next_documents(split)) for split in ("demo", "demo:heldout"))
    assert not first & second


def next_documents(source: str, count: int = 300) -> list[str]:
    parsed = parse_source(source)
    assert not isinstance(parsed, calibration.ReadyTokens)
    documents = parsed.documents(0)
    return [next(documents) for _ in range(count)]


@pytest.mark.slow
def test_what_the_readme_says_holds_on_held_out_texts() -> None:
    """Single flips differ by many standard errors, and uniform patterns cost many times what the found one costs."""
    golden = json.loads(GOLDEN.read_text())
    checkpoint = open_checkpoint("demo")
    tokenizer = model.load_tokenizer(checkpoint)
    source = parse_source("demo:heldout")
    assert not isinstance(source, calibration.ReadyTokens)
    key = calibration.cache_key(source, calibration.tokenizer_fingerprint(tokenizer), 256, 32, 0)
    batches = calibration.build(source, tokenizer, key, vocab_size=1024)
    ids = torch.from_numpy(batches.input_ids)
    dsa = model.load(checkpoint)
    full = dsa.start_pattern
    found, uniform = (Pattern(golden["claims"][name]) for name in ("searched", "uniform"))
    sweeper = Sweeper(dsa)
    nll: dict[str, list[float]] = {}
    for batch in cut_batches(ids, torch.from_numpy(batches.counted()), 4):
        for letters, sums in sweeper.sweep([full, found, uniform], [batch]).nll.items():
            nll.setdefault(letters, []).extend(sums)
    tokens = batches.counted_tokens()
    cost, uniform_cost = (paired_difference(nll[str(p)], nll[str(full)], tokens) for p in (found, uniform))
    assert uniform_cost.delta > 5 * cost.delta
    assert uniform_cost.delta - cost.delta > 10 * (cost.std_err + uniform_cost.std_err)
    assert any(layer >= len(full) // 2 for layer in found.full_layers)
