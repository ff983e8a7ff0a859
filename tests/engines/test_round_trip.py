"""What is exported for an engine reads back as the same pattern, for every engine and every pattern it can express."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_files import part_read
from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.engines.engine import MEGATRON, MINIMAX_M3, ExportError
from icsearch.engines.export import export
from icsearch.engines.read import import_pattern
from icsearch.engines.table import ENGINES
from icsearch.model.config import Backbone

MODEL_TYPES = [None, "glm_moe_dsa", "deepseek_v32", "hy_v4", "mistral_large4", "deepseek_v4", "dots3_note"]
TWO_NUMBERS = ("vllm", "minimax_m3_vl")  # the family that an engine reads no letters for


@st.composite
def files(draw: Any, *more_types: str) -> PatternFile:
    """Patterns on all layers of a model, or on some of them; wrapped or not; of any type."""
    num_layers = draw(st.integers(1, 14))
    indices = draw(st.just(set(range(num_layers))) | st.sets(st.integers(0, num_layers - 1), min_size=1))
    letters = "F" + draw(st.text("FS", min_size=len(indices) - 1, max_size=len(indices) - 1))
    model = {
        "model_type": draw(st.sampled_from([*MODEL_TYPES, *more_types])),
        "num_hidden_layers": num_layers,
        "wrapper_config": draw(st.booleans()),
    }
    return PatternFile(Pattern(letters), tuple(sorted(indices)), method="greedy", model=model)


def backbone_of(file: PatternFile) -> Backbone:
    model = file.model
    return Backbone(
        model["num_hidden_layers"], file.layer_indices, model["model_type"], wrapper=model.get("wrapper_config", False)
    )


@pytest.mark.parametrize("engine", ENGINES)
@given(file=files(TWO_NUMBERS[1]))
def test_export_and_import_give_the_same_pattern(engine: str, file: PatternFile) -> None:
    try:
        exported = export(file, engine)
    except ExportError:  # only Megatron and, for one family, vLLM refuse, and only what two numbers cannot give
        all_indexed = len(file.pattern) == file.model["num_hidden_layers"]
        if engine == "megatron":
            assert not (all_indexed and MEGATRON.fit(file.pattern.letters))
        else:
            assert (engine, file.model["model_type"]) == TWO_NUMBERS
            assert not MINIMAX_M3.fit(file.pattern.letters)
        return
    imported = import_pattern(part_read(exported), engine, backbone_of(file))
    assert imported.pattern == file.pattern
    assert imported.backbone.layer_indices == file.layer_indices


@pytest.mark.parametrize("engine", ENGINES)
@given(num_layers=st.integers(1, 14), freq=st.integers(1, 6), offset=st.integers(1, 6))
def test_every_schedule_goes_through_every_engine(engine: str, num_layers: int, freq: int, offset: int) -> None:
    file = PatternFile(
        Pattern(MEGATRON.letters(num_layers, freq, offset)),
        tuple(range(num_layers)),
        method="greedy",
        model={"model_type": "glm_moe_dsa", "num_hidden_layers": num_layers},
    )
    assert import_pattern(part_read(export(file, engine)), engine, backbone_of(file)).pattern == file.pattern


@given(file=files())
def test_transformers_keys_in_a_config_say_the_model_too(file: PatternFile) -> None:
    keys = export(file, "transformers").settings
    types = ["indexed_attention" if i in file.layer_indices else "other" for i in range(backbone_of(file).num_layers)]
    about = {"num_hidden_layers": len(types), "layer_types": types, "model_type": file.model["model_type"]}
    inner = keys.get("text_config", keys)
    config = {"text_config": {**about, **inner}} if "text_config" in keys else {**about, **inner}
    imported = import_pattern(json.dumps(config), "transformers")
    assert (imported.pattern, imported.backbone.layer_indices) == (file.pattern, file.layer_indices)


@given(file=files())
def test_a_pasted_flag_is_refused_with_the_part_to_give(file: PatternFile) -> None:
    flag, value = shlex.split(export(file, "vllm").text)
    for text in (
        f"--port 8000 {flag} {shlex.quote(value)} --quiet",
        f"{flag}={shlex.quote(value)}",
        f"vllm serve MODEL -tp 8 {flag} {shlex.quote(value)}",
        f"-tp 8 {shlex.quote(f'{flag}={value}')}",
    ):
        with pytest.raises(PatternError, match="give the JSON object behind --hf-overrides alone") as caught:
            import_pattern(text, None, backbone_of(file))
        assert "\n" not in str(caught.value)


def test_a_written_pattern_file_loads_again(tmp_path: Path) -> None:
    from icsearch.core.pattern_file import load_pattern_file

    found = import_pattern("freq:4", "megatron", Backbone.alike(6))
    found.pattern_file("freq:4").save(tmp_path / "pattern.json")
    file = load_pattern_file(tmp_path / "pattern.json")
    assert (file.pattern.letters, file.layer_indices, file.method) == ("FSSSFS", (0, 1, 2, 3, 4, 5), "imported")
    assert file.model["source"] == "freq:4, as Megatron-LM reads it"
