"""Branches through a block of decoder layers, and where their states are kept while no layer works on them."""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from icsearch.calibration.batches import Calibration
from icsearch.core.errors import IcsearchError
from icsearch.core.files import naming
from icsearch.core.pattern import Pattern
from icsearch.model.families.calls import LayerCall, hand_on, map_tensors, take_up, tensors_of
from icsearch.model.model import DsaModel
from icsearch.model.shape import CPU, DISK
from icsearch.model.slot import SelectionStore
from icsearch.sweep.states import Keeping, StateStore


class OnDevice:
    """States stay where they were computed."""

    def put(self, value: Any) -> Any:
        """A state behind a layer call: hidden states, a selection of any family, or None."""
        return value

    def fetch(self, value: Any) -> Any:
        """A state on the device, for a layer call."""
        return value


class InCpuMemory(OnDevice):
    """States are offloaded to CPU memory, pinned where the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def put(self, value: Any) -> Any:
        def copy(tensor: torch.Tensor) -> torch.Tensor:
            pinned = self._device.type == "cuda"
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned).copy_(tensor)

        return map_tensors(value, copy)

    def fetch(self, value: Any) -> Any:
        return map_tensors(value, lambda tensor: tensor.to(self._device))


class OnDisk(OnDevice):
    """States are files in a directory of their own. A file goes with the state that stands for it, and it with this."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
        directory.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._directory = directory
        self._device = device
        self._numbers = itertools.count()

    def put(self, value: Any) -> Any:
        if not (tensors := tensors_of(value)):
            return value
        path = self._directory / str(next(self._numbers))
        with naming(path), path.open("wb") as file:
            for tensor in tensors:
                file.write(_raw(tensor.cpu()))
        return _File(path, map_tensors(value, lambda tensor: tensor.to("meta")))

    def fetch(self, value: Any) -> Any:
        if not isinstance(value, _File):
            return value
        with naming(value.path), value.path.open("rb") as file:

            def read(form: torch.Tensor) -> torch.Tensor:
                tensor = torch.empty(form.shape, dtype=form.dtype)
                if file.readinto(_raw(tensor)) != tensor.nbytes:
                    raise IcsearchError(f"{value.path} has become shorter than it was written: start again")
                return tensor.to(self._device)

            return map_tensors(value.form, read)


def make_place(name: str, device: torch.device, directory: Path) -> OnDevice:
    """The place of this name: `cpu`, `disk` with its files in a directory, or else the device itself."""
    if name == DISK:
        return OnDisk(directory, device)
    return InCpuMemory(device) if name == CPU else OnDevice()


class _File:
    """A state on disk: its file, and what it holds with tensors of its shapes and types on meta."""

    def __init__(self, path: Path, form: Any) -> None:
        self.path = path
        self.form = form
        weakref.finalize(self, path.unlink, missing_ok=True)


def _raw(tensor: torch.Tensor) -> Any:
    """The bytes of a CPU tensor, as a buffer; a copy of them where they do not lie in order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences on the model's device: what one layer call works on.

    `input_ids` int64 [B, T]; `counted` bool [B, T], the tokens whose prediction counts; `first`: number of the first
    sequence among those of a run.
    """

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
    selections: list[Any]  # per batch, what the last F indexer returned, and what else layers hand on


