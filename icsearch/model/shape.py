"""Numbers that cost and memory follow from: the sizes of a model, as its config.json has them, and of its blocks.

The arithmetic and the plan read the same ones, so that what is planned is what runs. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icsearch.core.errors import ModelError
from icsearch.model.config import indexed_layers, language_config

# Keys of a config whose work the formulas leave out, and what that work is.
_UNCOUNTED = {
    "index_kpool": "pooled index keys",
    "hc_mult": "hyper-connections",
    "hc_count": "hyper-connections",
    "compress_rates": "compressed keys",
}
RESIDENT, CPU, DISK = "none", "cpu", "disk"  # where the weights of decoder layers are held: none: on the device

BATCH_TOKENS = 1024  # default tokens per layer call: small calls keep the reference indexer's tensors in cache
# Numbers in one buffer of the block-wise arithmetic: on CPU what stays in cache, on CUDA what keeps the device busy.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
MIN_BLOCK = 16  # queries, so that products stay products
# Tokens per LM-head product. A constant, not what fits at the moment: the bits of a product follow its shape.
HEAD_CHUNK_TOKENS = 1024
# Tokens that a layer's routed experts work on at once. A constant for the same reason. Fewer would read the experts'
# weights more often: with 256 large experts in 16 bits, an H200 reads them in 4 ms and computes on so many tokens in 5.
EXPERT_CHUNK_TOKENS = 8192
# One gathered number costs about as much as so many multiply-adds of a matrix product (measured on CPU, float32:
# 1.05 ns against 0.05 ns; see benchmarks/LOG.md). It decides between gathering and dense attention.
GATHER_COST = 20


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a DSA model with latent attention (MLA) that its cost depends on.

    Layers of another kind than DSA are counted with projections of the same size and without core attention, so
    shares and speed-ups of a model that mixes kinds are upper bounds. MTP layers are not counted. `gate_rank`: the
    query projection makes output gates too, from the query latent before and behind its norm, and each of a layer's
    two norms has a low-rank gate (A.X-K2; the norm before a dense MLP has none, and is counted as if it had).
    `q_lora_rank` 0: queries, the indexer's too, come straight from the hidden states (Mistral-Large-4, whose layers
    without RoPE are counted as if they had it).
    """

    hidden_size: int
    layers: int
    dsa_layers: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    dense_layers: int
    moe_intermediate_size: int
    routed_experts: int
    experts_per_token: int
    shared_experts: int
    vocab_size: int
    gate_rank: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dsa_layers: int | None = None) -> ModelShape:
        """The shape in a config.json, multimodal wrappers included; ModelError where this module cannot count it.

        `dsa_layers`, where the caller knows the model, beats what `layer_types` says.
        """
        model_type, config = config.get("model_type"), language_config(config, "config.json")
        for key, what in _UNCOUNTED.items():
            if config.get(key):
                raise ModelError(f"config.json has {key}, and the cost of {what} is not counted here")
        layers = _size(config, "num_hidden_layers")
        if dsa_layers is None:
            indices = indexed_layers(config, layers, str(model_type))
            dsa_layers = layers if indices is None else len(indices)
        # The one make whose queries have no latent lists its layers without RoPE.
        latent_queries = not config.get("no_rope_layers") or config.get("q_lora_rank") is not None
        dense = _dense_layers(config, layers)
        moe = dense < layers
        return cls(
            hidden_size=_size(config, "hidden_size"),
            layers=layers,
            dsa_layers=dsa_layers,
            heads=_size(config, "num_attention_heads"),
            q_lora_rank=_size(config, "q_lora_rank") if latent_queries else 0,
            kv_lora_rank=_size(config, "kv_lora_rank"),
            qk_nope_head_dim=_size(config, "qk_nope_head_dim"),
            qk_rope_head_dim=_size(config, "qk_rope_head_dim", least=0),
            v_head_dim=_size(config, "v_head_dim"),
            index_heads=_size(config, "index_n_heads"),
            index_head_dim=_size(config, "index_head_dim"),
            index_topk=_size(config, "index_topk"),
            intermediate_size=_size(config, "intermediate_size") if dense else 0,
            dense_layers=dense,
            moe_intermediate_size=_size(config, "moe_intermediate_size") if moe else 0,
            routed_experts=_size(config, "n_routed_experts", "num_experts", "num_local_experts") if moe else 0,
            experts_per_token=_size(config, "num_experts_per_tok") if moe else 0,
            shared_experts=_size(config, "n_shared_experts", least=0) if moe else 0,
            vocab_size=_size(config, "vocab_size"),
            gate_rank=config.get("gated_norm_rank") or 0,
        )

    @property
    def index_weights(self) -> int:
        """Weights of one indexer: queries from the query latent, keys and head weights from the hidden state."""
        queries = (self.q_lora_rank or self.hidden_size) * self.index_heads * self.index_head_dim
        return queries + self.hidden_size * (self.index_head_dim + self.index_heads)

    @property
    def indexer_parameters(self) -> int:
        """Weights of one indexer, and the norm of its keys."""
        return self.index_weights + 2 * self.index_head_dim

    @property
    def projection_weights(self) -> int:
        """Weights of one layer's attention: query down and up, key-value down, key and value up, output."""
        heads = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        query = self.q_lora_rank * (self.hidden_size + heads) if self.q_lora_rank else self.hidden_size * heads
        key_value = self.heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        output = self.heads * self.v_head_dim * self.hidden_size
        gates = 0
        if self.gate_rank:
            fused = heads + 2 * self.heads * self.v_head_dim
            gates = self.q_lora_rank * fused + 4 * self.hidden_size * self.gate_rank
        return query + self.hidden_size * self.latent + key_value + output + gates

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up, down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def routed_weights(self, index: int) -> int:
        """Weights of a decoder layer's routed experts."""
        return self.expert_weights * self.routed_experts if index >= self.dense_layers else 0

    @property
    def router_weights(self) -> int:
        return self.hidden_size * self.routed_experts

    def layer_parameters(self, index: int, with_indexer: bool = True) -> int:
        """Parameters of a decoder layer, norms included; biases, which the large models have none of, are not."""
        norms = 2 * self.hidden_size + self.q_lora_rank + self.kv_lora_rank
        indexer = self.indexer_parameters if with_indexer else 0
        experts = self.routed_weights(index) + self.expert_weights * self.shared_experts + self.router_weights
        mlp = 3 * self.hidden_size * self.intermediate_size if index < self.dense_layers else experts
        if index < self.dense_layers:
            mlp -= 2 * self.hidden_size * self.gate_rank  # that norm has no gate
        return self.projection_weights + norms + indexer + mlp

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, and of the LM head where it has its own."""
        return self.vocab_size * self.hidden_size

    @property
    def latent(self) -> int:
        """Values cached per token and layer for core attention."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def _size(config: Mapping[str, Any], *keys: str, least: int = 1) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(
            f"config.json has {keys[0]} {value!r}: expected a whole number of at least {least}; the cost is counted "
            "for models with latent attention (MLA) and a DSA indexer on the query latent, such as deepseek_v32 or "
            "glm_moe_dsa"
        )
    return value


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers with a dense MLP: as listed, else the leading ones and those that `moe_layer_freq` skips."""
    types = config.get("mlp_layer_types")
    if types:
        return sum(kind == "dense" for kind in types)
    if not any(config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts")):
        return layers
    first = config.get("first_k_dense_replace") or 0
    frequency = config.get("moe_layer_freq") or 1
    return sum(index < first or index % frequency != 0 for index in range(layers))


def block_size(elements_per_query: int, block_elements: int) -> int:
    """Queries whose buffers hold about `block_elements` numbers; at least MIN_BLOCK."""
    return max(MIN_BLOCK, block_elements // elements_per_query)


def default_batch_size(length: int, sequences: int) -> int:
    """Sequences of a layer call where nothing else was asked for."""
    return max(1, min(BATCH_TOKENS // length, sequences))


def gathering_pays(length: int, topk: int, heads: int, key_dim: int, value_dim: int, latent: int, rope: int) -> bool:
    """Whether attention over gathered latents costs less than dense attention behind a mask, by multiply-adds.

    Per query: gathering moves topk x (latent + rope) numbers and multiplies topk x (2 latent + rope) per head; dense
    attention multiplies half the length x (key_dim + value_dim) per head.
    """
    gathered = topk * (latent + rope) * GATHER_COST + heads * topk * (2 * latent + rope)
    dense = heads * length * (key_dim + value_dim) // 2
    return gathered < dense
