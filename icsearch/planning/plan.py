"""What a search will take, worked out before it runs: evaluations, layer runs, memory. Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes
from icsearch.planning.footprint import Call, head_bytes
from icsearch.search.registry import Options
from icsearch.search.swaps import MAX_SWAPS
from icsearch.sweep.states import Keeping

FLOAT_BYTES = 4
INDEX_BYTES = 4
# glibc gives a tensor pages of its own from 32 MB on; smaller ones share a heap, and what is freed between them stays
# with the process: a third of what they hold where they are small, less where they are large. Fitted on the runs of
# benchmarks/memory.py. With pages for every tensor (MALLOC_MMAP_THRESHOLD_) the plan holds without it, within 3%, but
# layers take 1.1 to 2.1 times as long.
LARGEST_IN_HEAP, HEAP_SHARE = 2**25, 0.35
NLL_HEAD_COPIES, KL_HEAD_COPIES = 2, 6  # float32 numbers per logit that the LM head holds at once
FEWEST_BRANCHES = 3  # the trunk, a candidate, and the layer output that is just being made


@dataclass(frozen=True)
class BatchShape:
    """The numbers that memory follows from: one batch of one model."""

    batch_size: int
    seq_len: int
    hidden_size: int
    dtype_bytes: int
    index_topk: int
    index_heads: int
    index_head_dim: int
    attention_heads: int
    vocab_size: int
    call: Call | None = None  # of a layer with the block-wise arithmetic; None: the reference modules
    head_copies: int = NLL_HEAD_COPIES
    streams: int = 1  # of hidden states between layers
    selection_bytes: int | None = None  # of one query; None: index_topk indices, or as many as there are tokens
    left_numbers: int = 0  # that layers hand on for each token beside states and selection
    known: bool = True  # whether the reference modules take what is counted here; else that is a guess

    @property
    def branch_bytes(self) -> int:
        """One branch's state: hidden states, the selection, and what else layers hand on."""
        return sum(self._state_tensors)

    @property
    def pinned_bytes(self) -> int:
        """The same in pinned CPU memory, where torch takes the next power of two for each tensor."""
        return sum(1 << (size - 1).bit_length() for size in self._state_tensors)

    @property
    def _state_tensors(self) -> tuple[int, int]:
        tokens = self.batch_size * self.seq_len
        selection = self.selection_bytes or min(self.index_topk, self.seq_len) * INDEX_BYTES
        return tokens * self.streams * self.hidden_size * self.dtype_bytes, tokens * selection

    @property
    def final_bytes(self) -> int:
        """The final hidden states of one sequence."""
        return self.seq_len * self.hidden_size * self.dtype_bytes

    def selections_bytes(self, layers: int) -> int:
        """All layers' selections of one batch, in the smallest integer type that holds a position."""
        if self.selection_bytes is not None:
            return layers * self.batch_size * self.seq_len * self.selection_bytes  # or less
        width = 1 if self.seq_len <= 2**8 else 2 if self.seq_len <= 2**15 else 4
        return layers * self.batch_size * self.seq_len * min(self.index_topk, self.seq_len) * width

    @property
    def layer_bytes(self) -> int:
        """Estimate of what one call takes while it runs: of a layer, or of the LM head if that is more."""
        tokens = self.batch_size * self.seq_len
        head = head_bytes(tokens, self.hidden_size, self.vocab_size, self.dtype_bytes, self.head_copies)
        return max(self._reference_bytes if self.call is None else self.call.bytes, head)

    @property
    def _reference_bytes(self) -> int:
        """The reference indexer holds scores per head twice and a copy of the keys per query, attention its scores
        per head: (2 H_index + D_index + 3 + H_attention) float32 values per pair of tokens. Modules of another make
        are counted as if they did, too (`known` False).
        """
        pairs = self.batch_size * self.seq_len**2
        per_pair = 2 * self.index_heads + self.index_head_dim + 3 + self.attention_heads
        return pairs * per_pair * FLOAT_BYTES


def blockwise_shape(call: Call, head_copies: int = NLL_HEAD_COPIES) -> BatchShape:
    """The shape of a batch whose layers compute with the block-wise arithmetic."""
    model = call.shape
    return BatchShape(
        batch_size=call.batch_size,
        seq_len=call.seq_len,
        hidden_size=model.hidden_size,
        dtype_bytes=call.dtype_bytes,
        index_topk=model.index_topk,
        index_heads=model.index_heads,
        index_head_dim=model.index_head_dim,
        attention_heads=model.heads,
        vocab_size=model.vocab_size,
        call=call,
        head_copies=head_copies,
    )


