"""Every family's checkpoint with a pattern in it: where the keys go, and that what is said of transformers is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import icsearch
import tiny_families
from icsearch.core.errors import IcsearchError
from icsearch.engines.native import LOAD_WITHOUT_INDEXERS, export_checkpoint, indexers_by_layer
from icsearch.engines.table import TRANSFORMERS
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.header import read_header
from icsearch.model.layout import Layout, inspect
from native_fixtures import save_pattern

OTHER_NAMES = ("minimax_m3_vl",)  # files in which no module is called indexer
RAISES = ("glm5_next",)  # in transformers 5.24


@pytest.fixture(scope="module", params=sorted(tiny_families.CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the pattern F S S … for its DSA layers beside it."""
    folder = tmp_path_factory.mktemp(family)
    checkpoint = tiny_families.save_checkpoint(folder / "model", family)
    layout = inspect(open_checkpoint(str(checkpoint)))
    letters = "F" + "S" * (len(layout.layer_indices) - 1)
    path = save_pattern(folder / "pattern.json", checkpoint, letters, num_hidden_layers=layout.num_layers)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "layer_indices": list(layout.layer_indices)}))
    return checkpoint


@pytest.fixture(scope="module")
def layout(source: Path) -> Layout:
    return inspect(open_checkpoint(str(source)))


def exported(source: Path, out: Path, **options: Any) -> Any:
    return export_checkpoint(source.parent / "pattern.json", out, **options)


def load(family: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    model, info = getattr(transformers, tiny_families.CLASSES[family]).from_pretrained(
        directory, output_loading_info=True
    )
    return model.eval().requires_grad_(False), info


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(40).reshape(1, 40)).logits


def test_indexers_are_found_by_their_names(family: str, source: Path, layout: Layout) -> None:
    names = [entry.name for path in open_checkpoint(str(source)).shards for entry in read_header(path).entries]
    expected = () if family in OTHER_NAMES else layout.layer_indices
    assert tuple(sorted(indexers_by_layer(names, layout.num_layers))) == expected


def test_the_keys_stand_where_the_language_model_is(family: str, source: Path, layout: Layout, tmp_path: Path) -> None:
    result = exported(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    inner = config["text_config"] if layout.wrapper_config else config
    shared = layout.layer_indices[1:]
    assert result.config.nested is layout.wrapper_config
    assert inner["index_topk_pattern"] == "".join("S" if i in shared else "F" for i in range(layout.num_layers))
    assert inner["indexer_types"] == ["shared" if i in shared else "full" for i in range(layout.num_layers)]
    if layout.wrapper_config:
        assert "index_topk_pattern" not in config and "indexer_types" not in config


def test_transformers_does_with_it_what_is_said(family: str, source: Path, layout: Layout, tmp_path: Path) -> None:
    """It follows the pattern, or ignores it, or (one family) fails; never anything that was not said."""
    notes = " ".join(exported(source, tmp_path / "out").notes)
    original = load(family, source)[0]
    model, info = load(family, tmp_path / "out")
    assert not info["missing_keys"]
    if family in RAISES:
        assert "and then fails in its first S layer" in notes
        with pytest.raises(ValueError, match="Shared DSA layers require"):
            logits(model)
    elif family in TRANSFORMERS.model_types:
        letters = "F" + "S" * (len(layout.layer_indices) - 1)
        assert torch.equal(logits(model), logits(icsearch.apply_pattern(original, letters)))
        assert "does not read" not in notes
    else:
        assert f"transformers 5.24 does not read the pattern of a {family} config" in notes
        assert not info["unexpected_keys"]
        assert torch.equal(logits(model), logits(original))


def test_dropping_is_refused_where_nobody_loads_the_result(family: str, source: Path, tmp_path: Path) -> None:
    if family in LOAD_WITHOUT_INDEXERS:
        assert exported(source, tmp_path / "out", drop_indexers=True).bytes_saved > 0
        return
    with pytest.raises(IcsearchError, match=f"nothing is known to load a model of type {family} without"):
        exported(source, tmp_path / "out", drop_indexers=True)
    assert not (tmp_path / "out").exists()
