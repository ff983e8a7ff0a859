"""Streamed weights: order, read-ahead, and what happens when a layer cannot be read. No torch."""

from __future__ import annotations

import threading
import time

import pytest

from icsearch.model.model import LayerWeights, StreamedWeights


class Shelf:
    """Layers that come and go, and a list of what happened to them."""

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.here: set[int] = set()
        self.most = 0
        self.fetched: list[int] = []
        self.threads: set[int] = set()
        self.broken = broken
        self.weights = StreamedWeights(range(count), self.fetch, self.here.discard)

    def fetch(self, index: int) -> int:
        self.threads.add(threading.get_ident())
        self.here.add(index)
        self.fetched.append(index)
        self.most = max(self.most, len(self.here))
        if index in self.broken:
            raise OSError(f"layer {index} is gone")
        return 1


def test_each_layer_is_fetched_once_and_let_go() -> None:
    shelf = Shelf(6)
    for index in range(6):
        with shelf.weights.holding(index):
            assert index in shelf.here
            with shelf.weights.holding(index):
                pass
            assert index in shelf.here
        assert index not in shelf.here
    assert shelf.fetched == list(range(6))
    assert shelf.here == set()
    assert shelf.most <= 2
    assert shelf.weights.bytes_read == 6
    assert threading.get_ident() not in shelf.threads and len(shelf.threads) == 1


def test_the_next_layer_comes_meanwhile() -> None:
    shelf = Shelf(3)
    with shelf.weights.holding(1):
        deadline = time.monotonic() + 300
        while 2 not in shelf.here and time.monotonic() < deadline:
            time.sleep(0.001)
        assert shelf.here == {1, 2}


def test_another_wave_begins_where_it_likes() -> None:
    """A layer that was fetched ahead in vain is let go before another one comes."""
    shelf = Shelf(5)
    with shelf.weights.holding(1):
        pass
    for index in (3, 4):
        with shelf.weights.holding(index):
            assert shelf.here <= {index, index + 1}
    assert shelf.here == set()
    assert shelf.fetched == [1, 2, 3, 4]


def test_what_reading_raises_comes_out_where_the_layer_is_wanted() -> None:
    shelf = Shelf(4, frozenset({2}))
    for index in (0, 1):
        with shelf.weights.holding(index):
            pass
    for _ in range(2):
        with pytest.raises(OSError, match="layer 2 is gone"), shelf.weights.holding(2):
            raise AssertionError("the block must not run")
        assert shelf.here == set()
    with shelf.weights.holding(3):  # one broken layer is not the end of the others
        assert shelf.here == {3}


def test_an_error_within_the_block_lets_the_layer_go() -> None:
    shelf = Shelf(3)
    with pytest.raises(ValueError, match="inside"), shelf.weights.holding(0):
        raise ValueError("inside")
    assert 0 not in shelf.here
    with shelf.weights.holding(0):
        assert 0 in shelf.here


@pytest.mark.parametrize("weights", [LayerWeights(range(2, 4)), StreamedWeights(range(2, 4), int, int)])
def test_layers_of_other_processes_are_refused(weights: LayerWeights) -> None:
    for index in (1, 4):
        with pytest.raises(IndexError, match=f"decoder layer {index} is not among"), weights.holding(index):
            pass
    with weights.holding(3):
        pass