@dataclass(frozen=True)
class Kept:
    """Which states are kept between steps, the memory that they may take, and what they take at most, in bytes."""

    keeping: Keeping
    budget: int
    bytes: int

    @property
    def words(self) -> str:
        """Such as `240.0 MB, every 2nd layer`."""
        stride = self.keeping.stride
        if not stride:
            return "nothing: there is no room"
        which = {1: "every layer", 2: "every 2nd layer", 3: "every 3rd layer"}.get(stride, f"every {stride}th layer")
        return f"{format_bytes(self.bytes)}, {which}"


@dataclass(frozen=True)
class SearchPlan:
    """The plan that is printed before a run. A layer evaluation is one layer over all sequences.

    `layer_evaluations` is the most that the search can take (`rehearsal.preview`), `expected_layer_evaluations` what an
    exact one is likely to take with the states that are kept between steps (`rehearsal.rehearse`).
    """

    strategy: Options
    num_layers: int
    candidates: int
    num_shared: int
    candidate_evaluations: int
    layer_evaluations: int
    expected_layer_evaluations: int
    naive_layer_evaluations: int
    branches_per_sweep: int
    branch_bytes: int
    layer_bytes: int
    weight_bytes: int
    memory_bytes: int
    full_state_bytes: int
    kept: Kept
    heldout_sequences: int = 0  # of a refinement; 0 where there is none
    processes: str = ""  # who computes, where several processes do
    weight_rows: tuple[tuple[str, str], ...] = ()  # where weights rest, in words
    program_bytes: int = 0  # measured: taken before the weights came
    tensor_bytes: int = 0  # of the hidden states of one batch
    state_bytes: int = 0  # one branch of one batch on the device, where all others rest in CPU memory
    resting: int = 0  # CPU memory for branch states; 0: they are on the device
    packets: int = 0  # of several processes: see `patterns_per_sweep`
    along: int = 0  # patterns that run in every sweep beside the candidates
    layer_known: bool = True  # whether `layer_bytes` is what this family's modules take; else a guess

    @property
    def live_branches(self) -> int:
        """Candidates of a sweep and the trunk, at work and on their way, and the layer output that is being made."""
        return (min(self.branches_per_sweep, self.candidates) + self.along + 1) * (1 + self.packets) + 1

    @property
    def peak_bytes(self) -> int:
        """Estimate of the most that the process has at once."""
        return self.program_bytes + self.weight_bytes + self._working_bytes + self.heap_bytes

    @property
    def _working_bytes(self) -> int:
        if self.resting:
            return self.layer_bytes + self.full_state_bytes + FEWEST_BRANCHES * self.state_bytes
        states = self.live_branches * self.branch_bytes + self.kept.bytes + self.full_state_bytes
        return self.layer_bytes + states

    @property
    def heap_bytes(self) -> int:
        """On the CPU, what the C library's heap holds between tensors: see HEAP_SHARE."""
        share = HEAP_SHARE * max(0.0, 1 - self.tensor_bytes / LARGEST_IN_HEAP) if self.program_bytes else 0.0
        return int(share * self._working_bytes)

    @property
    def moves(self) -> int:
        """How many swaps one pattern has: each F layer that may be shared with each S layer that was one."""
        return (self.candidates - self.num_shared) * self.num_shared


def room_for_branches(shape: BatchShape, weight_bytes: int, memory_bytes: int) -> int:
    """How many branches there is room for beside the weights and one layer call."""
    return (memory_bytes - weight_bytes - shape.layer_bytes) // shape.branch_bytes


def fewest_branches(packets: int = 0) -> int:
    """How many branches there must be room for. Between processes, trunk and candidate may be on their way, too."""
    return FEWEST_BRANCHES + 2 * packets


def patterns_per_sweep(shape: BatchShape, weight_bytes: int, memory_bytes: int, packets: int = 0) -> int:
    """How many candidates may live at once beside the trunk; raises IcsearchError where not even one fits.

    `packets`: how often the branches of a sweep may be on their way between processes beside those at work.
    """
    branches = room_for_branches(shape, weight_bytes, memory_bytes)
    least = fewest_branches(packets)
    if branches < least:
        needed = shape.layer_bytes + least * shape.branch_bytes
        raise IcsearchError(
            f"memory budget {format_bytes(memory_bytes)} is too small: {format_bytes(weight_bytes)} of weights and "
            f"about {format_bytes(needed)} for one candidate{_guess(shape.known)}; raise --memory, or lower "
            "--batch-size or --seq-len"
        )
    return (branches - 2 - packets) // (1 + packets)


