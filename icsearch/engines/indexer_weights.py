"""Which tensors of a checkpoint are the indexer of which decoder layer, by their names alone.

In the files of nearly all DSA families an indexer is a submodule called `indexer` of a layer, so its weights, and the
scales of quantised ones, are `…layers.N.….indexer.…` (minimax_m3_vl calls them otherwise; nothing is found there).
Indexers of multi-token prediction are no part of it: they come after the decoder's last layer, or under a prefix of
their own, which holds fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from icsearch.engines.letters import ExportError
from icsearch.jsonfile import read_object
from icsearch.weights.checkpoint import INDEX_NAME, SINGLE_NAME
from icsearch.weights.header import read_header

_INDEXER = re.compile(r"((?:.*?\.)?)layers\.(\d{1,6})\.(?:.*\.)?indexer\..")


def indexers_by_layer(names: Iterable[str], num_layers: int) -> dict[int, list[str]]:
    """The names of each decoder layer's indexer tensors; a layer without any is not there."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        match = _INDEXER.match(name)
        if match and int(match[2]) < num_layers:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    return max(found.values(), key=len, default={})


def layers_with_indexer(directory: Path, num_layers: int) -> set[int] | None:
    """The decoder layers that a checkpoint has indexer weights for; None where it has no weights, or none so named.

    Its index alone is enough. Raises an IcsearchError for one that is damaged.
    """
    if (directory / INDEX_NAME).exists():
        index = read_object(
            directory / INDEX_NAME, expected="the safetensors index", advice="download it again", error=ExportError
        )
        names = index.get("weight_map")
        if not isinstance(names, dict):
            raise ExportError(f"{directory / INDEX_NAME} has no weight_map: download it again")
    elif (directory / SINGLE_NAME).exists():
        names = [entry.name for entry in read_header(directory / SINGLE_NAME).entries]
    else:
        return None
    return set(indexers_by_layer(names, num_layers)) or None
