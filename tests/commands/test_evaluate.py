"""Evaluation against the naive twin, and its record on made-up numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep import random_batches

from icsearch.commands.progress import Quiet
from icsearch.core.errors import IcsearchError, JournalError
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.slot import SelectionStore
from icsearch.runs.evaluation import EvalRecord, load_eval, verdict
from icsearch.runs.journal import Event
from icsearch.search.loop import Run
from icsearch.sweep.branches import cut_waves
from icsearch.sweep.measures import bucket_edges, bucket_tokens, measure_missing, naive_measures
from icsearch.sweep.sweep import Sweeper, naive_nll, selection_overlap

PATTERNS = ["FFFFFF", "FSFSFS", "FSSFSS", "FFSSFS", "FSSSSS"]
TOPK = 8


@pytest.fixture(scope="module")
def dsa(family_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(family_checkpoint)))


class Events(list[Event]):
    """Stands for a journal: what is appended has gone through JSON."""

    path = Path("made-up")

    def append(self, event: Event) -> None:
        super().append(json.loads(json.dumps(event)))


def start_event(batches: Any) -> Event:
    counted = torch.cat([batch.counted for batch in batches])
    counted[:, 0] = False
    edges = bucket_edges(counted.shape[1], TOPK)
    return {
        "event": "start",
        "icsearch_version": "0",
        "start_pattern": "FFFFFF",
        "layer_indices": list(range(6)),
        "model": {},
        "calibration": {},
        "options": {},
        "environment": {},
        "patterns": [
            {
                "name": "full" if p == "FFFFFF" else p,
                "pattern": p,
                "method": "uniform" if p in ("FSFSFS", "FSSFSS", "FSSSSS") else "full" if p == "FFFFFF" else "greedy",
                "in_sample": False,
                "foreign": False,
            }
            for p in PATTERNS
        ],
        "tokens": counted.sum(1).tolist(),
        "bucket_edges": edges,
        "bucket_tokens": bucket_tokens(counted, edges),
        "choosing_queries": counted.shape[1] - TOPK,
        "index_topk": TOPK,
    }


def evaluated(dsa: model.DsaModel, per_sweep: int = 10, batches: Any = None, per_wave: int = 1) -> EvalRecord:
    batches = batches or random_batches()
    record = EvalRecord.replay([start_event(batches)])
    run = Run(Events(), record, Quiet())  # type: ignore[arg-type]
    measure_missing(run, dsa, cut_waves(batches, per_wave), [Pattern(p) for p in PATTERNS], per_sweep)
    return record


def test_losses_equal_naive_bit_for_bit(dsa: model.DsaModel) -> None:
    record, batches = evaluated(dsa), random_batches()
    for letters in PATTERNS:
        assert [m.nll for m in record.of(letters)] == naive_nll(dsa, Pattern(letters), batches)


def test_kl_and_agreement_follow_their_definitions(dsa: model.DsaModel) -> None:
    record = evaluated(dsa)
    for letters in PATTERNS:
        expected = [row for batch in random_batches() for row in naive_measures(dsa, Pattern(letters), batch)]
        for measures, (nll, kl, agree) in zip(record.of(letters), expected, strict=True):
            assert measures.nll == pytest.approx(nll, rel=1e-6)
            assert measures.kl == pytest.approx(kl, rel=1e-4, abs=1e-4)
            assert measures.agree == agree


def test_full_has_no_divergence(dsa: model.DsaModel) -> None:
    for measures in evaluated(dsa).of("FFFFFF"):
        assert measures.kl == 0.0
        assert measures.agree == 39
        assert measures.overlap == {}


def test_buckets_add_up(dsa: model.DsaModel) -> None:
    record = evaluated(dsa)
    for letters in PATTERNS:
        for measures in record.of(letters):
            assert math.fsum(measures.bucket_nll) == pytest.approx(measures.nll, rel=1e-12)


@pytest.mark.parametrize("per_sweep", [1, 2])
@pytest.mark.parametrize("per_wave", [1, 2, 9])
def test_splits_change_no_bit(dsa: model.DsaModel, per_sweep: int, per_wave: int) -> None:
    assert evaluated(dsa, per_sweep, per_wave=per_wave).measures == evaluated(dsa).measures


def test_borrowed_overlap_is_that_of_the_layers_own_choice(dsa: model.DsaModel) -> None:
    """FSSSSS: each S layer borrows from layer 0, and sees the states that the shared model gives it."""
    batches = random_batches(sequences=2, batch_size=2)
    found = evaluated(dsa, batches=batches).of("FSSSSS")
    calls, states = Sweeper(dsa).block.calls_for(batches[0]), None
    heard: dict[int, Any] = {}
    store = SelectionStore(Pattern("FSSSSS"), probe=lambda layer, a, b: heard.update({layer: selection_overlap(a, b)}))
    with torch.inference_mode():
        states = dsa.embed(batches[0].input_ids)
        for index in range(6):
            states = dsa.run_layer(index, states, calls[index], store)
    assert sorted(heard) == [1, 2, 3, 4, 5]
    for sequence, measures in enumerate(found):
        expected = {layer: float(values[sequence, TOPK:].sum()) for layer, values in heard.items()}
        assert measures.overlap == expected
    assert all(0 <= value <= 40 - TOPK for value in found[0].overlap.values())


@pytest.mark.parametrize("per_wave", [1, 2])
def test_resumed_behind_any_event(dsa: model.DsaModel, per_wave: int) -> None:
    """In other waves, too: what is known is not measured again unless it shares a wave with what is not."""
    batches = random_batches()
    events = Events()
    record = EvalRecord.replay([start_event(batches)])
    patterns = [Pattern(letters) for letters in PATTERNS]
    measure_missing(Run(events, record, Quiet()), dsa, cut_waves(batches, 1), patterns, 2)  # type: ignore[arg-type]
    for known in range(len(events)):
        resumed = EvalRecord.replay([start_event(batches), *events[:known]])
        run = Run(Events(), resumed, Quiet())  # type: ignore[arg-type]
        measure_missing(run, dsa, cut_waves(batches, per_wave), patterns, 2)
        assert resumed.measures == record.measures


def test_rows_and_file(dsa: model.DsaModel, tmp_path: Path) -> None:
    record = evaluated(dsa)
    document = record.to_json()
    write_object(tmp_path / "eval.json", document)
    assert load_eval(tmp_path / "eval.json") == document
    rows = document["rows"]
    assert rows[0]["name"] == "full"
    assert (rows[0]["delta"], rows[0]["kl"], rows[0]["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert [row["retention"] for row in rows[1:]] == sorted((row["retention"] for row in rows[1:]), reverse=True)
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert sum(bucket["last"] - bucket["first"] for bucket in row["positions"]) == 40


def made_up(deltas: dict[str, float], noise: float) -> EvalRecord:
    """Losses that cost `deltas` per token over the all-F model, with noise by sequence."""
    record = EvalRecord.replay([start_event(random_batches(sequences=30))])
    chance = random.Random(0)
    base = [chance.uniform(50, 60) for _ in range(30)]
    table = {
        letters: {
            "nll": [b + 39 * (deltas.get(letters, 0.0) + chance.gauss(0, noise)) for b in base],
            "kl": [0.0] * 30,
            "agree": [39] * 30,
            "bucket_nll": [[0.0] * 4] * 30,
            "overlap": {},
        }
        for letters in PATTERNS
    }
    record.apply({"event": "measures", "sequences": [0, 30], "patterns": table, "layer_sequences": 0, "seconds": 0})
    return record


def test_gap_closed() -> None:
    record = made_up({"FSFSFS": 0.4, "FFSSFS": 0.1}, 0.01)
    gap = record.gap_closed("FFSSFS", "FSFSFS")
    assert gap is not None
    assert gap.delta == pytest.approx(0.75, abs=4 * gap.std_err)
    assert 0 < gap.std_err < 0.03
    (entry,) = [gap for gap in record.to_json()["gaps"] if gap["uniform"] == "FSFSFS"]
    assert entry["name"] == "FFSSFS"


def test_no_gap_to_close() -> None:
    assert made_up({}, 0.1).gap_closed("FFSSFS", "FSFSFS") is None


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Difference(0.001, 0.001), "no loss seen"),
        (Difference(-0.001, 0.001), "no loss seen"),
        (Difference(0.0, 0.0), "no loss seen"),
        (Difference(0.004, 0.0029), "no loss seen"),
        (Difference(0.004, 0.0031), "not known"),
        (Difference(0.03, 0.12), "not known"),
        (Difference(-0.03, 0.12), "not known"),
        (Difference(-0.1, 0.001), "lower loss"),
        (Difference(0.005, 0.001), "under 0.01"),
        (Difference(0.05, 0.001), "under 0.1"),
        (Difference(0.5, 0.001), "heavy"),
        (Difference(0.5, math.nan), "evaluate more"),
    ],
)
def test_verdicts_say_what_the_numbers_carry(difference: Difference, words: str) -> None:
    assert words in verdict(difference, is_full=False)


def test_incomplete_measures_are_an_error() -> None:
    record = EvalRecord.replay([start_event(random_batches())])
    with pytest.raises(JournalError, match="continue the evaluation first"):
        record.rows()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "icsearch.eval/2"}'])
def test_unknown_eval_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(IcsearchError, match=r"eval\.json"):
        load_eval(tmp_path / "eval.json")
