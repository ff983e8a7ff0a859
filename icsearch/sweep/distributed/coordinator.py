"""All processes of a run, as rank 0 leads them: its orders, and a scorer that has them do each wave together.

A wave is one batch for each data rank, or as many as fit where weights are streamed. Waves are ordered ahead, so that
no process waits for rank 0 to ask; in a pipeline several are on their way at once. Losses come back as sums per
sequence, and are put together in sequence order: they are those of one process, bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from icsearch.core.errors import NonFiniteLossError
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event
from icsearch.search.loop import Scores
from icsearch.sweep.distributed.launch import CALIBRATION, Grid
from icsearch.sweep.distributed.worker import Order, Worker
from icsearch.sweep.distributed.world import World
from icsearch.sweep.fisher import join_events
from icsearch.sweep.states import Keeping, Rehearsal

Range = tuple[int, int]  # sequences [first, last)
Work = Sequence[tuple[Sequence[Pattern], Range]]


@dataclass(frozen=True)
class Start:
    """The decoder layer where each pattern's branch begins, by its letters, and the layer runs that follow."""

    entries: dict[str, int]
    layer_runs: int


class Schedule:
    """Follows every sweep of one set of sequences, so that all processes agree where a branch begins.

    Numbers alone: what is kept follows from the orders and the plan, never from what memory happens to be free.
    `full`: the unmodified model, in runs that measure the KL to it. That one runs along in the first sweep of each
    batch, and in all of them unless `keep_full_states`.
    """

    def __init__(
        self, keeping: Keeping, base: Pattern, full: Pattern | None = None, keep_full_states: bool = False
    ) -> None:
        self.keeping = keeping
        self.base = base
        self.full = full
        self.keep_full_states = keep_full_states
        self._kept = Rehearsal(keeping, base)
        self._known: set[int] = set()

    def retain(self, base: Pattern) -> None:
        """What cannot be on the way to `base`, or to a flip of it, is let go of everywhere."""
        self.base = base
        self._kept.retain(base)

    def sweep(self, asked: Sequence[Pattern], batches: Sequence[int]) -> Start:
        """A sweep of these patterns over the batches that begin with these sequences; it counts as done."""
        running = dict.fromkeys(asked)
        if self.full is not None and not self._known >= set(batches):
            running[self.full] = None
            if self.keep_full_states:
                self._known |= set(batches)
        entries = {pattern.letters: self._kept.start(pattern, batches) for pattern in running}
        return Start(entries, self._kept.sweep(running, batches))

    def copy(self) -> Schedule:
        """For looking ahead: what happens to the copy leaves this one as it is."""
        other = Schedule(self.keeping, self.base, self.full, self.keep_full_states)
        other._kept, other._known = self._kept.rehearsal(), set(self._known)
        return other


