"""The demo checkpoint: a golden loss curve, and what the README says of it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from icsearch.calibration import batches as packing
from icsearch.calibration import cache
from icsearch.calibration.sources import ReadyTokens, parse_source
from icsearch.commands.greedy import greedy
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import CalibrationRequest, GreedyRequest
from icsearch.core.files import published_patterns
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.core.statistics import mean_loss, paired_difference
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import Sweeper

GOLDEN = Path(__file__).parent / "data" / "demo_curve.json"
FIVE_OF_16 = "FFSSSSFSSSSFSFSS"  # what `make results` finds with five layers left
loading.quiet_transformers()


def held_out_losses(patterns: list[Pattern], source_text: str, sequences: int) -> dict[str, list[float]]:
    """NLL sums of each sequence of a built-in source, by pattern."""
    checkpoint = open_checkpoint("demo")
    tokenizer = loading.load_tokenizer(checkpoint)
    source = parse_source(source_text)
    assert not isinstance(source, ReadyTokens)
    key = cache.cache_key(source, packing.tokenizer_fingerprint(tokenizer), 256, sequences, 0)
    batches = packing.build(source, tokenizer, key, vocab_size=1024)
    sweeper = Sweeper(loading.load(checkpoint))
    nll: dict[str, list[float]] = {}
    for batch in cut_batches(torch.from_numpy(batches.input_ids), torch.from_numpy(batches.counted()), 4):
        for letters, sums in sweeper.sweep(patterns, [batch]).nll.items():
            nll.setdefault(letters, []).extend(sums)
    return nll


def test_golden_loss_curve() -> None:
    """A change of the engine must leave the losses what they are. Other hardware rounds otherwise: 1e-4 of a loss."""
    golden = json.loads(GOLDEN.read_text())
    nll = held_out_losses([Pattern(letters) for letters in golden["losses"]], "demo", golden["sequences"])
    tokens = [255] * golden["sequences"]
    found = {letters: mean_loss(sums, tokens) for letters, sums in nll.items()}
    assert found == pytest.approx(golden["losses"], rel=1e-4)


def test_cached_batches_are_those_of_the_recipe() -> None:
    """calibration/demo holds what `icsearch calibrate demo demo` makes today."""
    checkpoint = open_checkpoint("demo")
    stored = cache.load(Path(__file__).parent.parent / "calibration" / "demo")
    source = parse_source("demo")
    tokenizer = loading.load_tokenizer(checkpoint)
    fingerprint = packing.tokenizer_fingerprint(tokenizer)
    assert not isinstance(source, ReadyTokens)
    key = cache.cache_key(source, fingerprint, stored.seq_len, stored.num_sequences, 0)
    assert packing.build(source, tokenizer, key, vocab_size=1024).fingerprint == stored.fingerprint


def test_checkpoint_is_small_and_all_full() -> None:
    checkpoint = open_checkpoint("demo")
    layout = inspect(checkpoint)
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
    assert not isinstance(parsed, ReadyTokens)
    documents = parsed.documents(0)
    return [next(documents) for _ in range(count)]


def test_what_the_readme_says_holds_on_held_out_texts() -> None:
    """A layer of the second half stays F, and uniform costs many times what the found pattern costs."""
    full, found, uniform = Pattern.full(16), Pattern(FIVE_OF_16), Pattern.uniform(16, Fraction(1, 4))
    dropped = [(layer, found.flip(layer)) for layer in found.full_layers if layer >= 8]
    assert dropped
    nll = held_out_losses([full, found, uniform, *(pattern for _, pattern in dropped)], "demo:heldout", 16)
    tokens = [255] * 16
    cost, uniform_cost = (paired_difference(nll[str(p)], nll[str(full)], tokens) for p in (found, uniform))
    assert uniform_cost.delta > 5 * cost.delta
    assert uniform_cost.delta - cost.delta > 10 * (cost.std_err + uniform_cost.std_err) / 2
    for layer, pattern in dropped:
        price = paired_difference(nll[str(pattern)], nll[str(found)], tokens)
        assert price.delta > 4 * price.std_err, layer


@pytest.mark.slow
def test_the_whole_search_finds_the_stored_pattern(tmp_path: Path) -> None:
    """`icsearch greedy demo --calibration demo --retention 1/4`, against patterns/demo-greedy.json."""
    stored = load_pattern_file(published_patterns() / "demo-greedy.json")
    request = GreedyRequest(CalibrationRequest("demo", "demo"), out=tmp_path / "run", threads=1)
    record = greedy(request, Quiet())
    assert record.pattern == stored.at_retention(Fraction(1, 4))
    assert record.loss(record.pattern.letters) == pytest.approx(stored.steps[11].loss, rel=1e-4)
