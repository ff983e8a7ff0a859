"""The benchmarks on tiny checkpoints: the stock search as an independent judge, its estimate, and what is written."""

from __future__ import annotations

import json
import mmap
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import edge_ties  # noqa: E402
import forecast as forecast_benchmark  # noqa: E402
import kernels as forward_benchmark  # noqa: E402
import measuring  # noqa: E402
import memory as memory_benchmark  # noqa: E402
import processes as processes_benchmark  # noqa: E402
import search as search_benchmark  # noqa: E402
import stock  # noqa: E402
import tables  # noqa: E402
import variants  # noqa: E402
from icsearch.cli import app  # noqa: E402
from icsearch.model import ops  # noqa: E402
from icsearch.planning.forecast import Phase  # noqa: E402

MACHINE = dict.fromkeys(("cpu", "cores", "threads", "cpu_capability", "python", "torch", "transformers"), 1)
FLIPS = 3


@pytest.fixture(scope="module")
def ours(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a child of the search benchmark reports, by variant."""
    out = tmp_path_factory.mktemp("runs")
    spec = {"what": "ours", "model": str(glm_checkpoint), "tokens": str(tokens), "flips": FLIPS, "batch_size": 2}

    def run(name: str) -> dict[str, Any]:
        described = variants.describe(variants.parse_variant(name))
        return variants.run({**spec, "variant": described, "out": str(out / name), "threads": 1})

    return {name: run(name) for name in ("sweep-reference", "sweep", "exact")}


def stock_search(glm_checkpoint: Path, tokens: Path, earliest: bool) -> dict[str, Any]:
    spec = {"what": "stock", "model": str(glm_checkpoint), "tokens": str(tokens), "flips": FLIPS, "batch_size": 2}
    return variants.run({**spec, "candidates": None, "earliest": earliest, "threads": 1})


def relative(first: dict[str, Any], second: dict[str, Any]) -> float:
    return search_benchmark._largest_difference(first, second)


def test_stock_search_is_the_sweep_on_stock_modules(ours: dict[str, Any], glm_checkpoint: Path, tokens: Path) -> None:
    judge = stock_search(glm_checkpoint, tokens, earliest=False)
    assert ours["sweep-reference"]["layers"] == judge["layers"]
    assert ours["sweep-reference"]["patterns"] == judge["patterns"]
    assert relative(judge, ours["sweep-reference"]) < 1e-6


@pytest.mark.parametrize("variant", ["sweep", "exact"])
def test_exact_is_the_stock_search_with_ties_by_our_rule(
    ours: dict[str, Any], glm_checkpoint: Path, tokens: Path, variant: str
) -> None:
    judge = stock_search(glm_checkpoint, tokens, earliest=True)
    assert ours[variant]["layers"] == judge["layers"]
    assert ours[variant]["patterns"] == judge["patterns"]
    assert relative(judge, ours[variant]) < 1e-5


def test_kept_states_change_the_cost_and_no_bit(ours: dict[str, Any]) -> None:
    assert ours["sweep"]["sums"] == ours["exact"]["sums"]
    assert ours["sweep"]["layer_evaluations"] > ours["exact"]["layer_evaluations"]


def test_ties_change_what_stock_finds(glm_checkpoint: Path, tokens: Path) -> None:
    """Else the tie rule of the judge would not be tested here."""
    plain, earliest = (stock_search(glm_checkpoint, tokens, earliest=rule) for rule in (False, True))
    assert plain["sums"] != earliest["sums"]


def test_earliest_of_equal() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, -0.0, 1.0, 1.0]])
    with stock.EarliestOfEqual():
        assert scores.topk(3, dim=-1).indices.tolist() == [[1, 2, 4]]


def test_latest_of_equal_is_the_opposite_rule() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 0.0, 1.0, 1.0]])
    assert ops.top_tokens(scores, 3).tolist() == [[1, 2, 4]]
    assert edge_ties.latest_of_equal(ops.top_tokens)(scores, 3).tolist() == [[1, 4, 5]]


def test_selections_differ_at_ties_alone(glm_checkpoint: Path, tokens: Path) -> None:
    sequences = stock.read_tokens(tokens, 1, 1)
    counts = edge_ties.count_differences(glm_checkpoint, sequences, forward_benchmark.ROUNDING)
    assert counts["queries"] == 6 * (40 - 8)  # layers x queries that see more than they may select
    assert 0 < counts["stock_differs"] == counts["stock_differs_exact_tie"] <= counts["tied_at_the_edge"]
    assert counts["stock_differs_within_rounding"] == counts["stock_differs"]
    assert counts["earliest_differs"] == counts["earliest_differs_within_rounding"]


def test_estimate_adds_up_forwards() -> None:
    # 4 layers, 2 flips: 3 candidates with 3 F layers, then 2 with 2. A forward takes 1 s and 1 s per F layer.
    assert stock.forwards(4, 2) == 5
    assert stock.estimate_seconds(4, 2, batches=1, full=5.0, shared=3.0, shared_full=2) == 3 * 4.0 + 2 * 3.0
    assert stock.estimate_seconds(4, 2, batches=7, full=5.0, shared=3.0, shared_full=2) == 7 * 18.0


def test_estimate_of_a_stock_search_is_marked(glm_checkpoint: Path, tokens: Path) -> None:
    spec = {"what": "stock", "model": str(glm_checkpoint), "tokens": str(tokens), "flips": FLIPS, "batch_size": 2}
    line = variants.run({**spec, "candidates": 2, "threads": 1})
    assert line["estimated"]
    assert line["forwards"]["shared_full"] == 6 - FLIPS
    assert [len(seconds) for seconds in line["forward_seconds"].values()] == [1, 1]
    assert search_benchmark.stock_seconds(line, 6, FLIPS) == line["seconds"]
    assert search_benchmark.stock_seconds(line, 6, 1) < line["seconds"]


def test_judged_patterns() -> None:
    found = search_benchmark.judged_patterns([2, 1, 3], 4, steps=1, commits=2)
    assert found == ["FSFF", "FFSF", "FFFS", "FSSS", "FSSF"]
    sums = {"FSFF": [1.0], "FFSF": [3.0], "FFFS": [2.0]}
    assert search_benchmark.choices(sums, [2]) == [1]


def test_variants() -> None:
    variant = variants.parse_variant("exact:kl")
    assert (variant.objective, variant.keep, variant.by_loss) == ("kl", True, False)
    assert not variants.parse_variant("sweep").keep
    with pytest.raises(SystemExit, match="unknown objective"):
        variants.parse_variant("exact:loss")
    with pytest.raises(SystemExit, match="unknown variant"):
        variants.parse_variant("fastest")


def test_results_go_on_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    measuring.Results.open(path, MACHINE).add(("case", "exact", 0), {"seconds": 1.5})
    with path.open("a") as file:
        file.write('{"key": ["case", "exa')  # killed while writing
    results = measuring.Results.open(path, MACHINE)
    assert results.find(("case", "exact", 1)) is None
    found = results.find(("case", "exact", 0))
    assert found is not None
    assert found["seconds"] == 1.5
    results.add(("case", "exact", 1), {"seconds": 2.0})
    assert len(measuring.Results.open(path, MACHINE).lines) == 2
    with pytest.raises(SystemExit, match="begun on"):
        measuring.Results.open(path, {**MACHINE, "cores": 4})
    assert not measuring.Results.open(path, {**MACHINE, "cores": 4}, fresh=True).lines


def test_ratios_are_paired() -> None:
    assert measuring.ratios([10.0, 30.0, 40.0], [1.0, 2.0, 10.0]) == {
        "min": 4.0, "median": 10.0, "max": 15.0, "repeats": 3,
    }  # fmt: skip


def test_peak_sees_what_is_allocated() -> None:
    peak = measuring.Peak().start()
    block = mmap.mmap(-1, 50_000_000)  # pages of its own: what tests before have freed, the heap may hand out again
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    found = peak.numbers()
    assert found["peak_above_loaded_bytes"] >= 0.9 * len(block) or not found["memory_method"].startswith("VmHWM")


def test_search_benchmark_writes_results_and_table(
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but the processes: children run here."""
    monkeypatch.setattr(search_benchmark, "run_child", lambda _, spec, threads: variants.run({**spec, "threads": 1}))
    monkeypatch.setattr(search_benchmark, "prepare", lambda *_: (glm_checkpoint, tokens))
    monkeypatch.setattr(search_benchmark, "WORK", tmp_path / "work")
    names = ("stock", "sweep-reference", "exact", "sweep")
    case = search_benchmark.Case(str(glm_checkpoint), 40, 5, FLIPS, names, repeats=2, stock_candidates=2, judge_steps=2)
    results = measuring.Results.open(tmp_path / "search.jsonl", MACHINE)
    search_benchmark.run_case(case, results, 1, measuring.Clock(1.0))
    assert len(results.lines) == 2 * 4 + 2  # and two by the judge
    count = len(results.lines)
    search_benchmark.run_case(case, results, 1, measuring.Clock(1.0))
    assert len(results.lines) == count  # nothing twice
    for other in (replace(case, stock_candidates=4), replace(case, reference_flips=2), replace(case, judge_steps=1)):
        keys = [job.key for job in search_benchmark.jobs_of(other, 1)] + [other.judge_key("earliest")]
        assert sum(results.find(key) is None for key in keys) in (1, 2)  # both repeats, or the judge
    results.lines[0]["commit"] = "another"
    document = json.loads(json.dumps(search_benchmark.summarise([case], results)))
    assert document["commits"][0].startswith("another") and len(document["commits"]) == 2
    assert "lines are of different commits: another" in capsys.readouterr().out
    rows = {row["variant"]: row for row in document["cases"][0]["rows"]}
    assert rows["exact"]["same_path_as_stock"]
    assert rows["exact"]["judged_steps"] == 2
    assert rows["exact"]["largest_relative_loss_difference"] < 1e-5
    assert rows["sweep"]["bit_equal_to_exact"]
    assert rows["stock"]["layer_evaluations"] == (5 + 4 + 3) * 6
    assert rows["sweep-reference"]["flips"] == 1
    assert rows["exact"]["times_as_fast_as_stock"]["repeats"] == 2
    text = tables.search_table(document)
    assert "(estimate)" in text
    assert "sweep-reference, first 1 flips" in text
    assert "yes (first 2 steps)" in text
    assert str(glm_checkpoint) not in json.dumps(results.lines)


def test_kernels_benchmark_writes_rows_and_goals(glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    results = measuring.Results.open(tmp_path / "kernels.jsonl", MACHINE)
    spec = {"model": str(glm_checkpoint), "tokens": str(tokens), "threads": 1, "forwards": 1}
    for arithmetic in ("stock", "ours"):
        line = forward_benchmark.child({**spec, "what": "time", "arithmetic": arithmetic})
        results.add(("time", 2048, arithmetic, 0), line)
    results.add(("compare", "tiny:40"), forward_benchmark.child({**spec, "what": "compare"}))
    document = forward_benchmark.summarise(results, [2048])
    losses = document["compared"][0]["losses"]
    assert abs(losses["stock_earliest"] - losses["ours"]) < 1e-5 * losses["ours"]
    assert losses["ours_latest"] != losses["ours"]
    assert [goal["goal"] for goal in document["goals"]] == ["2048 tokens: at least 5 times as fast"]
    assert "tiny:40" in tables.kernels_table(document)


def test_tiny_is_what_the_counts_assume() -> None:
    assert (tiny.SIZES["num_hidden_layers"], tiny.SIZES["index_topk"]) == (6, 8)


# --- several processes -----------------------------------------------------------------------------------------------


def test_layouts_are_read_and_named() -> None:
    layout = processes_benchmark.parse_layout("dp=2,pp=3,stages=3")
    assert (layout.data, layout.pipeline, layout.stages, layout.size) == (2, 3, 3, 6)
    assert (layout.name, layout.alone.name, processes_benchmark.Layout().name) == (
        "dp=2,pp=3,stages=3",
        "stages=3",
        "one",
    )
    for text in ("dp", "dp=0", "tp=2", "dp=2;pp=2"):
        with pytest.raises(SystemExit, match="expected such as"):
            processes_benchmark.parse_layout(text)


def test_one_process_and_several_take_turns() -> None:
    layouts = [processes_benchmark.parse_layout(name) for name in ("dp=2", "pp=2,stages=2", "pp=2")]
    names = [(layout.name, repeat) for layout, repeat in processes_benchmark.runs_of(layouts, 2)]
    one = ["one", "dp=2", "pp=2", "stages=2", "pp=2,stages=2"]
    assert names == [(name, repeat) for repeat in range(2) for name in one]


def test_what_the_blocks_of_a_pipeline_allow() -> None:
    """4 layers, 1 flip: candidates 1 to 3 run 3, 2 and 1 layers, 1 of them in the first block and 5 in the second."""
    bound = processes_benchmark.pipeline_bound
    assert bound(["FSFF"], processes_benchmark.Layout(pipeline=2)) == pytest.approx(6 / 5)
    assert bound(["FSFF"], processes_benchmark.Layout()) == 1
    # In 2 stages: candidate 1 runs layers 1 to 3, then candidate 3 runs layer 3.
    assert bound(["FSFF", "FSFS"], processes_benchmark.Layout(pipeline=2, stages=2)) == pytest.approx(4 / 3)


def test_the_summary_of_several_processes(tmp_path: Path) -> None:
    """Ratios are taken within a repeat, and a loss that differs in one bit shows."""
    case, layout = processes_benchmark.parse_case("demo:64:2:1"), processes_benchmark.parse_layout("dp=2")
    results = measuring.Results.open(tmp_path / "processes.jsonl", MACHINE)
    for name, seconds in (("one", (10.0, 12.0, 11.0)), ("dp=2", (5.0, 7.5, 5.5))):
        for repeat, value in enumerate(seconds):
            line = {"seconds": value, "whole_seconds": value + 5, "layer_evaluations": 3.0, "patterns": ["FSFF"]}
            sums = {"FSFF": {"0": 1.5 if (name, repeat) != ("dp=2", 2) else 1.5000000000000002}}
            results.add((case.name, name, repeat), {**line, "sums": sums})
    document = processes_benchmark.summarise(case, [layout], 3, results)
    one, several = document["rows"]
    assert "times_as_fast" not in one
    assert several["times_as_fast"] == {"min": 1.6, "median": 2.0, "max": 2.0, "repeats": 3}
    assert (several["efficiency"], several["bound"], several["same_bits"]) == (1.0, 2.0, False)
    assert "| dp=2 | 5.5 | 2.00 (1.60 to 2.00) | 100% of 2.00 | 100% | NO |" in processes_benchmark.table(document)


def test_what_a_run_of_several_processes_leaves(glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["greedy", glm_checkpoint, "--calibration", tokens, "--out", out, "--num-shared", 2, "--threads", 1]
    assert app._run([*map(str, arguments), "--quiet"], debug=True) == 0
    found = processes_benchmark.read_run(out)
    assert len(found["patterns"]) == 2
    assert all(list(sums) == ["0", "1", "2", "3", "4"] for sums in found["sums"].values())
    assert found["seconds"] > 0


# --- the plan and its memory


def test_the_forecast_fits_the_efficiency_it_was_made_with() -> None:
    """Whatever some calls wait for beside."""
    chance = random.Random(0)
    known = replace(forecast_benchmark.CPU, efficiency=0.25)
    rows = []
    for number in range(41):
        phases = [Phase("made up", chance.uniform(1e9, 1e10), chance.uniform(0, 1e6)) for _ in range(3)]
        slower = 2.0 if number % 5 == 0 else 1 if number % 5 < 4 else 0.5
        rows.append((phases, forecast_benchmark.seconds_of(phases, known) * slower))
    assert forecast_benchmark.fit(rows).efficiency == pytest.approx(0.25, rel=1e-3)


def test_the_memory_benchmark_reads_the_plan() -> None:
    rows = {
        "peak": "about 1.8 GB in all, with 368.2 MB the program itself and 12.0 MB lost between tensors (estimate)",
        "memory": "8.1 MB weights + ...",
        "kept between steps": "nothing",
    }
    found = memory_benchmark.planned_bytes(rows)
    assert (found["planned_bytes"], found["program_bytes"]) == (1_800_000_000, 368_200_000)
