"""Which tensors of a checkpoint are the indexer of which decoder layer, by their names alone.

In the files of nearly all DSA families an indexer is a submodule called `indexer` of a layer, so its weights, and the
scales of quantised ones, are `…layers.N.….indexer.…` (minimax_m3_vl calls them otherwise; nothing is found there).
Indexers of multi-token prediction are no part of it: they come after the decoder's last layer, or under a prefix of
their own, which holds fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_INDEXER = re.compile(r"((?:.*?\.)?)layers\.(\d{1,6})\.(?:.*\.)?indexer\..")


def indexers_by_layer(names: Iterable[str], num_layers: int) -> dict[int, list[str]]:
    """The names of each decoder layer's indexer tensors; a layer without any is not there."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        match = _INDEXER.match(name)
        if match and int(match[2]) < num_layers:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    return max(found.values(), key=len, default={})
