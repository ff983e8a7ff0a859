"""`icsearch dp-baseline` as a function: similarity by one sweep, the dynamic program, the pattern's real loss.

The baseline of the IndexCache paper (Appendix C). It maximises a local similarity and so cannot see how missed
tokens add up downstream; the report sets its prediction beside what the pattern really costs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from icsearch.block import Batch, cut_waves
from icsearch.cosine_dp import solve
from icsearch.errors import IcsearchError, first_line
from icsearch.files import typed_path, write_atomically
from icsearch.journal import Event
from icsearch.jsonfile import (
    OBJECT,
    TEXT,
    FieldError,
    check_fields,
    optional,
    read_object,
    strict,
    whole,
    write_object,
)
from icsearch.pattern import Pattern
from icsearch.planning import plan
from icsearch.processes.launch import check_device, grids
from icsearch.processes.wave_jobs import COMPARE
from icsearch.requests import BaselineRequest
from icsearch.runs.record import RunRecord
from icsearch.search import Progress, Scoring
from icsearch.setup.inputs import Inputs
from icsearch.setup.prepare import Loaded, Publish, load_together, opened, publish_nothing
from icsearch.setup.start_event import pattern_start
from icsearch.setup.sweep_scorer import count_in_sweeps, make_scoring, process_rows, weight_rows
from icsearch.similarity import SimilaritySweep, similarity_events
from icsearch.weights.layout import Layout

if TYPE_CHECKING:
    from icsearch.processes.world import World

SIMILARITY_FORMAT = "icsearch.similarity/1"
_ARRAYS = ("cosine", "overlap")
_HEADER_BYTES = 4096  # far more than numpy writes before an array
_ROUNDING = 1e-6  # by which a mean cosine may pass 1
_MANIFEST_FIELDS = {
    "format": TEXT,
    "queries": whole(1),
    "model": TEXT,
    "calibration": TEXT,
    "numerics": optional(OBJECT),
}
_NUMERICS = ("dtype", "device", "batch_size", "attention", "kernels", "block_elements", "threads")


def dp_baseline(
    request: BaselineRequest, listener: Progress, publish: Publish = publish_nothing, world: World | None = None
) -> RunRecord:
    """Find the pattern of highest similarity, and its loss. Raises IcsearchError for bad input.

    With `world`, this is rank 0 of a run of several processes, which share the sequences.
    """
    wanted = grids(world.size if world else 1, None, 1)
    check_device(request.device, wanted[0].size)
    with opened(request, lambda inputs, existing: _start(request, inputs, existing), listener) as here:
        reused = [_read_similarity(request.similarity, here.start)] if request.similarity else []
        record = RunRecord.replay(here.existing)
        if not record.finished:
            loaded = load_together(request, here, world, wanted)
            record = RunRecord.replay(here.run.open(here.start, here.existing))
            _compare(request, here.inputs, loaded, make_scoring(here, record, loaded, listener), reused)
        _save_similarity(request.out, record)
        publish(request.out, record)
        return record


def _start(request: BaselineRequest, inputs: Inputs, existing: list[Event]) -> Event:
    method = {"method": "dp-baseline", "strategy": "dynamic-program", "objective": "cosine-similarity"}
    return pattern_start(request, inputs, existing, method)


def _compare(request: BaselineRequest, inputs: Inputs, loaded: Loaded, scoring: Scoring, reused: list[Event]) -> None:
    """Similarity, then the pattern, then what it costs beside the references."""
    record, layout = scoring.record, inputs.layout
    patterns = [record.start_pattern, *map(Pattern, record.references.values())]
    runs = layout.num_layers + count_in_sweeps(layout, patterns, loaded.memory.patterns_per_sweep)
    rows = [*plan.model_rows(record.start), *process_rows(loaded), *weight_rows(loaded, len(patterns))]
    scoring.progress.planned(rows, runs * len(record.tokens), record.layer_sequences)
    if not record.similarity_sums.sequences:
        for event in reused:
            scoring.append(event)
    if (measured := record.similarity_sums.numerics) is not None:
        scoring.note(_other_numerics(measured, record.start))
    _measure_similarity(layout, loaded, scoring)
    if record.chosen is None:
        _choose(request, scoring)
    scoring.score_references(record.pattern)
    scoring.append({"event": "finish", "pattern": record.pattern.letters})


def _measure_similarity(layout: Layout, loaded: Loaded, scoring: Scoring) -> None:
    """Wave by wave, what the journal does not hold yet."""
    memory, of_batch = loaded.memory, loaded.memory.shape.selections_bytes(len(layout.layer_indices))
    per_wave = min(memory.batches_per_wave, max(1, memory.spare // of_batch))
    shared = {"index_topk": layout.selection.kept, "keep_on_cpu": of_batch > memory.spare}
    left = [batch for batch in loaded.batches if batch.first >= scoring.record.similarity_sums.sequences]
    if left:
        scoring.progress.step_started(0, 1, layout.num_layers * sum(len(batch.input_ids) for batch in left))
    waves = cut_waves(left, per_wave)
    for events in _similarities(loaded, shared, waves, scoring.progress.layer_done):
        for event in events:
            scoring.append(event)


def _similarities(
    loaded: Loaded, shared: dict[str, Any], waves: Sequence[Sequence[Batch]], on_layer: Callable[[int], None]
) -> Iterator[list[Event]]:
    """The events of each wave, by one process or by all."""
    if loaded.crew is not None:
        items = [{"batches": [batch.first for batch in wave]} for wave in waves]
        yield from loaded.crew.do_jobs(COMPARE, shared, items, on_layer)
        return
    sweep = SimilaritySweep(loaded.dsa, shared["index_topk"], shared["keep_on_cpu"])
    for wave in waves:
        yield similarity_events(sweep, wave, on_layer)


def _choose(request: BaselineRequest, scoring: Scoring) -> None:
    """Solve the dynamic program and journal its pattern."""
    record = scoring.record
    start = record.start_pattern
    stages = frozenset(first for first, _ in record.start["blocks"])
    native = frozenset(record.start["model"]["native_shared"])
    solutions = solve(
        _square(record.similarity_sums.means()["cosine"]).tolist(),
        must_be_full=(request.keep_full | stages) - native - {0},
        must_be_shared=native,
    )
    kept = len(start.full_layers) - record.start["options"]["num_shared"]
    pattern = solutions.pattern(kept)
    scoring.append({"event": "chosen", "pattern": pattern.letters, "objective": solutions.objective(kept)})


def _save_similarity(out: Path, record: RunRecord) -> None:
    """similarity.npz (lower triangles, zeros above) and similarity.json, which says what they belong to.

    A similarity that was read from a file keeps the numerics that it was measured with there.
    """
    means = record.similarity_sums.means()
    arrays = {name: _square(means[name]) for name in ("cosine", "overlap")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(out / "similarity.npz", buffer.getvalue())
    identity, measured = _identity(record.start), record.similarity_sums.numerics
    manifest = {"format": SIMILARITY_FORMAT, "queries": means["queries"], **identity}
    if measured is not None:
        manifest["numerics"] = measured
    write_object(out / "similarity.json", manifest)


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
        "numerics": {name: options.get(name) for name in _NUMERICS},
    }


def _other_numerics(measured: dict[str, Any], start: Event) -> list[str]:
    """A note where a similarity from a file was measured with other numerics than the losses of this run."""
    here = _identity(start)["numerics"]
    differing = [f"{name} {measured.get(name)}, here {here[name]}" for name in here if measured.get(name) != here[name]]
    if not differing:
        return []
    return [f"the similarity was measured in an earlier run with other numerics ({'; '.join(differing)})"]


def _read_similarity(path: Path, start: Event) -> Event:
    """A similarity.npz as an event, refused unless it is of the same model and batches."""
    expected, advice = "the similarity.json that dp-baseline wrote beside it", "leave --similarity out"
    path = typed_path(str(path), IcsearchError)
    described = path.parent / f"{path.stem or 'similarity'}.json"
    manifest = read_object(described, expected=expected, advice=advice, error=IcsearchError)
    try:
        check_fields(manifest, _MANIFEST_FIELDS)
    except FieldError as error:
        raise IcsearchError(f"{described} is damaged ({error}): {advice}") from None
    found = {name: manifest[name] for name in ("model", "calibration")}
    wanted = {name: _identity(start)[name] for name in found}
    if manifest["format"] != SIMILARITY_FORMAT or found != wanted:
        other = [name for name in found if found[name] != wanted[name]] or ["format"]
        raise IcsearchError(f"{path} belongs to another {' and another '.join(other)}: {advice}")
    queries = manifest["queries"]
    return {
        "event": "similarity",
        "sequences": [0, len(start["tokens"])],
        "queries": queries,
        "numerics": strict(manifest.get("numerics") or {}),
        **{name: _triangle(square * queries) for name, square in _read_squares(path, start["num_layers"]).items()},
        "layer_sequences": 0,
        "seconds": 0.0,
    }


def _read_squares(path: Path, layers: int) -> dict[str, Any]:
    """`cosine` and `overlap` of a similarity.npz, float64 [layers, layers] each; raises IcsearchError.

    What is larger than that is not read: a small archive can hold arrays larger than memory.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            sizes = [arrays.zip.getinfo(f"{name}.npy").file_size for name in _ARRAYS]
            small = max(sizes) <= 8 * layers * layers + _HEADER_BYTES
            squares = {name: arrays[name] for name in _ARRAYS} if small else {}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds by the kind of damage
        raise IcsearchError(
            f"cannot use {path} ({type(error).__name__}: {first_line(error)}): expected a similarity.npz of "
            "dp-baseline; leave --similarity out"
        ) from None
    if any(squares.get(name, np.zeros(0)).shape != (layers, layers) for name in _ARRAYS):
        raise IcsearchError(f"{path} is not {layers} x {layers}, the model's DSA layers: leave --similarity out")
    for name, square in squares.items():
        if square.dtype != np.float64 or not (np.abs(square) <= 1 + _ROUNDING).all():
            raise IcsearchError(
                f"{name} of {path} does not hold float64 numbers from -1 to 1 alone: expected what dp-baseline wrote; "
                "leave --similarity out"
            )
    return squares


def _triangle(square: Any) -> list[list[float]]:
    return [[float(value) for value in row[:layer]] for layer, row in enumerate(square)]
