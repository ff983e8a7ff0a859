"""The parts of a layer call: FLOPs against what is counted and what torch does, seconds by the formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.slot import SelectionStore
from icsearch.planning.devices import DEVICES
from icsearch.planning.footprint import Call
from icsearch.planning.layer_time import CPU_EFFICIENCY, KINDS, CallWork, Efficiency, Part, head_call, layer_call
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.work import layer_work
from plan_fixtures import DEEPSEEK, GLM

H200 = DEVICES["h200"]
PERFECT = Efficiency(**dict.fromkeys(KINDS, 1.0), launch=0.0)


def call_of(name: str, seq_len: int = 65536, batch_size: int = 1) -> Call:
    return Call(open_model_file(name).shape, batch_size, seq_len, 2, 2**26)


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("index", [0, 40])
def test_flops_are_the_counted_ones_where_latents_are_gathered(name: str, full: bool, index: int) -> None:
    call = call_of(name, batch_size=2)
    assert call.gathers
    counted = 2 * layer_work(call.shape, index, full, call.seq_len).total.flops
    assert layer_call(call, index, full).flops == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("full", [True, False])
def test_flops_are_what_torch_does(full: bool, tmp_path: Path) -> None:
    """But for what a block computes beyond the causal half, and the sums of heads, which are no products."""
    checkpoint = open_checkpoint(str(tiny.save_checkpoint(tmp_path, index_topk=4)))
    dsa = loading.load(checkpoint, device="cpu", block_elements=2**10)
    call = Call(open_model_file(str(tmp_path)).shape, 1, 320, 4, 2**10)
    ids = torch.randint(tiny.VOCABULARY, (1, 320), generator=torch.Generator().manual_seed(0))
    store = SelectionStore(Pattern("FFFFFF" if full else "FSFFFF"))
    with torch.inference_mode():
        calls, states = dsa.capture_calls(ids), dsa.embed(ids)
        states = dsa.run_layer(0, states, calls[0], store)
        with FlopCounterMode(display=False) as counter:  # a dense layer: experts are counted by no counter
            dsa.run_layer(1, states, calls[1], store)
    assert call.gathers
    assert counter.get_total_flops() == pytest.approx(layer_call(call, 1, full).flops, rel=0.05)


def test_seconds_are_the_larger_of_two_over_the_efficiency() -> None:
    part = Part("mlp", flops=989e12 * 3, bytes=4.8e12)
    work = CallWork((part,), launches=10, dtype_bytes=2)
    assert part.least_seconds(H200, 2) == pytest.approx(3)
    assert replace(part, flops=0).least_seconds(H200, 2) == pytest.approx(1)
    assert replace(part, in_float32=True).least_seconds(H200, 2) == pytest.approx(3 * 989 / 67)
    assert part.least_seconds(H200, 4) == pytest.approx(3 * 989 / 67)
    assert work.seconds(H200, replace(PERFECT, mlp=0.5, launch=0.1)) == pytest.approx(3 / 0.5 + 1)


def test_a_buffer_in_the_cache_is_free() -> None:
    part = Part("scores", block_bytes=4.8e12, buffer=H200.cache)
    assert part.least_seconds(H200, 2) == 0
    assert replace(part, buffer=H200.cache + 1).least_seconds(H200, 2) == pytest.approx(1)


def test_time_grows_with_length_and_an_indexer_costs_more_the_longer_the_input() -> None:
    seconds = {
        (full, length): layer_call(call_of(GLM, length), 40, full).seconds(H200, PERFECT)
        for full in (True, False)
        for length in (16384, 32768, 65536)
    }
    for full in (True, False):
        assert seconds[full, 16384] < seconds[full, 32768] < seconds[full, 65536]
    extra = [seconds[True, length] - seconds[False, length] for length in (16384, 32768, 65536)]
    assert extra[2] / extra[1] > extra[1] / extra[0] * 0.9 > 1.8  # between linear and quadratic


def test_batches_of_two_take_two_of_one() -> None:
    one, two = (head_call(call_of(GLM, 8192, size)) for size in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.seconds(H200, CPU_EFFICIENCY) == pytest.approx(2 * one.seconds(H200, CPU_EFFICIENCY), rel=1e-6)
