"""What is known of one engine: how it is given a pattern, and how it reads one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.model.config import COMMON, FREQ, KINDS, OFFSET, PATTERN, SWITCH, TYPES, Schedule, family


class ExportError(IcsearchError):
    """A pattern that cannot be written for an engine."""


def decoder_letters(pattern: Pattern, layer_indices: Sequence[int], num_hidden_layers: int | None) -> str:
    """One letter for each decoder layer: the pattern's at `layer_indices`, F where a layer has no indexer."""
    indices = list(layer_indices)
    if len(indices) != len(pattern):
        raise ExportError(f"{len(indices)} layer_indices for {len(pattern)} letters: expected as many; mend the file")
    if indices != sorted(set(indices)) or indices[0] < 0:
        raise ExportError(f"layer_indices {indices} are not increasing layer numbers: write the file again")
    if num_hidden_layers is None:
        if indices != list(range(len(pattern))):
            raise ExportError(
                "the pattern covers only some decoder layers, and the file does not say how many there are: "
                "add model.num_hidden_layers from the checkpoint's config.json, or give --model-config"
            )
        return pattern.letters
    if indices[-1] >= num_hidden_layers:
        raise ExportError(
            f"layer_indices reach {indices[-1]}, but model.num_hidden_layers is {num_hidden_layers}: "
            "expected smaller indices; write the file again"
        )
    letters = [FULL] * num_hidden_layers
    for index, letter in zip(indices, pattern.letters, strict=True):
        letters[index] = letter
    return "".join(letters)


SEPARATE, CARRIED, UNKNOWN = "separate", "carried", "unknown"  # selections, from one pipeline stage to the next
Render = Callable[[dict[str, Any]], str]
Split = Callable[[int, int], list[int]]  # (layers, stages) to layers per stage


@dataclass(frozen=True)
class Reader:
    """How an engine reads the keys of a config.

    `order`: the keys that say which layers are F, the first that is there wins; `freq` and `offset` are the names of
    the two numbers, and what the engine makes of `unknown` keys is not known. `past_the_end`: a pattern shorter than
    the model is F from there on, and what is longer is not read (False: refused here). `needs_switch`: without
    `use_index_cache` all layers are F, but for a freq above 1 with `switched_by_freq`; other engines do not read it.
    `first_is_full`: layer 0 is F whatever the pattern says. `words`: a pattern that is a list holds full and shared
    (False: F and S), and the engine takes anything else in it as F. `any_case`: letters may be lowercase.
    `null_is_one`: a freq that is null is 1 (False: an error). `freq_counts_indexed`: freq goes by the layers with an
    indexer, where letters go by all. Without any of the keys every `default_freq`-th layer is F.
    """

    order: tuple[str, ...] = (TYPES, PATTERN, FREQ)
    schedule: Schedule = COMMON
    freq: str = FREQ
    offset: str = OFFSET
    unknown: tuple[str, ...] = ()
    past_the_end: bool = False
    needs_switch: bool = False
    switched_by_freq: bool = False
    first_is_full: bool = False
    words: bool = True
    any_case: bool = False
    null_is_one: bool = False
    freq_counts_indexed: bool = False
    default_freq: int = 1


@dataclass(frozen=True)
class Engine:
    """How one engine is given a pattern.

    `settings` makes its keys from letters and the family, `render` the text to paste, `how` says where that goes.
    `nests`: for a config that wraps a text model they go into text_config; `nested_alone`: and are known not to be
    read elsewhere. For `outside_types` they stand beside text_config, from where the engine hands them on to the text
    model; a text_config among overrides would replace the model's own there. For `dsa_letters_only` model types letters
    are counted over layers that have an indexer, else over all decoder layers; with `all_layers_alike` it is not known
    how they are counted where some have none. `split` gives the layers of each pipeline stage, None where that is not
    known; `stages` says whether one gets the selection of the one before it (`carried`, with since when), and may then
    start on S. `writes` is the kind of file that can be written, if any. `inside`: the key under which its options hold
    overrides of the model's config. `without_indexers`: the model types that it loads without the indexers of their S
    layers, and since which pull request of its project.
    """

    name: str
    title: str
    how: str
    settings: Callable[[str, str], dict[str, Any]]
    render: Render
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
    stages: str = UNKNOWN
    carried: str = ""
    writes: str | None = None
    inside: str = ""
    without_indexers: tuple[tuple[str, str], ...] = ()
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


def json_flag(name: str) -> Render:
    """One flag with all settings as its JSON argument, on one line."""
    return lambda settings: f"{name} {shlex.quote(json.dumps(settings))}"


def config_json(settings: dict[str, Any]) -> str:
    """One key a line; a list stays on its line, as one letter each would fill pages."""
    lines = []
    for key, value in settings.items():
        text = config_json(value).replace("\n", "\n  ") if isinstance(value, dict) else json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


