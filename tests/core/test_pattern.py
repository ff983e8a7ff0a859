"""Patterns and pattern files."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern, num_full, parse_retention
from icsearch.core.pattern_file import PatternFile, Step, load_pattern_file

patterns = st.text(alphabet="FS", max_size=80).map(lambda rest: Pattern("F" + rest))


@given(patterns)
def test_letters_and_layers_agree(pattern: Pattern) -> None:
    assert Pattern.from_full_layers(set(pattern.full_layers), len(pattern)) == pattern
    assert sorted(pattern.full_layers + pattern.shared_layers) == list(range(len(pattern)))
    assert Pattern.parse(f" {pattern.letters.lower()}\n", len(pattern)) == pattern


@given(patterns)
def test_sources_by_their_definition(pattern: Pattern) -> None:
    for layer, source in enumerate(pattern.sources()):
        assert source == max(full for full in pattern.full_layers if full <= layer)


@given(patterns, st.data())
def test_flip_changes_one_letter(pattern: Pattern, data: st.DataObject) -> None:
    layer = data.draw(st.integers(-1, len(pattern)))
    if 0 < layer < len(pattern) and pattern.is_full(layer):
        flipped = pattern.flip(layer)
        assert set(flipped.full_layers) == set(pattern.full_layers) - {layer}
    else:
        with pytest.raises(PatternError):
            pattern.flip(layer)


@given(st.integers(1, 100), st.fractions(Fraction(1, 200), 1))
def test_uniform_keeps_the_ceiling_evenly(num_layers: int, retention: Fraction) -> None:
    pattern = Pattern.uniform(num_layers, retention)
    assert len(pattern.full_layers) == math.ceil(retention * num_layers) == num_full(retention, num_layers)
    gaps = [b - a for a, b in zip(pattern.full_layers, (*pattern.full_layers[1:], num_layers), strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_uniform_is_the_papers() -> None:
    assert Pattern.uniform(12, Fraction(1, 4)).letters == "FSSSFSSSFSSS"
    assert Pattern.uniform(4, Fraction(1, 2)).letters == "FSFS"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty pattern"),
        ("SFF", "starts with S"),
        ("FFXF", "'X' at position 2"),
        ("FF F", "' ' at position 2"),
        ("FFF", "3 letters, the model has 4"),
    ],
)
def test_bad_patterns(text: str, expected: str) -> None:
    with pytest.raises(PatternError, match=expected):
        Pattern.parse(text, 4)


def test_retention_is_exact() -> None:
    assert parse_retention("1/4") == parse_retention(" 0.25 ") == Fraction(1, 4)
    assert num_full(parse_retention("0.1"), 10) == 1  # as a float, 0.1 * 10 could round up to 2


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-1/4", "1.01", "5/4", "a quarter", "1/0", "", "nan", "inf"),
        *("1e-99999999", "1E-9_9999999", "1e+99999999", "0." + "1" * 5000, "1/" + "9" * 5000),
    ],
)
def test_bad_retention(text: str) -> None:
    with pytest.raises(PatternError, match="give a"):
        parse_retention(text)


def sample() -> PatternFile:
    steps = (Step(1, 2, 2.5, 0.1, 0.01, "FFSF"), Step(2, 1, 2.75, 0.35, 0.02, "FSSF"))
    return PatternFile(Pattern("FSSF"), (0, 2, 4, 6), "greedy", "exact", "lm-loss", 2.4, 2.75, steps)


def test_pattern_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    sample().save(path)
    assert load_pattern_file(path) == sample()
    document = json.loads(path.read_text())
    assert document["full_layers"] == [0, 3]
    assert document["retention"] == 0.5


def test_nested_patterns_of_one_run() -> None:
    assert sample().at_retention(Fraction(1, 2)).letters == "FSSF"
    assert sample().at_retention(Fraction(3, 4)).letters == "FFSF"
    assert sample().at_retention(Fraction(1)).letters == "FFFF"
    with pytest.raises(PatternError, match="it holds 2 to 4 of 4"):
        sample().at_retention(Fraction(1, 4))


BROKEN: dict[str, Any] = {
    "unknown version": {"format": "icsearch.pattern/2"},
    "no format": {"format": None},
    "wrong length": {"num_layers": 5},
    "letters missing": {"pattern": None},
    "first layer S": {"pattern": "SFFF"},
    "layer indices too few": {"layer_indices": [0, 1]},
    "steps not a list": {"steps": 3},
    "a step without loss": {"steps": [{"step": 1}]},
    "a step of another length": {"steps": [{**vars(Step(1, 1, 0.0, 0.0, 0.0, "FS"))}]},
    "a step's layer out of range": {"steps": [{**vars(Step(1, 4, 0.0, 0.0, 0.0, "FSFF"))}]},
    "a step's layer a text": {"steps": [{**vars(Step(1, 1, 0.0, 0.0, 0.0, "FSFF")), "layer": "1"}]},
    "a step's layer negative": {"steps": [{**vars(Step(1, -3, 0.0, 0.0, 0.0, "FSFF"))}]},
    "a step that flips nothing": {"steps": [{**vars(Step(1, 2, 0.0, 0.0, 0.0, "FSFF"))}]},
    "a step's loss null": {"steps": [{**vars(Step(1, 1, 0.0, 0.0, 0.0, "FSFF")), "loss": None}]},
    "a step's error a text": {"steps": [{**vars(Step(1, 1, 0.0, 0.0, 0.0, "FSFF")), "std_err": "nan"}]},
    "a step that is none": {"steps": [3]},
    "a loss as text": {"loss": "2.5"},
    "a loss without bounds": {"baseline_loss": math.inf},
    "full layers of another pattern": {"full_layers": [0, 1]},
    "full layers a number": {"full_layers": 2},
    "layer indices as text": {"layer_indices": ["0", "2", "4", "6"]},
    "layer indices backwards": {"layer_indices": [6, 4, 2, 0]},
    "layer indices a text": {"layer_indices": "0246"},
    "a huge number of layers": {"num_layers": 10**11},
    "layers true": {"num_layers": True},
    "model a text": {"model": "glm"},
    "model null": {"model": None},
    "calibration a list": {"calibration": []},
    "cost a number": {"cost": 3},
    "method a list": {"method": []},
    "native layers a number": {"model": {"native_shared": 3}},
    "native layers as text": {"model": {"native_shared": ["1"]}},
    "a huge number of decoder layers": {"model": {"num_hidden_layers": 10**11}},
    "decoder layers as text": {"model": {"num_hidden_layers": "4"}},
    "model type a list": {"model": {"model_type": []}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pattern_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "pattern.json"
    path.write_text(json.dumps({**sample().to_json(), **BROKEN[case]}))
    with pytest.raises(PatternError, match=r"pattern\.json"):
        load_pattern_file(path)


def test_an_unknown_error_is_null_and_read_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    steps = (Step(1, 2, 2.5, 0.1, math.nan, "FFSF"),)
    PatternFile(Pattern("FFSF"), (0, 1, 2, 3), "greedy", loss=2.5, baseline_loss=math.nan, steps=steps).save(path)
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (document["steps"][0]["std_err"], document["baseline_loss"]) == (None, None)
    found = load_pattern_file(path)
    assert math.isnan(found.steps[0].std_err)
    assert found.baseline_loss is None
    assert found.loss == 2.5


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_not_a_pattern_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pattern.json"
    path.write_bytes(content)
    with pytest.raises(PatternError, match=r"pattern\.json"):
        load_pattern_file(path)
    with pytest.raises(PatternError, match="no file"):
        load_pattern_file(tmp_path / "none.json")
    with pytest.raises(PatternError, match="cannot read"):
        load_pattern_file(tmp_path)
