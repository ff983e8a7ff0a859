"""All processes of a run, as rank 0 leads them: its orders, and a scorer that has them do each wave together.

A wave is one batch for each data rank, or as many as fit where weights are streamed. Waves are ordered ahead, so that
no process waits for rank 0 to ask; in a pipeline several are on their way at once. Losses come back as sums per
sequence, and are put together in sequence order: they are those of one process, bit for bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.core.errors import NonFiniteLossError
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event
from icsearch.search.loop import Scores
from icsearch.sweep.distributed.launch import Grid
from icsearch.sweep.distributed.schedule import CALIBRATION, Ledger
from icsearch.sweep.distributed.worker import Member, Order, losses_message
from icsearch.sweep.distributed.world import World

Range = tuple[int, int]  # sequences [first, last)
Work = Sequence[tuple[Sequence[Pattern], Range]]


class Crew:
    """Rank 0's hold of the others: they do what they are told, in that order, as rank 0 does its own part."""

    def __init__(self, world: World, grid: Grid, member: Member) -> None:
        self.world = world
        self.grid = grid
        self.member = member
        self._items = 0

    def next_item(self) -> int:
        """A number for a sweep, by which its branches and losses are found."""
        self._items += 1
        return self._items

    @property
    def ahead(self) -> int:
        """Waves that are given out beyond the one whose losses are waited for."""
        return 2 * self.grid.pipeline

    def scorer(
        self,
        name: str,
        ledger: Ledger,
        batches: Sequence[Range],
        patterns: int,
        batches_per_share: int = 1,
        resting: bool = False,
    ) -> CrewScorer:
        """Scores one set of sequences, cut into these batches, so many patterns and batches at a time.

        `resting`: branch states are in each process's CPU memory between layer calls.
        """
        order: Order = {
            "do": "set up",
            "set": name,
            "num_layers": ledger.keeping.num_layers,
            "layer_indices": list(ledger.keeping.layer_indices),
            "flippable": sorted(ledger.keeping.flippable),
            "stride": ledger.keeping.stride,
            "base": ledger.base.letters,
            "kl": ledger.full is not None,
            "keep_full_states": ledger.keep_full_states,
            "resting": resting,
        }
        self.world.tell(order)
        self.member.set_up(order)
        shares = [batches[i : i + batches_per_share] for i in range(0, len(batches), batches_per_share)]
        return CrewScorer(self, name, ledger, shares, patterns)

    def do_jobs(
        self, job: str, shared: dict[str, Any], items: Sequence[dict[str, Any]], on_layer: Callable[[int], None]
    ) -> Iterator[list[Event]]:
        """The events of each item, one for each wave and in this order; so many at a time as there are data ranks.

        `shared` are the arguments of all. Seconds are those of the wall: the first event of a round has them.
        """
        size, started = self.grid.data, time.monotonic()
        rounds = [list(items[first : first + size]) for first in range(0, len(items), size)]
        orders = [self._job_order(job, shared, some) for some in rounds]
        told = 0
        for number, order in enumerate(orders):
            for coming in orders[told : number + 2]:  # one round ahead, so that nobody waits for the next one
                self.world.tell(coming)
                told += 1
            found = [self.member.do_job(order, on_layer) or []]
            for rank in range(1, len(rounds[number])):
                found.append(self.world.take(f"events/{order['item']}/{rank}", f"results from rank {rank}"))
                on_layer(sum(event["layer_sequences"] for event in found[-1]))
            events = [event for several in found for event in several]
            for event, seconds in zip(events, [time.monotonic() - started, *[0.0] * len(events)], strict=False):
                event["seconds"] = round(seconds, 3)
            started = time.monotonic()
            yield from found

    def _job_order(self, job: str, shared: dict[str, Any], items: Sequence[dict[str, Any]]) -> Order:
        idle = [None] * (self.grid.data - len(items))
        order: Order = {"do": "job", "job": job, "item": self.next_item(), "set": CALIBRATION, "shared": shared}
        return {**order, "items": [*items, *idle]}


@dataclass
class _Flight:
    """A wave that was given out: the order, and of rank 0's own part what it took and what came of it."""

    patterns: list[Pattern]
    wave: Range
    order: Order
    begun: bool = False
    own_layers: int = 0
    own: dict[str, Any] | None = None


