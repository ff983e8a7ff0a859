"""What a run says before it starts, in words: the model, the memory, what it will take, and what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.text import format_bytes
from icsearch.engines.pipeline import aligned_partition
from icsearch.model.shape import CPU, DISK
from icsearch.planning.memory import DEVICE, Kept, Memory
from icsearch.search.swaps import MAX_SWAPS

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class SearchPlan:
    """A search in numbers. A layer evaluation is one layer over all sequences.

    `layer_evaluations` is the most that the search can take (`rehearsal.preview`), `expected_layer_evaluations` what
    it is likely to take with the states that are kept between steps (`rehearsal.rehearsed`).
    """

    num_layers: int
    candidates: int
    num_shared: int
    candidate_evaluations: int
    layer_evaluations: int
    expected_layer_evaluations: int
    naive_layer_evaluations: int
    memory: Memory
    kept: Kept
    heldout_sequences: int = 0  # of a refinement; 0 where there is none


def search_rows(plan: SearchPlan, start: dict[str, Any]) -> Rows:
    """What a search will take; `start` is the journal's first event."""
    memory, ratio = plan.memory, plan.naive_layer_evaluations / plan.expected_layer_evaluations
    branches = min(memory.patterns_per_sweep, plan.candidates) + 1
    rows = [
        ("DSA layers", f"{plan.num_layers}, of which {plan.candidates} can be flipped; {plan.num_shared} will be"),
        ("evaluations", f"{plan.candidate_evaluations} candidates in {plan.num_shared} steps"),
        (
            "layer evaluations",
            f"about {plan.expected_layer_evaluations}, at most {plan.layer_evaluations}; one whole forward each would "
            f"take {plan.naive_layer_evaluations} ({ratio:.1f} times as many)",
        ),
        (
            "memory",
            f"{format_bytes(memory.weights)} weights + {branches} branches x {format_bytes(memory.branch_bytes)} + "
            f"{format_bytes(memory.shape.layer_bytes)} in a layer{memory.shape.guess}, "
            f"of {format_bytes(memory.budget)} (estimate)",
        ),
    ]
    if memory.in_cpu_memory:
        states = format_bytes(memory.live_branches(plan.candidates) * memory.branch_bytes)
        room = format_bytes(memory.in_cpu_memory)
        text = f"in pinned CPU memory, each tensor as the next power of two: {states} of {room}; one at a time moves in"
        rows.append(("branch states", text))
    peak, lost = memory.peak(plan.candidates, plan.kept.bytes)  # of the process; on CUDA of the device
    parts = {"the program itself": memory.program, "lost between tensors": lost}
    told = " and ".join(f"{format_bytes(size)} {name}" for name, size in parts.items() if size)
    rows += [
        ("kept between steps", plan.kept.words),
        ("peak", f"about {format_bytes(peak)} in all{', with ' if told else ''}{told} (estimate)"),
    ]
    if start["options"]["objective"] == "kl":
        along = "no room for its final states: it runs along in every sweep"
        kept = f"{format_bytes(memory.full_states)} of final states kept" if memory.full_states else along
        rows.append(("all-F for the KL", kept))
    if plan.heldout_sequences:  # how many rounds a refinement goes on nobody knows before
        moves = (plan.candidates - plan.num_shared) * plan.num_shared  # each F layer with each S layer that was one
        text = (
            f"then swaps, in rounds of at most {moves} moves; one for each swap made (at most {MAX_SWAPS}), "
            f"one to end with; confirmed on {plan.heldout_sequences} held-out sequences; not in the numbers above"
        )
        rows.append(("refinement", text))
    return rows


def table_rows(memory: Memory) -> Rows:
    """What the second-order table takes of memory; nothing where none is made."""
    table = memory.table
    if table is None:
        return []
    where = {DEVICE: "on the device", CPU: "in pinned CPU memory", DISK: "on disk"}[table.place]
    wave = f"{table.batches_per_wave} batches" if table.batches_per_wave > 1 else "one batch"
    text = (
        f"{format_bytes(table.layer_bytes)} while a layer is differentiated{memory.shape.guess}; the entries of all "
        f"layers, {format_bytes(table.resting)} for {wave} at a time, {where} (estimate)"
    )
    return [("memory of the table", text)]


def model_rows(start: dict[str, Any]) -> Rows:
    """Model and numerics in words; `start` is the journal's first event."""
    model, options = start["model"], start["options"]
    threads = f"{options['threads']} thread{'' if options['threads'] == 1 else 's'}"
    calls = f"{options['batch_size']} sequence{'' if options['batch_size'] == 1 else 's'} a call"
    kernels = f"{options['kernels']} kernels"
    rows = [
        ("model", f"{model['name_or_path']} ({model['model_type']}, {start['decoder_layers']} layers)"),
        ("numerics", f"{options['dtype']} on {options['device']}, {threads}, {calls}, {kernels}"),
    ]
    if shared := model["native_shared"]:
        rows.append(("native S layers", f"{', '.join(map(str, shared))}: shared by the checkpoint, and they stay so"))
    return rows


