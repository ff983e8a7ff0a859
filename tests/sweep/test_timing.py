"""What is timed, in which order, and what is made of it; never how long anything takes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from icsearch.core.errors import ModelError, OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.loading import load
from icsearch.model.model import DsaModel
from icsearch.sweep import timing as measuring
from icsearch.sweep.timing import Spread, Timing, measure
from tiny import FAMILIES, save_checkpoint

FULL, SHARED, MIXED = Pattern("FFFFFF"), Pattern("FSSSSS"), Pattern("FSFSFS")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DsaModel:
    directory = save_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    return load(open_checkpoint(str(directory)), device="cpu")


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is one second later: times then count looks, not work."""
    ticks = itertools.count()
    monkeypatch.setattr(measuring, "_now", lambda device: float(next(ticks)))


def spreads(timing: Timing) -> list[Spread]:
    return [timing.prefill_seconds, timing.decode_seconds, timing.prefill_speedup, timing.decode_speedup]


def test_one_row_per_length_and_pattern_the_unmodified_model_first(model: DsaModel) -> None:
    rows = measure(model, [SHARED, FULL, SHARED, MIXED], [20, 12], repeats=2, decode_tokens=3)
    assert [(row.length, row.pattern) for row in rows] == [
        (length, str(pattern)) for length in (20, 12) for pattern in (FULL, SHARED, MIXED)
    ]
    for row in rows:
        assert (row.repeats, row.decode_tokens, row.device, row.dtype) == (2, 3, "cpu", "float32")
        assert all(0 < s.minimum <= s.median <= s.maximum for s in spreads(row))
        if row.pattern == str(FULL):
            assert row.prefill_speedup == row.decode_speedup == Spread(1, 1, 1)


def test_patterns_take_turns_and_the_first_round_does_not_count(
    model: DsaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    seconds = itertools.count(1)

    def sample(_: DsaModel, pattern: Pattern, input_ids: torch.Tensor, length: int) -> Any:
        turns.append(str(pattern))
        return measuring._Sample(prefill=float(next(seconds)), decode=2.0)

    monkeypatch.setattr(measuring, "_sample", sample)
    _, row = measure(model, [SHARED], [16], repeats=3, decode_tokens=2)
    assert turns == [str(FULL), str(SHARED)] * 4
    assert row.prefill_seconds == Spread(4, 6, 8)  # 2 was the warm-up
    assert row.prefill_speedup == Spread(3 / 4, 5 / 6, 7 / 8)  # paired with the turn just before
    assert row.decode_speedup == Spread(1, 1, 1)


def test_seconds_are_per_prefill_and_per_decoded_token(model: DsaModel, steady_clock: None) -> None:
    (row,) = measure(model, [], [16], repeats=1, decode_tokens=4)
    assert (row.prefill_seconds, row.decode_seconds) == (Spread(1, 1, 1), Spread(1 / 4, 1 / 4, 1 / 4))


def test_the_model_runs_the_pattern_over_a_cache(model: DsaModel) -> None:
    """Indexers of S layers are never called; F layers once per prefill and once per decoded token."""
    calls = [0] * len(model.slots)

    def counting(position: int) -> Any:
        return lambda *_: calls.__setitem__(position, calls[position] + 1)

    hooks = [slot.inner.register_forward_hook(counting(slot.position)) for slot in model.slots if slot.inner]
    measuring._sample(model, MIXED, measuring._random_ids(model, 20 + 3, 0), 20)
    for hook in hooks:
        hook.remove()
    assert calls == [4, 0, 4, 0, 4, 0]
    assert all(slot.store is None for slot in model.slots)


def test_tokens_come_from_the_seed_alone(model: DsaModel) -> None:
    first, again, other = (measuring._random_ids(model, 30, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 30)
    assert set(first[0].tolist()) <= set(range(model.config.vocab_size))


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([16], {"repeats": 0}, "repeats 0"),
        ([16], {"decode_tokens": 0}, "decode_tokens 0"),
        ([0], {}, "length 0"),
        ([500], {"decode_tokens": 16}, "make 516, but the model has 512 positions"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    model: DsaModel, lengths: list[int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        measure(model, [SHARED], lengths, **options)


def test_a_failed_allocation_names_the_length(model: DsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(measuring, "_sample", fail)
    with pytest.raises(OutOfMemoryError, match="at 16 tokens: measure shorter lengths"):
        measure(model, [SHARED], [16])


def test_other_errors_pass_through(model: DsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(measuring, "_sample", fail)
    with pytest.raises(RuntimeError, match="something else"):
        measure(model, [SHARED], [16])


def test_a_native_s_layer_belongs_to_the_unmodified_model(tmp_path: Path) -> None:
    types = ["full", "shared"] * 3
    directory = save_checkpoint(tmp_path / "native", "glm_moe_dsa", indexer_types=types)
    native = load(open_checkpoint(str(directory)), device="cpu")
    rows = measure(native, [SHARED], [12], repeats=1, decode_tokens=1)
    assert [row.pattern for row in rows] == ["FSFSFS", "FSSSSS"]
