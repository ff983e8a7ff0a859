"""Pipeline blocks that begin with a layer which the checkpoint shares: named, with the cuts that can be served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.files import published_patterns
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.engines.pipeline import stages_on_shared
from icsearch.planning.rows import shared_starts, stage_rows
from icsearch.search.greedy import split_stages

EIGHT = (
    "block 2 of --stages 2 begins with layer 4, which the checkpoint itself shares: F cannot be kept there, and a "
    "serving stage that begins there would have no selection to reuse; cut the server at layers 0,3 in place, where it "
    "takes its cuts by hand: search with --keep-full 3, or let icsearch export --serve-pp 0,3 repair the pattern"
)


def firsts(start: Pattern, stages: int) -> list[int]:
    return [block.start for block in split_stages(len(start), stages)]


def test_the_blocks_and_what_to_do_are_named() -> None:
    assert shared_starts(Pattern("FFFFSFFF"), [0, 4], range(8)) == [EIGHT]
    assert shared_starts(Pattern("FFFFSFFF"), [0, 2, 5], range(8)) == []
    assert shared_starts(Pattern("FFFF"), [0], range(4)) == []


def test_glm_5_2_in_four_stages() -> None:
    start = load_pattern_file(published_patterns() / "glm-5.2-native.json").pattern
    (text,) = shared_starts(start, firsts(start, 4), range(78))
    assert text.startswith("blocks 2, 3, 4 of --stages 4 begin with layers 20, 40, 60, which")
    assert "at layers 0,18,38,58 in place" in text and "--keep-full 18,38,58," in text


def test_layers_of_other_kinds_between() -> None:
    """Letters for --keep-full, decoder layers for --serve-pp."""
    (text,) = shared_starts(Pattern("FFSF"), [0, 2], (1, 3, 5, 7))
    assert "layer 2 (decoder layer 5)" in text
    assert "--keep-full 1," in text and "--serve-pp 0,3 " in text


def test_where_nothing_can_be_cut() -> None:
    (text,) = shared_starts(Pattern("FSSS"), [0, 2], range(4))
    assert text.endswith("too few layers have an indexer for 2 stages: give fewer")


@given(st.text("FS", min_size=1, max_size=20).map("F".__add__), st.integers(1, 6))
def test_the_cuts_that_are_named_can_be_served(letters: str, stages: int) -> None:
    start = Pattern(letters)
    blocks = firsts(start, min(stages, len(start)))
    found = shared_starts(start, blocks, range(len(start)))
    assert bool(found) == any(not start.is_full(first) for first in blocks)
    if found and "--serve-pp" in found[0]:
        cuts = [int(cut) for cut in found[0].split("--serve-pp ")[1].split()[0].split(",")]
        sizes = [end - first for first, end in zip(cuts, [*cuts[1:], len(start)], strict=True)]
        assert len(cuts) == len(blocks) and stages_on_shared(start, range(len(start)), sizes) == []


@pytest.mark.parametrize("blocks", [{}, {"blocks": [[0, 8]]}, {"blocks": [[0, 3], [3, 8]]}])
def test_a_run_whose_blocks_begin_on_f_says_nothing(blocks: dict[str, list[list[int]]]) -> None:
    start = {"start_pattern": "FFFFSFFF", "layer_indices": list(range(8)), **blocks}
    assert stage_rows(start) == []
    cut = {**start, "blocks": [[0, 4], [4, 8]]}
    assert stage_rows(cut) == [("stages", EIGHT)]
