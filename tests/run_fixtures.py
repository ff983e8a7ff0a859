"""A made-up run: the journal of a search whose losses come from a formula. No model, no torch.

The formula gives what real searches show: costs over several orders of magnitude, a flip that costs more when its
neighbours share too, a few flips that help a little, and noise that two patterns have in common.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss, paired_difference
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord, load_run
from icsearch.search.greedy import split_stages

VERSION = "0.0.0-made-up"
BASELINE = 2.1


@dataclass(frozen=True)
class MadeUpRun:
    """What to make up. `stop_after` leaves the run unfinished in the middle of the step behind that many flips."""

    num_layers: int = 16
    num_shared: int = 12
    stages: int = 1
    num_sequences: int = 12
    native_shared: tuple[int, ...] = ()
    keep_full: tuple[int, ...] = ()
    stop_after: int | None = None
    name: str = "made-up/model"
    revision: str | None = None  # of a checkpoint that the hub delivered
    model_type: str = "glm_moe_dsa"
    seed: int = 0
    notes: tuple[str, ...] = ()


def write_run(directory: Path, made_up: MadeUpRun = MadeUpRun()) -> RunRecord:
    """Write journal.jsonl into `directory` and return the run as its readers see it."""
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory / JOURNAL_NAME)
    for event in events(made_up):
        journal.append(event)
    return load_run(directory)


def events(made_up: MadeUpRun) -> list[Event]:
    """The journal's events in order: start, baseline and references, one losses event and one commit per step."""
    found = [_start(made_up)]
    pattern = Pattern(found[0]["start_pattern"])
    found.append(_losses(made_up, 0, [pattern.letters, *found[0]["references"].values()]))
    step = 0
    while step < made_up.num_shared:
        for block in _blocks(made_up):
            candidates = _candidates(made_up, pattern, block)
            if step == made_up.num_shared or not candidates:
                continue
            step += 1
            losses = _losses(made_up, step, [pattern.flip(layer).letters for layer in candidates])
            if made_up.stop_after is not None and step > made_up.stop_after:
                half = len(candidates) // 2
                return [*found, _losses(made_up, step, losses["patterns"][:half])]
            commit = _commit(made_up, step, losses, candidates)
            found += [losses, commit]
            pattern = Pattern(commit["pattern"])
    notes = [{"event": "note", "text": text} for text in made_up.notes]
    return [*found, *notes, {"event": "finish", "pattern": pattern.letters}]


def _start(made_up: MadeUpRun) -> Event:
    n = made_up.num_layers
    start_pattern = Pattern.from_full_layers(set(range(n)) - set(made_up.native_shared), n).letters
    fractions = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(n - made_up.num_shared, n))
    return {
        "event": "start",
        "format": "icsearch.journal/1",
        "icsearch_version": VERSION,
        "time": "2026-11-02T09:30:00+00:00",
        "options": {
            "method": "greedy",
            "strategy": "exact",
            "objective": "lm-loss",
            "num_shared": made_up.num_shared,
            "stages": made_up.stages,
            "keep_full": list(made_up.keep_full),
            "dtype": "bfloat16",
            "device": "cuda",
            "batch_size": 4,
            "attention": "icsearch",
            "seed": made_up.seed,
        },
        "model": {
            "name_or_path": made_up.name,
            "revision": made_up.revision,
            "model_type": made_up.model_type,
            "fingerprint": hashlib.sha256(made_up.name.encode()).hexdigest(),
            "native_shared": list(made_up.native_shared),
            "wrapper_config": False,
            "num_hidden_layers": n,
        },
        "calibration": {
            "fingerprint": hashlib.sha256(b"calibration").hexdigest(),
            "num_sequences": made_up.num_sequences,
            "seq_len": 2048,
            "source": "made-up corpus",
        },
        "environment": {"torch": "0.0", "transformers": "0.0", "platform": "made-up", "threads": 2},
        "num_layers": n,
        "decoder_layers": n,
        "layer_indices": list(range(n)),
        "start_pattern": start_pattern,
        "references": {f"uniform:{f}": _uniform(made_up, f) for f in fractions},
        "blocks": [list(block) for block in _blocks(made_up)],
        "tokens": [2047] * made_up.num_sequences,
    }


def _uniform(made_up: MadeUpRun, retention: Fraction) -> str:
    n = made_up.num_layers
    kept = set(Pattern.uniform(n, retention).full_layers) - set(made_up.native_shared)
    return Pattern.from_full_layers(kept, n).letters


def _blocks(made_up: MadeUpRun) -> list[tuple[int, int]]:
    return [(block.start, block.stop) for block in split_stages(made_up.num_layers, made_up.stages)]


def _candidates(made_up: MadeUpRun, pattern: Pattern, block: tuple[int, int]) -> list[int]:
    return [
        layer for layer in range(block[0] + 1, block[1]) if pattern.is_full(layer) and layer not in made_up.keep_full
    ]


def _losses(made_up: MadeUpRun, step: int, patterns: list[str]) -> Event:
    unique = list(dict.fromkeys(patterns))
    return {
        "event": "losses",
        "step": step,
        "sequences": [0, made_up.num_sequences],
        "patterns": unique,
        "nll": [nll_sums(made_up, letters) for letters in unique],
        "layer_sequences": len(unique) * made_up.num_layers * made_up.num_sequences // 2 + made_up.num_sequences,
        "seconds": 0.4 * len(unique),
    }


def _commit(made_up: MadeUpRun, step: int, losses: Event, candidates: list[int]) -> Event:
    tokens = [2047] * made_up.num_sequences
    totals = [mean_loss(sums, tokens) for sums in losses["nll"]]
    best = min(range(len(candidates)), key=lambda i: (totals[i], candidates[i]))
    winner = losses["nll"][best]
    ties = [
        layer
        for i, (layer, sums) in enumerate(zip(candidates, losses["nll"], strict=True))
        if i != best and paired_difference(sums, winner, tokens).is_tie
    ]
    pattern = losses["patterns"][best]
    return {
        "event": "commit",
        "step": step,
        "layer": candidates[best],
        "pattern": pattern,
        "candidates": sorted(candidates),
        "ties": ties,
    }


def nll_sums(made_up: MadeUpRun, letters: str) -> list[float]:
    """Summed NLL (nats) of each sequence under a pattern: baseline, cost of sharing, shared and own noise."""
    cost = _cost(made_up, letters)
    sums = []
    for sequence in range(made_up.num_sequences):
        of_sequence = random.Random(f"{made_up.seed}/{sequence}")
        own = random.Random(f"{made_up.seed}/{sequence}/{letters}").gauss(0, 3e-4)
        sums.append((BASELINE + of_sequence.gauss(0, 0.2) + cost * of_sequence.uniform(0.6, 1.4) + own) * 2047)
    return sums


def _cost(made_up: MadeUpRun, letters: str) -> float:
    pattern = Pattern(letters)
    weights: Any = random.Random(f"{made_up.seed}/weights")
    each = [math.exp(weights.gauss(math.log(1.2e-3), 1.8)) - 2e-4 for _ in letters]
    distance = [layer - source for layer, source in enumerate(pattern.sources())]
    crowding = 1 + 3 * (len(pattern.shared_layers) / len(pattern)) ** 4
    native = set(made_up.native_shared)
    total: float = sum(
        weight * far**1.5 for i, (weight, far) in enumerate(zip(each, distance, strict=True)) if far and i not in native
    )
    return crowding * total