def plan_kept(
    keeping: Keeping,
    shape: BatchShape,
    sequences: int,
    room: int,
    blocks: Sequence[range] | None = None,
    pinned: bool = False,
) -> Kept:
    """The states of every k-th layer entry, with the smallest k for which all that are of use fit into `room` bytes.

    `blocks`: the decoder layers of each process of a pipeline, of which every one has that room. `pinned`: it is in
    pinned CPU memory. Decided before the run, from numbers alone: it changes what a run costs, never its bits.
    """
    entry_bytes = (shape.pinned_bytes if pinned else shape.branch_bytes) // shape.batch_size * sequences
    for stride in range(1, keeping.num_layers):
        spaced = replace(keeping, stride=stride)
        most = max(spaced.states_in(block) for block in blocks or [range(keeping.num_layers)])
        if most * entry_bytes <= room:
            return Kept(spaced, room, most * entry_bytes)
    return Kept(replace(keeping, stride=0), 0, 0)


def rows(plan: SearchPlan, start: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan in words; `start` is the journal's first event."""
    exact = plan.strategy.name == "exact"  # what the others take follows from the losses
    most, about = ("", f"about {plan.expected_layer_evaluations}, ") if exact else ("at most ", "")
    ratio = plan.naive_layer_evaluations / (plan.expected_layer_evaluations if exact else plan.layer_evaluations)
    branches = min(plan.branches_per_sweep, plan.candidates) + 1
    return [
        *model_rows(start),
        *([("processes", plan.processes)] if plan.processes else []),
        *plan.weight_rows,
        ("DSA layers", f"{plan.num_layers}, of which {plan.candidates} can be flipped; {plan.num_shared} will be"),
        ("evaluations", f"{most}{plan.candidate_evaluations} candidates in {plan.num_shared} steps"),
        (
            "layer evaluations",
            f"{about}at most {plan.layer_evaluations}; one whole forward each would "
            f"take {plan.naive_layer_evaluations} ({ratio:.1f} times as many)",
        ),
        (
            "memory",
            f"{format_bytes(plan.weight_bytes)} weights + {branches} branches x {format_bytes(plan.branch_bytes)} + "
            f"{format_bytes(plan.layer_bytes)} in a layer{_guess(plan.layer_known)}, "
            f"of {format_bytes(plan.memory_bytes)} (estimate)",
        ),
        *_resting_rows(plan),
        ("kept between steps", plan.kept.words),
        ("peak", _peak_words(plan)),
        *_objective_rows(plan, start),
        *_refinement_rows(plan),
    ]


def _resting_rows(plan: SearchPlan) -> list[tuple[str, str]]:
    """Branch states that the device has no room for."""
    if not plan.resting:
        return []
    states = format_bytes(plan.live_branches * plan.branch_bytes)
    return [
        (
            "branch states",
            f"in pinned CPU memory, each tensor as the next power of two: {states} of {format_bytes(plan.resting)}; "
            "one at a time moves in",
        )
    ]


def _guess(known: bool) -> str:
    return "" if known else " (unknown for this family: counted as for dense attention and scores)"


def _peak_words(plan: SearchPlan) -> str:
    """What the process is expected to have at once; on CUDA the device."""
    parts = {"the program itself": plan.program_bytes, "lost between tensors": plan.heap_bytes}
    told = [f"{format_bytes(size)} {name}" for name, size in parts.items() if size]
    return f"about {format_bytes(plan.peak_bytes)} in all{', with ' if told else ''}{' and '.join(told)} (estimate)"


def _objective_rows(plan: SearchPlan, start: dict[str, Any]) -> list[tuple[str, str]]:
    """What an objective needs beside the loss."""
    if start["options"]["objective"] != "kl":
        return []
    kept = f"{format_bytes(plan.full_state_bytes)} of final states kept"
    along = "no room for its final states: it runs along in every sweep"
    return [("all-F for the KL", kept if plan.full_state_bytes else along)]


def _refinement_rows(plan: SearchPlan) -> list[tuple[str, str]]:
    """What a refinement may add; how many rounds it goes on nobody knows before."""
    if not plan.heldout_sequences:
        return []
    return [
        (
            "refinement",
            f"then swaps, in rounds of at most {plan.moves} moves; one for each swap made (at most {MAX_SWAPS}), "
            f"one to end with; confirmed on {plan.heldout_sequences} held-out sequences; not in the numbers above",
        )
    ]


def model_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    """Model and numerics in words."""
    model, options = start["model"], start["options"]
    threads = f"{options['threads']} thread{'' if options['threads'] == 1 else 's'}"
    calls = f"{options['batch_size']} sequence{'' if options['batch_size'] == 1 else 's'} a call"
    found = [
        ("model", f"{model['name_or_path']} ({model['model_type']}, {start['decoder_layers']} layers)"),
        (
            "numerics",
            f"{options['dtype']} on {options['device']}, {threads}, {calls}, {options['kernels']} kernels",
        ),
    ]
    if shared := model["native_shared"]:
        found.append(("native S layers", f"{', '.join(map(str, shared))}: shared by the checkpoint, and they stay so"))
    return found
