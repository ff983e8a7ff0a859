"""Memory that one call takes while it runs, with the block-wise arithmetic: what is alive at once, moment by moment.

Followed through the modules of deepseek_v32 and glm_moe_dsa in transformers 5.23 and through `ops`: a moment is a point
of a layer call at which much is alive, and the call takes as much as its fullest moment. Letters as in `cost`; all
numbers are per token but for the buffers of blocks. e: bytes per value of the model's type. Not counted is the state
that the call begins with: that is its branch's. No torch here.

The experts take most per token: transformers' `grouped_mm` makes one row of hidden size for each (token, expert) pair,
and the routing weights, which are float32, make it float32, twice. So they work on a chunk of tokens at once
(`icsearch.model.kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.model.shape import EXPERT_CHUNK_TOKENS, HEAD_CHUNK_TOKENS, ModelShape, block_size, gathering_pays

FLOAT, LONG, INT = 4, 8, 4  # bytes


@dataclass(frozen=True)
class Call:
    """A layer call: the model, sequences and tokens of each, bytes per value, and how large a block's buffer is."""

    shape: ModelShape
    batch_size: int
    seq_len: int
    dtype_bytes: int
    block_elements: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def topk(self) -> int:
        return min(self.shape.index_topk, self.seq_len)

    @property
    def gathers(self) -> bool:
        """Whether core attention gathers latents, or is dense behind a mask."""
        one = self.shape
        key_dim = one.qk_nope_head_dim + one.qk_rope_head_dim
        return gathering_pays(
            self.seq_len, self.topk, one.heads, key_dim, one.v_head_dim, one.kv_lora_rank, one.qk_rope_head_dim
        )

    @property
    def bytes(self) -> int:
        """The fullest moment of a call of the layer that takes most."""
        return max(self.moments().values())

    def moments(self) -> dict[str, int]:
        """Bytes alive at each of the moments that can be the fullest."""
        tokens, moments, once = self.tokens, {"norm": self._norm}, {}
        moments["indexer"] = self._attention_inputs + self._indexer
        moments["attention"] = self._attention_inputs + self._core
        if self.shape.dense_layers:
            moments["dense MLP"] = self._mlp_inputs + 3 * self.shape.intermediate_size * self.dtype_bytes
        if self.shape.dense_layers < self.shape.layers:
            moments["router"] = self._mlp_inputs + self._router
            moments["experts"], once["experts"] = self._experts
        once |= {"indexer": self._indexer_block, "attention": self._core_block}
        return {name: tokens * each + once.get(name, 0) for name, each in moments.items()}

    @property
    def _norm(self) -> int:
        """The normed states, and RMSNorm's float32 copy (none where the model's type is that), square and product."""
        copies = 2 if self.dtype_bytes == FLOAT else 3
        return self.shape.hidden_size * copies * FLOAT

    @property
    def _attention_inputs(self) -> int:
        """Normed states; queries before and behind RoPE; residual queries; latents, normed and as they came."""
        one = self.shape
        queries = one.heads * (2 * one.qk_nope_head_dim + 3 * one.qk_rope_head_dim)
        return (one.hidden_size + queries + one.q_lora_rank + 2 * one.latent) * self.dtype_bytes

    @property
    def _indexer(self) -> int:
        """Queries before and behind RoPE, with the rotated part by itself; keys, in float32 too; the selection."""
        one = self.shape
        queries = one.index_heads * (2 * one.index_head_dim + one.qk_rope_head_dim) * self.dtype_bytes
        return queries + one.index_head_dim * (self.dtype_bytes + FLOAT) + one.index_heads * FLOAT + self.topk * INT

    @property
    def _indexer_block(self) -> int:
        """Scores of one head, their sum, and what settles the top-k: values, tokens, and where they are tied, keys."""
        queries = block_size(self.tokens, self.block_elements)
        pairs = self.batch_size * min(queries, self.seq_len) * self.seq_len
        return pairs * (2 * FLOAT + LONG) + self.batch_size * min(queries, self.seq_len) * self.topk * (LONG + FLOAT)

    @property
    def _core(self) -> int:
        """Latents of one kind, or keys and values of every head; the output; the selection, if it is new."""
        one = self.shape
        expanded = one.heads * (2 * one.qk_nope_head_dim + one.qk_rope_head_dim + one.v_head_dim)
        kept = one.latent if self.gathers else expanded
        return (kept + one.heads * one.v_head_dim) * self.dtype_bytes + self.topk * INT

    @property
    def _core_block(self) -> int:
        """Gathered latents, in float32 too, and scores and weights of every head; or a mask and dense scores."""
        one = self.shape
        if not self.gathers:
            queries = min(block_size(self.tokens, self.block_elements), self.seq_len)
            return self.batch_size * queries * self.seq_len * (2 + self.dtype_bytes)
        queries = min(block_size(self.batch_size * self.topk * one.latent, self.block_elements), self.seq_len)
        copy = 0 if self.dtype_bytes == FLOAT else FLOAT
        gathered = one.latent * (self.dtype_bytes + copy)
        scores = one.heads * (2 * FLOAT + (0 if self.dtype_bytes == FLOAT else self.dtype_bytes))
        return self.batch_size * queries * self.topk * (gathered + scores + 3 * LONG)

    @property
    def _mlp_inputs(self) -> int:
        """States behind attention, and normed."""
        return 2 * self.shape.hidden_size * self.dtype_bytes

    @property
    def _router(self) -> int:
        """A float32 copy of the states, and some tables of all experts."""
        copy = 0 if self.dtype_bytes == FLOAT else self.shape.hidden_size * FLOAT
        return copy + 6 * self.shape.routed_experts * FLOAT

    @property
    def _experts(self) -> tuple[int, int]:
        """Per token, and in all of a chunk.

        Of each (token, expert) pair: gate and up with what they are made of, or outputs, weighted and reordered. Where
        there are several chunks, their outputs wait for one another.
        """
        one, width = self.shape, self.dtype_bytes
        inner = one.hidden_size * width + 4 * one.moe_intermediate_size * width
        outer = one.hidden_size * (2 * width + 2 * FLOAT)
        chunk = min(self.tokens, EXPERT_CHUNK_TOKENS)
        waiting = one.hidden_size * width if chunk < self.tokens else 0
        return self._mlp_inputs + waiting, chunk * one.experts_per_token * max(inner, outer)


def head_bytes(tokens: int, hidden_size: int, vocab_size: int, dtype_bytes: int, copies: int) -> int:
    """What the final norm and the LM head take: the normed states of all tokens, and a chunk's logits.

    Logits are held in the model's type, where that is another one, and `copies` times in float32.
    """
    norm_copies = 2 if dtype_bytes == FLOAT else 3
    norm = tokens * hidden_size * norm_copies * FLOAT
    chunk = min(HEAD_CHUNK_TOKENS, tokens)
    own = 0 if dtype_bytes == FLOAT else dtype_bytes  # float32 logits are not copied
    logits = chunk * vocab_size * (own + copies * FLOAT)
    return max(norm, tokens * hidden_size * dtype_bytes + logits)
