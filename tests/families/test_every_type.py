"""A rehearsal with every type of model that transformers registers with an indexer, as its own classes save it.

The types are asked of transformers, not listed: a new one fails here until a small config of it is made. Each is
searched, or refused in one line that says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_batches import random_batches
from test_commands import fixed, pattern_of, refused, run
from torch.nn import functional
from transformers.models.auto import configuration_auto, modeling_auto

import tiny_families
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.config import MODEL_TYPES, family
from icsearch.model.layout import inspect
from icsearch.sweep.sweep import naive_nll
from ties import broken_by_our_rule

# Where a class that makes a checkpoint is registered: those with an LM head first, then the body alone.
TABLES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
NO_HEAD = "transformers has no class with an LM head for model_type {}: expected a checkpoint of a whole language model"


def with_an_indexer(model_type: str) -> bool:
    """Whether the modeling file of a registered type makes an indexer, and the type is a language model's."""
    folder = configuration_auto.model_type_to_module_name(model_type)
    package = Path(transformers.__file__).parent / "models" / folder
    made = any(re.search(r"self\.indexer\b", file.read_text()) for file in package.glob("modeling_*.py"))
    return made and not re.search("vision|audio", model_type)


def classes() -> dict[str, str]:
    """The class of each type that is registered with an indexer."""
    tables = [getattr(modeling_auto, table) for table in TABLES]
    types = filter(with_an_indexer, configuration_auto.CONFIG_MAPPING_NAMES)
    return {name: next(table[name] for table in tables if name in table) for name in types}


def config_of(model_type: str) -> Any:
    """A small config; for a type that nobody has made one of, the KeyError says which."""
    whole = tiny_families.CONFIGS[family(model_type)]()
    return whole if whole.model_type == model_type else whole.get_text_config()


def save(directory: Path, model_type: str, name: str) -> Path:
    torch.manual_seed(0)
    config = config_of(model_type)
    module = importlib.import_module(f"transformers.models.{configuration_auto.model_type_to_module_name(model_type)}")
    model = getattr(module, name)._from_config(config)
    for part in model.modules():
        if hasattr(part, "tid2eid"):
            part.tid2eid.random_(config.n_routed_experts)
    model.save_pretrained(directory)
    tiny_families.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config has attributes of its own for some layers."""
    model = save(tmp_path_factory.mktemp("text") / "model", "dots3_note_text", classes()["dots3_note_text"])
    assert "num_attention_heads" in json.loads((model / "config.json").read_text())["per_layer_config"]["1"]
    return model


def test_the_types_are_known() -> None:
    types = classes()
    assert {family(model_type) for model_type in types} == set(MODEL_TYPES) == set(tiny_families.CONFIGS)
    assert set(types) - set(MODEL_TYPES) >= {"dots3_note_text", "qwen4_exp_text", "glm5_next_text"}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.slow) if name in tiny_families.CLASSES else name for name in classes()],
)
def test_each_is_searched_or_refused(
    model_type: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = classes()[model_type]
    model = save(tmp_path / "model", model_type, name)
    command = ("greedy", *fixed(model, tokens, tmp_path / "run", "--num-shared", 1))
    if name.endswith("TextModel"):  # a body
        assert NO_HEAD.format(model_type) in refused(capsys, *command)
        return
    status, _, err = run(capsys, *command)
    assert status == 0, err
    assert pattern_of(tmp_path / "run")["pattern"].count("S") == 1


def test_layers_with_a_config_of_their_own(
    text_only: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads a checkpoint reads what it needs of the layer meant."""
    out = tmp_path / "run"
    for command in (
        ("greedy", *fixed(text_only, tokens, out, "--num-shared", 1)),
        ("greedy", *fixed(text_only, tokens, tmp_path / "streamed", "--num-shared", 1, "--offload", "disk")),
        ("dp-baseline", *fixed(text_only, tokens, tmp_path / "dp", "--num-shared", 1)),
        ("eval", *fixed(text_only, tokens, tmp_path / "eval", "--pattern", out, "--pattern", f"vllm:{text_only}")),
        ("export", out, "--engine", "vllm", "--model-config", text_only),
        ("export", out, "--checkpoint", tmp_path / "copy"),
        ("eval", *fixed(tmp_path / "copy", tokens, tmp_path / "again", "--pattern", "full")),
        ("import", text_only, "--engine", "vllm"),
    ):
        status, _, err = run(capsys, *command)
        assert status == 0, (command[0], err)
    assert pattern_of(tmp_path / "streamed")["loss"] == pattern_of(out)["loss"]
    layout = inspect(open_checkpoint(str(text_only)))
    assert (layout.attention_heads, layout.has_arithmetic) == (4, True)  # the most of any layer
    assert layout.sizes is not None and layout.sizes.heads == 2  # a layer with an indexer


@pytest.mark.parametrize("elements", [None, 2000])
def test_their_losses_are_the_models_own(text_only: Path, elements: int | None) -> None:
    dsa = loading.load(open_checkpoint(str(text_only)), block_elements=elements)
    (batch, *_) = random_batches(2)
    with broken_by_our_rule(dsa) if elements is None else contextlib.nullcontext():
        (nll, *_) = naive_nll(dsa, Pattern("FFF"), [batch])
    own = loading.load(open_checkpoint(str(text_only)))
    with torch.inference_mode(), broken_by_our_rule(own):
        logits = own.model(batch.input_ids).logits[0, :-1]
    assert nll == pytest.approx(
        float(functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="sum")), rel=1e-5
    )
