"""What is known of one engine: how it is given a pattern, and how it reads one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from icsearch.engines.schedule import COMMON, Schedule
from icsearch.engines.stages import Split

TYPES, PATTERN, FREQ, OFFSET = "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"
SWITCH = "use_index_cache"

HEEDED, NEEDED = "heeded", "needed"


def family(model_type: str | None) -> str:
    """The model_type of the whole model, also where that of its text model is given; "" for none."""
    return (model_type or "").removesuffix("_text")


@dataclass(frozen=True)
class Reader:
    """How an engine reads the keys of a config.

    `order`: the keys that say which layers are F, the first that is there wins; `freq` and `offset` are the names of
    the two numbers, and what the engine makes of `unknown` keys is not known. `past_the_end`: a pattern shorter than
    the model is F from there on, and what is longer is not read (False: refused here). `switch` says what
    `use_index_cache` does: nothing (None), false turns all layers F (HEEDED), so does its absence (NEEDED), but for a
    freq above 1 with `switched_by_freq`. `first_is_full`: layer 0 is F whatever the pattern says. `words`: a pattern
    that is a list holds full and shared (False: F and S), and the engine takes anything else in it as F.
    """

    order: tuple[str, ...] = (TYPES, PATTERN, FREQ)
    schedule: Schedule = COMMON
    freq: str = FREQ
    offset: str = OFFSET
    unknown: tuple[str, ...] = ()
    past_the_end: bool = False
    switch: str | None = None
    switched_by_freq: bool = False
    first_is_full: bool = False
    words: bool = True


@dataclass(frozen=True)
class Engine:
    """How one engine is given a pattern.

    `settings` makes its keys from letters and the family, `render` the text to paste, `how` says where that goes.
    `nests`: for a config that wraps a text model they go into text_config; `nested_alone`: and are known not to be
    read elsewhere. For `outside_types` they stand beside text_config, from where the engine hands them on to the text
    model; a text_config among overrides would replace the model's own there. For `dsa_letters_only` model types letters
    are counted over layers that have an indexer, else over all decoder layers; with `all_layers_alike` it is not known
    how they are counted where some have none. `split` gives the layers of each pipeline stage, None where that is not
    known. `writes` is the kind of file that can be written, if any.
    """

    name: str
    title: str
    how: str
    settings: Callable[[str, str], dict[str, Any]]
    render: Callable[[dict[str, Any]], str]
    model_types: tuple[str, ...]
    on_other_types: str
    wrapper_note: str = ""
    notes: tuple[tuple[str, str], ...] = ()  # (model_type or "" for all, what to look out for)
    nests: bool = True
    nested_alone: bool = False
    outside_types: tuple[str, ...] = ()
    dsa_letters_only: tuple[str, ...] = ()
    all_layers_alike: bool = False
    split: Split | None = None
    partition_variable: str | None = None
    writes: str | None = None
    reader: Reader = Reader()
    readers: tuple[tuple[str, Reader], ...] = ()  # of model types that it reads in another way

    def serves(self, model_type: str | None) -> bool:
        """Whether it is known to share selections in models of this type."""
        return family(model_type) in self.model_types

    def nests_for(self, model_type: str | None) -> bool:
        """Whether its keys go into the text_config of a config of this type, where that has one."""
        return self.nests and family(model_type) not in self.outside_types

    def counts_indexed(self, model_type: str | None) -> bool:
        """Whether its letters are those of the layers with an indexer alone, for models of this type."""
        return family(model_type) in self.dsa_letters_only

    def reader_of(self, model_type: str | None) -> Reader:
        """How it reads a config of this type."""
        return dict(self.readers).get(family(model_type), self.reader)
