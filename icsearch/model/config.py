"""What a checkpoint's config.json says: its decoder layers, and which of them it shares. Plain JSON, no torch.

Each fact about a type of model, each name of a key and each unwrapping of `text_config` stands here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icsearch.core.errors import IcsearchError, ModelError, PatternError
from icsearch.core.jsonfile import (
    MAX_COUNT,
    MAX_LAYERS,
    TEXT,
    FieldError,
    Kind,
    check_fields,
    list_of,
    one_of,
    optional,
    read_object,
    shown,
    whole,
)
from icsearch.core.pattern import FULL, SHARED, Pattern

TEXT_CONFIG = "text_config"  # of a config that wraps a language model
TYPES, PATTERN, FREQ, OFFSET = "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"
SWITCH = "use_index_cache"
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")  # layers of multi-token prediction
INDEX_KEYS = ("index", "sparse_attention")  # how keys of indexers begin
KINDS = {FULL: "full", SHARED: "shared"}
LETTERS = {kind: letter for letter, kind in KINDS.items()}

# layer_types of layers with an indexer; the last two are what older transformers and released configs call the first.
INDEXED_TYPES = (
    *("indexed_attention", "compressed_sparse_attention", "minimax_m3_sparse"),
    *("deepseek_sparse_attention", "qwen_sparse_attention"),
)
FULL_ATTENTION = "full_attention"  # of layers with an indexer where none is called so, of dense ones elsewhere
_LAYERS = whole(1, MAX_LAYERS)
C4 = 4  # the compression of DeepSeek V4's layers that have an indexer


@dataclass(frozen=True)
class ModelType:
    """What is known of a `model_type`.

    `mixed`: only some of its decoder layers have an indexer, and the config must say which. `heeded`: the keys of a
    pattern that transformers 5.24 goes by, the first that is there wins; where none is, every `freq`-th layer is F.
    """

    mixed: bool = False
    heeded: tuple[str, ...] = ()
    freq: int = 1


MODEL_TYPES = {
    "deepseek_v32": ModelType(),
    "axk2": ModelType(),
    "glm_moe_dsa": ModelType(heeded=(TYPES, PATTERN, FREQ)),
    "mistral_large4": ModelType(heeded=(TYPES, PATTERN, FREQ)),
    "hy_v4": ModelType(heeded=(TYPES,), freq=4),
    "hy_v4_vl": ModelType(heeded=(TYPES,), freq=4),
    "dots3_note": ModelType(mixed=True),
    "deepseek_v4": ModelType(mixed=True),
    "glm5_next": ModelType(mixed=True, heeded=(TYPES, PATTERN, FREQ)),
    "minimax_m3_vl": ModelType(mixed=True),
    "qwen4_exp": ModelType(mixed=True),
}


# DeepSeek-V4.1 shares by itself, in three modes: who selects (index) and who has keys to select by (kv); transformers
# 5.24 has no such model.
OWN_MODES = "deepseek_v41"
_SOURCES = {
    "index_source_layer_ids": list_of(whole(0, MAX_LAYERS)),
    "kv_source_layer_ids": list_of(whole(0, MAX_LAYERS)),
}


class EngineConfigError(PatternError):
    """A config, an override or a file of an engine that cannot be read as a pattern."""


def no_indexers(config: Mapping[str, Any], name: str) -> ModelError:
    """What to say of a model whose class has no indexers, and which class would, where its config tells of some."""
    keys = language_config(config, f"config.json of {name}")
    told = next((key for key in keys if key.startswith(INDEX_KEYS)), None)
    hint = f"; config.json has {told}: if the weights have indexers, such a model_type has them too" if told else ""
    return ModelError(
        f"{name} is a {config.get('model_type', 'nameless')} model and has no indexers: expected a "
        "DeepSeek-Sparse-Attention checkpoint such as deepseek_v32 or glm_moe_dsa, whose decoder layers have a module "
        f"`indexer` that returns a selection{hint}"
    )


def family(model_type: str | None) -> str:
    """The model_type of the whole model, also where that of its text model is given; "" for none."""
    return (model_type or "").removesuffix("_text")


def language_config(config: Mapping[str, Any], name: str, error: type[IcsearchError] = ModelError) -> Mapping[str, Any]:
    """The part that describes the language model: all of it, or `text_config` of a wrapper.

    Raises `error`, which calls the config `name`, where that is no object.
    """
    inner = config.get(TEXT_CONFIG)
    if inner is not None and not isinstance(inner, dict):
        raise error(f"{name} has text_config {shown(inner)}: expected an object; use the model's own config.json")
    return inner or config


def num_hidden_layers(config: Mapping[str, Any], name: str) -> int:
    """Decoder layers of a checkpoint, without those of multi-token prediction; raises ModelError."""
    found = language_config(config, f"config.json of {name}").get("num_hidden_layers")
    if not _LAYERS.fits(found):
        raise _wrong(name, f"num_hidden_layers is {shown(found)}: expected {_LAYERS.name}")
    return int(found)  # type: ignore[arg-type]  # it fits


def mtp_layers(keys: Mapping[str, Any]) -> int:
    """Layers of multi-token prediction behind the decoder's, by the language model's config."""
    return next((keys[key] for key in MTP_KEYS if keys.get(key)), 0)


@dataclass(frozen=True)
class Backbone:
    """`num_layers` decoder layers, those of multi-token prediction (`mtp_layers`) not among them.

    `layer_indices` are those with an indexer; `wrapper`: the language model's config sits in text_config. `keys` is
    the language model's config, empty where it is not known.
    """

    num_layers: int
    layer_indices: tuple[int, ...]
    model_type: str | None = None
    mtp_layers: int = 0
    wrapper: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def alike(cls, num_layers: int) -> Backbone:
        """That many layers, each with an indexer."""
        return cls(num_layers, tuple(range(num_layers)))

    @classmethod
    def of_model(cls, num_layers: int, layer_indices: Sequence[int], config: Mapping[str, Any]) -> Backbone:
        """The layers that a model was seen to have, with what its config.json says beside them."""
        keys = language_config(config, "config.json")
        model_type = config.get("model_type") or keys.get("model_type")
        return cls(num_layers, tuple(layer_indices), model_type, mtp_layers(keys), keys is not config, keys)


_BACKBONE = {
    "num_hidden_layers": _LAYERS,
    "layer_types": optional(list_of(TEXT)),
    "compress_ratios": optional(list_of(whole(0))),
    **{key: optional(whole(0, MAX_LAYERS)) for key in MTP_KEYS},
}


def read_backbone(config: Mapping[str, Any], name: str) -> Backbone:
    """The decoder layers of a config.json, called `name` in messages; raises EngineConfigError."""
    keys = language_config(config, name, EngineConfigError)
    try:
        check_fields(keys, _BACKBONE)
    except FieldError as error:
        raise EngineConfigError(f"{name} cannot be used ({error}): use the model's own config.json") from None
    model_type = config.get("model_type") or keys.get("model_type")
    if not isinstance(model_type, str | None):
        raise EngineConfigError(f"{name} has model_type {shown(model_type)}: use the model's own config.json")
    if family(model_type) not in MODEL_TYPES and not any(key.startswith(INDEX_KEYS) for key in keys):
        raise EngineConfigError(
            f"{name} is of a {model_type or 'nameless'} model and has no indexers: expected that of a "
            "DeepSeek-Sparse-Attention model, such as deepseek_v32 or glm_moe_dsa"
        )
    num_layers = keys["num_hidden_layers"]
    indices = indexed_layers(keys, num_layers, model_type)
    if indices is None:
        if MODEL_TYPES.get(family(model_type), ModelType()).mixed:
            raise EngineConfigError(
                f"{name} does not say which layers of this {model_type} model have an indexer: expected layer_types; "
                "use the config.json of the checkpoint"
            )
        indices = tuple(range(num_layers))
    if not indices:
        raise EngineConfigError(f"no layer of {name} has an indexer: expected one of {', '.join(INDEXED_TYPES)}")
    return Backbone.of_model(num_layers, indices, config)


def indexed_layers(keys: Mapping[str, Any], num_layers: int, model_type: str | None) -> tuple[int, ...] | None:
    """The layers that have an indexer, by the kinds that a language model's config lists; None where it lists none.

    By `layer_types`, else by the keys that DeepSeek V4 and MiniMax M3 were first released with.
    """
    kinds, sparse = keys.get("layer_types"), keys.get("sparse_attention_config")
    if not kinds and keys.get("compress_ratios"):
        chosen = (lambda ratio: ratio > 0) if family(model_type) == OWN_MODES else (lambda ratio: ratio == C4)
        kinds = ["compressed_sparse_attention" if chosen(ratio) else "other" for ratio in keys["compress_ratios"]]
    if not kinds and isinstance(sparse, dict) and isinstance(sparse.get("sparse_attention_freq"), list):
        kinds = ["minimax_m3_sparse" if chosen else "other" for chosen in sparse["sparse_attention_freq"]]
    if not kinds:
        return None
    named = [index for index, kind in enumerate(kinds[:num_layers]) if kind in INDEXED_TYPES]
    if named or family(model_type) == "minimax_m3_vl":  # its layers of full attention are dense
        return tuple(named)
    return tuple(index for index, kind in enumerate(kinds[:num_layers]) if kind == FULL_ATTENTION)


@dataclass(frozen=True)
class Modes:
    """Layers of DeepSeek-V4.1 that select: `full` by keys of their own, `reindex` by those of an earlier layer.

    `reuse` take over a selection. The second ones choose among candidate blocks where an earlier layer has made some.
    """

    full: tuple[int, ...]
    reindex: tuple[int, ...]
    reuse: tuple[int, ...]


def own_modes(config: Mapping[str, Any], name: str) -> Modes | None:
    """The modes of a config.json, None where it is not that of a DeepSeek-V4.1; raises EngineConfigError."""
    keys = language_config(config, name, EngineConfigError)
    if OWN_MODES not in (family(str(each.get("model_type"))) for each in (config, keys)):
        return None
    try:
        check_fields(keys, {**_BACKBONE, **_SOURCES, "compress_ratios": list_of(whole(0))})
    except FieldError as error:
        raise EngineConfigError(f"{name} cannot be used ({error}): use the model's own config.json") from None
    index, kv = (set(keys[key]) for key in _SOURCES)
    layers = [layer for layer, ratio in enumerate(keys["compress_ratios"][: keys["num_hidden_layers"]]) if ratio]
    return Modes(
        full=tuple(layer for layer in layers if layer in index & kv),
        reindex=tuple(layer for layer in layers if layer in index - kv),
        reuse=tuple(layer for layer in layers if layer not in index),
    )


def refuse_modes(config: Mapping[str, Any], name: str, error: type[IcsearchError] = ModelError) -> None:
    """Raise `error` for a DeepSeek-V4.1: its three modes are no pattern of F and S."""
    if (modes := own_modes(config, name)) is not None:
        raise error(
            f"{name} is of a {OWN_MODES} model, which shares by itself in three modes ({len(modes.full)} layers Full, "
            f"{len(modes.reindex)} Reindex, {len(modes.reuse)} Reuse): nothing here searches or serves those; "
            "icsearch import shows them"
        )


def load_config(path: Path) -> dict[str, Any]:
    """The object in a config.json, or in that of a checkpoint directory; raises EngineConfigError."""
    return read_object(
        path / "config.json" if path.is_dir() else path,
        expected="a model's config.json",
        advice="give the checkpoint's own",
        error=EngineConfigError,
    )


# --- what a checkpoint must have -------------------------------------------------------------------------------------

_ALWAYS = {
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(MTP_KEYS, whole(0, MAX_LAYERS)),
    TYPES: list_of(one_of(*LETTERS)),  # transformers takes any other word for full
}


def check_config(config: Mapping[str, Any], name: str, kinds: Mapping[str, Kind] | None = None) -> None:
    """Raise ModelError, which names the checkpoint, for what does not have its kind in the language model's part."""
    refuse_modes(config, f"config.json of {name}")
    expected = {key: optional(kind) for key, kind in {**_ALWAYS, **(kinds or {})}.items()}
    try:
        check_fields(language_config(config, f"config.json of {name}"), expected)
    except FieldError as error:
        raise _wrong(name, str(error)) from None


