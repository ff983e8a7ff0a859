"""The second-order table: what every flip does to the loss and to the model, by one sweep forth and one back.

Layer i under layer j's selection changes its core-attention output by D_ij = o_i(T_j) - o_i(T_i), everything before it
being the unmodified model. With g_i the gradient at o_i of a sum of log-probabilities, one number a sequence says what
the flip does to second order and what it does with all others:

- drawn[r][i][j] = <g_i, D_ij> for the r-th drawing of labels from the model's own predictions. Scores of drawn labels
  at different positions are uncorrelated and have the Fisher information as covariance, so for any pattern the mean
  over draws of (sum over its S layers)^2 / 2 estimates the KL of the unmodified model to it, interactions included;
- true[i][j] = -<g_i, D_ij> with the text's own labels: the change of the summed NLL to first order.

Forward, each layer's entry is kept; then from the last layer back, each layer runs again and is differentiated by
itself (`model.gradients`). A layer's weights are touched twice, whatever the number of layers, draws and sequences.
Ancestors: Optimal Brain Surgeon (Hassibi and Stork, 1993), Fisher pruning of masks (Kwon and others, 2022).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from icsearch.core.errors import IcsearchError
from icsearch.model.families.attention import heard
from icsearch.model.families.calls import LayerCall, hand_on, take_up
from icsearch.model.gradients import Cotangent, differentiate, floating
from icsearch.model.model import DsaModel
from icsearch.model.shape import HEAD_CHUNK_TOKENS
from icsearch.model.slot import SelectionStore
from icsearch.runs.journal import Event
from icsearch.sweep.branches import Batch, LayerBlock, OnDevice
from icsearch.sweep.similarity import smallest_index_type
from icsearch.sweep.sweep import computing, kernel_notes

Triangle = list[list[float]]  # row i has i numbers, one for each earlier layer
DRAWING_ROWS = 128  # tokens whose distributions are summed up at once, in float64


@dataclass
class BatchTable:
    """By sequence of a batch: for each draw, and for the text's own labels, a lower triangle."""

    drawn: list[list[Triangle]]
    true: list[Triangle]


@dataclass
class _Pass:
    """One batch on its way through the layers and back: each layer's entry, what each DSA layer selected."""

    batch: Batch
    calls: list[LayerCall]
    states: Any
    handed: Any = None
    entries: list[tuple[Any, Any]] = field(default_factory=list)  # hidden states and what is handed on, in their place
    selections: list[tuple[Any, torch.dtype]] = field(default_factory=list)  # by DSA layer, made small
    cotangents: list[Cotangent] = field(default_factory=list)  # those of the draws, then of the text's own labels
    rows: dict[int, Any] = field(default_factory=dict)  # by DSA layer: float64 [draws + 1, B, earlier layers]


