"""How large the blocks of the arithmetic are, and which attention is the cheaper one: numbers alone, no torch.

The arithmetic and the plan read the same ones, so that what is planned is what runs.
"""

from __future__ import annotations

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