@dataclass(frozen=True)
class BranchState:
    """A branch on one batch at a layer's entry: hidden states [B, T, D], and what the last F indexer returned."""

    hidden_states: torch.Tensor
    selection: Any

    @property
    def bytes(self) -> int:
        """Memory that it holds. States of S layers share their selection; it counts for each of them."""
        tensors = [self.hidden_states, *tensors_of(self.selection)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# What hears of an S layer: (batch, the patterns that run there, position, borrowed selection, its own indexer's).
Probe = Callable[[Batch, Sequence[Pattern], int, Any, Any], None]


def device_batches(calibration: Calibration, batch_size: int, device: torch.device) -> list[Batch]:
    """A calibration's sequences as batches on a device."""
    input_ids, counted = torch.from_numpy(calibration.input_ids), torch.from_numpy(calibration.counted())
    return cut_batches(input_ids.to(device), counted.to(device), batch_size)


def cut_batches(input_ids: torch.Tensor, counted: torch.Tensor, batch_size: int) -> list[Batch]:
    """Fixed batches of consecutive sequences of [S, T] ids. The last may be smaller."""
    return [
        Batch(first, input_ids[first : first + batch_size], counted[first : first + batch_size])
        for first in range(0, len(input_ids), batch_size)
    ]


def cut_waves(batches: Sequence[Batch], per_wave: int) -> list[list[Batch]]:
    """Consecutive batches that go through the layers together, so many at a time. The last wave may be smaller."""
    return [list(batches[first : first + per_wave]) for first in range(0, len(batches), per_wave)]


def count_sequences(wave: Sequence[Batch]) -> int:
    """Sequences of all batches of a wave."""
    return sum(len(batch.input_ids) for batch in wave)


class LayerBlock:
    """The decoder layers of a model that this process has.

    Call arguments are captured once for each batch shape. `place`: where states are between layer calls.
    """

    def __init__(self, model: DsaModel, place: OnDevice | None = None) -> None:
        self.model = model
        self.place = place or OnDevice()
        self._calls: dict[torch.Size, list[LayerCall]] = {}
        self._letter_of_layer = {index: position for position, index in enumerate(model.layer_indices)}

    def advance(
        self,
        starts: Mapping[Pattern, int],
        wave: Sequence[Batch],
        kept: StateStore[BranchState],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
        probe: Probe | None = None,
        arriving: Sequence[Branch] = (),
    ) -> tuple[list[Branch], int]:
        """The branches behind the block's last layer, and the layer runs x sequences that they took.

        `starts`: the decoder layer where each pattern's branch begins; those that begin before this block come from
        the block before, as `arriving`, and those that begin behind it are not here. States at the entries of this
        block's layers are taken from `kept`, and handed to it. `on_layer` hears of each layer.
        """
        entering = _groups(starts, kept.keeping)
        branches, layer_runs = list(arriving), 0
        for index in self.model.held:
            _keep(index, branches, wave, kept)
            pending, branches = branches + self._open(index, entering.get(index, []), wave, kept), []
            if not pending:
                continue  # all branches begin behind: this layer's weights are not needed
            with self.model.holding(index):
                while pending:  # taken off one by one, so that a branch's old states go as its new ones come
                    branches += self._run_layer(index, pending.pop(0), wave, probe)
            layer_runs += len(branches)
            on_layer(len(branches) * count_sequences(wave))
        return branches, layer_runs * count_sequences(wave)

    def _open(
        self, index: int, groups: Iterable[list[Pattern]], wave: Sequence[Batch], kept: StateStore[BranchState]
    ) -> list[Branch]:
        """The branches that start at a decoder layer: at the first one from the embedding, elsewhere from `kept`."""
        branches = []
        for group in groups:
            if index == 0:
                embedded = [self.place.put(self.model.embed(batch.input_ids)) for batch in wave]
                branches.append(Branch(group, embedded, [None] * len(wave)))
                continue
            letters = kept.keeping.letters_before(group[0], index)
            states = [kept.get(batch.first, index, letters) for batch in wave]
            branches.append(Branch(group, [s.hidden_states for s in states], [s.selection for s in states]))
        return branches

    def _run_layer(self, index: int, branch: Branch, wave: Sequence[Batch], probe: Probe | None) -> list[Branch]:
        """One layer on one branch; two branches come back where the patterns part."""
        groups, position = [branch.patterns], self._letter_of_layer.get(index)
        if position is not None:
            full = [pattern for pattern in branch.patterns if pattern.is_full(position)]
            shared = [pattern for pattern in branch.patterns if not pattern.is_full(position)]
            groups = [group for group in (full, shared) if group]
        return [self._run_group(index, branch, group, wave, probe) for group in groups]

    def _run_group(
        self, index: int, branch: Branch, patterns: list[Pattern], wave: Sequence[Batch], probe: Probe | None
    ) -> Branch:
        hidden_states, selections = [], []
        for states, selection, batch in zip(branch.hidden_states, branch.selections, wave, strict=True):
            here = self.place.fetch(selection)
            store = take_up(SelectionStore(patterns[0]), here)
            if probe is not None:
                store.probe = partial(probe, batch, patterns)
            call = self.calls_for(batch)[index].on(batch.input_ids)
            output = self.model.run_layer(index, self.place.fetch(states), call, store)
            hidden_states.append(self.place.put(output))
            handed = hand_on(store, here)  # an S layer borrows what is in its place already
            selections.append(selection if handed is here else self.place.put(handed))
        return Branch(patterns, hidden_states, selections)

    def calls_for(self, batch: Batch) -> list[LayerCall]:
        """Each layer's call arguments for this batch's shape; on its tokens by `LayerCall.on`."""
        shape = batch.input_ids.shape
        if shape not in self._calls:
            self._calls[shape] = self.model.capture_calls(batch.input_ids)
        return self._calls[shape]


def _groups(starts: Mapping[Pattern, int], keeping: Keeping) -> dict[int, list[list[Pattern]]]:
    """By the decoder layer where they start: groups of patterns that share their state there."""
    groups: dict[tuple[int, str], list[Pattern]] = {}
    for pattern, entry in starts.items():
        groups.setdefault((entry, keeping.letters_before(pattern, entry)), []).append(pattern)
    entering: dict[int, list[list[Pattern]]] = {}
    for (entry, _), group in groups.items():
        entering.setdefault(entry, []).append(group)
    return entering


def _keep(entry: int, branches: Iterable[Branch], wave: Sequence[Batch], kept: StateStore[BranchState]) -> None:
    """Hand the branches' states at the entry of a decoder layer to the store, which takes what it wants."""
    for branch in branches:
        letters = kept.keeping.letters_before(branch.patterns[0], entry)
        for number, batch in enumerate(wave):
            state = BranchState(branch.hidden_states[number], branch.selections[number])
            kept.put(batch.first, entry, letters, state, state.bytes)