def weight_rows(memory: Memory, patterns: int, sequences: int, bytes_per_second: float | None) -> Rows:
    """Where weights are, and what a step of at most so many patterns on so many sequences reads of them."""
    offload = memory.offload
    if not offload.streamed:
        return [("weights", f"resident: {offload.why}")]
    source = {DISK: "the checkpoint's shards", CPU: "CPU memory"}[offload.where]
    waves = -(-sequences // (memory.shape.batch_size * memory.batches_per_wave * memory.grid.data))
    passes = waves * -(-patterns // memory.patterns_per_sweep)
    size = passes * offload.pass_bytes
    text = f"all layers {'once' if passes == 1 else f'{passes} times'} a step, about {format_bytes(size)}"
    if bytes_per_second:
        rate = f"{format_bytes(int(bytes_per_second))}/s, as measured just now"
        text += f", {size / bytes_per_second:.0f} s at {rate} (estimate; read while layers compute)"
    return [("weights", f"streamed from {source}, layer by layer: {offload.why}"), ("reading", text)]


def process_rows(memory: Memory, sequences: int, more: str = "") -> Rows:
    """Who computes, and how many of them have nothing to do with so many sequences; nothing where one process does."""
    grid, size = memory.grid, memory.shape.batch_size
    if grid.size == 1:
        return []
    words, shares = grid.words, -(-sequences // (size * memory.batches_per_wave))
    if idle := grid.pipeline * max(0, grid.data - shares):
        smaller = min(size - 1, sequences // grid.data)  # with that, every data rank has some
        option = f"--batch-size {smaller} (not by itself, for the bits of a loss follow the batch size), "
        words += (
            f"; {idle} of the {grid.size} {'has' if idle == 1 else 'have'} nothing to do, for {sequences} sequences "
            f"make {shares} share{'s' if shares > 1 else ''}: give {option if smaller > 0 else ''}more sequences, "
            "or start fewer processes"
        )
    return [("processes", f"{words}{more}")]


def stage_rows(start: dict[str, Any]) -> Rows:
    """Of a run, by its first event: blocks that begin with a layer which the checkpoint itself shares; none, nothing.

    A search keeps the first layer of each block F, so that a serving stage can begin there. A layer that comes without
    an indexer cannot be kept F: a server that is cut there would begin that stage without a selection, and no repair
    helps.
    """
    firsts = [first for first, _ in start.get("blocks") or ()]
    return [("stages", text) for text in shared_starts(Pattern(start["start_pattern"]), firsts, start["layer_indices"])]


def shared_starts(start: Pattern, firsts: Sequence[int], layer_indices: Sequence[int]) -> list[str]:
    """Which blocks begin with a native S layer, and what to do, in one text; none where no block does.

    `firsts` are the first positions of the blocks in the pattern, `layer_indices` the decoder layers of all positions.
    """
    wrong = [number for number, first in enumerate(firsts) if not start.is_full(first)]
    if not wrong:
        return []
    layers = [  # as their letters are counted; with the number in the decoder, where other layers lie between
        str(first) if (decoder := layer_indices[first]) == first else f"{first} (decoder layer {decoder})"
        for first in (firsts[number] for number in wrong)
    ]
    blocks, s, verb = ", ".join(str(number + 1) for number in wrong), *(("s", "") if len(wrong) > 1 else ("", "s"))
    sizes = [stop - first for first, stop in pairwise((*firsts, len(start)))]
    aligned = aligned_partition(start, range(len(start)), sizes)
    advice = f"too few layers have an indexer for {len(firsts)} stages: give fewer"
    if aligned is not None:  # before the nearest layers that have one
        cuts = [sum(aligned[:number]) for number in range(1, len(aligned))]
        kept, served = ",".join(map(str, cuts)), ",".join(["0", *(str(layer_indices[cut]) for cut in cuts)])
        advice = (
            f"cut the server at layers {served} in place, where it takes its cuts by hand: search with --keep-full "
            f"{kept}, or let icsearch export --serve-pp {served} repair the pattern"
        )
    return [
        f"block{s} {blocks} of --stages {len(firsts)} begin{verb} with layer{s} {', '.join(layers)}, which the "
        "checkpoint itself shares: F cannot be kept there, and a serving stage that begins there would have no "
        f"selection to reuse; {advice}"
    ]
