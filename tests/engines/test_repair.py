"""Repairs of patterns whose pipeline stages would start on S: which layers, by which losses, and what is said."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_files import pattern_file
from icsearch.core.files import published_patterns
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile, Step, load_pattern_file
from icsearch.engines.engine import ExportError
from icsearch.engines.export import Serving, export, with_config
from icsearch.engines.pipeline import (
    add_full,
    flip_costs,
    losses_of_file,
    losses_of_run,
    move_full,
    split_vllm,
    stages_on_shared,
)
from icsearch.engines.table import ENGINES
from icsearch.runs import results
from run_fixtures import MadeUpRun, write_run


def additive(costs: list[float]) -> dict[str, float]:
    """Losses of every pattern, of a model whose flips do not influence one another."""
    found = {}
    for number in range(2 ** (len(costs) - 1)):
        letters = "F" + "".join("S" if number >> i & 1 else "F" for i in range(len(costs) - 1))
        found[letters] = 2.0 + sum(cost for cost, letter in zip(costs, letters, strict=True) if letter == "S")
    return found


def along_a_search(costs: list[float]) -> tuple[list[str], dict[str, float]]:
    """The patterns that a greedy search commits, and the losses of all that it scores."""
    everything = additive(costs)
    pattern = Pattern.full(len(costs))
    path, scored = [pattern.letters], {pattern.letters: everything[pattern.letters]}
    while len(pattern.full_layers) > 1:
        flips = [pattern.flip(layer) for layer in pattern.full_layers[1:]]
        scored |= {flip.letters: everything[flip.letters] for flip in flips}
        pattern = min(flips, key=lambda flip: everything[flip.letters])
        path.append(pattern.letters)
    return path, scored


@given(st.integers(0, 10**6), st.integers(3, 8), st.data())
def test_the_cheapest_repair_is_that_of_a_search_through_all(seed: int, n: int, data: st.DataObject) -> None:
    random.seed(seed)
    costs = [random.uniform(-1, 1) for _ in range(n)]
    path, scored = along_a_search(costs)
    everything = additive(costs)
    pattern = Pattern(data.draw(st.sampled_from(path)))
    must = data.draw(st.sets(st.integers(1, n - 1), max_size=3))
    added = add_full(pattern, must, scored)
    assert added.pattern.full_layers == tuple(sorted({*pattern.full_layers, *must}))
    assert added.loss == pytest.approx(everything[added.pattern.letters], abs=1e-12)
    moved = move_full(pattern, must, scored)
    missing = must - set(pattern.full_layers)
    free = set(pattern.full_layers) - must - {0}
    if len(free) < len(missing):
        assert moved is None
        return
    assert moved is not None
    assert len(moved.pattern.full_layers) == len(pattern.full_layers)
    best = min(
        everything[Pattern.from_full_layers((set(pattern.full_layers) | must) - set(given_up), n).letters]
        for given_up in combinations(sorted(free), len(missing))
    )
    assert moved.loss == pytest.approx(best, abs=1e-12)
    assert set(moved.pattern.full_layers) >= must


def test_costs_come_from_the_nearest_pair() -> None:
    losses = {"FFFF": 2.0, "FSFF": 2.1, "FFFS": 2.3, "FSFS": 2.2}
    assert flip_costs(Pattern("FSFS"), losses)[3] == pytest.approx(0.1)  # beside S at 1, and not the 0.3 without it
    assert flip_costs(Pattern("FFFS"), losses)[3] == pytest.approx(0.3)
    assert 2 not in flip_costs(Pattern("FSFS"), losses)


def test_a_measured_loss_is_no_estimate() -> None:
    losses = {"FFFF": 2.0, "FSFF": 2.1, "FSFS": 2.4, "FFFS": 2.25}
    added = add_full(Pattern("FSFS"), [1], losses)
    assert (added.pattern.letters, added.loss, added.measured) == ("FFFS", 2.25, True)
    del losses["FFFS"]
    added = add_full(Pattern("FSFS"), [1], losses)
    assert (added.loss, added.measured) == (pytest.approx(2.3), False)


def test_losses_of_a_file_and_of_its_journal(tmp_path: Path) -> None:
    record = write_run(tmp_path, MadeUpRun())
    in_file = losses_of_file(results.pattern_file(record))
    in_journal = losses_of_run(record, len(record.pattern))
    assert len(in_file) == len(record.steps()) + 1
    assert in_file.items() <= in_journal.items()
    assert len(in_journal) > len(in_file)
    assert losses_of_run(record, len(record.pattern) + 1) == {}


# --- what is said ---------------------------------------------------------------------------------------------------

STEPS = (
    Step(1, 2, 2.1, 0.1, 0.01, "FFSFFFFF"),
    Step(2, 4, 2.3, 0.3, 0.01, "FFSFSFFF"),
    Step(3, 6, 2.6, 0.6, 0.01, "FFSFSFSF"),
)


def searched(retention_letters: str = "FFSFSFFF") -> PatternFile:
    model = {"model_type": "glm_moe_dsa", "num_hidden_layers": 8}
    pattern = Pattern(retention_letters)
    return PatternFile(pattern, tuple(range(8)), "greedy", baseline_loss=2.0, loss=2.3, steps=STEPS, model=model)


def test_the_repair_says_stage_layer_number_and_loss() -> None:
    file = searched()
    losses = {"FFFFFFFF": 2.0, "FFSFFFFF": 2.1, "FFSFSFFF": 2.3, "FFSFSFSF": 2.6}
    result = export(file, "vllm", serving=Serving("2", losses=losses))
    assert result.pattern.letters == "FFSFFFFF"
    assert result.warnings == (
        "with 2 pipeline stages (4+4 layers), stage 2 would start on S (layer 4), with no selection to reuse: F at 4 "
        "(7 F instead of 6, loss 2.1000 for 2.3000, measured in the run); --repair same: F at 4 and S at 6 (6 F as "
        "before, loss 2.4000 for 2.3000, estimated from the run's losses, evaluate it); or leave the pattern as it is, "
        "and serve it with VLLM_PP_LAYER_PARTITION=3,5",
    )
    same = export(file, "vllm", serving=Serving("2", "same", losses))
    assert same.pattern.letters == "FFSFFFSF"
    left = export(file, "vllm", serving=Serving("2", "none", losses))
    assert left.pattern.letters == "FFSFSFFF"
    assert left.warnings[0].endswith("; the pattern is left as it is, so serve it with VLLM_PP_LAYER_PARTITION=3,5")


def test_no_partition_is_named_where_none_can_help() -> None:
    file = searched("FSSSSSSS")
    lack = ", and has fewer F layers than there are stages: serve it in fewer"
    for engine in ("vllm", "lmdeploy"):
        left = export(file, engine, serving=Serving("0,4", "none"))
        assert left.warnings[0].endswith(f"; the pattern is left as it is{lack}")


def test_a_layout_that_fits_changes_nothing() -> None:
    assert export(searched(), "vllm", serving=Serving("0,3")).warnings == ()
    assert export(searched(), "vllm", serving=Serving("1")).pattern == searched().pattern


@given(st.integers(0, 10**6), st.integers(4, 9), st.integers(2, 4), st.sampled_from(["add", "same"]), st.data())
def test_no_stage_of_a_repaired_pattern_starts_on_shared(
    seed: int, n: int, stages: int, repair: str, data: st.DataObject
) -> None:
    random.seed(seed)
    path, scored = along_a_search([random.uniform(-1, 1) for _ in range(n)])
    pattern = Pattern(data.draw(st.sampled_from(path)))
    try:
        result = export(pattern_file(pattern.letters), "vllm", serving=Serving(str(stages), repair, scored))
    except ExportError as refused:
        assert "layers must become F, and only" in str(refused)
        return
    assert stages_on_shared(result.pattern, range(n), split_vllm(n, stages)) == []
    if repair == "same":
        assert len(result.pattern.full_layers) == len(pattern.full_layers)


def test_without_losses_it_is_said() -> None:
    result = export(pattern_file("FFSFSFFF"), "vllm", serving=Serving("2"))
    assert result.pattern.letters == "FFSFFFFF"
    assert "(7 F instead of 6, the file holds no losses)" in result.warnings[0]
    with pytest.raises(ExportError, match="chosen by the losses of a run, and the file holds none: give --repair"):
        export(pattern_file("FFSFSFFF"), "vllm", serving=Serving("2", "same"))


def test_why_nothing_can_be_given_up() -> None:
    few = {"FFFFFFFF": 2.0, "FFSFFFFF": 2.1}
    with pytest.raises(ExportError, match="losses do not say what enough other layers cost; those in the journal"):
        export(pattern_file("FFSFSFFF"), "vllm", serving=Serving("2", "same", few))
    with pytest.raises(ExportError, match="3 layers must become F, and only 1 others could be given up"):
        export(pattern_file("FSSFSSSS"), "vllm", serving=Serving("4", "same", few))


def test_layers_are_those_of_the_decoder() -> None:
    file = pattern_file("FSFS", (1, 3, 4, 6), num_hidden_layers=8, model_type="dots3_note")
    result = export(file, "vllm", serving=Serving("0,2,5"))
    assert result.pattern.letters == "FFFF"
    assert "stages 2, 3 would start on S (layers 3, 6), with no selection to reuse: F at 3, 6" in result.warnings[0]


def test_a_layer_that_the_checkpoint_shares_cannot_start_a_stage() -> None:
    for engine, layout, cuts in (
        ("vllm", "2", "VLLM_PP_LAYER_PARTITION=3,5"),
        ("vllm-ascend", "2", "VLLM_PP_LAYER_PARTITION=3,5"),
        ("lmdeploy", "0,4", "stages that begin at layers 0, 3"),
    ):
        with pytest.raises(ExportError, match=f"shares layer 4 itself, which cannot be F: serve it with {cuts}$"):
            export(pattern_file("FFSFSFFF", native_shared=[4]), engine, serving=Serving(layout))
    with pytest.raises(ExportError, match="it has fewer F layers than there are stages: serve it in fewer"):
        export(pattern_file("FSSSSSSS", native_shared=list(range(1, 8))), "vllm", serving=Serving("2"))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_export_makes_a_layer_without_an_indexer_full(engine: str) -> None:
    own = load_pattern_file(published_patterns() / "glm-5.2-native.json")
    for layout in ("0,39", "0,20,40,60"):
        for repair in ("add", "same", "none"):
            try:
                served = export(own, engine, serving=Serving(layout, repair)).pattern
            except ExportError as refused:
                assert "serve it with" in str(refused)
                assert ENGINES[engine].stages == "separate"
            else:
                assert served == own.pattern


def test_a_layer_that_a_config_alone_shares_is_not_made_full_by_a_repair() -> None:
    config = {"model_type": "glm_moe_dsa", "num_hidden_layers": 8, "index_topk_pattern": "FFSFSFFF"}
    file, notes = with_config(pattern_file("FFSFSFFF"), config, "config.json")
    assert "give its directory with --model-config" in notes[0]
    with pytest.raises(ExportError, match="the config shares layer 4, and whether there is an indexer is not known"):
        export(file, "vllm", serving=Serving("2"))
    assert export(file, "vllm", serving=Serving("2", "none")).pattern == file.pattern


def test_a_stage_may_start_on_shared_where_the_selection_travels() -> None:
    for engine, since in (("sglang", "28532"), ("atom", "1882")):
        result = export(pattern_file("FFSFSFFF"), engine, serving=Serving("0,4"))
        assert result.pattern.letters == "FFSFSFFF"
        assert f"which {ENGINES[engine].title} serves" in result.warnings[0] and since in result.warnings[0]
    unknown = export(pattern_file("FFSFSFFF"), "trtllm", serving=Serving("0,4"))
    assert unknown.pattern.letters == "FFSFSFFF"
    assert "whether TensorRT-LLM hands a selection on from stage to stage is not known here" in unknown.warnings[0]


def test_an_unknown_repair() -> None:
    with pytest.raises(ExportError, match="--repair 'move' is not known: expected add, same, none"):
        Serving("2", "move")
