"""How processes end together, with two of them in one process and a store of torch's own between them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore

from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.core.signals import Terminated
from icsearch.sweep.branches import Branch
from icsearch.sweep.distributed import heartbeat, startup, transport
from icsearch.sweep.distributed.heartbeat import End, Ended, Heartbeat
from icsearch.sweep.distributed.launch import Launch
from icsearch.sweep.distributed.transport import Packet, Transport
from icsearch.sweep.distributed.world import World


class Pair:
    """Two processes' watches. Their threads do not run: each look and judgement is a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.left: list[int] = []
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(heartbeat.time, "sleep", self.pass_time)
        store = HashStore()
        self.first, self.second = (Heartbeat(rank, 2, store, "the store", 10.0, self.left.append) for rank in range(2))
        for one in (self.first, self.second):
            one.announce()
        self.look()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def look(self, *watches_: Heartbeat) -> None:
        """A beat of each of these, by default both, then a look."""
        for one in watches_ or (self.first, self.second):
            one._beat()
        for one in watches_ or (self.first, self.second):
            one._look()

    def judged(self, one: Heartbeat) -> End | None:
        """What one process finds now, once both know it."""
        one._judge(self.now)
        if one._proposed is not None:
            one._write(one._proposed[0])
        return one.end


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    return Pair(monkeypatch)


def test_those_who_live_go_on(pair: Pair) -> None:
    for _ in range(100):
        pair.pass_time(9.0)
        pair.look()
        assert pair.judged(pair.first) is None
    pair.first.check()


def test_one_without_a_sign_of_life_ends_the_run_at_the_timeout(pair: Pair) -> None:
    pair.pass_time(9.9)
    pair.look(pair.first)
    assert pair.judged(pair.first) is None
    pair.pass_time(0.2)
    pair.look(pair.first)
    end = pair.judged(pair.first)
    assert end is not None
    assert (end.status, end.rank) == (1, 0)
    assert "rank 1 gave no sign of life for 10 s" in end.text
    with pytest.raises(Ended, match="rank 0: rank 1 gave no sign"):
        pair.first.check()
    pair.look(pair.second)  # it was stopped only, and wakes up
    with pytest.raises(Ended, match="rank 1: rank 1 gave no sign"):
        pair.second.check()


def test_the_first_reason_counts(pair: Pair) -> None:
    assert pair.second.declare(1, "rank 1 failed: no memory").rank == 1
    assert pair.first.declare(1, "rank 0 failed: cannot reach rank 1").text == "rank 1 failed: no memory"
    with pytest.raises(Ended, match="rank 0: rank 1 failed: no memory; the same command continues"):
        pair.first.check()


def test_what_a_message_that_failed_means(pair: Pair) -> None:
    """The other one may have had a reason to end; else it is gone."""
    error = pair.first.lost(1, "connection reset")
    assert "rank 1 is gone (connection reset)" in str(error)
    assert isinstance(error, Ended)
    pair.look()
    assert "rank 1 is gone" in str(pair.second.lost(0, "connection reset"))


