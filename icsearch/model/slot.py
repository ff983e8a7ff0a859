"""The slot: what turns a DSA layer's indexer into one that can be Full or Shared.

In every DSA family the selection is what a call of the `indexer` submodule returns. A slot stands in the
indexer's place: as F it calls the indexer and remembers the selection, as S it hands the remembered one back
(IndexCache paper, section 3). The memory belongs to one run (`SelectionStore`), never to a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from icsearch.core.errors import ModelError
from icsearch.core.pattern import FULL, Pattern


@dataclass
class Returned:
    """How the indexers of one model return a selection: alone, or among other values; the first call tells."""

    among: int | None = None  # so many values; 0: alone, None: not known yet
    place: int = 0

    def selection(self, returned: Any) -> Any:
        """What of an indexer's return value is the selection: of several, the one tensor of whole numbers or truths.

        Where it is none of that, it is handed on as it is, and refused by `check_made_by`.
        """
        self.among = 0
        if isinstance(returned, tuple):
            tensors = [isinstance(each, Tensor) and not each.is_floating_point() for each in returned]
            if tensors.count(True) == 1:
                self.among, self.place = len(returned), tensors.index(True)
                return returned[self.place]
        return returned

    def wrapped(self, selection: Any) -> Any:
        """A selection as an indexer would return it, None in the place of other values."""
        if not self.among:
            return selection
        return tuple(selection if place == self.place else None for place in range(self.among))


@dataclass
class SelectionStore:
    """One run's pattern and its current selection, whatever the family's indexer returns ([B, T, k] indices)."""

    pattern: Pattern
    selection: Any = None
    # Where set, S layers run their own indexer beside, and this hears (position, borrowed, own selection).
    probe: Callable[[int, Any, Any], None] | None = None
    source: int | None = None  # position of the layer that made the selection; None where that is not known
    replayed: bool = False  # a layer that ran before runs again: it gets the selection back that it made or borrowed
    # What else layers hand on to later ones, by the name of their argument: see `families.calls`.
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def check_made_by(self, position: int) -> None:
        """Raise ModelError where a layer ran as F and made no selection: then no S layer could take it over."""
        if self.replayed or not self.pattern.is_full(position):
            return
        if self.source != position:
            raise ModelError(
                f"DSA layer {position} ran as F and did not call its indexer: expected a layer whose selection is what "
                "a call of its `indexer` returns; this family cannot be searched"
            )
        if not isinstance(self.selection, Tensor):
            raise ModelError(
                f"the indexer of DSA layer {position} returned a {type(self.selection).__name__}: expected one tensor, "
                "the selection, or one among values of other kinds; this family cannot be searched"
            )


class IndexerSlot(nn.Module):
    """Stands where `inner` stood. Without a store it is `inner`: the model is then unmodified.

    `inner` is None on a layer that the checkpoint itself shares. The slot adopts the parameter tables of
    `inner`, so that names in the state dict, devices and dtypes stay those of the model.
    """

    def __init__(self, inner: nn.Module | None, position: int, returned: Returned) -> None:
        super().__init__()
        self.returned = returned
        # Past nn.Module's registration: as a submodule, `inner` would show up in every parameter name.
        object.__setattr__(self, "inner", inner)
        self.position = position
        self.store: SelectionStore | None = None
        self.arithmetic: Callable[..., Any] | None = None  # where set, computes the selection in the inner's stead
        if inner is not None:
            for table in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
                object.__setattr__(self, table, getattr(inner, table))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The selection for this layer, as its indexer returns it: computed if F, the store's if S."""
        if self.store is None:
            return self._compute(args, kwargs)
        if self.store.replayed:
            return self.returned.wrapped(self.store.selection)
        if self.store.pattern.is_full(self.position):
            computed = self._compute(args, kwargs)
            self.store.selection, self.store.source = self.returned.selection(computed), self.position
            return computed
        self._check_source(self.store)
        if self.inner is not None and (self.store.probe is not None or self.returned.among is None):
            own = self.returned.selection(self._compute(args, kwargs))
            if self.store.probe is not None:
                self.store.probe(self.position, self.store.selection, own)
        return self.returned.wrapped(self.store.selection)

    def _check_source(self, store: SelectionStore) -> None:
        """An S layer reads the nearest F layer before it: refuse what another one made."""
        if store.selection is None:
            raise ModelError(f"DSA layer {self.position} is S, but no F layer ran before it in this pass")
        expected = store.pattern.letters.rfind(FULL, 0, self.position)
        if store.source not in (None, expected):
            raise ModelError(
                f"DSA layer {self.position} is S and reads layer {expected}, but layer {store.source} ran last: "
                "run the layers in order, one forward at a time (no activation checkpointing, no second thread)"
            )

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inner is None:
            raise ModelError(f"DSA layer {self.position} has no indexer in this checkpoint: it can only be S")
        if self.arithmetic is not None:
            return self.arithmetic(self.inner, *args, **kwargs)
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("inner")
            if inner is None:
                raise
            return getattr(inner, name)


def put_slot(owner: nn.Module, position: int, returned: Returned) -> IndexerSlot:
    """The slot in place of the owner's indexer: the one that stands there, or a new one.

    `returned` is one object for all slots of a model: the first stage of a pipeline has an F layer before any S, and a
    later one may not, which then asks an indexer of its own once.
    """
    indexer: Any = owner.indexer
    if not isinstance(indexer, IndexerSlot):
        owner.indexer = indexer = IndexerSlot(indexer, position, returned)
    return indexer


def take_slot(owner: nn.Module) -> None:
    """Put the owner's indexer back where a slot stands now; nothing happens where none does."""
    slot = owner.indexer
    if not isinstance(slot, IndexerSlot):
        return
    if slot.inner is None:
        del owner.indexer  # a None that was never a module is a plain attribute, as it was
    else:
        slot.inner.training = slot.training  # train() and eval() have reached the slot alone
    owner.indexer = slot.inner
