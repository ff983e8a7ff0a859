"""What layers hand on to later ones beside hidden states: the selection, and in some families more.

A model whose layers share keys and values, too, gives each of them an empty container, in which a layer leaves what
later ones take up. A branch of a search forks at a layer, and what is in there forks with it: so it travels with the
selection, and each layer call gets containers of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from icsearch.model.families.calls import LayerCall
from icsearch.model.slot import SelectionStore

# By the name of a layer's argument: what layers have left in there, by their key.
Left = Mapping[str, Mapping[str, tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class Handed:
    """A selection, and what else the layers so far have left for later ones."""

    selection: Any
    left: Left


def take_up(store: SelectionStore, handed: Any) -> SelectionStore:
    """The store with what a layer before has handed on: a selection, or more."""
    more = isinstance(handed, Handed)
    store.selection, store.left = (handed.selection, handed.left) if more else (handed, {})
    return store


def hand_on(store: SelectionStore, taken: Any) -> Any:
    """What a later layer takes up of the store; `taken` itself where a layer has changed nothing of it."""
    if not any(store.left.values()):
        return store.selection
    if isinstance(taken, Handed) and taken.selection is store.selection and _same(taken.left, store.left):
        return taken
    return Handed(store.selection, store.left)


def _same(one: Left, other: Left) -> bool:
    """Whether both hold the same objects."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys() and all(one[name][key] is other[name][key] for key in one[name])
        for name in one
    )


@contextlib.contextmanager
def own_containers(call: LayerCall, store: SelectionStore) -> Iterator[LayerCall]:
    """The call with containers of its own, filled with what the store holds; afterwards the store has what they hold.

    Containers are the arguments that were empty when the call was heard without any layer at work.
    """
    empty = {name: one for name, one in call.kwargs.items() if isinstance(one, MutableMapping) and not one}
    if not empty:
        yield call
        return
    kinds: dict[str, Any] = {name: type(one) for name, one in empty.items()}
    own = {name: kind(store.left.get(name, {})) for name, kind in kinds.items()}
    yield replace(call, kwargs={**call.kwargs, **own})
    store.left = {name: dict(one) for name, one in own.items()}


def tensors_of(handed: Any) -> list[torch.Tensor]:
    """All tensors of what is handed on."""
    found: list[torch.Tensor] = []
    map_tensors(handed, found.append)
    return found


def map_tensors(handed: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """What is handed on with each tensor replaced by what the function makes of it; all else as it is."""
    if isinstance(handed, torch.Tensor):
        return function(handed)
    if not isinstance(handed, Handed):
        return handed
    left = {
        name: {key: tuple(function(one) for one in tensors) for key, tensors in kept.items()}
        for name, kept in handed.left.items()
    }
    return Handed(map_tensors(handed.selection, function), left)


def numbers_left(config: Any) -> int:
    """Numbers that layers leave for each token beside the selection, at most: shared latents, with RoPE and without."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    if not any(mode == "store" for mode in modes):
        return 0
    return 2 * config.kv_lora_rank + config.qk_rope_head_dim
