"""A loaded model of transformers, run layer by layer with F/S roles: the only file that knows its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icsearch.errors import ModelError
from icsearch.kernels import (
    Blockwise,
    Observer,
    attending,
    compressed,
    dense_core,
    find_rotation,
    has_arithmetic,
    mask_stand_in,
    random_copy,
)
from icsearch.pattern import FULL, SHARED, Pattern
from icsearch.slot import SelectionStore, find_indexers, put_slot
from icsearch.weights.holding import LayerWeights


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer beside the hidden states, as the model's own forward passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DsaModel:
    """A loaded model with a slot in place of each indexer.

    Positions count DSA layers from 0 (the letters of a pattern); `layer_indices[position]` is the decoder layer.
    With `block_elements`, layers compute with the block-wise arithmetic of `ops`, else as transformers wrote them.
    That holds for every method here; the model's own `generate` and `forward` stay the model's own.
    `weights` says which decoder layers this process has, and brings them to `device`; by default all are there.
    """

    def __init__(
        self,
        model: Any,  # a causal LM of transformers
        block_elements: int | None = None,
        weights: LayerWeights | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.layers: list[nn.Module] = list(getattr(self.decoder, "layers", []))  # other names: no DSA family
        self.lm_head: nn.Module = model.get_output_embeddings()
        self.weights = weights or LayerWeights(range(len(self.layers)))
        self.device = device or next(model.parameters()).device
        owners = indexer_owners(model)
        self.layer_indices = [index for index, _ in owners]
        self.owners = [owner for _, owner in owners]
        self.slots = [put_slot(owner, position) for position, owner in enumerate(self.owners)]
        self.native_shared = [slot.position for slot in self.slots if slot.inner is None]
        self._slot_of = dict(zip(self.layer_indices, self.slots, strict=True))
        self._observer: Observer | None = None
        self.blockwise = None if block_elements is None else self._make_blockwise(block_elements)

    @property
    def has_arithmetic(self) -> bool:
        """Whether the block-wise arithmetic knows all attention layers of this model, and there is no other kind."""
        known = all(has_arithmetic(owner, slot.inner) for owner, slot in zip(self.owners, self.slots, strict=True))
        return known and len(self.slots) == len(self.layers)

    def _make_blockwise(self, block_elements: int) -> Blockwise:
        indexer = next(slot.inner for slot in self.slots if slot.inner is not None)
        return Blockwise(find_rotation(random_copy(indexer)), block_elements)

    @property
    def held(self) -> range:
        """The decoder layers that this process has."""
        return self.weights.held

    def holding(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Within the block, the weights of this decoder layer are on the device: `run_layer` wants them there."""
        return self.weights.holding(index)

    @property
    def start_pattern(self) -> Pattern:
        """All F but for the layers that the checkpoint itself shares: the unmodified model."""
        return Pattern("".join(SHARED if slot.inner is None else FULL for slot in self.slots))

    @contextlib.contextmanager
    def running(self, pattern: Pattern) -> Iterator[SelectionStore]:
        """Within the block, the model's own forward follows the pattern; afterwards it is as it was before."""
        store = SelectionStore(pattern)
        before = [slot.store for slot in self.slots]
        for slot in self.slots:
            slot.store = store
        try:
            yield store
        finally:
            for slot, earlier in zip(self.slots, before, strict=True):
                slot.store = earlier

    def final_hidden_states(self, input_ids: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """One whole forward by the model's own code: [B, T] ids to [B, T, D] states after the final norm.

        Raises ModelError where not all weights are on the device.
        """
        if self.weights.streamed or len(self.held) < len(self.layers):
            raise ModelError("a whole forward needs all weights on the device: load the model with --offload none")
        with self.running(pattern):
            return self._decode(input_ids, input_ids=input_ids).last_hidden_state

    def _decode(self, like: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """The decoder's own forward on inputs in the shape of [B, T] ids, with the arithmetic of this model."""
        mask = None if self.blockwise is None else mask_stand_in(like)
        with self._computing():
            return self.decoder(**inputs, attention_mask=mask, use_cache=False)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the block, layers compute with the arithmetic of this model, and the observer hears of them."""
        with contextlib.ExitStack() as stack:
            if self.blockwise is not None:
                stack.enter_context(compressed(self.owners))
                stack.enter_context(attending(self.config, self.blockwise.core, self._observer))
                stack.enter_context(self._selecting(self.blockwise.select))
            elif self._observer is not None:
                stack.enter_context(attending(self.config, dense_core, self._observer))
            yield

    @contextlib.contextmanager
    def _selecting(self, select: Callable[..., Any]) -> Iterator[None]:
        for slot in self.slots:
            slot.arithmetic = select
        try:
            yield
        finally:
            for slot in self.slots:
                slot.arithmetic = None

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the block, every DSA layer that runs reports its core attention; its result stays what it was."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def capture_calls(self, input_ids: torch.Tensor) -> list[LayerCall]:
        """Each decoder layer's call arguments for [B, T] inputs of this shape, from one forward of the model's own.

        Masks, positions and rotary embeddings are then the model's own; without padding they depend on the shape
        alone. So the layers are left out, and no weights are needed. A family that hands the selection from layer to
        layer as an argument gets None there: the slots supply it.
        """
        calls: list[LayerCall] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(LayerCall(args, kwargs))
            if len(calls) == len(self.layers):
                raise _LastLayerReached
            return hidden_states.as_subclass(_LayerOutput)

        embedding = self.model.get_input_embeddings().weight  # [V, D]
        zeros = torch.zeros(1, dtype=embedding.dtype, device=input_ids.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(_LastLayerReached))
            for layer in self.layers:
                stack.enter_context(_instead_of_forward(layer, record))
            self._decode(input_ids, inputs_embeds=zeros.expand(*input_ids.shape, embedding.shape[1]))
        return calls

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The states that the model's own forward hands to its first decoder layer: [B, T] to [B, T, D]."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _FirstLayerReached(args[0])

        hook = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._decode(input_ids, input_ids=input_ids)
        except _FirstLayerReached as reached:
            return reached.hidden_states
        finally:
            hook.remove()
        raise ModelError("the model's forward never called its first decoder layer: this family is not supported")

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, call: LayerCall, store: SelectionStore
    ) -> torch.Tensor:
        """One decoder layer on [B, T, D] states, in the role that the store's pattern gives it; updates the store."""
        slot = self._slot_of.get(index)
        if slot is not None:
            before, slot.store = slot.store, store
        try:
            with self._computing():
                output = self.layers[index](hidden_states, *call.args, **call.kwargs)
        finally:
            if slot is not None:
                slot.store = before
        return output[0] if isinstance(output, tuple) else output

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm between the last decoder layer and the LM head."""
        return self.decoder.norm(hidden_states)


def indexer_owners(model: Any) -> list[tuple[int, nn.Module]]:
    """(decoder layer, module whose `indexer` makes its selection) of each DSA layer of a transformers model, in order.

    `indexer` is None on layers that the checkpoint itself shares, and a slot where one has been put.
    """
    native = native_types(model.config.get_text_config())
    owners = []
    for index, layer in enumerate(getattr(model.get_decoder(), "layers", [])):
        for owner, indexer in find_indexers(layer):
            # None elsewhere: a layer of another kind in a family that mixes them
            if indexer is not None or native.get(index) == "shared":
                owners.append((index, owner))
    return owners


def native_types(config: Any) -> dict[int, str]:
    """Decoder layer to `full` or `shared` where the config itself says so (GLM-5.2 style), else empty."""
    return dict(enumerate(getattr(config, "indexer_types", None) or []))


class _LayerOutput(torch.Tensor):
    """States as a decoder layer of any family returns them: alone, or first of a pair with the layer's selection."""

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self, None))

    def __getitem__(self, item: Any) -> torch.Tensor:
        return self if isinstance(item, int) and item == 0 else super().__getitem__(item)


class _LastLayerReached(Exception):
    """Ends a forward when all layers have been called."""


@contextlib.contextmanager
def _instead_of_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling the module calls the function."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _FirstLayerReached(Exception):
    """Carries the embedded states out of the model's forward."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states
