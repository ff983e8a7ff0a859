"""A made-up evaluation and a made-up similarity baseline: documents and journals from formulas. No model, no torch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.runs.evaluation import EvalRecord
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.search.dynamic_program import Solutions, solve
from run_fixtures import MadeUpRun, events, nll_sums

TASKS = ("key_value", "variable_tracking", "needle")
TOKENS = 2047
EDGES = [0, 256, 512, 1024, 2048]


@dataclass(frozen=True)
class MadeUpEval:
    """What to make up: which optional parts there are, and how many layers and sequences."""

    num_layers: int = 16
    num_sequences: int = 12
    tasks: bool = True
    overlap: bool = True
    savings: bool = True
    in_sample: tuple[str, ...] = ("greedy run @1/4",)
    foreign: tuple[str, ...] = ("published:made-up",)
    name: str = "made-up/model"
    revision: str | None = None
    seed: int = 0

    @property
    def run(self) -> MadeUpRun:
        named = {"name": self.name, "revision": self.revision}
        return MadeUpRun(self.num_layers, num_sequences=self.num_sequences, seed=self.seed, **named)


def made_up_document(made_up: MadeUpEval = MadeUpEval()) -> dict[str, Any]:
    """The content of an eval.json."""
    record = EvalRecord.replay(eval_events(made_up))
    return record.to_json()


def eval_events(made_up: MadeUpEval) -> list[Event]:
    """An evaluation's journal: start, measures, tasks, and what a pattern saves."""
    named = named_patterns(made_up)
    start = {
        **{key: events(made_up.run)[0][key] for key in ("icsearch_version", "start_pattern", "layer_indices")},
        **{key: events(made_up.run)[0][key] for key in ("model", "calibration", "environment")},
        "event": "start",
        "options": {"dtype": "bfloat16", "device": "cuda", "batch_size": 4},
        "patterns": named,
        "tokens": [TOKENS] * made_up.num_sequences,
        "bucket_edges": EDGES,
        "bucket_tokens": [[255, 256, 512, 1024]] * made_up.num_sequences,
        "choosing_queries": 2048 - 256,
        "index_topk": 256,
    }
    table = {one["pattern"]: _measures(made_up, one["pattern"]) for one in named}
    measures = {"event": "measures", "sequences": [0, made_up.num_sequences], "patterns": table}
    found: list[Event] = [start, {**measures, "layer_sequences": 1000, "seconds": 83.0}]
    found += _task_events(made_up, named) if made_up.tasks else []
    return [*found, *(_savings(made_up, named) if made_up.savings else []), {"event": "finish"}]


