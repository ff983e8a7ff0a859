"""What one process does of a run of several: its layers of the model, on its share of each wave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from icsearch.core.errors import NonFiniteLossError
from icsearch.core.pattern import Pattern
from icsearch.model.model import DsaModel
from icsearch.runs.journal import Event
from icsearch.sweep.branches import Batch, Branch, BranchState, make_place
from icsearch.sweep.distributed.launch import MEASURE, TABLE, Grid
from icsearch.sweep.distributed.transport import Packet, Transport
from icsearch.sweep.distributed.world import World, has_own_gpu
from icsearch.sweep.fisher import FisherSweep, Pass
from icsearch.sweep.measures import WaveMeasures
from icsearch.sweep.similarity import SimilaritySweep
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import LM_HEAD, Sums, Sweeper, kernel_notes, make_sweeper

Order = dict[str, Any]
UNLIMITED = 2**62  # bytes: what is kept is decided by rank 0, by the plan


class Worker:
    """One process's part: a model that holds its layers, and the batches of all sets, of which it scores its share."""

    def __init__(self, world: World, grid: Grid, dsa: DsaModel, batches: Mapping[str, Iterable[Batch]]) -> None:
        self._world = world
        self._dsa = dsa
        self.data_rank, self._place = grid.data_rank(world.rank), grid.place(world.rank)
        self._is_last = world.rank == grid.last_rank(self.data_rank)
        self._batches = {name: {batch.first: batch for batch in several} for name, several in batches.items()}
        self._sweepers: dict[str, Sweeper] = {}
        direct = dsa.device.type == "cpu" or has_own_gpu(world.launch)
        self._places = grid.pipeline
        self._transport = Transport(world, dsa.device, direct)
        self._back = Transport(world, dsa.device, direct=dsa.device.type == "cpu", back=True)

    def batches_of(self, name: str) -> list[Batch]:
        """All batches of a set; this process scores its share of them."""
        return list(self._batches[name].values())

    def set_up(self, order: Order) -> None:
        """Make the sweeper of one set: what it measures, and what it keeps between sweeps."""
        keeping = Keeping(
            order["num_layers"], tuple(order["layer_indices"]), frozenset(order["flippable"]), order["stride"]
        )
        kept: StateStore[BranchState] = StateStore(keeping, Pattern(order["base"]), UNLIMITED)
        wanted = order["kl"], order["keep_full_states"], order["in_cpu_memory"]
        self._sweepers[order["set"]] = make_sweeper(self._dsa, kept, *wanted)

    def retain(self, order: Order) -> None:
        """Let go of what is of no use to the committed pattern and its flips."""
        self._sweepers[order["set"]].kept.retain(Pattern(order["base"]))

    def sweep(self, order: Order, on_layer: Callable[[int], None] = lambda _: None) -> dict[str, Any] | None:
        """This process's part of one sweep; the losses come from the last process of each pipeline.

        They come as JSON has them (floats keep their bits), with what the pipeline took and noted. A loss that is not
        finite comes in place of them, where the layer that it comes from may be another process's: see `trace`.
        """
        share = order["shares"][self.data_rank]
        if share is None:  # the last wave may have fewer batches than there are pipelines
            return None
        batches = self._batches[order["set"]]
        wave = [batches[first] for first in share["batches"]]
        starts = {Pattern(letters): entry for letters, entry in share["starts"].items()}
        sweeper = self._sweepers[order["set"]]
        before = self._transport.receive(order["item"]) if self._place else Packet([], 0)
        weights = self._dsa.weights
        read = before.bytes_read - weights.bytes_read
        sums: Sums = {}
        with kernel_notes() as notes:
            branches, taken = sweeper.advance(starts, wave, self._heeding(on_layer), before.branches)
            if self._is_last:
                try:
                    sums = sweeper.measure([Pattern(letters) for letters in order["asked"]], wave, branches)
                except NonFiniteLossError as error:
                    if self._place == 0:  # it has all layers, and has named the one
                        raise
                    return {"not finite": {name: getattr(error, name) for name in ("value", "sequence", "pattern")}}
        packet = Packet(
            branches,
            before.layer_sequences + taken,
            read + weights.bytes_read,
            tuple(sorted({*before.notes, *notes})),
        )
        if not self._is_last:
            self._transport.send(order["item"], packet)
            return None
        return {
            "nll": sums["nll"],
            "kl": sums.get("kl", {}),
            "layer_sequences": packet.layer_sequences,
            "bytes_read": packet.bytes_read,
            "notes": list(packet.notes),
        }

    def trace(self, order: Order) -> str | None:
        """This process's part of a forward that looks for where a sequence's states are first not finite.

        The process that finds it returns where; to those behind it, a packet without branches says that it is found.
        """
        if self.data_rank != order["data_rank"]:
            return None
        before = self._transport.receive(order["item"]).branches if self._place else None
        where, onward = "", list[Branch]()
        if before != []:
            arriving = BranchState(before[0].hidden_states[0], before[0].selections[0]) if before else None
            pattern, batch = Pattern(order["pattern"]), self._batches[order["set"]][order["batch"]]
            row = order["sequence"] - batch.first
            where, behind = self._sweepers[order["set"]].trace(pattern, batch, row, arriving)
            onward = [] if where else [Branch([pattern], [behind.hidden_states], [behind.selection])]
            where = where or (LM_HEAD if self._is_last else "")
        if not self._is_last:
            self._transport.send(order["item"], Packet(onward, 0))
        return where or None

    def do_job(self, order: Order, on_layer: Callable[[int], None] = lambda _: None) -> list[Event] | None:
        """This process's part of a job: its wave, if there is one for it; of a table, several waves.

        For all else every process must hold all layers.
        """
        own = order["items"][self.data_rank]
        if own is None:
            return None
        if order["job"] == TABLE:
            return self._tables(order, own["waves"], self._heeding(on_layer))
        wave = [self._batches[order["set"]][first] for first in own["batches"]]
        shared, on_layer = order["shared"], self._heeding(on_layer)
        if order["job"] == MEASURE:
            measures = WaveMeasures(self._dsa, **shared)
            return [measures.event([Pattern(letters) for letters in own["patterns"]], wave, on_layer)]
        return SimilaritySweep(self._dsa, shared["index_topk"], shared["keep_on_cpu"]).events(wave, on_layer)

    def _tables(self, order: Order, waves: list[list[int]], on_layer: Callable[[int], None]) -> list[Event]:
        """The rows of a second-order table that are of this process's layers.

        In a pipeline a wave goes back through this process as soon as one more is on its way forth than there are
        processes behind: so everybody has work, and entries are kept of few waves.
        """
        shared, item, batches = order["shared"], order["item"], self._batches[order["set"]]
        directory = Path(shared["directory"]) / f"rank{self._world.rank}"
        place = make_place(shared["place"], self._dsa.device, directory)
        sweep = FisherSweep(self._dsa, shared["draws"], shared["seed"], place, shared["pair_cost"])
        forth, back = self._transport, self._back
        started, read, done = time.monotonic(), self._dsa.weights.bytes_read, list[Pass]()

        def finish(number: int, passes: list[Pass]) -> None:
            if not self._is_last:
                sweep.take_back(passes, back.receive(f"{item}.{number}").passes)
            sweep.back(passes, on_layer)
            if self._place:
                back.send(f"{item}.{number}", Packet([], passes=sweep.hand_back(passes)))
            done.extend(passes)

        under_way: deque[tuple[int, list[Pass]]] = deque()
        with kernel_notes() as notes:
            for number, firsts in enumerate(waves):
                wave = [batches[first] for first in firsts]
                if self._place:
                    passes = sweep.take_up(wave, forth.receive(f"{item}.{number}").passes)
                else:
                    passes = sweep.begin(wave)
                sweep.forth(passes, on_layer)
                if self._is_last:
                    sweep.turn(passes)
                else:
                    forth.send(f"{item}.{number}", Packet([], passes=sweep.hand_on(passes)))
                under_way.append((number, passes))
                if len(under_way) == self._places - self._place:
                    finish(*under_way.popleft())
            while under_way:
                finish(*under_way.popleft())
        return sweep.events_of(done, notes, time.monotonic() - started, self._dsa.weights.bytes_read - read)

    def _heeding(self, on_layer: Callable[[int], None]) -> Callable[[int], None]:
        """Between two layers this process hears what ends the run."""

        def heed(layer_sequences: int) -> None:
            self._world.heartbeat.check()
            on_layer(layer_sequences)

        return heed