class FisherSweep:
    """Makes the table of one model. `place`: where the layers' entries are between the way forth and back."""

    def __init__(self, dsa: DsaModel, draws: int, seed: int, place: OnDevice | None = None) -> None:
        self._dsa = dsa
        self._place = place or OnDevice()
        self._block = LayerBlock(dsa)
        self._draws = draws
        self._seed = seed
        self._position = {index: position for position, index in enumerate(dsa.layer_indices)}

    def run(
        self, wave: Sequence[Batch], on_layer: Callable[[int], None] = lambda layer_sequences: None
    ) -> list[BatchTable]:
        """The table of each batch. Raises IcsearchError where a number is not finite, ModelError."""
        last = len(self._dsa.layers) - 1
        with computing(torch.no_grad):
            passes = [
                _Pass(batch, self._block.calls_for(batch), self._dsa.embed(batch.input_ids)) for batch in wave
            ]
            for index in range(last + 1):
                with self._dsa.holding(index):
                    for through in passes:
                        self._forth(index, through)
                        on_layer(len(through.batch.input_ids))
            for through in passes:
                through.cotangents = self._ends(through)
            for index in range(last, -1, -1):
                with self._dsa.holding(index, back=True):
                    for through in passes:
                        self._back(index, through)
                        on_layer(len(through.batch.input_ids) * (1 + self._draws))
            return [self._table(through) for through in passes]

    def events(self, wave: Sequence[Batch], on_layer: Callable[[int], None]) -> list[Event]:
        """The batches of a wave as the journal has them: each by itself, so that waves change no number."""
        started, before = time.monotonic(), self._dsa.weights.bytes_read
        with kernel_notes() as notes:
            tables = self.run(wave, on_layer)
        seconds, read = time.monotonic() - started, self._dsa.weights.bytes_read - before
        layers = len(self._dsa.layers)
        events: list[Event] = [
            {
                "event": "fisher",
                "sequences": [batch.first, batch.last],
                "drawn": table.drawn,
                "true": table.true,
                "layer_sequences": len(batch.input_ids) * layers * (2 + self._draws),
                "seconds": round(seconds / len(wave), 3),
                "notes": sorted(notes),
            }
            for batch, table in zip(wave, tables, strict=True)
        ]
        if read:
            events[0]["weight_bytes"] = read
        return events

    def _forth(self, index: int, through: _Pass) -> None:
        """One layer of the unmodified model; its entry is kept, and what it selected."""
        through.entries.append((self._place.put(through.states), self._place.put(through.handed)))
        store = take_up(SelectionStore(self._dsa.start_pattern), through.handed)
        call = through.calls[index].on(through.batch.input_ids)
        through.states = self._dsa.run_layer(index, through.states, call, store)
        through.handed = hand_on(store, through.handed)
        if index in self._position:
            selection, dtype = store.selection, store.selection.dtype
            if dtype != torch.bool:  # a mask is small as it is
                signed = bool((selection < 0).any())
                selection = selection.to(smallest_index_type(through.batch.input_ids.shape[1], signed))
            through.selections.append((self._place.put(selection), dtype))

    def _selection(self, through: _Pass, position: int) -> torch.Tensor:
        selection, dtype = through.selections[position]
        return self._place.fetch(selection).to(dtype)

    def _ends(self, through: _Pass) -> list[Cotangent]:
        """Cotangents of what the last layer returned; what it handed on reaches no loss."""
        of_states = label_cotangents(self._dsa, through.states, through.batch, self._draws, self._seed)
        handed = [torch.zeros_like(tensor) for tensor in floating(through.states, through.handed)[1:]]
        through.states = through.handed = None
        return [[cotangent, *handed] for cotangent in of_states]

    def _back(self, index: int, through: _Pass) -> None:
        """Cotangents of what a layer returned become those of its entry; of a DSA layer, its row of the table."""
        states, handed = (self._place.fetch(each) for each in through.entries.pop())
        position = self._position.get(index)
        selection = None if position is None else self._selection(through, position)
        call = through.calls[index].on(through.batch.input_ids)
        layer = differentiate(self._dsa, index, states, handed, selection, call, through.cotangents)
        through.cotangents = layer.entry
        if position is None or layer.core is None or layer.output is None:
            return
        columns = []
        for earlier in range(position):
            changed = layer.core(self._selection(through, earlier)).float() - layer.output.float()  # [B, T, H, V]
            columns.append([_inner(gradient, changed) for gradient in layer.attention])
        through.rows[position] = columns

    def _table(self, through: _Pass) -> BatchTable:
        batch, layers = through.batch, len(self._dsa.layer_indices)
        # [layer][earlier][draw] of float64 [B] to [sequence][draw][layer][earlier]
        by_sequence = [
            [
                [[through.rows[i][j][r][s] for j in range(i)] for i in range(layers)]
                for r in range(self._draws + 1)
            ]
            for s in range(len(batch.input_ids))
        ]
        for number, triangles in enumerate(by_sequence):
            for layer in range(layers):
                if not np.isfinite([row for triangle in triangles for row in triangle[layer]]).all():
                    raise IcsearchError(
                        f"a gradient at DSA layer {layer} is not finite in sequence {batch.first + number}: expected "
                        "numbers; try --dtype float32, or look at that sequence"
                    )
        true = [[[-value for value in row] for row in triangles[-1]] for triangles in by_sequence]
        return BatchTable([triangles[:-1] for triangles in by_sequence], true)


def _inner(gradient: torch.Tensor, change: torch.Tensor) -> list[float]:
    """<gradient, change> of each sequence: [B, T, H, V] twice; float32 within a token, float64 over tokens."""
    return (gradient.float() * change).flatten(2).sum(-1).double().sum(1).tolist()


def label_cotangents(
    dsa: DsaModel, states: torch.Tensor, batch: Batch, draws: int, seed: int
) -> list[torch.Tensor]:
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
    """Uniform numbers in [0, 1), float64 [draws, length], of one sequence: more draws or tokens leave these as they are.

    Position t draws the token behind it.
    """
    return np.stack(
        [np.random.Generator(np.random.Philox(key=[seed, sequence * 2**20 + draw])).random(length) for draw in range(draws)]
    )


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