def named_patterns(made_up: MadeUpEval) -> list[dict[str, Any]]:
    """Full, uniform, a greedy run's nested patterns, dp-baseline, a published pattern and one by its letters."""
    n, run = made_up.num_layers, made_up.run
    found = [("full", "F" * n, "full")]
    fractions = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
    found += [(f"uniform {f}", Pattern.uniform(n, f).letters, "uniform") for f in fractions]
    commits = [e for e in events(replace(run, num_shared=n - math.ceil(n / 8))) if e["event"] == "commit"]
    for fraction in fractions:
        kept = math.ceil(fraction * n)
        letters = next(c["pattern"] for c in commits if c["pattern"].count("F") == kept)
        found.append((f"greedy run @{fraction}", letters, "greedy"))
        found.append((f"dp-baseline dp-{fraction.denominator}", _dp(made_up, kept).letters, "dp-baseline"))
    chance = random.Random(made_up.seed)
    some = Pattern.from_full_layers({0, *chance.sample(range(1, n), n // 4)}, n)
    found.append(("published:made-up", some.letters, "published"))
    other = Pattern.from_full_layers({0, *chance.sample(range(1, n), n // 3)}, n)
    found.append((other.letters, other.letters, "letters"))
    return [
        {
            "name": name,
            "pattern": letters,
            "method": method,
            "in_sample": name in made_up.in_sample,
            "foreign": name in made_up.foreign,
        }
        for name, letters, method in found
    ]


def _dp(made_up: MadeUpEval, kept: int) -> Pattern:
    return solutions(made_up.num_layers, made_up.seed).pattern(kept)


def _measures(made_up: MadeUpEval, letters: str) -> dict[str, Any]:
    """Sums by sequence; what sharing costs is lost where the text is long."""
    base = nll_sums(made_up.run, "F" * len(letters))
    chance = random.Random(f"{made_up.seed}/{letters}/spread")
    own = [b + (a - b) * chance.uniform(0.6, 1.4) for a, b in zip(nll_sums(made_up.run, letters), base, strict=True)]
    share = (0.0, 0.06, 0.24, 0.7)
    buckets = [
        [b * count / TOKENS + (a - b) * part for count, part in zip((255, 256, 512, 1024), share, strict=True)]
        for a, b in zip(own, base, strict=True)
    ]
    lost = [max(a - b, 0.0) for a, b in zip(own, base, strict=True)]
    return {
        "nll": own,
        "kl": [0.6 * one + (0.0 if "S" not in letters else 0.2) for one in lost],
        "agree": [TOKENS - min(0.5 * one, 0.8 * TOKENS) for one in lost],
        "bucket_nll": buckets,
        "overlap": _overlap(made_up, letters) if made_up.overlap else {},
    }


def _overlap(made_up: MadeUpEval, letters: str) -> dict[str, list[float]]:
    rows = triangles(made_up.num_layers, made_up.seed)["overlap"]
    pairs = enumerate(Pattern(letters).sources())
    return {
        str(layer): [rows[layer][source] * (2048 - 256)] * made_up.num_sequences
        for layer, source in pairs
        if layer != source
    }


def _task_events(made_up: MadeUpEval, named: list[dict[str, Any]]) -> list[Event]:
    found: list[Event] = []
    for one in named:
        share = 0.97 * (one["pattern"].count("F") / made_up.num_layers) ** 0.4
        for kind in TASKS:
            chance = random.Random(f"{kind}/{one['pattern']}")
            forced = [chance.random() < share for _ in range(60)]
            generated = [hit and chance.random() < 0.95 for hit in forced]
            hits = {"forced": forced, "generated": generated}
            found.append({"event": "task", "pattern": one["pattern"], "kind": kind, **hits})
    return found


def _savings(made_up: MadeUpEval, named: list[dict[str, Any]]) -> list[Event]:
    costs, measured, chance = [], [], random.Random(made_up.seed)
    for one in named:
        removed = one["pattern"].count("S") / made_up.num_layers
        rows = [
            {
                "context": context,
                "indexer_share_full": share,
                "indexer_share_pattern": share * (1 - removed) / (1 - share * removed),
                "removed_share": removed,
                "prefill_speedup_estimate": 1 / (1 - 0.7 * share * removed),
                "decode_speedup_estimate": 1 / (1 - 0.5 * share * removed),
            }
            for context, share in ((10_000, 0.17), (60_000, 0.55), (120_000, 0.7), (200_000, 0.79))
        ]
        costs.append({"name": one["name"], "rows": rows})
        for length in (512, 2048):
            for phase in ("prefill", "decode"):
                median = 1 + 0.4 * removed * length / 2048 * chance.uniform(0.8, 1.2)
                ends = {"min": median - 0.03, "median": median, "max": median + 0.05}
                measured.append({"name": one["name"], "length": length, "phase": phase, **ends})
    return [
        {"event": "extra", "name": "cost_rows", "value": costs},
        {"event": "extra", "name": "measured", "value": measured},
    ]


# --- a similarity baseline ------------------------------------------------------------------------------------------


def triangles(num_layers: int, seed: int = 0) -> dict[str, list[list[float]]]:
    """Similarity and overlap that fall with the distance of two layers, and across two borders."""
    chance = random.Random(f"{seed}/triangles")
    block = [3 * layer // num_layers for layer in range(num_layers)]
    cosine: list[list[float]] = []
    overlap: list[list[float]] = []
    for layer in range(num_layers):
        far = [(layer - source) / num_layers + 0.2 * (block[layer] - block[source]) for source in range(layer)]
        cosine.append([max(0.0, 1 - 0.09 * f - abs(chance.gauss(0, 0.008))) for f in far])
        overlap.append([min(1.0, max(0.08, 0.95 - 0.8 * f + chance.gauss(0, 0.03))) for f in far])
    return {"cosine": cosine, "overlap": overlap}


def solutions(num_layers: int, seed: int = 0) -> Solutions:
    """The best patterns by the made-up similarities; the diagonal is there for the solver alone."""
    return solve([[*row, 1.0] for row in triangles(num_layers, seed)["cosine"]])


def dp_events(made_up: MadeUpRun, chosen: bool = True) -> list[Event]:
    """The journal of a dp-baseline run: start, similarities, the chosen pattern, losses. Unfinished if not `chosen`."""
    greedy, sums, count = events(made_up), triangles(made_up.num_layers, made_up.seed), 1000 * made_up.num_sequences
    options = {"method": "dp-baseline", "strategy": "dynamic-program", "objective": "cosine-similarity"}
    start = {**greedy[0], "options": {**greedy[0]["options"], **options}}
    similarity: Event = {"event": "similarity", "sequences": [0, made_up.num_sequences], "queries": count}
    for name, rows in sums.items():
        similarity[name] = [[count * value for value in row] for row in rows]
    similarity |= {"layer_sequences": made_up.num_layers * made_up.num_sequences, "seconds": 3.0}
    if not chosen:
        return [start, similarity]
    kept = made_up.num_layers - made_up.num_shared
    solved = solutions(made_up.num_layers, made_up.seed)
    letters = solved.pattern(kept).letters
    losses = {**greedy[1], "patterns": list(dict.fromkeys([*greedy[1]["patterns"], letters]))}
    losses["nll"] = [nll_sums(made_up, one) for one in losses["patterns"]]
    choice = {"event": "chosen", "pattern": letters, "objective": solved.objective(kept)}
    return [start, similarity, choice, losses, {"event": "finish", "pattern": letters}]


def compared_events(made_up: MadeUpRun) -> list[Event]:
    """The same with Kascade's score and a second-order table, whose patterns are scored too."""
    start, similarity, choice, losses, finish = dp_events(made_up)
    layers, sequences = made_up.num_layers, made_up.num_sequences
    chance = random.Random(f"{made_up.seed}/table")
    similarity["kept"] = [[sequences * value for value in row] for row in triangles(layers)["overlap"]]
    similarity["importance"] = [sequences * (0.02 + 0.1 * chance.random()) for _ in range(layers)]
    fisher = {
        "event": "fisher",
        "sequences": [0, sequences],
        "drawn": [[_gaussian(chance, layers) for _ in range(2)] for _ in range(sequences)],
        "true": [_gaussian(chance, layers) for _ in range(sequences)],
        "layer_sequences": 0,
        "seconds": 0.0,
    }
    options = {**start["options"], "draws": 2, "seed": 0}
    kept = choice["pattern"].count("F")
    others = {"kascade": "F" * kept + "S" * (layers - kept), "fisher": "F" + "S" * (layers - kept) + "F" * (kept - 1)}
    compared: list[Event] = [
        {"event": "compared", "by": name, "pattern": letters, "objective": 0.1} for name, letters in others.items()
    ]
    more = [event["pattern"] for event in compared]
    scored = {**losses, "patterns": losses["patterns"] + more}
    scored["nll"] = [nll_sums(made_up, letters) for letters in scored["patterns"]]
    return [{**start, "options": options}, similarity, fisher, choice, *compared, scored, finish]


def _gaussian(chance: random.Random, layers: int) -> list[list[float]]:
    return [[chance.gauss(0, 1) for _ in range(layer)] for layer in range(layers)]


def dp_record(made_up: MadeUpRun) -> RunRecord:
    return RunRecord.replay(dp_events(made_up))
