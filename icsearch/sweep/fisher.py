"""The second-order table: what every flip does to the loss and to the model, by one sweep forth and one back.

Layer i under layer j's selection changes its core-attention output by D_ij = o_i(T_j) - o_i(T_i), everything before it
being the unmodified model. With g_i the gradient at o_i of a sum of log-probabilities, one number a sequence says what
the flip does to second order and what it does with all others:

- drawn[r][i][j] = <g_i, D_ij> for the r-th drawing of labels from the model's own predictions. Scores of drawn labels
  at different positions are uncorrelated and have the Fisher information as covariance, so for any pattern the mean
  over draws of (sum over its S layers)^2 / 2 estimates the KL of the unmodified model to it, interactions included;
- true[i][j] = -<g_i, D_ij> with the text's own labels: the change of the summed NLL to first order.

Forward, each layer's entry is kept; then from the last layer back, each layer runs again and is differentiated by
itself (`model.gradients`). A layer's weights are touched twice a wave, whatever the number of layers and draws.
Ancestors: Optimal Brain Surgeon (Hassibi and Stork, 1993), Fisher pruning of masks (Kwon and others, 2022).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import FULL, Pattern
from icsearch.model.families.attention import heard
from icsearch.model.families.calls import Handed, LayerCall, take_up
from icsearch.model.gradients import CoreAttention, Cotangent, differentiate, floating
from icsearch.model.model import DsaModel
from icsearch.model.shape import HEAD_CHUNK_TOKENS
from icsearch.model.slot import SelectionStore
from icsearch.runs.journal import Event
from icsearch.sweep.branches import Batch, LayerBlock, OnDevice
from icsearch.sweep.similarity import made_small
from icsearch.sweep.sweep import computing, kernel_notes

Triangle = list[list[float]]  # row i has i numbers, one for each earlier layer
Rows = dict[int, torch.Tensor]  # by DSA layer: float64 [B, draws + 1, earlier layers]
DRAWING_ROWS = 128  # tokens whose distributions are summed up at once, in float64


@dataclass
class BatchTable:
    """By sequence of a batch: for each draw, and for the text's own labels, a lower triangle."""

    drawn: list[list[Triangle]]
    true: list[Triangle]


@dataclass(frozen=True, eq=False)
class KeptSelection:
    """What a DSA layer selected, made small and put where the entries are, and the type that it had."""

    placed: Any
    dtype: torch.dtype


@dataclass
class Pass:
    """One batch on its way through the layers and back: each layer's entry, and what each DSA layer selected.

    `between`: where cotangents are while other batches of the wave are at work.
    """

    batch: Batch
    calls: list[LayerCall]
    states: Any  # [B, T, D] behind the last layer that ran, in its place
    between: OnDevice
    more: Any = None  # what layers hand on beside states and selections, in its place
    entries: list[tuple[Any, Any]] = field(default_factory=list)  # `states` and `more` that each layer ran from
    selections: list[KeptSelection] = field(default_factory=list)  # by DSA layer; a borrowed one is the same object
    cotangents: list[Cotangent] = field(default_factory=list)  # those of the draws, then of the text's own labels
    rows: Rows = field(default_factory=dict)
    layer_sequences: int = 0