def _wrong(name: str, what: str) -> ModelError:
    return ModelError(f"config.json of {name}: {what}; use the config that belongs to the weights")


# --- which layers a checkpoint shares --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """An engine's rule: layer i, from 0, is F iff max(i - offset + shift, 0) % freq == 0.

    `default_offset` is taken where none is given (with `zero_is_default` also where it is 0), and what is below
    `least_offset` is taken as that. With `fixed_offset` an offset that is given is not read.
    """

    default_offset: int = 2
    shift: int = 1
    least_offset: int | None = None
    fixed_offset: bool = False
    zero_is_default: bool = False

    def effective(self, offset: int | None) -> int:
        """The offset that the engine goes by, where this one is given."""
        if offset is None or self.fixed_offset or (offset == 0 and self.zero_is_default):
            offset = self.default_offset
        return offset if self.least_offset is None else max(offset, self.least_offset)

    def letters(self, num_layers: int, freq: int, offset: int | None = None) -> str:
        """The pattern that the engine runs. S may come first: what an engine does with that is its own."""
        start = self.effective(offset) - self.shift
        return "".join(FULL if max(i - start, 0) % freq == 0 else SHARED for i in range(num_layers))

    def fit(self, letters: str) -> tuple[int, int] | None:
        """(freq, offset) that reproduce the letters, or None where no such pair does; all F are (1, the default)."""
        if SHARED not in letters:
            return 1, self.effective(None)
        first = letters.index(SHARED)  # max(...) is 1 there, and the next F is freq - 1 further
        following = letters.find(FULL, first)
        freq = (following if following >= 0 else len(letters)) - first + 1
        offset = first - 1 + self.shift
        return (freq, offset) if first and self.letters(len(letters), freq, offset) == letters else None


COMMON = Schedule()  # transformers and most engines


_NUMBER = whole(-MAX_COUNT)


def start_pattern(config: Mapping[str, Any], name: str) -> Pattern:
    """All F but for the layers that the checkpoint, called `name`, shares: one letter a decoder layer.

    By the keys that transformers heeds for its type; a type that is not known is read as most are, as listed, else by
    letters, else by freq and offset. Raises ModelError.
    """
    keys = language_config(config, f"config.json of {name}")
    layers = num_hidden_layers(config, name)
    known = MODEL_TYPES.get(family(str(config.get("model_type"))), ModelType(heeded=(TYPES, PATTERN, FREQ)))
    key = next((key for key in known.heeded if keys.get(key) is not None), FREQ)
    if key == FREQ:
        given = keys if FREQ in known.heeded else {FREQ: known.freq}
        numbers = {FREQ: given.get(FREQ, 1), OFFSET: given.get(OFFSET, COMMON.default_offset)}
        for number_key, value in numbers.items():
            if not _NUMBER.fits(value):
                raise _wrong(name, f"{number_key} is {shown(value)}: expected a whole number, or no such key")
        letters = COMMON.letters(layers, max(numbers[FREQ], 1), numbers[OFFSET])
    else:
        letters = _listed(keys[key], key, name)
    if len(letters) not in (layers, layers + mtp_layers(keys)):
        raise _wrong(name, f"{key} has {len(letters)} letters for {layers} layers: expected one a layer")
    if not letters.startswith(FULL):
        raise _wrong(name, f"{key} makes layer 0 S (shared): expected full first, for no indexers run before it")
    return Pattern(letters[:layers])


def check_sharing(config: Mapping[str, Any], name: str) -> None:
    """Raise ModelError where transformers reads these keys and would fail, or silently read something else."""
    known = MODEL_TYPES.get(family(str(config.get("model_type"))), ModelType(mixed=True))
    if not known.mixed and language_config(config, f"config.json of {name}").get("num_hidden_layers") is not None:
        start_pattern(config, name)


def _listed(value: Any, key: str, name: str) -> str:
    """The letters of a list of full and shared, or of a text of F and S."""
    as_text = isinstance(value, str) and key == PATTERN
    known = {FULL: FULL, SHARED: SHARED} if as_text else LETTERS
    if not as_text and not isinstance(value, list):
        raise _wrong(name, f"{key} is {shown(value)}: expected {'letters, or ' * (key == PATTERN)}a list")
    for position, kind in enumerate(value):
        if not isinstance(kind, str) or kind not in known:
            raise _wrong(name, f"{key} has {shown(kind)} at position {position}: expected {' or '.join(known)}")
    return "".join(known[kind] for kind in value)
