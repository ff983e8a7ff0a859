"""What a model's own forward calls its decoder layers with, heard without running them; and what layers hand on.

Masks, positions, rotary embeddings: without padding they follow from the shape of a batch alone. Token ids do not;
where a family's layers take them too (hashed experts, n-gram embeddings), they are filled in batch by batch. That
nothing else of a batch reaches a layer but the states that the layer before it returned is tried on each model.

Beside hidden states, layers hand on the selection to later ones, and in some families more: a model whose layers share
keys and values, too, gives each of them an empty container, in which a layer leaves what later ones take up. A branch
of a search forks at a layer, and what is in there forks with it: so it travels with the selection, and each layer call
gets containers of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.model.slot import SelectionStore

PROBE_TOKENS = 2
TOKEN_ARGUMENTS = ("input_ids", "ple_input_ids")  # what layers may take a batch's token ids as


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer beside the hidden states, as the model's own forward passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def on(self, input_ids: torch.Tensor) -> LayerCall:
        """The call on these [B, T] token ids: another one only where the layer takes them."""
        tokens = {name: input_ids for name in TOKEN_ARGUMENTS if name in self.kwargs}
        return replace(self, kwargs={**self.kwargs, **tokens}) if tokens else self


@contextlib.contextmanager
def embedding_nothing(model: Any) -> Iterator[None]:
    """Within the block, the model's embedding makes states of the token ids' own numbers: it needs no weights."""
    embedding = model.get_input_embeddings()
    if getattr(embedding, "weight", None) is None:
        raise ModelError(
            f"the input embedding of {type(model).__name__} has no weight: expected a table with a row for each token; "
            "this family cannot be searched"
        )
    width, dtype = embedding.weight.shape[1], embedding.weight.dtype

    def numbers(input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.to(dtype).unsqueeze(-1).expand(*input_ids.shape, width)

    with instead_of_forward(embedding, numbers):
        yield


@contextlib.contextmanager
def recorded(
    layers: Sequence[nn.Module],
    output: Callable[[int, torch.Tensor], torch.Tensor] = lambda index, hidden_states: hidden_states,
) -> Iterator[list[LayerCall]]:
    """Within the block, layers leave their call in the list and return `output`; the last one ends the forward.

    A family that hands the selection from layer to layer as an argument gets None there: the slots supply it. Raises
    ModelError where the forward does not call each layer once, in order.
    """
    calls: list[LayerCall] = []

    def record(index: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        returned = output(index, hidden_states)
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise LastLayerReached
        return returned.as_subclass(LayerOutput)

    with contextlib.suppress(LastLayerReached), in_order(layers, record):
        yield calls


@contextlib.contextmanager
def in_order(layers: Sequence[nn.Module], function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within the block, calling a layer calls the function, with the layer's number in front.

    Raises ModelError where layers are not called one after another, each of them once.
    """
    done = 0

    def call(index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal done
        if index != done:
            raise _out_of_order(done, f"layer {index}")
        done += 1
        return function(index, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(instead_of_forward(layer, partial(call, index)))
        yield
        if done < len(layers):
            raise _out_of_order(done, "none of the others")


def check_layers_stand_alone(
    model: Any, layers: Sequence[nn.Module], decode: Callable[[torch.Tensor], Any], device: torch.device
) -> None:
    """Raise ModelError where a layer gets more of a batch than its token ids and the states of the layer before it.

    Tried on two made-up batches of a few tokens, where layer i returns states that are all i + 1: `decode` is the
    forward.
    """

    def made_up(index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if index and not torch.equal(hidden_states, torch.full_like(hidden_states, index)):
            raise ModelError(
                f"{type(model).__name__} changes the states between decoder layers {index - 1} and {index}: expected "
                "each layer to get what the one before it returned; this family cannot be searched layer by layer"
            )
        return torch.full_like(hidden_states, index + 1)

    heard = []
    for token in (0, 1):
        with embedding_nothing(model), recorded(layers, made_up) as calls:
            decode(torch.full((1, PROBE_TOKENS), token, device=device))
        heard.append(calls)
    for index, (call, again) in enumerate(zip(*heard, strict=True)):
        named = [{n: v for n, v in c.kwargs.items() if n not in TOKEN_ARGUMENTS} for c in (call, again)]
        if not same_values((call.args, named[0]), (again.args, named[1])):
            raise ModelError(
                f"{type(model).__name__} hands decoder layer {index} something that follows from the text, beside the "
                f"states of the layer before it: expected masks, positions or {' or '.join(TOKEN_ARGUMENTS)}; this "
                "family cannot be searched layer by layer"
            )


def same_values(one: Any, other: Any) -> bool:
    """Whether arguments hold the same tensors; what is neither a tensor nor a plain container is not compared."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_values(one[name], other[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return True


def _out_of_order(done: int, then: str) -> ModelError:
    return ModelError(
        f"the model's own forward calls {done} decoder layers in order and then {then}: expected each layer once; this "
        "family cannot be searched layer by layer"
    )


@contextlib.contextmanager
def instead_of_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling the module calls the function."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class LayerOutput(torch.Tensor):
    """States as a decoder layer of any family returns them: alone, or first of a pair with the layer's selection."""

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self, None))

    def __getitem__(self, item: Any) -> torch.Tensor:
        return self if isinstance(item, int) and item == 0 else super().__getitem__(item)


class LastLayerReached(Exception):
    """Ends a forward when all layers have been called."""


class FirstLayerReached(Exception):
    """Carries the embedded states out of the model's forward, as its only argument."""


# By the name of a layer's argument: what layers have put in there, by their key.
More = Mapping[str, Mapping[str, tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class Handed:
    """A selection, and what else the layers so far have handed on to later ones."""

    selection: Any
    more: More


def take_up(store: SelectionStore, handed: Any) -> SelectionStore:
    """The store with what a layer before has handed on: a selection, or more."""
    if isinstance(handed, Handed):
        store.selection, store.more = handed.selection, handed.more
    else:
        store.selection, store.more = handed, {}
    return store


def hand_on(store: SelectionStore, taken: Any) -> Any:
    """What a later layer takes up of the store; `taken` itself where a layer has changed nothing of it."""
    if not any(store.more.values()):
        return store.selection
    if isinstance(taken, Handed) and taken.selection is store.selection and _same_objects(taken.more, store.more):
        return taken
    return Handed(store.selection, store.more)


def _same_objects(one: More, other: More) -> bool:
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
    empty = {name: value for name, value in call.kwargs.items() if isinstance(value, MutableMapping) and not value}
    if not empty:
        yield call
        return
    kinds: dict[str, Any] = {name: type(container) for name, container in empty.items()}
    own = {name: kind(store.more.get(name, {})) for name, kind in kinds.items()}
    yield replace(call, kwargs={**call.kwargs, **own})
    store.more = {name: dict(container) for name, container in own.items()}


def tensors_of(handed: Any) -> list[torch.Tensor]:
    """All tensors of what is handed on."""
    tensors: list[torch.Tensor] = []
    map_tensors(handed, tensors.append)
    return tensors


def map_tensors(handed: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """What is handed on with each tensor replaced by what the function makes of it; all else as it is."""
    if isinstance(handed, torch.Tensor):
        return function(handed)
    if not isinstance(handed, Handed):
        return handed
    more = {
        name: {key: tuple(function(tensor) for tensor in tensors) for key, tensors in container.items()}
        for name, container in handed.more.items()
    }
    return Handed(map_tensors(handed.selection, function), more)


def numbers_handed_on(config: Any) -> int:
    """Numbers that layers hand on for each token beside the selection, at most: latents, with RoPE and without."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    if not any(mode == "store" for mode in modes):
        return 0
    return 2 * config.kv_lora_rank + config.qk_rope_head_dim