class CrewScorer:
    """The layer sweep by several processes as the search sees it."""

    def __init__(self, crew: Crew, name: str, ledger: Ledger, shares: Sequence[Sequence[Range]], patterns: int) -> None:
        self.patterns_per_sweep = patterns
        self._crew = crew
        self._name = name
        self._ledger = ledger
        size = crew.grid.data
        waves = [shares[first : first + size] for first in range(0, len(shares), size)]
        self._shares = {(wave[0][0][0], wave[-1][-1][1]): wave for wave in waves}  # one for each data rank
        self._coming: deque[tuple[Sequence[Pattern], Range]] = deque()
        self._flights: deque[_Flight] = deque()

    @property
    def waves(self) -> Sequence[Range]:
        return list(self._shares)

    def retain(self, base: Pattern) -> None:
        if base == self._ledger.base:
            return
        self._ledger.retain(base)
        order = {"do": "retain", "set": self._name, "base": base.letters}
        self._crew.world.tell(order)
        self._crew.member.retain(order)

    def expected(self, work: Work) -> int:
        ahead = self._ledger.copy()
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
        self._do_own(on_layer)
        flight = self._flights.popleft()
        if (flight.patterns, flight.wave) != (list(patterns), wave):
            raise RuntimeError(f"asked to score {wave}, but {flight.wave} was announced")
        return self._collect(flight, on_layer)

    def _give_out(self) -> None:
        """Keep the processes supplied."""
        while self._coming and len(self._flights) <= self._crew.ahead:
            patterns, wave = self._coming.popleft()
            shares: list[dict[str, Any] | None] = [
                {"batches": _firsts(share), "starts": self._ledger.sweep(patterns, _firsts(share)).entries}
                for share in self._shares[wave]
            ]
            order: Order = {
                "do": "sweep",
                "item": self._crew.next_item(),
                "set": self._name,
                "asked": [pattern.letters for pattern in patterns],
                "shares": shares + [None] * (self._crew.grid.data - len(shares)),
            }
            self._crew.world.tell(order)
            self._flights.append(_Flight(list(patterns), wave, order))

    def _do_own(self, on_layer: Callable[[int], None]) -> None:
        """Rank 0's part of the wave that is waited for; as the head of a pipeline, of those behind it meanwhile."""
        first = self._flights[0]
        for flight in self._flights:
            if flight is not first and (self._crew.grid.pipeline == 1 or self._is_done(first)):
                return
            if not flight.begun:
                flight.begun = True
                self._do_part(flight, on_layer)

    def _is_done(self, flight: _Flight) -> bool:
        """Whether the losses of all pipelines have come."""
        data_ranks = range(len(self._shares[flight.wave]))
        return self._crew.world.has([_losses_key(flight, data_rank) for data_rank in data_ranks])

    def _do_part(self, flight: _Flight, on_layer: Callable[[int], None]) -> None:
        def count(layer_sequences: int) -> None:
            flight.own_layers += layer_sequences
            on_layer(layer_sequences)

        done = self._crew.member.sweep(flight.order, count)
        flight.own = None if done is None else losses_message(done)

    def _collect(self, flight: _Flight, on_layer: Callable[[int], None]) -> Scores:
        """The sums of all pipelines, in sequence order."""
        grid = self._crew.grid
        found = []
        for data_rank in range(len(self._shares[flight.wave])):
            if data_rank == 0 and flight.own is not None:
                found.append(flight.own)
                continue
            last = grid.last_rank(data_rank)
            found.append(self._crew.world.take(_losses_key(flight, data_rank), f"losses from rank {last}"))
        for data_rank, part in enumerate(found):
            if "not finite" in part:
                raise self._named(flight, data_rank, part["not finite"])
        done = sum(part["layer_sequences"] for part in found)
        on_layer(done - flight.own_layers)
        notes = sorted({note for part in found for note in part["notes"]})
        read = sum(part["bytes_read"] for part in found)
        return Scores(_joined(found, "nll"), done, tuple(notes), _joined(found, "kl"), read)

    def _named(self, flight: _Flight, data_rank: int, loss: dict[str, Any]) -> NonFiniteLossError:
        """The error for a loss of a pipeline that is not finite: its processes look for the layer, one after another.

        They come to that behind all that was given out before, of which rank 0 has to do its part.
        """
        for other in self._flights:
            if not other.begun:
                self._crew.member.sweep(other.order)
        batches = [batch for batch in self._shares[flight.wave][data_rank] if batch[0] <= loss["sequence"]]
        order: Order = {"do": "trace", "item": self._crew.next_item(), "set": self._name, "data_rank": data_rank}
        order |= {"batch": batches[-1][0], "sequence": loss["sequence"], "pattern": loss["pattern"]}
        self._crew.world.tell(order)
        where = self._crew.member.trace(order)
        if where is None:
            where = self._crew.world.take(f"traced/{order['item']}", "the layer of a loss that is not finite")
        return NonFiniteLossError(loss["value"], loss["sequence"], loss["pattern"], where)


def _firsts(share: Sequence[Range]) -> list[int]:
    """The first sequence of each batch, by which processes know it."""
    return [first for first, _ in share]


def _losses_key(flight: _Flight, data_rank: int) -> str:
    return f"losses/{flight.order['item']}/{data_rank}"


def _joined(parts: Sequence[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """Sums by letters over consecutive sequences, put one behind the other."""
    return {letters: [value for part in parts for value in part[name][letters]] for letters in parts[0][name]}