def test_a_message_that_cannot_even_begin(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo may know that the other one is gone when a message is given to it, and not only when it is waited for."""
    world = World(Launch(rank=0, size=2), HashStore(), pair.first)

    def begin(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer\nat ...")

    monkeypatch.setattr(transport.distributed, "isend", begin)
    packet = Packet([Branch([Pattern("FF")], [torch.zeros(1)], [None])])
    with pytest.raises(Ended, match=r"rank 0: rank 1 is gone \(Connection closed by peer\)"):
        Transport(world, torch.device("cpu"), direct=False).send(0, packet)


def test_all_waiting_for_one_another_is_a_network_that_is_gone(pair: Pair) -> None:
    with pair.first.waiting("losses from rank 1"), pair.second.waiting("branches from rank 0"):
        pair.look()
        assert pair.judged(pair.first) is None
        pair.pass_time(9.0)
        pair.look()
        assert pair.judged(pair.first) is None
        pair.pass_time(1.1)
        pair.look()
        end = pair.judged(pair.first)
        assert end is not None
        assert "rank 0 for losses from rank 1, rank 1 for branches from rank 0" in end.text


def test_one_that_computes_may_be_waited_for_as_long_as_it_takes(pair: Pair) -> None:
    with pair.first.waiting("losses from rank 1"):
        for _ in range(20):
            pair.pass_time(5.0)
            pair.look()
            assert pair.judged(pair.first) is None


def test_waits_that_move_are_no_standstill(pair: Pair) -> None:
    with pair.first.waiting("losses from rank 1"):
        for _ in range(20):
            with pair.second.waiting("orders from rank 0"):
                pair.pass_time(5.0)
                pair.look()
                assert pair.judged(pair.first) is None


def test_a_launcher_that_ends_all_is_asked_whom_it_lost(pair: Pair) -> None:
    pair.first._told_at = pair.now
    pair.pass_time(heartbeat.SILENT + 1)
    pair.look(pair.first)
    end = pair.judged(pair.first)
    assert end is not None
    assert (end.status, "rank 1 is gone: killed, or ended without a word" in end.text) == (1, True)


def test_told_to_end_while_all_live_is_sigterm(pair: Pair) -> None:
    pair.first._told_at = pair.now
    for _ in range(4):
        pair.pass_time(1.0)
        pair.look()
    end = pair.judged(pair.first)
    assert end is not None
    assert end.status == 143
    with pytest.raises(Terminated):
        pair.first.check()


def test_one_that_was_told_and_then_killed_is_missed(pair: Pair) -> None:
    pair.second._told_at = pair.now
    pair.look()
    pair.pass_time(10.1)  # it had no time for an end of its own
    pair.look(pair.first)
    end = pair.judged(pair.first)
    assert end is not None
    assert (end.status, "rank 1 gave no sign of life" in end.text) == (1, True)


def test_a_thread_without_memory_goes_on_to_tell_the_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        pair.second._closed.set()  # this turn is the last one here
        raise MemoryError

    monkeypatch.setattr(pair.second, "_look", fail)
    pair.second._live()
    pair.second._judge(pair.now)
    assert pair.second.end is None  # the next turn writes it where all see it
    assert pair.second._proposed is not None
    assert pair.second._proposed[0].text == "rank 1 failed: out of memory"


def test_an_interrupt_that_the_main_thread_does_not_hear(pair: Pair) -> None:
    pair.second._interrupted_at = pair.now
    pair.pass_time(2.0)
    pair.look()
    assert pair.judged(pair.second) == End(130, 1, "interrupted")
    pair.look()
    with pytest.raises(KeyboardInterrupt):
        pair.first.check()


def test_an_interrupt_that_comes_while_the_reason_to_end_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises nothing beside the error that is being told: the run ends for one reason, with one line."""
    explain = startup.explain

    def interrupted(error: Exception) -> tuple[str, int]:
        pair.first._on_signal(signal.SIGINT, None)
        return explain(error)

    monkeypatch.setattr(startup, "explain", interrupted)
    error = IcsearchError("no such layer")
    try:
        reason = startup._reason(World(Launch(0, 2), None, pair.first), error)
    except KeyboardInterrupt:
        pytest.fail("the interrupt was raised")
    assert reason is error
    assert pair.first.end == End(2, 0, "rank 0 failed: no such layer")


def test_a_store_that_does_not_answer(pair: Pair) -> None:
    pair.pass_time(10.1)  # no look has come back since
    end = pair.judged(pair.first)
    assert end is not None
    assert "the store has not answered for 10 s" in end.text


def test_a_reason_that_cannot_be_written_still_counts_here(pair: Pair) -> None:
    pair.first._propose(1, "rank 1 gave no sign of life", pair.now)
    pair.first._judge(pair.now + 1)
    assert pair.first.end is None
    pair.first._judge(pair.now + heartbeat.SILENT + 1)
    assert pair.first.end == End(1, 0, "rank 1 gave no sign of life")


def test_the_timeout_is_that_of_rank_0(pair: Pair) -> None:
    pair.first._store.set("timeout", json.dumps(3.0))
    pair.look()
    pair.pass_time(3.5)
    pair.look(pair.second)
    end = pair.judged(pair.second)
    assert end is not None
    assert "rank 0 gave no sign of life for 3 s" in end.text


@pytest.mark.parametrize(("rank", "status", "said"), [(0, 1, True), (1, 1, True), (0, 130, True), (1, 130, False)])
def test_a_main_thread_that_hears_nothing_is_ended(
    pair: Pair, capsys: pytest.CaptureFixture[str], rank: int, status: int, said: bool
) -> None:
    one = (pair.first, pair.second)[rank]
    one._end_now(End(status, 0, "because"))
    assert pair.left == [status]
    assert ("because" in capsys.readouterr().err) == said


def test_a_signal_that_came_with_the_last_of_the_work_counts(pair: Pair) -> None:
    """It was not judged yet, and nothing was raised: the status is its own all the same."""
    pair.first._on_signal(signal.SIGTERM, None)
    assert World(Launch(0, 2), pair.first._store, pair.first).finish(0) == 143
