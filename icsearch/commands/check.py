"""A check of a config.json, or of a checkpoint with its weights. No torch here."""

from __future__ import annotations

from icsearch.commands.requests import CheckRequest
from icsearch.engines.check import Check, check_config
from icsearch.engines.native import layers_with_indexer
from icsearch.engines.table import find_engine
from icsearch.model.config import load_config, read_backbone
from icsearch.planning.modelfile import find_config


def check(request: CheckRequest) -> Check:
    """Raises an IcsearchError where there is no config, or it is not that of a model with indexers."""
    path = find_config(request.model)
    config, name = load_config(path), str(path)
    engine = find_engine(request.engine) if request.engine else None
    with_indexer = None
    if path.name == "config.json":  # another name says nothing of the weights that lie beside it
        with_indexer = layers_with_indexer(path.parent, read_backbone(config, name).num_layers)
    return check_config(config, name, with_indexer, engine)
