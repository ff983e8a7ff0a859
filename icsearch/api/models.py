"""F/S patterns on transformers models in place, and off again.

A patched model is the model itself with a slot in place of each indexer (`slot.py`): its forward, `generate`,
`save_pretrained`, `state_dict` and `deepcopy` are its own. Pattern and selection live in one store per model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from icsearch.commands.specs import pattern_of
from icsearch.core.errors import PatternError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.config import Backbone, load_config
from icsearch.model.families.decoder import decoder_layers
from icsearch.model.layout import inspect
from icsearch.model.model import indexer_owners
from icsearch.model.slot import SelectionStore, put_slot, take_slot

Model = TypeVar("Model", bound=nn.Module)


def load(
    name_or_path: str,
    pattern: str | Pattern | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A transformers model, checked as a search checks it, with the pattern applied (None: unmodified).

    `name_or_path` is a directory, a hub id or ``demo``; `dtype` and `device` are as on the command line. The model
    comes in eval mode, its parameters without gradients, so that its bits are those of a search (torch picks some
    matrix products by whether a weight needs a gradient). Raises ModelError for a checkpoint that cannot be used, and
    PatternError, before any weight is read, for a pattern that does not fit.
    """
    checkpoint = open_checkpoint(name_or_path, trust_remote_code=trust_remote_code)
    layout = inspect(checkpoint, trust_remote_code)
    fitting = None if pattern is None else _fit(pattern, layout.start_pattern, layout.backbone)
    model = loading.load(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code).model
    return restore(model) if fitting is None else apply_pattern(model, fitting)


def apply_pattern(model: Model, pattern: str | Pattern) -> Model:
    """Make a loaded transformers model follow the pattern, in place; returns the model.

    `pattern` is a Pattern, its letters (one per DSA layer, layer 0 first), or any SPEC of the command line: a
    pattern.json, a RUN, ``RUN@1/2``, ``uniform:1/4``, ``published:NAME``, or what an engine is given, such as its
    config.json. A pattern that was applied before is replaced. Run one forward at a time on a patched model. A KV
    cache holds no indexer keys of S layers, so continue it only under the pattern that filled it. Saving writes the
    checkpoint as it was: a pattern travels as a pattern.json.

    Raises PatternError, and leaves the model alone, where the pattern has another length, asks F of a layer that the
    checkpoint itself shares, or the model has no indexers.
    """
    owners = _owners(model)
    if not owners:
        raise PatternError(
            f"{type(model).__name__} has no indexers: expected a DeepSeek-Sparse-Attention model of transformers, "
            "such as deepseek_v32 or glm_moe_dsa"
        )
    store = SelectionStore(_fit(pattern, _start_pattern(owners), _decoder_layers(model)))
    for position, owner in enumerate(owners):
        put_slot(owner, position).store = store
    return model


def restore(model: Model) -> Model:
    """Take an applied pattern off again, in place: every `indexer` is then the object that it was; returns the model.

    A `DsaModel` made around the same model loses its slots by this: make a new one afterwards.
    """
    for owner in _owners(model):
        take_slot(owner)
    return model


def _owners(model: nn.Module) -> list[nn.Module]:
    """The modules whose `indexer` makes a DSA layer's selection, in layer order; none for another kind of model."""
    if not (hasattr(model, "config") and hasattr(model, "get_decoder")):
        return []
    return [owner for _, owner in indexer_owners(model)]


def _decoder_layers(model: Any) -> Backbone:
    """Those of the model, with its config.json where it was loaded from a directory.

    transformers' own config has keys that the file need not have, such as the `indexer_types` that it made of others.
    """
    origin = model.config.name_or_path
    known = bool(origin) and (Path(origin) / "config.json").is_file()
    config = load_config(Path(origin)) if known else model.config.to_dict()
    indices = [index for index, _ in indexer_owners(model)]
    return Backbone.of_model(len(decoder_layers(model)), indices, config)


def _start_pattern(owners: list[nn.Module]) -> Pattern:
    """The unmodified model: S on the layers that the checkpoint itself shares, F elsewhere."""
    indexers = [getattr(owner.indexer, "inner", owner.indexer) for owner in owners]
    return Pattern("".join(SHARED if indexer is None else FULL for indexer in indexers))


def _fit(pattern: str | Pattern, start: Pattern, layers: Backbone) -> Pattern:
    """The pattern, checked against the unmodified model's, whose decoder layers these are; raises PatternError."""
    letters = isinstance(pattern, Pattern) or not set(pattern) - set("FfSs")
    spec = str(pattern)
    fitting = Pattern.parse(spec, len(start)) if letters else pattern_of(spec, start, layers)
    refused = [layer for layer in start.shared_layers if fitting.is_full(layer)]
    if refused:
        raise PatternError(
            f"pattern asks F of DSA layer {refused[0]}, which has no indexer in this checkpoint: "
            f"use S at {', '.join(map(str, start.shared_layers))}"
        )
    return fitting
