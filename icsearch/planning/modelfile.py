"""A model from its config.json alone: what `icsearch plan` needs to know of it, without weights and without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from icsearch.core.errors import ModelError
from icsearch.core.files import demo_checkpoint, may_be_hub_id, typed_path
from icsearch.core.jsonfile import FLAG, TEXT, list_of, read_object, shown, whole
from icsearch.core.pattern import Pattern
from icsearch.core.text import first_line
from icsearch.model.config import INDEX_KEYS, check_config, family, language_config, no_indexers, start_pattern
from icsearch.model.quantisation import Quantisation, dtype_name, other_bytes, quantisation, with_quantisation
from icsearch.model.shape import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_COUNTS = (  # sizes that `ModelShape` reads, and says of each what it must be at least
    "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "index_n_heads", "index_head_dim", "index_topk", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok", "n_shared_experts", "vocab_size",
    "first_k_dense_replace",
)  # fmt: skip
_READ = {
    **dict.fromkeys(_COUNTS, whole(0)),
    "max_position_embeddings": whole(1),
    "moe_layer_freq": whole(1),
    "mlp_layer_types": list_of(TEXT),
    "layer_types": list_of(TEXT),
    "tie_word_embeddings": FLAG,
}


@dataclass(frozen=True)
class ModelFile:
    """What a config.json says: sizes, the start pattern, types, and bytes of each weight on disk.

    `dtype` is the checkpoint's own, which weights are dequantised to where they are quantised.
    """

    name: str
    model_type: str
    shape: ModelShape
    start: Pattern
    dtype: str
    quantisation: Quantisation | None
    tied: bool  # the LM head is the embedding
    max_positions: int

    @property
    def checkpoint(self) -> str:
        """What a command that needs the weights takes as MODEL."""
        path = Path(self.name)
        if path.suffix != ".json":
            return self.name
        return str(path.parent) if path.name == "config.json" else "MODEL"

    @property
    def outside_parameters(self) -> int:
        """Embedding, LM head and final norm: what is no decoder layer."""
        return (1 if self.tied else 2) * self.shape.embedding_weights + self.shape.hidden_size

    def layer_parameters(self, index: int) -> int:
        """Parameters of a decoder layer; native S layers come without an indexer."""
        return self.shape.layer_parameters(index, self.start.is_full(index))

    @property
    def num_parameters(self) -> int:
        return self.outside_parameters + sum(map(self.layer_parameters, range(self.shape.layers)))

    def stored_layer_bytes(self, index: int) -> float:
        """Bytes of a decoder layer in the checkpoint.

        Where only the experts are in a smaller format, all else is counted as the config's type; exceptions that a
        config lists are not.
        """
        experts, found = self.shape.routed_weights(index), self.quantisation
        of_experts = experts * (found.expert_bytes if found else DTYPE_BYTES[self.dtype])
        return of_experts + (self.layer_parameters(index) - experts) * self.other_bytes

    @property
    def other_bytes(self) -> float:
        """Bytes on disk of a weight of a decoder layer that is none of a routed expert's."""
        return other_bytes(self.quantisation, DTYPE_BYTES[self.dtype])

    @property
    def stored_model_bytes(self) -> float:
        """Bytes of the checkpoint; what is no decoder layer is not quantised."""
        outside = self.outside_parameters * DTYPE_BYTES[self.dtype]
        return outside + sum(map(self.stored_layer_bytes, range(self.shape.layers)))


def open_model_file(name: str) -> ModelFile:
    """The model in a config.json: a file, a directory with one, a hub id, or demo. Raises ModelError."""
    path = find_config(name)
    found = read_object(path, expected="a model's config.json", advice="download it again", error=ModelError)
    config = with_quantisation(found, path.parent)
    inner = language_config(config, name)
    told = any(key.startswith(INDEX_KEYS) for key in inner)
    if not told or _lacks_indexers(str(config.get("model_type")), "auto_map" in config):
        raise no_indexers(config, name)
    shape = _shape(name, config)
    if shape.dsa_layers != shape.layers:
        raise ModelError(
            f"{name} has {shape.dsa_layers} DSA layers among {shape.layers}: only models whose layers all are can be "
            "planned for, such as deepseek_v32 or glm_moe_dsa"
        )
    dtype = dtype_name(config, name)
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{path} has dtype {shown(dtype)}: expected {', '.join(DTYPE_BYTES)}; mend it")
    return ModelFile(
        name=name,
        model_type=str(config.get("model_type", "")),
        shape=shape,
        start=start_pattern(config, name),
        dtype=dtype,
        quantisation=quantisation(config, name),
        tied=bool(inner.get("tie_word_embeddings")),
        max_positions=inner.get("max_position_embeddings") or 0,
    )


def _lacks_indexers(model_type: str, own_code: bool) -> bool:
    """Whether transformers has a class of this type, and its code knows of no indexer; told without running any."""
    package = find_spec("transformers")
    if own_code or package is None or package.origin is None or not re.fullmatch(r"\w{1,64}", model_type):
        return False
    code = Path(package.origin).parent / "models" / family(model_type) / f"modeling_{family(model_type)}.py"
    return code.exists() and "ndexer" not in code.read_text(encoding="utf-8")


def _shape(name: str, config: dict[str, Any]) -> ModelShape:
    try:
        check_config(config, name, _READ)
        inner = language_config(config, name)
        layers = inner.get("num_hidden_layers")
        for key in ("layer_types", "mlp_layer_types"):
            if inner.get(key) and len(inner[key]) != layers:
                raise ModelError(
                    f"config.json of {name} has {len(inner[key])} {key} and num_hidden_layers {layers}: expected as "
                    "many as there are layers; use the config that belongs to the weights"
                )
        if inner.get("per_layer_config"):  # dots3_note_text
            raise ModelError("its layers have sizes of their own (per_layer_config), which are not counted here")
        return ModelShape.from_config(config)
    except ModelError as error:
        kind = config.get("model_type", "nameless")
        raise ModelError(f"{name}, a {kind} model, cannot be planned for: {error}") from None


def find_config(name: str) -> Path:
    """The config.json of a directory, a hub id or demo, or the file itself. Raises ModelError."""
    if name == "demo":
        return demo_checkpoint() / "config.json"
    path = typed_path(name, ModelError)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"no config.json in {path}: expected a checkpoint directory, or the file itself")
        return path / "config.json"
    if path.exists():
        return path
    if not may_be_hub_id(name):
        raise ModelError(f"nothing at {path}: expected a directory with config.json, the file, a hub id, or demo")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))  # and nothing else of the checkpoint
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, not found
        raise ModelError(
            f"no file or directory {name}, and the hub did not deliver its config.json ({first_line(error)}): "
            "check the name, the network and `hf auth login`, or give a local config.json"
        ) from error
