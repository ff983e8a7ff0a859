"""The demo model and its starting weights.

Recall does not appear by itself in so small a model within minutes of training, so the circuit that it needs
is laid out at the start: heads that look one and two tokens back in layer 0 (a phase in the rotary part of
their queries), and in each of the far-looking layers one head that asks for a word that the one before has
found, compares it with "the word two back" of every token, and writes what it finds where the next such head
will read. All of it is trained from there on.
"""

from __future__ import annotations

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

HALF = 24  # of the 48 latent dimensions: one half for the word two back, one for the word itself
CONSTANT = 47  # the query latent that never changes, for phases


def build_model(far_layers: tuple[int, ...], seed: int, **changes) -> tuple[GlmMoeDsaForCausalLM, list[torch.Tensor]]:
    """A seeded `glm_moe_dsa` model in float32, and the maps that read its look-ups (see `seed_weights`)."""
    settings = {
        "vocab_size": 1024,
        "hidden_size": 96,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 2 * HALF,
        "kv_lora_rank": 2 * HALF,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": HALF,
        "v_head_dim": HALF,
        "first_k_dense_replace": 8,
        "index_topk": 16,
        "index_head_dim": 24,
        "index_n_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**{**settings, **changes})).float()
    return model, seed_weights(model, far_layers)


@torch.no_grad()
def seed_weights(model: GlmMoeDsaForCausalLM, far_layers: tuple[int, ...]) -> list[torch.Tensor]:
    """Lays out previous-token heads, look-up heads, and indexers that can tell near from far.

    The residual is divided into a part for the word itself, one for the word two back, and one for what each
    look-up but the last finds; the last writes to the word itself, from where the head reads.
    Returns, for every far layer, the map [hidden, hidden] from what its look-up writes to the word found.
    """
    hidden = model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    word, two_back, *found = basis.split(HALF, dim=1)
    seed_words(model, word)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer in model.model.layers:
        seed_positions(layer.self_attn, inv_freq)
    first = model.model.layers[0].self_attn
    seed_previous_token(first, head=0, offset=1, inv_freq=inv_freq)
    seed_previous_token(first, head=1, offset=2, inv_freq=inv_freq)
    seed_copy(first, head=1, word=word, target=two_back)
    seed_copy(first, head=0, word=word, target=found[-1])
    asked = [two_back, *found][: len(far_layers)]
    written = [*asked[1:], word]
    for index, question, answer in zip(far_layers, asked, written, strict=False):
        attn = model.model.layers[index].self_attn
        seed_look_up(attn, head=0, question=question, two_back=two_back)
        seed_copy(attn, head=0, word=word, target=answer)
    seed_repetition(model.model.layers[far_layers[0]].self_attn, head=1, one_back=found[-1], word=word)
    return [word @ answer.T for answer in written]


def seed_words(model: GlmMoeDsaForCausalLM, word: torch.Tensor) -> None:
    """Words differ mostly in their own part of the residual, and the head reads them there."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, 1.0)
    embedding.copy_(0.3 * embedding + 0.7 * embedding @ word @ word.T)
    model.lm_head.weight.copy_(0.2 * embedding)  # so that copying a word is the same for all words
    embedding[:, 0] += 1.5  # something constant for the indexers' head weights to stand on


def seed_positions(attn, inv_freq: torch.Tensor) -> None:
    """A constant query latent and a constant rotary key: phases can be learned from the first step."""
    attn.q_a_proj.weight[CONSTANT] = 0.0
    attn.q_a_proj.bias[CONSTANT] = 3.0
    attn.kv_a_proj_with_mqa.bias[-attn.qk_rope_head_dim :: 2] = 4.0
    indexer = attn.indexer
    indexer.wq_b.weight.normal_(0.0, 0.2)
    indexer.k_norm.bias[: indexer.qk_rope_head_dim : 2] = 1.0
    indexer.weights_proj.weight[:, 0] = 0.5


def query_rows(attn, head: int) -> torch.Tensor:
    width = attn.qk_nope_head_dim + attn.qk_rope_head_dim
    return attn.q_b_proj.weight[head * width : (head + 1) * width]


def key_value_rows(attn, head: int) -> torch.Tensor:
    width = attn.qk_nope_head_dim + attn.v_head_dim
    return attn.kv_b_proj.weight[head * width : (head + 1) * width]


def seed_previous_token(attn, head: int, offset: int, inv_freq: torch.Tensor) -> None:
    """The head attends `offset` tokens back."""
    rotary = query_rows(attn, head)[attn.qk_nope_head_dim :]
    rotary.zero_()
    rotary[0::2, CONSTANT] = 5.0 * torch.cos(offset * inv_freq)
    rotary[1::2, CONSTANT] = -5.0 * torch.sin(offset * inv_freq)


def seed_copy(attn, head: int, word: torch.Tensor, target: torch.Tensor, gain: float = 2.0) -> None:
    """The head writes the `word` part of what it attends to into the `target` part of the residual."""
    attn.kv_a_proj_with_mqa.weight[HALF : 2 * HALF] = word.T
    values = key_value_rows(attn, head)[attn.qk_nope_head_dim :]
    values.zero_()
    values[:, HALF : 2 * HALF] = torch.eye(HALF)
    attn.o_proj.weight[:, head * HALF : (head + 1) * HALF] = gain * target


def seed_look_up(attn, head: int, question: torch.Tensor, two_back: torch.Tensor) -> None:
    """The head attends to tokens whose `two_back` part is like the query's `question` part."""
    attn.q_a_proj.weight[:HALF] = question.T
    attn.kv_a_proj_with_mqa.weight[:HALF] = two_back.T
    query, key = query_rows(attn, head), key_value_rows(attn, head)[: attn.qk_nope_head_dim]
    query.zero_()
    key.zero_()
    query[:HALF, :HALF] = 1.75 * torch.eye(HALF)
    key[:, :HALF] = 1.75 * torch.eye(HALF)
    query[HALF::2, CONSTANT] = -1.0  # away from the query itself, which is most like it


def seed_repetition(attn, head: int, one_back: torch.Tensor, word: torch.Tensor) -> None:
    """The head attends to what came after an earlier occurrence of the word before, to repeat it."""
    attn.q_a_proj.weight[HALF:CONSTANT] = one_back.T[: CONSTANT - HALF]
    query, key = query_rows(attn, head), key_value_rows(attn, head)[: attn.qk_nope_head_dim]
    query.zero_()
    key.zero_()
    query[: CONSTANT - HALF, HALF:CONSTANT] = 1.25 * torch.eye(CONSTANT - HALF)
    key[:, :HALF] = 1.25 * torch.eye(HALF)
    seed_copy(attn, head, word=word, target=word)
