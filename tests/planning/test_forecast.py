"""The plan of a search: invariants, not numbers. More work takes longer, more devices do not; counts add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from icsearch.cli import app
from icsearch.core.errors import IcsearchError
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.planning.forecast import Forecast, Plan, make_plan
from icsearch.planning.page import reason
from icsearch.planning.placement import Placement
from icsearch.planning.work import layer_work
from icsearch.planning.workload import MEASURED_SHARES, share_of_exact
from plan_fixtures import DEEPSEEK, GLM, plan_request


def of(plan: Plan, placement: Placement, strategy: str = "exact") -> Forecast:
    fits = {one.placement: one for one in plan.forecasts}
    return next(one for one in plan.forecasts[fits[placement]] if one.strategy == strategy)


def demo(devices: str = "2xcpu", sequences: int = 8, seq_len: int = 256, **more) -> Plan:  # type: ignore[no-untyped-def]
    return make_plan(plan_request("demo", devices, sequences, seq_len, **more))


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
def test_700b_models_on_one_node(name: str) -> None:
    """64 x 64K tokens on 8 H200: nothing is resident in 16 bits, streamed fits; the parts of each memory add up."""
    plan = make_plan(plan_request(name, stages=4))
    assert {one.placement.offload for one in plan.forecasts} == {CPU, DISK}
    for one in plan.fits:
        assert one.total == one.weights + one.states + one.call
        assert bool(one.missing) == (one not in plan.forecasts)
    best, _ = plan.best
    assert best.total <= best.budget < 141e9
    assert of(plan, best.placement).hours == min(exact.hours for exact, *_ in plan.forecasts.values())


@pytest.mark.parametrize(("strategy", "least", "most"), [("exact", 3.8, 4.2), ("lazy", 3.8, 4.2), ("race+lazy", 3, 4)])
def test_more_sequences_take_longer(strategy: str, least: float, most: float) -> None:
    """A race less so: it saves more where it looks more often."""
    hours = [of(demo(sequences=count), Placement(2), strategy).hours for count in (8, 16, 32)]
    assert hours == sorted(hours) and least < hours[2] / hours[0] < most


def test_longer_sequences_take_longer_than_their_tokens() -> None:
    hours = [of(demo(seq_len=length, sequences=4), Placement(1, 1)).hours for length in (512, 1024, 2048)]
    assert hours[2] > 2 * hours[1] > 4 * hours[0] * 0.9


def test_data_ranks_share_the_work_and_a_pipeline_less_evenly() -> None:
    """Branches fork on their way: the last block of layers has more to do than the first."""
    plan = demo(sequences=64)
    alone, data, pipeline = (of(plan, one).hours for one in (Placement(), Placement(2), Placement(1, 2)))
    assert data == pytest.approx(alone / 2, rel=0.02)
    assert alone / 2 < pipeline < alone


def test_flops_are_those_of_the_layers_that_run() -> None:
    plan = demo()
    forecast = of(plan, Placement())
    sequences, shape = plan.case.workload.sequences, plan.case.model.shape
    cheapest = layer_work(shape, 0, False, 256).total.flops
    dearest = layer_work(shape, 15, True, 256).total.flops
    runs = forecast.layer_evaluations * sequences
    heads = 2 * 256 * shape.embedding_weights * sequences
    assert runs * cheapest < forecast.flops < runs * dearest * 3 + heads * 1000  # attention is dense at 256 tokens
    assert of(plan, Placement(2)).flops == forecast.flops == of(plan, Placement(1, 2)).flops


def test_what_is_measured_is_a_share_of_exact_and_bounds_are_above_it() -> None:
    plan = demo()
    for forecasts in plan.forecasts.values():
        exact = forecasts[0]
        for one in forecasts:
            assert one.layer_evaluations == pytest.approx(one.share * exact.layer_evaluations)
            assert one.flops == pytest.approx(one.share * exact.flops)
            assert one.layer_evaluations <= one.most_layer_evaluations
            assert one.flops <= one.most_flops and one.hours <= one.most_hours
            assert one.steps == plan.case.workload.num_shared
            assert one.hours_per_step * one.steps == pytest.approx(one.hours)


def test_weights_are_read_once_or_once_a_wave() -> None:
    plan = demo()
    stored = round(plan.case.model.stored_model_bytes)
    assert of(plan, Placement(2)).weight_bytes == 2 * stored
    streamed = Placement(1, 1, DISK)
    fit = next(one for one in plan.forecasts if one.placement == streamed)
    sweeps = plan.case.workload.likely(fit.per_sweep, fit.kept.keeping)
    assert fit.wave == plan.case.batches(streamed)  # a small model: one wave
    assert of(plan, streamed).weight_bytes == stored * len(sweeps)
    assert of(plan, streamed, "race").weight_bytes == stored * len(sweeps)
    assert of(plan, streamed, "lazy").weight_bytes > stored * len(sweeps)  # each portion of a step reads them


def test_a_race_saves_nothing_in_one_wave_and_more_in_more() -> None:
    plan = demo()
    assert of(plan, Placement(1, 1, DISK), "race").share == 1.0
    assert of(plan, Placement(1, 1, DISK), "race+lazy").share == of(plan, Placement(), "lazy").share
    shares = [share_of_exact("race", waves) for waves in (1, 2, 8, 10**9)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == pytest.approx(MEASURED_SHARES["race"])
    assert share_of_exact("exact", 1) == share_of_exact("exact", 8) == 1


def test_a_run_races_as_the_forecast_says(glm_checkpoint: Path, tmp_path: Path) -> None:
    """Of two candidates and a clear winner: in one wave both are scored to the end, as exact does."""
    tokens = tiny.save_tokens(tmp_path / "tokens", sequences=8)
    fixed = ["--num-shared", 3, "--batch-size", 1, "--offload", "disk", "--threads", 1, "--quiet"]
    found = {}
    for strategy in ("exact", "race"):
        out = tmp_path / strategy
        arguments = ["greedy", glm_checkpoint, "--calibration", tokens, "--out", out, "--strategy", strategy, *fixed]
        assert app._run([str(argument) for argument in arguments], debug=True) == 0
        found[strategy] = json.loads((out / "pattern.json").read_text())["cost"]["layer_evaluations"]
    assert found["race"] == found["exact"]


def test_weights_in_cpu_memory_come_over_the_link_as_they_compute() -> None:
    """A step reads them all once for each wave, in bfloat16, where the checkpoint has FP8."""
    plan = make_plan(plan_request(stages=4))
    fit = next(one for one in plan.forecasts if one.placement == Placement(1, 1, CPU))
    layers = 2 * sum(map(plan.case.model.layer_parameters, range(78)))
    sweeps = plan.case.workload.likely(fit.per_sweep, fit.kept.keeping)
    waves = -(-64 // fit.wave)
    assert of(plan, fit.placement).weight_bytes == layers * waves * len(sweeps)


def test_a_slow_disk_sets_the_pace_of_streamed_weights() -> None:
    fast, slow = (demo(device_read_rate=rate, device_node_memory=1) for rate in (1e12, 1e5))
    assert of(slow, Placement(1, 1, DISK)).hours > 2 * of(fast, Placement(1, 1, DISK)).hours
    assert of(slow, Placement(1, 1, RESIDENT)).hours > of(fast, Placement(1, 1, RESIDENT)).hours  # loading


def test_faster_devices_take_less() -> None:
    slow, fast = (make_plan(plan_request(devices=name, stages=4)).best[1].hours for name in ("8xH200", "8xB200"))
    assert fast < slow


def test_exact_is_recommended_where_there_is_time_and_else_what_takes_least() -> None:
    assert demo().best[1].strategy == "exact"
    plan = make_plan(plan_request(stages=4))
    fit, chosen = plan.best
    assert chosen.strategy == "race"  # lazy's portions each read the weights
    assert chosen.hours == min(one.hours for one in plan.forecasts[fit])


def test_the_reason_for_a_recommendation_is_true() -> None:
    """Where exact takes long and nothing else is faster, it is not said to end in time."""
    assert "ends within 24 h" in reason(demo())
    plan = make_plan(plan_request(stages=4))
    assert "there the fastest strategy, for exact takes more than 24 h" in reason(plan)
    alone = replace(plan, forecasts={fit: some[:1] for fit, some in plan.forecasts.items()})
    assert alone.best[1].hours > 24 and reason(alone).endswith("no other strategy is faster there")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 2048}, "--seq-len 2048 is not longer than index_topk 2048"),
        ({"seq_len": 10**6}, "more than the model's 202752 positions"),
        ({"num_shared": 78}, "cannot share 78 more layers"),
        ({"stages": 79}, "--stages 79 is out of range"),
        ({"keep_full": frozenset({99})}, "--keep-full names layer 99"),
        ({"devices": "1xA100", "device_memory": 40 * 10**9}, "nothing fits 1xA100"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(IcsearchError, match=message):
        make_plan(plan_request(**changes))  # type: ignore[arg-type]


def test_the_default_length_is_that_of_a_run() -> None:
    assert make_plan(replace(plan_request("demo", "1xcpu", 4, None))).case.seq_len == 256
