"""The memory of a run, planned before its weights are read: the budget, and how much of what fits into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from icsearch.commands.requests import AUTO, KL, GreedyRequest, PatternRequest, RunRequest
from icsearch.commands.setup import Inputs
from icsearch.core.errors import IcsearchError
from icsearch.model.layout import DTYPES, Layout
from icsearch.model.machine import free_bytes, resident_bytes
from icsearch.planning import offload, plan
from icsearch.planning.footprint import Call
from icsearch.planning.offload import NO_OFFLOAD, Offload, WeightSizes
from icsearch.sweep.distributed.launch import Grid, Launch, can_be_cut, pipeline_blocks

MEMORY_SHARE = 0.8  # of what is free when the run starts


@dataclass(frozen=True)
class Share:
    """One process's share of a run: of the sequences, of the layers, and of the memory that it runs in."""

    grid: Grid = field(default_factory=Grid)
    neighbours: int = 1  # processes that run in the same memory
    on_machine: int = 1  # processes on the same machine

    def sequences(self, total: int, batch_size: int) -> int:
        """The most that a data rank has of so many sequences, in whole batches."""
        return min(total, self.batches(-(-total // batch_size)) * batch_size)

    def batches(self, total: int) -> int:
        """The most that a data rank has of so many batches."""
        return -(-total // self.grid.data)

    def batches_per_wave(self, total: int) -> int:
        """The most of a data rank's batches that may go through streamed layers together, of so many in all."""
        return self.grid.batches_per_wave(self.batches(total))

    def layer_parameters(self, layout: Layout) -> tuple[int, ...]:
        """Of each layer of the largest block."""
        blocks = pipeline_blocks(layout.num_layers, layout.layer_indices, self.grid.pipeline)
        return max((tuple(layout.layer_parameters[index] for index in block) for block in blocks), key=sum)

    @property
    def packets(self) -> int:
        """How often the branches of a sweep are there beside those at work."""
        return self.grid.packets


@dataclass(frozen=True)
class Memory:
    """The memory of a run: its budget and what it goes into, in bytes.

    `full_states`: the unmodified model's final states, kept for the KL; 0 where they are not needed or do not fit.
    """

    budget: int
    weights: int  # on the device at once
    shape: plan.BatchShape
    patterns_per_sweep: int  # how many patterns may live at once beside the trunk
    full_states: int = 0
    share: Share = field(default_factory=Share)
    batches_per_wave: int = 1  # how many batches go through the layers together
    offload: Offload = NO_OFFLOAD
    resting: int = 0  # CPU memory for branch states, where the device has no room for them; 0: they are on the device
    program: int = 0  # measured: what the program itself had taken before the weights came; on CUDA not counted
    along: int = 0  # patterns that run in every sweep beside those that are scored

    @property
    def branch_bytes(self) -> int:
        """One branch's states, of all batches of a wave, where they are between layer calls."""
        return (self.shape.pinned_bytes if self.resting else self.shape.branch_bytes) * self.batches_per_wave

    @property
    def spare(self) -> int:
        """What weights, kept final states, one layer call and two branches leave; for states that rest, CPU memory."""
        if self.resting:
            return self.resting - 2 * self.branch_bytes
        fixed = self.weights + self.full_states + self.shape.layer_bytes
        return self.budget - fixed - 2 * self.branch_bytes

    def beside(self, patterns: int) -> int:
        """What so many patterns in one sweep leave of `spare`."""
        packets, living = self.share.packets, min(patterns, self.patterns_per_sweep) + self.along
        return self.spare - (living * (1 + packets) + packets) * self.branch_bytes

    def for_kl(self, full_states: int) -> Memory:
        """The final states of the unmodified model come first; where they do not fit, it runs along in each sweep."""
        packets = self.share.packets
        left = ((self.spare - full_states) // self.shape.branch_bytes - packets) // (1 + packets)
        if left >= 1:
            return replace(self, full_states=full_states, patterns_per_sweep=left)
        return replace(self, patterns_per_sweep=max(1, self.patterns_per_sweep - 1), along=1)

    def rest_in_cpu(self, room: int, patterns: int, batches: int) -> Memory:
        """With branch states in so many bytes of CPU memory, where that lets more of the patterns live at once.

        The device then holds three states of one batch: what a layer call starts from, makes, and has made. Longer
        waves alone are not worth it: every state crosses the link twice a layer, and copies are waited for.
        """
        batches = batches if self.offload.streamed else 1
        together, wave = offload.plan_waves(room // self.shape.pinned_bytes, patterns, batches, 2 + self.along)
        if self.patterns_per_sweep >= patterns or together <= self.patterns_per_sweep:
            return self
        return replace(self, resting=room, patterns_per_sweep=together, batches_per_wave=wave)

    def in_waves(self, patterns: int, batches: int) -> Memory:
        """As much of so many patterns and batches in one pass as there is room for."""
        room = (self.budget - self.weights - self.full_states - self.shape.layer_bytes) // self.shape.branch_bytes
        together, wave = offload.plan_waves(room // (1 + self.share.packets), patterns, batches, 2 + self.along)
        return replace(self, patterns_per_sweep=together, batches_per_wave=wave)

    def grid_words(self, sequences: int) -> str:
        """Who computes, and how many of them have nothing to do with so many sequences, and what to do about that."""
        grid, shares = self.share.grid, -(-sequences // (self.shape.batch_size * self.batches_per_wave))
        idle = grid.pipeline * max(0, grid.data - shares)
        if not idle:
            return grid.words
        smaller = self._smaller_batches(sequences)
        return (
            f"{grid.words}; {idle} of the {grid.size} {'has' if idle == 1 else 'have'} nothing to do, for {sequences} "
            "sequences make "
            f"{shares} share{'s' if shares > 1 else ''}: give {smaller}more sequences, or start fewer processes"
        )

    def _smaller_batches(self, sequences: int) -> str:
        """The batch size with which every data rank has some, and why it is not taken by itself; empty for none."""
        size = min(self.shape.batch_size - 1, sequences // self.share.grid.data)
        if size < 1:
            return ""
        return f"--batch-size {size} (not by itself, for the bits of a loss follow the batch size), "

    def passes(self, patterns: int, sequences: int) -> int:
        """How often scoring so many patterns on so many sequences goes through the layers."""
        waves = -(-sequences // (self.shape.batch_size * self.batches_per_wave * self.share.grid.data))
        return waves * -(-patterns // self.patterns_per_sweep)


def plan_memory(request: RunRequest, inputs: Inputs, options: dict[str, Any], share: Share | None = None) -> Memory:
    """The budget, by default most of what is free, and what fits; raises IcsearchError where no pattern does."""
    share = share or Share()
    device = torch.device(options["device"])
    budget = request.memory or int(MEMORY_SHARE * free_bytes(device) / share.neighbours)
    shape = batch_shape(inputs.layout, options, inputs.batches.seq_len)
    chosen = _choose_offload(request, inputs, options, partial(_fits, shape, budget, share.packets), share)
    patterns = plan.patterns_per_sweep(shape, chosen.device_bytes, budget, share.packets)
    program = 0 if device.type == "cuda" else resident_bytes()
    memory = Memory(budget, chosen.device_bytes, shape, patterns, share=share, offload=chosen, program=program)
    by_kl = options.get("objective") == KL
    if by_kl:
        sets = [one.num_sequences for one in (inputs.batches, inputs.heldout) if one]
        memory = memory.for_kl(sum(share.sequences(total, shape.batch_size) for total in sets) * shape.final_bytes)
    batches = share.batches_per_wave(-(-inputs.batches.num_sequences // shape.batch_size))
    patterns = _most_patterns(request, inputs.layout, options)
    if chosen.streamed:
        memory = memory.in_waves(patterns, batches)
    if device.type != "cuda" or share.grid.pipeline > 1 or not isinstance(request, GreedyRequest):
        return memory  # what dp-baseline compares, all layers' selections of a batch, stays on the device
    free, sizes = free_bytes(torch.device("cpu")), weight_sizes(inputs, options)
    room = offload.resting_room(free, share.on_machine, chosen.where, sum(sizes.layers), sizes.on_disk)
    return memory.rest_in_cpu(room, patterns, batches)


def _fits(shape: plan.BatchShape, budget: int, packets: int, weights: int) -> bool:
    return plan.room_for_branches(shape, weights, budget) >= plan.fewest_branches(packets)


def _choose_offload(
    request: RunRequest, inputs: Inputs, options: dict[str, Any], fits: Callable[[int], bool], share: Share
) -> Offload:
    """Where weights rest: those of one process, of several the one that has most."""
    on_cpu = torch.device(options["device"]).type == "cpu"
    free = free_bytes(torch.device("cpu")) // share.on_machine
    chosen = offload.choose(request.offload, on_cpu, weight_sizes(inputs, options, share), fits, free)
    if share.grid.size == 1:
        return chosen
    one_pass = offload.pass_bytes(chosen.where, weight_sizes(inputs, options)) if chosen.streamed else 0
    return replace(chosen, why=f"{chosen.why}, in each process", pass_bytes=one_pass * share.grid.data)


def plan_share(
    request: RunRequest, inputs: Inputs, options: dict[str, Any], launch: Launch, wanted: Iterable[Grid]
) -> Memory:
    """The memory of a process under the first of these grids in which one pattern at least fits.

    Weights are streamed only where no grid can keep them, or where that is asked for. Raises IcsearchError where no
    grid does: for want of memory, unless the layers cannot be cut for any of them.
    """
    dsa_layers, every = len(inputs.layout.layer_indices), list(wanted)
    candidates = [grid for grid in every if can_be_cut(dsa_layers, grid.pipeline)] or every
    neighbours = launch.neighbours(torch.cuda.device_count() if options["device"].startswith("cuda") else 1)
    refusals, streamed = [], []
    for grid in candidates:
        try:
            memory = plan_memory(request, inputs, options, Share(grid, neighbours, launch.local_size))
        except IcsearchError as error:
            refusals.append(error)
            continue
        if request.offload != AUTO or not memory.offload.streamed:
            return memory
        streamed.append(memory)
    if streamed:
        return streamed[0]
    raise refusals[-1]


def weight_sizes(inputs: Inputs, options: dict[str, Any], share: Share | None = None) -> WeightSizes:
    """Of the weights as the model computes with them, of one process's share: all that lies outside, and its layers."""
    layout, width = inputs.layout, DTYPES[options["dtype"]].itemsize
    outside = layout.num_parameters - sum(layout.layer_parameters)
    layers = tuple(number * width for number in (share or Share()).layer_parameters(layout))
    part = sum(layers) / (sum(layout.layer_parameters) * width)
    return WeightSizes(outside * width, layers, int(inputs.source.num_bytes * part))


def _most_patterns(request: RunRequest, layout: Layout, options: dict[str, Any]) -> int:
    """How many patterns are scored together at most: the flips of a step, or those that an evaluation names."""
    if isinstance(request, PatternRequest):
        return len(request.flippable(layout.start_pattern))
    return len(options.get("patterns", ())) or 1


def batch_shape(layout: Layout, options: dict[str, Any], seq_len: int) -> plan.BatchShape:
    dtype_bytes = DTYPES[options["dtype"]].itemsize
    batch_size, elements = options["batch_size"], options.get("block_elements")
    copies = plan.KL_HEAD_COPIES if options.get("objective") == KL else plan.NLL_HEAD_COPIES
    if elements is not None and layout.sizes is not None:
        shape = plan.blockwise_shape(Call(layout.sizes, batch_size, seq_len, dtype_bytes, elements), copies)
        return replace(shape, left_numbers=layout.left_numbers)
    return plan.BatchShape(
        batch_size=batch_size,
        seq_len=seq_len,
        hidden_size=layout.hidden_size,
        dtype_bytes=dtype_bytes,
        index_topk=layout.selection.kept,
        index_heads=layout.index_heads,
        index_head_dim=layout.index_head_dim,
        attention_heads=layout.attention_heads,
        vocab_size=layout.vocab_size,
        head_copies=copies,
        streams=layout.streams,
        left_numbers=layout.left_numbers,
        selection_bytes=None if layout.selection.plain else layout.selection.bytes_per_query(seq_len),
        known=layout.reference_known,
    )
