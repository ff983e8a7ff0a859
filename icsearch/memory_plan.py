"""The memory of a run, planned before its weights are read: the budget, and how much of what fits into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from icsearch import plan
from icsearch.footprint import Call
from icsearch.inputs import Inputs
from icsearch.layout import DTYPES, Layout
from icsearch.memory import free_bytes
from icsearch.requests import KL, RunRequest

MEMORY_SHARE = 0.8  # of what is free when the run starts


@dataclass(frozen=True)
class Memory:
    """The memory of a run: its budget and what it goes into, in bytes.

    `full_states`: the unmodified model's final states, kept for the KL; 0 where they are not needed or do not fit.
    """

    budget: int
    weights: int
    shape: plan.BatchShape
    patterns_per_sweep: int  # how many patterns may live at once beside the trunk
    full_states: int = 0

    @property
    def spare(self) -> int:
        """What weights, kept final states, one layer call and two branches leave."""
        fixed = self.weights + self.full_states + self.shape.layer_bytes
        return self.budget - fixed - 2 * self.shape.branch_bytes

    def for_kl(self, full_states: int) -> Memory:
        """The final states of the unmodified model come first; where they do not fit, it runs along in each sweep."""
        left = (self.spare - full_states) // self.shape.branch_bytes
        if left >= 1:
            return replace(self, full_states=full_states, patterns_per_sweep=left)
        return replace(self, patterns_per_sweep=max(1, self.patterns_per_sweep - 1))


def plan_memory(request: RunRequest, inputs: Inputs, options: dict[str, Any]) -> Memory:
    """The budget, by default most of what is free, and what fits; raises IcsearchError where no pattern does."""
    budget = request.memory or int(MEMORY_SHARE * free_bytes(torch.device(options["device"])))
    weights = inputs.layout.num_parameters * DTYPES[options["dtype"]].itemsize
    shape = batch_shape(inputs.layout, options, inputs.batches.seq_len)
    memory = Memory(budget, weights, shape, plan.patterns_per_sweep(shape, weights, budget))
    if options.get("objective") != KL:
        return memory
    sequences = inputs.batches.num_sequences + (inputs.heldout.num_sequences if inputs.heldout else 0)
    return memory.for_kl(sequences * shape.final_bytes)


def batch_shape(layout: Layout, options: dict[str, Any], seq_len: int) -> plan.BatchShape:
    dtype_bytes = DTYPES[options["dtype"]].itemsize
    batch_size, elements = options["batch_size"], options.get("block_elements")
    copies = plan.KL_HEAD_COPIES if options.get("objective") == KL else plan.NLL_HEAD_COPIES
    if elements is not None and layout.sizes is not None:
        return plan.blockwise_shape(Call(layout.sizes, batch_size, seq_len, dtype_bytes, elements), copies)
    return plan.BatchShape(
        batch_size=batch_size,
        seq_len=seq_len,
        hidden_size=layout.hidden_size,
        dtype_bytes=dtype_bytes,
        index_topk=layout.index_topk,
        index_heads=layout.index_heads,
        index_head_dim=layout.index_head_dim,
        attention_heads=layout.attention_heads,
        vocab_size=layout.vocab_size,
        head_copies=copies,
    )
