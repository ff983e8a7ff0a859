"""This process among those of a run: small messages through the launcher's store, tensors through torch.distributed.

Orders and losses are small, and go as JSON through the store that all processes share. Tensors go by
gloo, and from one GPU to another by NCCL.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from icsearch.core.errors import IcsearchError
from icsearch.sweep.distributed.heartbeat import GRACE, Heartbeat
from icsearch.sweep.distributed.launch import LAUNCHED, Launch

SHORTEST_PAUSE, LONGEST_PAUSE = 0.0002, 0.02  # seconds between two looks for a message
JOIN_TIMEOUT = 300.0  # seconds that processes may be apart when they start
A_LOOK = 0.5  # seconds that a call which hears no signal may take while they come together
QUIET = 2.0  # seconds until a process says whom it waits for
NEVER = timedelta(days=30)  # the heartbeat ends what hangs; a process may compute for as long as it takes


class JoinError(IcsearchError):
    """The processes of a run did not find one another."""

    exit_status = 1


class World:
    """The processes of a run, seen from one of them. Make one by `join`."""

    def __init__(self, launch: Launch, store: Any, heartbeat: Heartbeat) -> None:
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.heartbeat = heartbeat
        self._orders = 0
        self._store = store

    @contextlib.contextmanager
    def _store_at_hand(self) -> Iterator[Any]:
        """The store; where it does not answer, the process that keeps it is gone."""
        try:
            yield self._store
        except distributed.DistError as error:
            raise self.heartbeat.lost(0, f"its store, or its launcher's: {str(error).splitlines()[0]}") from None

    def post(self, key: str, message: Any) -> None:
        """Leave a JSON message for whoever takes it. Numbers arrive bit for bit."""
        with self._store_at_hand() as store:
            store.set(key, json.dumps(message))

    def take(self, key: str, what: str) -> Any:
        """Wait for a message, and take it away. `what` is said where it never comes; raises what ends the run."""
        with self.heartbeat.waiting(what), self._store_at_hand() as store:
            look_for(store, [key], self.heartbeat.check)
            message = json.loads(store.get(key))
            store.delete_key(key)
        return message

    def has(self, keys: list[str]) -> bool:
        """Whether all of these messages have come."""
        with self._store_at_hand() as store:
            return bool(store.check(keys))

    def tell(self, order: dict[str, Any]) -> None:
        """Rank 0: an order for every other process, each of which takes its own in turn."""
        for rank in self.others:
            self.post(f"order/{rank}/{self._orders}", order)
        self._orders += 1

    def order(self) -> dict[str, Any]:
        """Another process: the next order of rank 0."""
        order: dict[str, Any] = self.take(f"order/{self.rank}/{self._orders}", "orders from rank 0")
        self._orders += 1
        return order

    def set_timeout(self, seconds: float) -> None:
        """Let all processes know for how long one may be silent."""
        self.post("timeout", seconds)
        self.heartbeat.timeout = seconds

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's CPU tensor, put into those of the same shape that all others bring; returns it."""
        with self.heartbeat.waiting("the calibration batches"), self.exchange_with(0):
            distributed.broadcast(tensor, src=0)
        return tensor

    @contextlib.contextmanager
    def exchange_with(self, rank: int) -> Iterator[None]:
        """For calls of torch.distributed alone: one that fails, as it starts or ends, says that `rank` is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self.heartbeat.lost(rank, str(error).splitlines()[0]) from None

    def finish(self, status: int) -> int:
        """End the run for all processes; rank 0 waits for them, since the store may live in it. Returns its status.

        A signal counts also where the work was done before it was heard.
        """
        end = self.heartbeat.declare(status or self.heartbeat.signalled, "")
        with contextlib.suppress(distributed.DistError, TimeoutError):
            self._store.set(f"bye/{self.rank}", json.dumps(end.status))
            if self.rank == 0:
                look_for(self._store, [f"bye/{rank}" for rank in self.others], patience=GRACE - 1)
        self.heartbeat.close()
        return status or end.status


def join(launch: Launch) -> World:
    """Find the other processes, and say whom this one waits for. Raises JoinError where they do not come."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"the store at {host}:{port} (of rank 0, or of its launcher)"
    try:
        store = _reach_store(launch, host, port, where)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = PrefixStore(f"icsearch/{attempt}", store)
        another = _connect(host, port, is_master=False)  # the main thread may be waiting on the other connection
        heartbeat = Heartbeat(launch.rank, launch.size, PrefixStore(f"icsearch/{attempt}", another), where)
        heartbeat.announce()
        _wait_for_all(launch, own)
        heartbeat.start()
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl" if has_own_gpu(launch) else "gloo"
        distributed.init_process_group(
            backend,
            store=PrefixStore(f"group/{attempt}", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=NEVER,
        )
    except (distributed.DistError, RuntimeError, ValueError) as error:
        raise JoinError(
            f"rank {launch.rank} of {launch.size} cannot reach the others at {host}:{port} "
            f"({str(error).splitlines()[0]}): check MASTER_ADDR, MASTER_PORT and the network, and start again"
        ) from error
    return World(launch, own, heartbeat)


def _connect(host: str, port: int, **more: Any) -> TCPStore:
    """A connection to the store, which waits for nobody: torch's own rendezvous does, in a call deaf to signals."""
    libuv = os.environ.get("USE_LIBUV", "1") == "1"  # as torch reads it: some builds lack it
    return TCPStore(
        host, port, wait_for_workers=False, timeout=timedelta(seconds=JOIN_TIMEOUT), use_libuv=libuv, **more
    )


def _reach_store(launch: Launch, host: str, port: int, where: str) -> TCPStore:
    """The store that all processes share: rank 0 keeps it, where its launcher does not."""
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _connect(host, port, is_master=True, multi_tenant=True)
    waiting = _Waiting(launch, lambda: where)
    while True:  # until somebody listens there: a connection's own wait hears no signal either
        try:
            socket.create_connection((host, port), timeout=A_LOOK).close()
        except OSError as error:
            if waiting.seconds > JOIN_TIMEOUT:
                raise ValueError(f"nobody is there after {JOIN_TIMEOUT:.0f} s: {error}") from None
            waiting.check()
            time.sleep(LONGEST_PAUSE)
        else:
            return _connect(host, port, is_master=False)


class _Waiting:
    """Says on stderr, once, what a process waits for."""

    def __init__(self, launch: Launch, what: Callable[[], str]) -> None:
        self._who = f"rank {launch.rank} of {launch.size}"
        self._what, self._said, self._started = what, False, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the wait began."""
        return time.monotonic() - self._started

    def check(self) -> None:
        """Speak, where it has taken more than a moment."""
        if self._said or self.seconds < QUIET:
            return
        alone = "" if LAUNCHED in os.environ else "; WORLD_SIZE is set, unset it to run alone"
        print(f"note: {self._who} waits for {self._what()}{alone}", file=sys.stderr, flush=True)
        self._said = True


def look_for(
    store: Any, keys: list[str], between: Callable[[], object] = lambda: None, patience: float = math.inf
) -> None:
    """Wait for keys by looking again and again, more rarely the longer it takes; `between` may raise.

    The store's own wait would hear neither a signal nor what ends the run. Raises TimeoutError after so many seconds.
    """
    started = time.monotonic()
    while not store.check(keys):
        between()
        waited = time.monotonic() - started
        if waited > patience:
            raise TimeoutError(f"nothing came within {patience:.0f} s")
        time.sleep(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, waited / 10)))


def _wait_for_all(launch: Launch, store: Any) -> None:
    """Raises ValueError that names those who did not come."""
    signs = {rank: f"beat/{rank}" for rank in range(launch.size)}

    def missing() -> str:
        return ", ".join(str(rank) for rank, sign in signs.items() if not store.check([sign]))

    waiting = _Waiting(launch, lambda: f"rank {missing()}")
    try:
        look_for(store, list(signs.values()), waiting.check, patience=JOIN_TIMEOUT)
    except TimeoutError:
        raise ValueError(f"rank {missing()} did not come within {JOIN_TIMEOUT:.0f} s") from None


def has_own_gpu(launch: Launch) -> bool:
    """Whether every process of this machine has a GPU of its own: NCCL needs that."""
    return (
        torch.cuda.is_available() and distributed.is_nccl_available() and launch.local_size <= torch.cuda.device_count()
    )