class FisherSweep:
    """Makes the table of one model. `place`: where the layers' entries are between the way forth and back.

    `pair_cost`: what a core attention under another layer's selection costs, in runs of a layer.
    """

    def __init__(
        self, dsa: DsaModel, draws: int, seed: int, place: OnDevice | None = None, pair_cost: float = 0.0
    ) -> None:
        self._dsa = dsa
        self._place = place or OnDevice()
        self._block = LayerBlock(dsa)
        self._draws = draws
        self._seed = seed
        self._pair_cost = pair_cost
        self._position = {index: position for position, index in enumerate(dsa.layer_indices)}

    def run(self, wave: Sequence[Batch], on_layer: Callable[[int], None] = lambda layer_sequences: None) -> list[Pass]:
        """Each batch with its rows of the table. Raises IcsearchError where a number is not finite, ModelError."""
        passes = self.begin(wave)
        self.forth(passes, on_layer)
        self.turn(passes)
        self.back(passes, on_layer)
        return passes

    def events(self, wave: Sequence[Batch], on_layer: Callable[[int], None]) -> list[Event]:
        """The batches of a wave as the journal has them: each by itself, so that waves change no number."""
        started, before = time.monotonic(), self._dsa.weights.bytes_read
        with kernel_notes() as notes:
            passes = self.run(wave, on_layer)
        return self.events_of(passes, notes, time.monotonic() - started, self._dsa.weights.bytes_read - before)

    def events_of(self, passes: Sequence[Pass], notes: Iterable[str], seconds: float, bytes_read: int) -> list[Event]:
        """One for each batch; what was noted, seconds, and bytes of weights that were read are those of all of them."""
        events: list[Event] = []
        for through in passes:
            table = table_of(through.rows, len(self._dsa.layer_indices))
            event = {
                "event": "fisher",
                "sequences": [through.batch.first, through.batch.last],
                "drawn": table.drawn,
                "true": table.true,
                "layer_sequences": through.layer_sequences,
                "seconds": round(seconds / len(passes), 3),
                "notes": sorted(notes),
            }
            events.append(event)
        if bytes_read:
            events[0]["weight_bytes"] = bytes_read
        return events

    @computing(torch.no_grad)
    def begin(self, wave: Sequence[Batch]) -> list[Pass]:
        """Batches in front of the first layer."""
        states = (self._place.put(self._dsa.embed(batch.input_ids)) for batch in wave)
        return [self._pass(batch, embedded, wave) for batch, embedded in zip(wave, states, strict=True)]

    def _pass(self, batch: Batch, states: Any, wave: Sequence[Batch]) -> Pass:
        return Pass(batch, self._block.calls_for(batch), states, self._place if len(wave) > 1 else OnDevice())

    @computing(torch.no_grad)
    def forth(self, passes: Sequence[Pass], on_layer: Callable[[int], None]) -> None:
        """Through the layers that this process has."""
        for index in self._dsa.held:
            with self._dsa.holding(index):
                for through in passes:
                    self._forth(index, through)
                    self._count(through, 1, on_layer)

    @computing(torch.no_grad)
    def turn(self, passes: Sequence[Pass]) -> None:
        """Behind the last layer: cotangents of what it returned; what it handed on reaches no loss."""
        for through in passes:
            states, more = (self._place.fetch(each) for each in (through.states, through.more))
            through.states = through.more = None
            of_states = label_cotangents(self._dsa, states, through.batch, self._draws, self._seed)
            _check_finite("a gradient at the LM head is", through.batch, of_states)
            handed = [torch.zeros_like(tensor) for tensor in floating(states, more)[1:]]
            through.cotangents = _each(through.between.put, [[cotangent, *handed] for cotangent in of_states])

    @computing(torch.no_grad)
    def back(self, passes: Sequence[Pass], on_layer: Callable[[int], None]) -> None:
        """Through the same layers from the last one. Rows stay, and cotangents that another process waits for."""
        for index in reversed(self._dsa.held):
            with self._dsa.holding(index, back=True):
                for through in passes:
                    self._back(index, through)
                    self._count(through, 2 + self._draws, on_layer, self._position.get(index))
        for through in passes:
            through.selections.clear()
            if 0 in self._dsa.held:
                through.cotangents.clear()

    def hand_on(self, passes: Sequence[Pass]) -> list[Any]:
        """What the process that has the next layers takes up of these batches."""
        handed = []
        for through in passes:
            small = {kept: self._place.fetch(kept.placed) for kept in through.selections}  # a borrowed one once
            selections = [[small[kept], kept.dtype] for kept in through.selections]
            handed.append([self._place.fetch(through.states), self._place.fetch(through.more), selections])
            through.states = through.more = None
        return handed

    @computing(torch.no_grad)
    def take_up(self, wave: Sequence[Batch], handed: Sequence[Any]) -> list[Pass]:
        """Batches in front of this process's first layer, by what the one before has handed on."""
        passes = []
        for batch, (states, more, selections) in zip(wave, handed, strict=True):
            through = self._pass(batch, self._place.put(states), wave)
            through.more = self._place.put(more)
            known: dict[int, KeptSelection] = {}  # a borrowed selection is the same tensor
            for small, dtype in selections:
                kept = known.get(id(small)) or KeptSelection(self._place.put(small), dtype)
                through.selections.append(known.setdefault(id(small), kept))
            passes.append(through)
        return passes

    def hand_back(self, passes: Sequence[Pass]) -> list[list[Cotangent]]:
        """The cotangents of each batch at this process's first entry."""
        handed = [_each(through.between.fetch, through.cotangents) for through in passes]
        for through in passes:
            through.cotangents.clear()
        return handed

    def take_back(self, passes: Sequence[Pass], handed: Sequence[Sequence[Cotangent]]) -> None:
        """The cotangents of each batch behind this process's last layer."""
        for through, cotangents in zip(passes, handed, strict=True):
            through.cotangents = _each(through.between.put, cotangents)

    def _forth(self, index: int, through: Pass) -> None:
        """One layer of the unmodified model; its entry is kept, and what it selected."""
        through.entries.append((through.states, through.more))
        start, position = self._dsa.start_pattern, self._position.get(index)
        store = take_up(SelectionStore(start), self._place.fetch(through.more))
        borrows = position is not None and not start.is_full(position)
        if borrows:
            store.selection = self._fetch(through.selections[-1])
        call = through.calls[index].on(through.batch.input_ids)
        states = self._dsa.run_layer(index, self._place.fetch(through.states), call, store)
        _check_finite(f"the states behind decoder layer {index} are", through.batch, [states])
        through.states = self._place.put(states)
        if any(store.more.values()):
            through.more = self._place.put(Handed(None, store.more))
        if borrows:
            through.selections.append(through.selections[-1])
        elif position is not None:
            small = made_small(store.selection, through.batch.input_ids.shape[1])
            through.selections.append(KeptSelection(self._place.put(small), store.selection.dtype))

    def _fetch(self, kept: KeptSelection) -> torch.Tensor:
        selection: torch.Tensor = self._place.fetch(kept.placed)
        return selection.to(kept.dtype)

    def _back(self, index: int, through: Pass) -> None:
        """Cotangents of what a layer returned become those of its entry; of a DSA layer, its row of the table."""
        states, more = (self._place.fetch(each) for each in through.entries.pop())
        position = self._position.get(index)
        selection = None if position is None else self._fetch(through.selections[position])
        cotangents, through.cotangents = _each(through.between.fetch, through.cotangents), []
        call = through.calls[index].on(through.batch.input_ids)
        layer = differentiate(self._dsa, index, states, more, selection, call, cotangents)
        _check_finite(f"a gradient at decoder layer {index} is", through.batch, itertools.chain(*layer.entry))
        through.cotangents = _each(through.between.put, layer.entry)
        if position is not None and layer.core is not None:
            through.rows[position] = self._row(through, layer.core)
            _check_finite(f"a number of DSA layer {position} is", through.batch, [through.rows[position]])
            del through.selections[position]

    def _row(self, through: Pass, core: CoreAttention) -> torch.Tensor:
        """<g, D> of each sequence, cotangent and earlier layer; of a selection that is the layer's own, exactly 0."""
        *earlier, own = through.selections
        nothing = torch.zeros(len(through.batch.input_ids), len(core.gradients), dtype=torch.float64)
        columns = {own: nothing}
        for kept in earlier:
            if kept not in columns:
                changed = core.under(self._fetch(kept)).float() - core.output.float()  # [B, T, H, V]
                columns[kept] = torch.stack([_inner(gradient, changed) for gradient in core.gradients], dim=1).cpu()
        return torch.stack([columns[kept] for kept in earlier], dim=2) if earlier else nothing.unsqueeze(2)[..., :0]

    def _count(self, through: Pass, runs: int, on_layer: Callable[[int], None], position: int | None = None) -> None:
        """So many runs of a layer, and of a DSA layer's row its pairs."""
        pairs = 0 if position is None else pair_runs(self._dsa.start_pattern, position)
        taken = round(len(through.batch.input_ids) * (runs + pairs * self._pair_cost))
        through.layer_sequences += taken
        on_layer(taken)