class Coordinator:
    """Rank 0's hold of the others: they do what they are told, in that order, as rank 0 does its own part."""

    def __init__(self, world: World, grid: Grid, worker: Worker) -> None:
        self.world = world
        self.grid = grid
        self.worker = worker
        self.items = itertools.count(1)  # a number for each sweep, by which its branches and losses are found

    def scorer(
        self,
        name: str,
        schedule: Schedule,
        patterns: int,
        batches_per_share: int = 1,
        in_cpu_memory: bool = False,
    ) -> DistributedScorer:
        """Scores one set of sequences, so many patterns and batches at a time.

        `in_cpu_memory`: branch states are in each process's CPU memory between layer calls.
        """
        keeping = schedule.keeping
        order: Order = {
            "do": "set up",
            "set": name,
            "num_layers": keeping.num_layers,
            "layer_indices": list(keeping.layer_indices),
            "flippable": sorted(keeping.flippable),
            "stride": keeping.stride,
            "base": schedule.base.letters,
            "kl": schedule.full is not None,
            "keep_full_states": schedule.keep_full_states,
            "in_cpu_memory": in_cpu_memory,
        }
        self.world.tell(order)
        self.worker.set_up(order)
        ranges = [(batch.first, batch.last) for batch in self.worker.batches_of(name)]
        shares = [ranges[i : i + batches_per_share] for i in range(0, len(ranges), batches_per_share)]
        return DistributedScorer(self, name, schedule, shares, patterns)

    def do_jobs(
        self, job: str, shared: dict[str, Any], items: Sequence[dict[str, Any]], on_layer: Callable[[int], None]
    ) -> Iterator[list[Event]]:
        """The events of each item, one for each wave and in this order; so many at a time as there are data ranks.

        `shared` are the arguments of all. Seconds are those of the wall: the first event of a round has them.
        """
        size, started = self.grid.data, time.monotonic()
        rounds: list[list[dict[str, Any] | None]] = []
        orders: list[Order] = []
        for first in range(0, len(items), size):
            rounds.append(list(items[first : first + size]))
            idle = [None] * (size - len(rounds[-1]))
            order: Order = {"do": "job", "job": job, "item": next(self.items), "set": CALIBRATION, "shared": shared}
            orders.append({**order, "items": rounds[-1] + idle})
        told = 0
        for number, order in enumerate(orders):
            for coming in orders[told : number + 2]:  # one round ahead, so that nobody waits for the next one
                self.world.tell(coming)
                told += 1
            by_rank = [self.worker.do_job(order, on_layer) or []]
            for rank in range(1, len(rounds[number]) * self.grid.pipeline):
                by_rank.append(self.world.take(f"events/{order['item']}/{rank}", f"results from rank {rank}"))
                on_layer(sum(event["layer_sequences"] for event in by_rank[-1]))
            parts = by_rank
            if (places := self.grid.pipeline) > 1:
                pipelines = (by_rank[first : first + places] for first in range(0, len(by_rank), places))
                parts = [[join_events(part) for part in zip(*each, strict=True)] for each in pipelines]
            events = [event for part in parts for event in part]
            for event, seconds in zip(events, [time.monotonic() - started, *[0.0] * len(events)], strict=False):
                event["seconds"] = round(seconds, 3)
            started = time.monotonic()
            yield from parts


@dataclass
class _Flight:
    """A wave that was given out: the order, and of rank 0's own part what it took and what came of it."""

    patterns: list[Pattern]
    wave: Range
    order: Order
    losses: list[str]  # the key of each pipeline's message
    begun: bool = False
    own_layers: int = 0
    own: dict[str, Any] | None = None