ATOM = Schedule(default_offset=1, shift=0)
ATOM_V4 = Schedule(default_offset=0, shift=0, fixed_offset=True)  # over the layers with an indexer
XLLM = Schedule(zero_is_default=True)
MINIMAX_M3 = Schedule(default_offset=0, shift=0)  # of ATOM and vLLM, over the sparse layers alone
MEGATRON = Schedule(default_offset=0, least_offset=1)  # layers from 1: max(n - offset, 0), and n = i + 1
ASCEND_V4 = Schedule(fixed_offset=True)

GGUF_KEY = "glm-dsa.attention.indexer.types"
MEGATRON_FREQ, MEGATRON_OFFSET = "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"
PRIME_RL_PATTERN, PRIME_RL_FREQ = "topk_pattern", "topk_freq"
PADDLE_PATTERN = "indexcache_topk_pattern"
LETTER_KEYS = (PATTERN, PRIME_RL_PATTERN, PADDLE_PATTERN)  # that hold a text of F and S


def toml(table: str) -> Render:
    """The settings as a table of a TOML file."""
    return lambda settings: "\n".join([f"[{table}]", *(f"{key} = {json.dumps(it)}" for key, it in settings.items())])


def config_keys(letters: str, _: str | None = None) -> dict[str, Any]:
    """All keys of a config.json, consistent, so that a reader of any one of them sees the same pattern.

    `indexer_types` wins in transformers; freq and offset only where they reproduce the pattern.
    """
    settings: dict[str, Any] = {TYPES: [KINDS[letter] for letter in letters], PATTERN: letters}
    if pair := COMMON.fit(letters):
        settings |= {FREQ: pair[0], OFFSET: pair[1]}
    return settings


def switched_pattern(letters: str, _: str | None = None) -> dict[str, Any]:
    """The letters, and the switch that makes an engine look at them."""
    return {SWITCH: True, PATTERN: letters}


def vllm_keys(letters: str, model_type: str) -> dict[str, Any]:
    """The letters, or for MiniMax M3, where vLLM reads none, two numbers; ExportError where none give the pattern."""
    if model_type != "minimax_m3_vl":
        return switched_pattern(letters)
    freq, offset = two_numbers(letters, MINIMAX_M3, "vLLM reads no letters for MiniMax M3")
    return {SWITCH: True, FREQ: freq, OFFSET: offset}


def megatron_keys(letters: str, _: str | None = None) -> dict[str, Any]:
    """Megatron's two numbers; raises ExportError, with the nearest pattern, where none give these letters."""
    freq, offset = two_numbers(letters, MEGATRON, "Megatron-LM has no list of layers")
    return {MEGATRON_FREQ: freq, MEGATRON_OFFSET: offset}


def two_numbers(letters: str, schedule: Schedule, lack: str) -> tuple[int, int]:
    """(freq, offset) that give the letters; raises ExportError, with the nearest that two numbers can give, for none.

    `lack` says why numbers it must be.
    """
    if pair := schedule.fit(letters):
        return pair
    freq, offset = nearest_numbers(schedule, letters)
    nearest = schedule.letters(len(letters), freq, offset)
    differs = sum(a != b for a, b in zip(letters, nearest, strict=True))
    raise ExportError(
        f"{lack}, and no freq and offset give this pattern: the nearest that they can "
        f"give is {nearest} (freq {freq}, offset {offset}; {differs} of {len(letters)} letters differ, "
        f"{nearest.count(FULL)} F for {letters.count(FULL)}); evaluate that one, and export it"
    )


def nearest_numbers(schedule: Schedule, letters: str) -> tuple[int, int]:
    """(freq, offset) of the pattern that differs in the fewest letters; of several the one with most F.

    Then the one with the smallest freq, then offset.
    """
    _, _, freq, first = min(_differences(letters))
    return (freq, first - 1 + schedule.shift) if freq > 1 else (1, schedule.effective(None))


def _differences(letters: str) -> Iterator[tuple[int, int, int, int]]:
    """(letters that differ, -F layers, freq, first layer that can be S) of every pattern that two numbers can give.

    Behind `first - 1`, an F stands at every freq-th layer. Sums along these layers are made once a freq, so that
    this takes as many steps as there are pairs.
    """
    n = len(letters)
    yield letters.count(SHARED), -n, 1, n
    in_front = [letters[:first].count(SHARED) for first in range(n + 1)]
    for freq in range(2, n + 1):
        wrong, full = [0] * (n + 1), [0] * (n + 1)  # from here on, here being an F of the schedule
        for i in range(n - 1, -1, -1):
            after = min(i + freq, n)
            gap = after - i - 1
            wrong[i] = (letters[i] == SHARED) + gap - (in_front[after] - in_front[i + 1]) + wrong[after]
            full[i] = 1 + full[after]
        for first in range(1, n):
            at = first - 1
            yield in_front[at] + wrong[at], -(at + full[at]), freq, first