def pair_runs(start: Pattern, position: int) -> int:
    """Core attentions of a DSA layer's row: one for each earlier selection that is not its own."""
    return start.letters.count(FULL, 0, position) - (not start.is_full(position))


def table_runs(start: Pattern, layers: int, draws: int, pair_cost: float) -> float:
    """Runs of a layer that a sequence takes: forth, again, a backward for each cotangent; and the pairs."""
    return layers * (3 + draws) + pair_cost * sum(pair_runs(start, position) for position in range(len(start)))


def table_of(rows: Rows, layers: int) -> BatchTable:
    """The rows by sequence; of a layer that another process has, an empty one."""
    some = next(iter(rows.values()))
    empty = some[..., :0]
    by_sequence = [
        [[rows.get(layer, empty)[sequence, r].tolist() for layer in range(layers)] for r in range(some.shape[1])]
        for sequence in range(some.shape[0])
    ]
    true = [[[-value for value in row] for row in triangles[-1]] for triangles in by_sequence]
    return BatchTable([triangles[:-1] for triangles in by_sequence], true)


def join_events(parts: Sequence[Event]) -> Event:
    """A batch's event by those of the processes that share the layers: each has the rows of its own."""
    joined = {name: _filled([part[name] for part in parts]) for name in ("drawn", "true")}
    sums = {name: sum(part.get(name, 0) for part in parts) for name in ("layer_sequences", "weight_bytes")}
    notes = sorted({note for part in parts for note in part["notes"]})
    return {**parts[0], **joined, **{name: value for name, value in sums.items() if value}, "notes": notes}


