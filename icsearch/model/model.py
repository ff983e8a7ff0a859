"""A loaded model of transformers, run layer by layer with F/S roles.

What families do each in their own way is in `families`, how layers compute in `kernels`.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.text import first_line
from icsearch.model.families.attention import Observer, run_observed
from icsearch.model.families.calls import (
    FirstLayerReached,
    LayerCall,
    check_layers_stand_alone,
    embedding_nothing,
    own_containers,
    recorded,
)
from icsearch.model.families.decoder import decoder_layers
from icsearch.model.families.ending import Ending
from icsearch.model.kernels import (
    Blockwise,
    attending,
    chunked,
    find_experts,
    find_rotation,
    has_arithmetic,
    is_windowed,
    random_copy,
    turns,
)
from icsearch.model.slot import Returned, SelectionStore, put_slot

# What a family's code raises where a config asks for what it does not have, such as keys that no layer before it made.
_MISFITS = (LookupError, TypeError, AttributeError)


class LayerWeights:
    """The layers that this process has, all of them on the device for as long as it lives."""

    streamed = False

    def __init__(self, held: range, bytes_read: int = 0) -> None:
        self.held = held
        self.bytes_read = bytes_read  # of weights so far, from the checkpoint or from CPU memory
        self.left_out: list[int] = []  # layers of multi-token prediction, which no process has

    @contextlib.contextmanager
    def holding(self, index: int, back: bool = False) -> Iterator[None]:
        """Within the block, this decoder layer is on the device. Raises IndexError where another process has it.

        Layers are meant to be taken in order, or with `back` in the opposite one.
        """
        self._check(index)
        yield

    def _check(self, index: int) -> None:
        if index not in self.held:
            raise IndexError(f"decoder layer {index} is not among those of this process, {self.held}")


class StreamedWeights(LayerWeights):
    """Layers that come when they are wanted and go when they are done with; the next one is prefetched meanwhile.

    A sweep runs every branch through a layer before it goes on to the next one, so a layer that is brought to the
    device once serves them all. `fetch(index)` brings it, always in one thread of its own, and returns the bytes that
    it has read or moved; `drop(index)` lets it go, and may be called for a layer that came only in part. At most two
    layers are there at once.
    """

    streamed = True

    def __init__(self, held: range, fetch: Callable[[int], int], drop: Callable[[int], object]) -> None:
        super().__init__(held)
        self._fetch = fetch
        self._drop = drop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="icsearch-weights")
        self._ahead: tuple[int, Future[int]] | None = None
        self._here: int | None = None

    @contextlib.contextmanager
    def holding(self, index: int, back: bool = False) -> Iterator[None]:
        """As of any weights. What reading the layer raises, this raises; a block within one for the same layer is free.

        The layer that is meant to be next is being fetched, if it is ours.
        """
        self._check(index)
        if index == self._here:
            yield
            return
        try:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead[0] != index:
                if ahead[1].exception() is None:  # waits; who wants that layer later will meet what went wrong again
                    self.bytes_read += ahead[1].result()
                self._drop(ahead[0])
                ahead = None
            coming = self._thread.submit(self._fetch, index) if ahead is None else ahead[1]
            self.bytes_read += coming.result()
            self._here = index
            coming_next = index - 1 if back else index + 1
            if coming_next in self.held:
                self._ahead = coming_next, self._thread.submit(self._fetch, coming_next)
            yield
        finally:
            self._here = None
            self._drop(index)


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
        self.layers = decoder_layers(model)
        self._checked = False  # that layers stand alone
        ending = Ending(model, self.layers)
        self.lm_head, self.final_norm = ending.head, ending.norm
        self.weights = weights or LayerWeights(range(len(self.layers)))
        self.held = self.weights.held  # the decoder layers that this process has
        self.device = device or next(model.parameters()).device
        owners = indexer_owners(model)
        self.layer_indices = [index for index, _ in owners]
        self.owners = [owner for _, owner in owners]
        returned = Returned()
        self.slots = [put_slot(owner, position, returned) for position, owner in enumerate(self.owners)]
        self.native_shared = [slot.position for slot in self.slots if slot.inner is None]
        self._slot_of = dict(zip(self.layer_indices, self.slots, strict=True))
        self._observer: Observer | None = None
        self._experts = find_experts(self.layers)
        self.blockwise: Blockwise | None = None
        if block_elements is not None:
            self.blockwise = Blockwise(find_rotation(random_copy(self.telling_indexer)), block_elements)

    @property
    def has_arithmetic(self) -> bool:
        """Whether the block-wise arithmetic is that of all layers of this model, as far as their parts tell."""
        others = set(range(len(self.layers))) - set(self.layer_indices)
        if not all(is_windowed(self.layers[index]) for index in others):
            return False
        return all(has_arithmetic(owner, slot.inner) for owner, slot in zip(self.owners, self.slots, strict=True))

    @property
    def telling_indexer(self) -> Any:
        """The indexer that tells the RoPE layout: the first one that turns anything, else the first; or None."""
        indexers = [slot.inner for slot in self.slots if slot.inner is not None]
        return next((indexer for indexer in indexers if turns(indexer)), next(iter(indexers), None))

    def holding(self, index: int, back: bool = False) -> contextlib.AbstractContextManager[None]:
        """Within the block, the weights of this decoder layer are on the device: `run_layer` wants them there."""
        return self.weights.holding(index, back)

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
            return self._decode(input_ids).last_hidden_state

    def _decode(self, input_ids: torch.Tensor) -> Any:
        """The decoder's own forward on [B, T] ids, with the arithmetic of this model."""
        mask = None
        if self.blockwise is not None:  # it is causal by position: what the model takes for a finished mask
            mask = torch.ones(len(input_ids), 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        with self._computing():
            return self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the block, layers compute with the arithmetic of this model; where it is ours, the observer hears."""
        with contextlib.ExitStack() as stack:
            if self.blockwise is not None:
                stack.enter_context(attending(self.config, self.owners, self.blockwise, self._observer))
                stack.enter_context(chunked(self._experts))
                for slot in self.slots:
                    slot.arithmetic = self.blockwise.select
                    stack.callback(setattr, slot, "arithmetic", None)
            yield

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the block, every DSA layer that `run_layer` runs reports its core attention; its result is as ever.

        Raises ModelError in a family whose attention cannot be heard.
        """
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def capture_calls(self, input_ids: torch.Tensor) -> list[LayerCall]:
        """Each decoder layer's call arguments for [B, T] inputs of this shape, from one forward of the model's own.

        Masks, positions and rotary embeddings are then the model's own. The layers are left out, and no weights are
        needed. See `LayerCall.on` for families whose layers take token ids.
        """
        if not self._checked:
            check_layers_stand_alone(self.model, self.layers, self._decode, input_ids.device)
            self._checked = True
        with embedding_nothing(self.model), recorded(self.layers) as calls:
            self._decode(input_ids)
        return calls

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The states that the model's own forward hands to its first decoder layer: [B, T] to [B, T, D], or streams."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise FirstLayerReached(args[0] if args else kwargs["hidden_states"])

        hook = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._decode(input_ids)
        except FirstLayerReached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise ModelError("the model's forward never called its first decoder layer: this family is not supported")

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, call: LayerCall, store: SelectionStore
    ) -> torch.Tensor:
        """One decoder layer on [B, T, D] states, in the role that the store's pattern gives it; updates the store.

        In families with hyper-connections states have one more dimension, or are so many times as wide.
        """
        slot = self._slot_of.get(index)
        with own_containers(call, store) as own:
            run = partial(self._run, index, hidden_states, own)
            if slot is None:
                return run()
            before, slot.store = slot.store, store
            try:
                if self._observer is None or self.blockwise is not None:
                    output = run()
                else:
                    owner, layer = self.owners[slot.position], self.layers[index]
                    output = run_observed(layer, owner, self.config, slot, store, run, self._observer)
            finally:
                slot.store = before
            store.check_made_by(slot.position)
            return output

    def _run(self, index: int, hidden_states: torch.Tensor, call: LayerCall) -> torch.Tensor:
        try:
            with self._computing():
                output = self.layers[index](hidden_states, *call.args, **call.kwargs)
        except _MISFITS as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals["__name__"].split(".")[0] == __name__.split(".")[0]:
                raise  # by code of this package, and not by the family's: then no config can mend it
            raise ModelError(
                f"decoder layer {index} cannot be run ({type(error).__name__}: {first_line(error)}): expected a config "
                f"of {self.config.model_type} that fits its code; mend config.json (--debug shows where it ends)"
            ) from error
        return output[0] if isinstance(output, tuple) else output


def indexer_owners(model: Any) -> list[tuple[int, nn.Module]]:
    """(decoder layer, module whose `indexer` makes its selection) of each DSA layer of a transformers model, in order.

    `indexer` is None on layers that the checkpoint itself shares, and a slot where one has been put.
    """
    native = native_types(model.config.get_text_config())
    owners = []
    for index, layer in enumerate(decoder_layers(model)):
        for owner in layer.modules():
            if "indexer" not in owner._modules and "indexer" not in vars(owner):
                continue
            # None elsewhere: a layer of another kind in a family that mixes them
            if isinstance(owner.indexer, nn.Module) or (owner.indexer is None and native.get(index) == "shared"):
                owners.append((index, owner))
    return owners


def native_types(config: Any) -> dict[int, str]:
    """Decoder layer to `full` or `shared` where the config itself says so (GLM-5.2 style), else empty."""
    return dict(enumerate(getattr(config, "indexer_types", None) or []))
