"""Branches from one process of a pipeline to the next, point to point, several packets in flight.

A packet is what a block of layers leaves of one wave: its branches, with hidden states and selections; or of a table of
second order, the states of each batch, and on the way back its cotangents. What it holds is announced through the
store; the tensors follow by isend. A tensor that is there several times goes once.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model.families.calls import Handed
from icsearch.sweep.branches import Branch
from icsearch.sweep.distributed.launch import IN_FLIGHT
from icsearch.sweep.distributed.world import World

TAGS = 2**16  # gloo tells messages apart by a number that may come again once they are through


@dataclass(frozen=True)
class Packet:
    """The branches of one wave behind a block, and what the blocks so far took and noted."""

    branches: list[Branch]
    layer_sequences: int = 0
    bytes_read: int = 0  # of weights, from the checkpoint
    notes: tuple[str, ...] = ()
    passes: list[Any] = field(default_factory=list)  # of a table: nested lists with tensors and their types


class Transport:
    """To the process behind this one in a pipeline, and from the one before it; `device` is where branches live.

    `direct`: tensors go from device to device, else by way of CPU memory. `back`: the other way. Not both ways may be
    direct: what two GPUs send to each other at the same time, NCCL has in one queue, and each would wait for the other.
    """

    def __init__(self, world: World, device: torch.device, direct: bool, back: bool = False) -> None:
        self._world = world
        step = -1 if back else 1
        self._to, self._source = world.rank + step, world.rank - step
        self._device = device
        self._between = device if direct else torch.device("cpu")
        self._sent: deque[tuple[str, list[Any], list[torch.Tensor]]] = deque()
        self._tags_sent, self._tags_received = itertools.count(), itertools.count()

    def send(self, item: int | str, packet: Packet) -> None:
        """Hand a packet on; waits while there are too many that the next process has not taken."""
        here, to = self._world.rank, self._to
        header, tensors = _pack(packet)
        while len(self._sent) >= IN_FLIGHT:
            taken, works, _ = self._sent.popleft()
            self._world.take(taken, f"rank {to} to take branches")
            with self._world.exchange_with(to):
                _finish(works)
        self._world.post(f"branches/{here}/{to}/{item}", header)
        tensors = [tensor.to(self._between).contiguous() for tensor in tensors]
        with self._world.exchange_with(to):
            works = [distributed.isend(tensor, to, tag=next(self._tags_sent) % TAGS) for tensor in tensors]
        self._sent.append((f"taken/{here}/{to}/{item}", works, tensors))

    def receive(self, item: int | str) -> Packet:
        """The packet of this item from the process before."""
        source, here = self._source, self._world.rank
        header = self._world.take(f"branches/{source}/{here}/{item}", f"branches from rank {source}")
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=self._between) for shape, dtype in header["tensors"]
        ]
        with self._world.heartbeat.waiting(f"branches from rank {source}"), self._world.exchange_with(source):
            _finish([distributed.irecv(tensor, source, tag=next(self._tags_received) % TAGS) for tensor in tensors])
        self._world.post(f"taken/{source}/{here}/{item}", True)
        return _unpack(header, [tensor.to(self._device) for tensor in tensors])


def _finish(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _pack(packet: Packet) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What the receiver must know before the tensors come, and these, each once."""
    numbers: dict[int, int] = {}
    tensors: list[torch.Tensor] = []

    def number_of(value: Any) -> int | None:
        if value is None:
            return None
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"a selection of type {type(value).__name__} cannot go to another process: give --pp 1")
        if id(value) not in numbers:
            numbers[id(value)] = len(tensors)
            tensors.append(value)
        return numbers[id(value)]

    def numbered(handed: Any) -> Any:
        if not isinstance(handed, Handed):
            return number_of(handed)
        more = {
            name: {key: [number_of(tensor) for tensor in group] for key, group in container.items()}
            for name, container in handed.more.items()
        }
        return {"selection": number_of(handed.selection), "more": more}

    def nested(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _name(value)
        return [nested(each) for each in value] if isinstance(value, list) else numbered(value)

    branches = [
        {
            "patterns": [pattern.letters for pattern in branch.patterns],
            "hidden_states": [number_of(states) for states in branch.hidden_states],
            "selections": [numbered(selection) for selection in branch.selections],
        }
        for branch in packet.branches
    ]
    passes = nested(packet.passes)
    shapes = [[list(tensor.shape), _name(tensor.dtype)] for tensor in tensors]
    others = {name: getattr(packet, name) for name in ("layer_sequences", "bytes_read", "notes")}
    return {"branches": branches, "passes": passes, "tensors": shapes, **others}, tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unpack(header: dict[str, Any], tensors: list[torch.Tensor]) -> Packet:
    def handed(item: Any) -> Any:
        if not isinstance(item, dict):
            return None if item is None else tensors[item]
        more = {
            name: {key: tuple(tensors[number] for number in numbers) for key, numbers in container.items()}
            for name, container in item["more"].items()
        }
        return Handed(handed(item["selection"]), more)

    def nested(item: Any) -> Any:
        if isinstance(item, str):
            return getattr(torch, item)
        return [nested(each) for each in item] if isinstance(item, list) else handed(item)

    branches = [
        Branch(
            [Pattern(letters) for letters in branch["patterns"]],
            [tensors[number] for number in branch["hidden_states"]],
            [handed(item) for item in branch["selections"]],
        )
        for branch in header["branches"]
    ]
    passes = nested(header["passes"])
    return Packet(branches, header["layer_sequences"], header["bytes_read"], tuple(header["notes"]), passes)