def _filled(parts: Sequence[Any]) -> Any:
    """Nested lists alike but for empty rows: with what any of them has."""
    if not all(parts):
        return next(filter(None, parts), [])
    return [_filled(each) for each in zip(*parts, strict=True)]


def _each(function: Callable[[Any], Any], cotangents: Iterable[Cotangent]) -> list[Cotangent]:
    return [[function(tensor) for tensor in cotangent] for cotangent in cotangents]


def _inner(gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """<gradient, change> of each sequence: [B, T, H, V] twice to [B]; float32 within a token, float64 over tokens."""
    return (gradient.float() * change).flatten(2).sum(-1).double().sum(1)


def _check_finite(what: str, batch: Batch, values: Iterable[torch.Tensor]) -> None:
    """Raise IcsearchError with the sequence named, unless all of these numbers, each [B, ...], are finite."""
    for value in values:
        finite = torch.isfinite(value).flatten(1).all(1)  # [B]
        if not finite.all():
            raise IcsearchError(
                f"{what} not finite in sequence {batch.first + finite.tolist().index(False)}: expected numbers; try "
                "--dtype float32, or look at that sequence"
            )


def label_cotangents(dsa: DsaModel, states: torch.Tensor, batch: Batch, draws: int, seed: int) -> list[torch.Tensor]:
    """Gradients of the summed log-probability of labels at the last layer's states [B, T, D]: drawn ones, the text's.

    The label of a position is drawn by a number that follows from the seed, the sequence and the position alone. By
    chunks of tokens: no [T, vocabulary] tensor.
    """
    found = [torch.zeros_like(states) for _ in range(draws + 1)]
    length = batch.input_ids.shape[1]
    for row in range(len(batch.input_ids)):
        uniform = torch.from_numpy(drawing_numbers(seed, batch.first + row, draws, length))
        for first in range(0, length - 1, HEAD_CHUNK_TOKENS):
            last = min(first + HEAD_CHUNK_TOKENS, length - 1)
            piece = states[row : row + 1, first:last].detach().requires_grad_()
            with torch.enable_grad():
                logits = dsa.lm_head(dsa.final_norm(piece)).float().squeeze(0)  # [chunk, V]
            probabilities = logits.detach().softmax(-1)
            drawn = draw_labels(probabilities, uniform[:, first:last].to(states.device))
            labels = [*drawn, batch.input_ids[row, first + 1 : last + 1]]
            counted = batch.counted[row, first + 1 : last + 1]
            for total, label in zip(found, labels, strict=True):
                score = probabilities.neg()
                score.scatter_add_(1, label.unsqueeze(1), torch.ones_like(label, dtype=score.dtype).unsqueeze(1))
                score.masked_fill_(~counted.unsqueeze(1), 0.0)
                (gradient,) = torch.autograd.grad(logits, piece, score, retain_graph=True)
                total[row : row + 1, first:last] = gradient
    return found


def drawing_numbers(seed: int, sequence: int, draws: int, length: int) -> Any:
    """Uniform numbers in [0, 1), float64 [draws, length], of one sequence; the same with more draws or tokens beside.

    Position t draws the token behind it.
    """
    keys = [[seed, sequence * 2**20 + draw] for draw in range(draws)]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(length) for key in keys])


