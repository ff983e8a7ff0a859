"""Where the weights of decoder layers are while a model runs: all on the device, or each one for as long as it runs.

A sweep runs every branch through a layer before it goes on to the next one, so a layer that is brought to the device
once serves them all. No torch here: fetching and dropping a layer are handed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

RESIDENT, CPU, DISK = "none", "cpu", "disk"  # where the weights of decoder layers rest: none: on the device


class LayerWeights:
    """The layers that this process has, all of them on the device for as long as it lives."""

    streamed = False

    def __init__(self, held: range, read: Callable[[], int] = int) -> None:
        self.held = held
        self._read = read

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read from the checkpoint so far, or brought from where they rest."""
        return self._read()

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """Within the block, this decoder layer is on the device. Raises IndexError where another process has it."""
        self._check(index)
        yield

    def _check(self, index: int) -> None:
        if index not in self.held:
            raise IndexError(f"decoder layer {index} is not among those of this process, {self.held}")


class StreamedWeights(LayerWeights):
    """Layers that come when they are wanted and go when they are done with; the next one is fetched meanwhile.

    `fetch(index)` brings a layer to the device, always in one thread of its own; `drop(index)` lets it go, and may be
    called for a layer that came only in part. At most two layers are there at once.
    """

    streamed = True

    def __init__(
        self, held: range, fetch: Callable[[int], None], drop: Callable[[int], None], read: Callable[[], int] = int
    ) -> None:
        super().__init__(held, read)
        self._fetch = fetch
        self._drop = drop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="icsearch-weights")
        self._ahead: tuple[int, Future[None]] | None = None
        self._here: int | None = None

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """As of any weights. What reading the layer raises, this raises; a block within one for the same layer is free.

        Layers are meant to be taken in order: the one behind is being fetched, if it is ours.
        """
        self._check(index)
        if index == self._here:
            yield
            return
        try:
            self._wait_for(index)
            self._here = index
            if index + 1 in self.held:
                self._ahead = index + 1, self._thread.submit(self._fetch, index + 1)
            yield
        finally:
            self._here = None
            self._drop(index)

    def _wait_for(self, index: int) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != index:
            ahead[1].exception()  # waits; nobody wants that layer now, and who does will meet what went wrong again
            self._drop(ahead[0])
            ahead = None
        coming = self._thread.submit(self._fetch, index) if ahead is None else ahead[1]
        coming.result()
