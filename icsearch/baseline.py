"""`icsearch dp-baseline` as a function: similarity by one sweep, the dynamic program, the pattern's real loss.

The baseline of the IndexCache paper (Appendix C). It maximises a local similarity and so cannot see how missed
tokens add up downstream; the report sets its prediction beside what the pattern really costs.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from icsearch import plan
from icsearch.cosine_dp import solve
from icsearch.errors import IcsearchError
from icsearch.files import write_atomically
from icsearch.journal import Event
from icsearch.pattern import Pattern
from icsearch.prepare import (
    Inputs,
    Listener,
    SweepScorer,
    count_in_sweeps,
    device_batches,
    load_model,
    memory_of,
    obtain_batches,
    open_model,
    pattern_options,
    pattern_start,
    run_options,
    tell_what_happens,
)
from icsearch.record import RunRecord
from icsearch.requests import BaselineRequest
from icsearch.rundir import RunDirectory
from icsearch.search import Scoring
from icsearch.similarity import SimilaritySweep, similarity_event

SIMILARITY_FORMAT = "icsearch.similarity/1"


def dp_baseline(request: BaselineRequest, listener: Listener) -> RunRecord:
    """Find the pattern of highest similarity, and its loss. Raises IcsearchError for bad input."""
    source, layout = open_model(request.calibration)
    num_shared = request.resolve_num_shared(layout.start_pattern)
    run = RunDirectory(request.out)
    with run.locked():
        inputs = Inputs(source, layout, obtain_batches(request, source, layout, listener))
        existing = [] if request.fresh else run.existing()
        options = {
            "method": "dp-baseline",
            "strategy": "dynamic-program",
            "objective": "cosine-similarity",
            **pattern_options(request, num_shared),
            **run_options(request, inputs, existing),
        }
        start = pattern_start(request, inputs, options)
        reused = _read_similarity(request.similarity, start) if request.similarity else None
        record = RunRecord.replay(run.open(start, existing))
        tell_what_happens(existing, record.finished, request.out, listener)
        return record if record.finished else _run(request, inputs, run, record, reused, listener)


def _run(
    request: BaselineRequest,
    inputs: Inputs,
    run: RunDirectory,
    record: RunRecord,
    reused: Event | None,
    listener: Listener,
) -> RunRecord:
    options, layout = record.start["options"], inputs.layout
    memory = memory_of(request, inputs, options)
    per_sweep = memory.patterns_per_sweep
    dsa = load_model(request, inputs, options, listener)
    batches = device_batches(dsa, inputs.batches, options["batch_size"])
    references = [record.start_pattern, *map(Pattern, record.references.values())]
    total = (layout.num_layers + count_in_sweeps(layout, references, per_sweep)) * len(record.tokens)
    listener.planned(plan.model_rows(record.start), total, record.layer_sequences)
    scorer = SweepScorer(dsa, batches, per_sweep)
    scoring = Scoring(run.journal, record, scorer, listener, layout.count_layer_runs)
    if reused is not None and not record.similarity_sums.sequences:
        scoring.append(reused)
    sweep = SimilaritySweep(dsa, layout.index_topk, memory.shape.selections_bytes(len(dsa.slots)) > memory.spare)
    listener.step_started(0, 1, layout.num_layers * len(record.tokens))
    for batch in batches:
        if batch.first >= record.similarity_sums.sequences:
            scoring.append(similarity_event(sweep, batch, listener.layer_done))
    _save_similarity(request.out, record)
    _choose(request, record, scoring)
    scoring.score_references(record.pattern)
    scoring.append({"event": "finish", "pattern": record.pattern.letters})
    return record


def _choose(request: BaselineRequest, record: RunRecord, scoring: Scoring) -> None:
    """Solve the dynamic program and journal its pattern."""
    start = record.start_pattern
    stages = frozenset(first for first, _ in record.start["blocks"])
    native = frozenset(record.start["model"]["native_shared"])
    solutions = solve(
        record.similarity_sums.means()["cosine"],
        must_be_full=(request.keep_full | stages) - native - {0},
        must_be_shared=native,
    )
    kept = len(start.full_layers) - record.start["options"]["num_shared"]
    pattern = solutions.pattern(kept)
    scoring.append({"event": "chosen", "pattern": pattern.letters, "objective": solutions.objective(kept)})


def _save_similarity(out: Path, record: RunRecord) -> None:
    """similarity.npz (lower triangles, zeros above) and similarity.json, which says what they belong to."""
    means = record.similarity_sums.means()
    arrays = {name: _square(means[name]) for name in ("cosine", "overlap")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(out / "similarity.npz", buffer.getvalue())
    manifest = {"format": SIMILARITY_FORMAT, "queries": means["queries"], **_identity(record.start)}
    write_atomically(out / "similarity.json", json.dumps(manifest, indent=2) + "\n")


def _square(rows: list[list[float]]) -> Any:
    square = np.zeros((len(rows), len(rows)))
    for layer, row in enumerate(rows):
        square[layer, : len(row)] = row
    return square


def _identity(start: Event) -> dict[str, Any]:
    options = start["options"]
    return {
        "model": start["model"]["fingerprint"],
        "calibration": start["calibration"]["fingerprint"],
        "numerics": {name: options[name] for name in ("dtype", "device", "batch_size", "attention", "threads")},
    }


def _read_similarity(path: Path, start: Event) -> Event:
    """A similarity.npz as an event, refused unless it is of the same model and batches."""
    manifest_path = path.with_suffix(".json")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        with np.load(path, allow_pickle=False) as arrays:
            squares = {name: arrays[name] for name in ("cosine", "overlap")}
        queries, found = int(manifest["queries"]), {name: manifest[name] for name in ("model", "calibration")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IcsearchError(
            f"cannot use {path} ({type(error).__name__}: {error}): expected a similarity.npz with its similarity.json"
        ) from None
    wanted = {name: _identity(start)[name] for name in found}
    if manifest.get("format") != SIMILARITY_FORMAT or found != wanted:
        other = [name for name in found if found[name] != wanted[name]] or ["format"]
        raise IcsearchError(f"{path} belongs to another {' and another '.join(other)}: leave --similarity out")
    layers = start["num_layers"]
    if any(square.shape != (layers, layers) for square in squares.values()):
        raise IcsearchError(f"{path} is not {layers} x {layers}, the model's DSA layers: leave --similarity out")
    return {
        "event": "similarity",
        "sequences": [0, len(start["tokens"])],
        "queries": queries,
        **{name: _triangle(square * queries) for name, square in squares.items()},
        "layer_sequences": 0,
        "seconds": 0.0,
    }


def _triangle(square: Any) -> list[list[float]]:
    return [[float(value) for value in row[:layer]] for layer, row in enumerate(square)]