def draw_labels(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels int64 [R, n] by inverting the distribution functions of [n, V] probabilities at uniform [R, n]."""
    parts = []
    for rows, numbers in zip(probabilities.split(DRAWING_ROWS), uniform.split(DRAWING_ROWS, dim=1), strict=True):
        below = rows.double().cumsum(-1)  # [rows, V]
        target = numbers.t() * below[:, -1:]  # [rows, R]
        parts.append(torch.searchsorted(below, target.contiguous(), right=True).clamp_max(rows.shape[1] - 1).t())
    return torch.cat(parts, dim=1)


def direct_table(
    dsa: DsaModel, batch: Batch, draws: int, seed: int, selections: Sequence[torch.Tensor] | None = None
) -> Any:
    """The slow, obvious twin, for one sequence: transformers' own forward as a whole, plain autograd, whole logits.

    Float64 [draws + 1, N, N]: drawn labels, then the text's own. Every entry of another selection is a forward of its
    own, in which one layer alone gets it. `selections`: those of each DSA layer, in place of its indexer's.
    """
    length, count = batch.input_ids.shape[1], len(dsa.layer_indices)

    def forward(replaced: dict[int, Any]) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        """Final normed states, each DSA layer's core attention, and each one's selection."""
        chosen: list[Any] = []
        called: list[int] = []  # attention calls before each DSA layer's own
        with contextlib.ExitStack() as stack:
            attended = stack.enter_context(heard(dsa.config))
            stack.enter_context(dsa.running(dsa.start_pattern))
            for slot, index in zip(dsa.slots, dsa.layer_indices, strict=True):
                layer = dsa.layers[index]
                stack.callback(layer.register_forward_pre_hook(lambda *_: called.append(len(attended))).remove)

                def choose(slot: Any, _: Any, own: Any) -> Any:
                    chosen.append(replaced.get(slot.position, own))
                    return chosen[-1]

                stack.callback(slot.register_forward_hook(choose).remove)
            states = dsa.decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return states, [attended[number] for number in called], chosen

    with torch.enable_grad():
        dsa.model.get_input_embeddings().requires_grad_(True)  # so that there is a graph at all
        try:
            given = dict(enumerate(selections or ()))
            states, outputs, chosen = forward(given)
        finally:
            dsa.model.get_input_embeddings().requires_grad_(False)
        log_p = dsa.lm_head(states).float()[0, :-1].log_softmax(-1)  # [T-1, V]
    uniform = torch.from_numpy(drawing_numbers(seed, batch.first, draws, length))[:, : length - 1]
    below = log_p.detach().exp().double().cumsum(-1)
    drawn = [torch.searchsorted(below, (u * below[:, -1]).unsqueeze(1), right=True).squeeze(1) for u in uniform]
    table = np.zeros((draws + 1, count, count))
    counted = batch.counted[0, 1:]
    for r, labels in enumerate([*drawn, batch.input_ids[0, 1:]]):
        score = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)[counted].sum()
        gradients = torch.autograd.grad(score, outputs, retain_graph=True)
        for i in range(count):
            for j in range(i):
                with torch.no_grad():
                    _, changed, _ = forward({**given, i: chosen[j]})
                inner = (gradients[i].double() * (changed[i] - outputs[i].detach()).double()).sum()
                table[r, i, j] = float(inner if r < draws else -inner)
    return table
