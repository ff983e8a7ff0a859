"""The layer sweep: many patterns scored in one pass over the layers.

Patterns are walked as a tree. All patterns that agree up to a layer are one branch there, with one state; where
their letters differ the branch forks. So in a greedy step the committed pattern is the trunk, and each candidate
forks off at its own layer. Layers are the outer loop: each layer's weights are touched once per wave.

A branch is (hidden states, current selection) per batch. Batches are cut from the sequences once, by
`batch_size`, and every layer call has one batch's shape, whatever else is alive: so the losses have the same bits
as those of whole forwards (`naive_nll`), for any split of patterns into sweeps and of batches into waves.

With a `StateStore` a branch starts at the deepest layer entry where its state was kept by an earlier sweep. Without
one it starts at the embedding: that is the slow twin, which must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from icsearch.errors import NonFiniteLossError
from icsearch.losses import sequence_nll
from icsearch.memory import is_out_of_memory, out_of_memory
from icsearch.model import DsaModel, LayerCall
from icsearch.pattern import Pattern
from icsearch.slot import SelectionStore
from icsearch.states import Keeping, StateStore


@dataclass(frozen=True)
class Batch:
    """Consecutive calibration sequences: `input_ids` int64 [B, T], `counted` bool [B, T], `first` sequence number."""

    first: int
    input_ids: torch.Tensor
    counted: torch.Tensor

    @property
    def last(self) -> int:
        """One past the last sequence number."""
        return self.first + len(self.input_ids)


@dataclass
class Branch:
    """Patterns that agree so far, and per batch the state that they share."""

    patterns: list[Pattern]
    hidden_states: list[torch.Tensor]  # per batch [B, T, D]
    selections: list[object]  # per batch, what the last F indexer returned


@dataclass(frozen=True)
class BranchState:
    """A branch on one batch at a layer's entry: hidden states [B, T, D], and what the last F indexer returned."""

    hidden_states: torch.Tensor
    selection: Any

    @property
    def bytes(self) -> int:
        """Memory that it holds. States of S layers share their selection; it counts for each of them."""
        tensors = [value for value in (self.hidden_states, self.selection) if isinstance(value, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True)
class SweepResult:
    """`nll[letters]`: summed NLL in nats of each sequence of the wave; `layer_sequences`: layer runs x sequences.

    `kl` is the same of the KL to the unmodified model, where it was measured.
    """

    nll: dict[str, list[float]]
    layer_sequences: int
    kl: dict[str, list[float]] = field(default_factory=dict)


# What hears of an S layer: (batch, the patterns that run there, position, borrowed selection, its own indexer's).
Probe = Callable[[Batch, Sequence[Pattern], int, Any, Any], None]


def cut_batches(input_ids: torch.Tensor, counted: torch.Tensor, batch_size: int) -> list[Batch]:
    """Fixed batches of consecutive sequences of [S, T] ids. The last may be smaller."""
    return [
        Batch(first, input_ids[first : first + batch_size], counted[first : first + batch_size])
        for first in range(0, len(input_ids), batch_size)
    ]


class Sweeper:
    """Runs sweeps of one model; call arguments are captured once per batch shape and kept.

    With `kept`, which belongs to one set of batches, a sweep goes on from earlier ones' states and keeps new ones.
    """

    def __init__(self, model: DsaModel, kept: StateStore[BranchState] | None = None) -> None:
        self.model = model
        self._nothing: StateStore[BranchState] = StateStore(
            Keeping(len(model.layers), tuple(model.layer_indices)), model.start_pattern
        )
        self._kept = self._nothing if kept is None else kept
        self._calls: dict[torch.Size, list[LayerCall]] = {}
        self._letter_of_layer = {index: position for position, index in enumerate(model.layer_indices)}

    def retain(self, base: Pattern) -> None:
        """Let go of kept states that are of no use to the committed pattern and its flips."""
        self._kept.retain(base)

    def sweep(
        self,
        patterns: Iterable[Pattern],
        wave: Sequence[Batch],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
    ) -> SweepResult:
        """The loss of every pattern on every sequence of the wave, which must be consecutive.

        `on_layer` hears the layer runs x sequences done by each layer. Raises NonFiniteLossError, OutOfMemoryError.
        """
        nll: dict[str, list[float]] = {}

        def reduce(batch: Batch, states: dict[str, torch.Tensor]) -> None:
            for letters, hidden_states in states.items():
                nll.setdefault(letters, []).extend(self.batch_losses(hidden_states, batch, Pattern(letters)))

        return SweepResult(nll, self.run(patterns, wave, reduce, on_layer))

    def expected(self, work: Iterable[tuple[Sequence[Pattern], Sequence[Batch]]]) -> int:
        """Layer runs x sequences that sweeps of these patterns over these waves, in this order, will take."""
        rehearsal = self._kept.rehearsal()
        return sum(
            rehearsal.sweep(patterns, [batch.first for batch in wave]) * sum(len(batch.input_ids) for batch in wave)
            for patterns, wave in work
        )

    @torch.inference_mode()
    def run(
        self,
        patterns: Iterable[Pattern],
        wave: Sequence[Batch],
        reduce: Callable[[Batch, dict[str, torch.Tensor]], None],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
        probe: Probe | None = None,
    ) -> int:
        """One pass over the layers; `reduce` gets each batch with the last layer's [B, T, D] states by pattern.

        With a `probe`, S layers run their own indexer too, and the probe hears both selections; a probe wants to see
        every layer, so it goes without what is kept. Returns the layer runs x sequences.
        """
        store = self._kept if probe is None else self._nothing
        try:
            return self._run(list(dict.fromkeys(patterns)), wave, reduce, on_layer, probe, store)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(error) from error
            raise

    def _run(
        self,
        patterns: list[Pattern],
        wave: Sequence[Batch],
        reduce: Callable[[Batch, dict[str, torch.Tensor]], None],
        on_layer: Callable[[int], None],
        probe: Probe | None,
        kept: StateStore[BranchState],
    ) -> int:
        sequences = sum(len(batch.input_ids) for batch in wave)
        entering = self._entering(patterns, wave, kept)
        branches: list[Branch] = []
        layer_runs = 0
        for index in range(len(self.model.layers)):
            pending, branches = branches + self._open(index, entering.get(index, []), wave, kept), []
            while pending:  # taken off one by one, so that a branch's old states go as its new ones come
                branches += self._run_layer(index, pending.pop(0), wave, probe)
            self._keep(index + 1, branches, wave, kept)
            layer_runs += len(branches)
            on_layer(len(branches) * sequences)
        for number, batch in enumerate(wave):
            reduce(batch, {str(branch.patterns[0]): branch.hidden_states[number] for branch in branches})
        return layer_runs * sequences

    def _entering(
        self, patterns: list[Pattern], wave: Sequence[Batch], kept: StateStore[BranchState]
    ) -> dict[int, list[list[Pattern]]]:
        """By the decoder layer where they start: groups of patterns that share their state there."""
        groups: dict[tuple[int, str], list[Pattern]] = {}
        for pattern in patterns:
            entry = kept.start(pattern, [batch.first for batch in wave])
            groups.setdefault((entry, kept.keeping.letters_before(pattern, entry)), []).append(pattern)
        entering: dict[int, list[list[Pattern]]] = {}
        for (entry, _), group in groups.items():
            entering.setdefault(entry, []).append(group)
        return entering

    def _open(
        self,
        index: int,
        groups: Iterable[list[Pattern]],
        wave: Sequence[Batch],
        kept: StateStore[BranchState],
    ) -> list[Branch]:
        """The branches that start at a decoder layer: at the first one from the embedding, elsewhere from `kept`."""
        branches = []
        for group in groups:
            if index == 0:
                embedded = [self.model.embed(batch.input_ids) for batch in wave]
                branches.append(Branch(group, embedded, [None] * len(wave)))
                continue
            letters = kept.keeping.letters_before(group[0], index)
            states = [kept.get(batch.first, index, letters) for batch in wave]
            branches.append(Branch(group, [s.hidden_states for s in states], [s.selection for s in states]))
        return branches

    def _keep(
        self, entry: int, branches: Iterable[Branch], wave: Sequence[Batch], kept: StateStore[BranchState]
    ) -> None:
        """Hand the branches' states at the entry of a decoder layer to the store, which takes what it wants."""
        for branch in branches:
            letters = kept.keeping.letters_before(branch.patterns[0], entry)
            for number, batch in enumerate(wave):
                state = BranchState(branch.hidden_states[number], branch.selections[number])
                kept.put(batch.first, entry, letters, state, state.bytes)

    def _run_layer(self, index: int, branch: Branch, wave: Sequence[Batch], probe: Probe | None) -> list[Branch]:
        """One layer on one branch; two branches come back where the patterns part."""
        return [self._advance(index, branch, patterns, wave, probe) for patterns in self._split(index, branch.patterns)]

    def _split(self, index: int, patterns: list[Pattern]) -> list[list[Pattern]]:
        position = self._letter_of_layer.get(index)
        if position is None:
            return [patterns]
        full = [pattern for pattern in patterns if pattern.is_full(position)]
        shared = [pattern for pattern in patterns if not pattern.is_full(position)]
        return [group for group in (full, shared) if group]

    def _advance(
        self, index: int, branch: Branch, patterns: list[Pattern], wave: Sequence[Batch], probe: Probe | None
    ) -> Branch:
        hidden_states, selections = [], []
        for states, selection, batch in zip(branch.hidden_states, branch.selections, wave, strict=True):
            store = SelectionStore(patterns[0], selection)
            if probe is not None:
                store.probe = partial(probe, batch, patterns)
            call = self.calls_for(batch)[index]
            hidden_states.append(self.model.run_layer(index, states, call, store))
            selections.append(store.selection)
        return Branch(patterns, hidden_states, selections)

    def batch_losses(self, hidden_states: torch.Tensor, batch: Batch, pattern: Pattern) -> list[float]:
        """The last layer's [B, T, D] states to one NLL sum per sequence; raises NonFiniteLossError."""
        normed = self.model.final_norm(hidden_states)
        nll = sequence_nll(normed, self.model.lm_head, batch.input_ids, batch.counted)
        self.check_finite(nll, batch, pattern)
        return [float(value) for value in nll]

    def check_finite(self, nll: torch.Tensor, batch: Batch, pattern: Pattern) -> None:
        """Raise NonFiniteLossError with layer and sequence named, unless all of the [B] sums are finite."""
        bad = (~torch.isfinite(nll)).nonzero().flatten().tolist()
        if bad:
            layer = self._first_nonfinite_layer(batch, pattern, bad[0])
            raise NonFiniteLossError(
                f"the loss of sequence {batch.first + bad[0]} under {pattern} is {nll[bad[0]].item()}, "
                f"first seen behind {layer}: expected a finite number; try --dtype float32, or look at that sequence"
            )

    def _first_nonfinite_layer(self, batch: Batch, pattern: Pattern, row: int) -> str:
        calls = self.calls_for(batch)
        states = self.model.embed(batch.input_ids)
        if not torch.isfinite(states[row]).all():
            return "the embedding"
        store = SelectionStore(pattern)
        for index in range(len(self.model.layers)):
            states = self.model.run_layer(index, states, calls[index], store)
            if not torch.isfinite(states[row]).all():
                return f"decoder layer {index}"
        return "the LM head"

    def calls_for(self, batch: Batch) -> list[LayerCall]:
        """Each layer's call arguments for this batch's shape."""
        shape = batch.input_ids.shape
        if shape not in self._calls:
            self._calls[shape] = self.model.capture_calls(batch.input_ids)
        return self._calls[shape]


@torch.inference_mode()
def naive_nll(model: DsaModel, pattern: Pattern, batches: Sequence[Batch]) -> list[float]:
    """The slow, obvious twin: one whole forward per pattern and batch by the model's own code."""
    sums: list[float] = []
    for batch in batches:
        states = model.final_hidden_states(batch.input_ids, pattern)
        sums += sequence_nll(states, model.lm_head, batch.input_ids, batch.counted).tolist()
    return sums