class DistributedScorer:
    """The layer sweep by several processes as the search sees it."""

    def __init__(
        self,
        coordinator: Coordinator,
        name: str,
        schedule: Schedule,
        shares: Sequence[Sequence[Range]],
        patterns: int,
    ) -> None:
        self.patterns_per_sweep = patterns
        self._world, self._grid, self._worker = coordinator.world, coordinator.grid, coordinator.worker
        self._items = coordinator.items
        self._name = name
        self._schedule = schedule
        size = self._grid.data
        waves = [shares[first : first + size] for first in range(0, len(shares), size)]
        self._shares = {(wave[0][0][0], wave[-1][-1][1]): wave for wave in waves}  # one for each data rank
        self.waves: Sequence[Range] = list(self._shares)
        self._coming: deque[tuple[Sequence[Pattern], Range]] = deque()
        self._flights: deque[_Flight] = deque()

    def retain(self, base: Pattern) -> None:
        if base == self._schedule.base:
            return
        self._schedule.retain(base)
        order = {"do": "retain", "set": self._name, "base": base.letters}
        self._world.tell(order)
        self._worker.retain(order)

    def expected(self, work: Work) -> int:
        ahead = self._schedule.copy()
        return sum(
            ahead.sweep(patterns, _firsts(share)).layer_runs * (share[-1][1] - share[0][0])
            for patterns, wave in work
            for share in self._shares[wave]
        )

    def announce(self, work: Work) -> None:
        """What `score` will be asked for next: processes begin with it before they are."""
        if self._flights:
            raise RuntimeError("sweeps that were given out have not been waited for")
        self._coming = deque(work)

    def shrink(self, patterns: int) -> bool:
        """Memory that runs out in one of several processes ends the run; it goes on with a smaller plan."""
        return False

    def score(self, patterns: Sequence[Pattern], wave: Range, on_layer: Callable[[int], None]) -> Scores:
        if not self._flights and not self._coming:
            self._coming.append((patterns, wave))
        self._give_out()
        first = self._flights[0]
        for flight in self._flights:  # rank 0's part; as the head of a pipeline, of those behind it meanwhile
            if flight is not first and (self._grid.pipeline == 1 or self._world.has(first.losses)):
                break
            if not flight.begun:
                flight.begun = True
                flight.own = self._worker.sweep(flight.order, partial(_count, flight, on_layer))
        self._flights.popleft()
        if (first.patterns, first.wave) != (list(patterns), wave):
            raise RuntimeError(f"asked to score {wave}, but {first.wave} was announced")
        return self._collect(first, on_layer)

    def _give_out(self) -> None:
        """Keep the processes supplied: in a pipeline, with two waves a place beyond the one that is waited for."""
        while self._coming and len(self._flights) <= 2 * self._grid.pipeline:
            patterns, wave = self._coming.popleft()
            shares: list[dict[str, Any] | None] = [
                {"batches": _firsts(share), "starts": self._schedule.sweep(patterns, _firsts(share)).entries}
                for share in self._shares[wave]
            ]
            order: Order = {
                "do": "sweep",
                "item": next(self._items),
                "set": self._name,
                "asked": [pattern.letters for pattern in patterns],
                "shares": shares + [None] * (self._grid.data - len(shares)),
            }
            self._world.tell(order)
            losses = [f"losses/{order['item']}/{data_rank}" for data_rank in range(len(shares))]
            self._flights.append(_Flight(list(patterns), wave, order, losses))

    def _collect(self, flight: _Flight, on_layer: Callable[[int], None]) -> Scores:
        """The sums of all pipelines, in sequence order."""
        parts = []
        for data_rank, key in enumerate(flight.losses):
            if data_rank == 0 and flight.own is not None:
                parts.append(flight.own)
            else:
                parts.append(self._world.take(key, f"losses from rank {self._grid.last_rank(data_rank)}"))
        for data_rank, part in enumerate(parts):
            if "not finite" in part:
                raise self._named(flight, data_rank, part["not finite"])
        done = sum(part["layer_sequences"] for part in parts)
        on_layer(done - flight.own_layers)
        notes = sorted({note for part in parts for note in part["notes"]})
        read = sum(part["bytes_read"] for part in parts)
        nll, kl = (
            {letters: [value for part in parts for value in part[name][letters]] for letters in parts[0][name]}
            for name in ("nll", "kl")
        )
        return Scores(nll, done, tuple(notes), kl, read)

    def _named(self, flight: _Flight, data_rank: int, loss: dict[str, Any]) -> NonFiniteLossError:
        """The error for a loss of a pipeline that is not finite: its processes look for the layer, one after another.

        They come to that behind all that was given out before, of which rank 0 has to do its part.
        """
        for other in self._flights:
            if not other.begun:
                self._worker.sweep(other.order)
        batches = [batch for batch in self._shares[flight.wave][data_rank] if batch[0] <= loss["sequence"]]
        order: Order = {"do": "trace", "item": next(self._items), "set": self._name, "data_rank": data_rank}
        order |= {"batch": batches[-1][0], "sequence": loss["sequence"], "pattern": loss["pattern"]}
        self._world.tell(order)
        where = self._worker.trace(order)
        if where is None:
            where = self._world.take(f"traced/{order['item']}", "the layer of a loss that is not finite")
        return NonFiniteLossError(loss["value"], loss["sequence"], loss["pattern"], where)


def _count(flight: _Flight, on_layer: Callable[[int], None], layer_sequences: int) -> None:
    flight.own_layers += layer_sequences
    on_layer(layer_sequences)


def _firsts(share: Sequence[Range]) -> list[int]:
    """The first sequence of each batch, by which processes know it."""
    return [first for first, _ in share]
