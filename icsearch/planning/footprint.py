"""Memory of one batch: the state of a branch between layers, and what a layer call takes while it runs. No torch here.

With the block-wise arithmetic, what is alive at once is followed through the modules of deepseek_v32 and glm_moe_dsa in
transformers 5.23 and through `ops`: a moment is a point of a layer call at which much is alive, and the call takes as
much as its fullest moment. Not counted is the state that the call begins with: that is its branch's.

The experts take most per token: transformers' `grouped_mm` makes one row of hidden size for each (token, expert) pair,
and the routing weights, which are float32, make it float32, twice. So they work on a chunk of tokens at once
(`icsearch.model.kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.model.shape import EXPERT_CHUNK_TOKENS, HEAD_CHUNK_TOKENS, ModelShape, block_size, gathering_pays

FLOAT, LONG, INT = 4, 8, 4  # bytes
NLL_HEAD_COPIES, KL_HEAD_COPIES = 2, 6  # float32 numbers per logit that the LM head holds at once


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
        shape = self.shape
        key_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        return gathering_pays(
            self.seq_len, self.topk, shape.heads, key_dim, shape.v_head_dim, shape.kv_lora_rank, shape.qk_rope_head_dim
        )

    @property
    def bytes(self) -> int:
        """The fullest moment of a call of the layer that takes most."""
        return max(self.moments().values())

    def moments(self) -> dict[str, int]:
        """Bytes alive at each of the moments that can be the fullest: so many per token, and buffers of blocks."""
        shape, width = self.shape, self.dtype_bytes
        # Normed states; queries before and behind RoPE; residual queries; latents, normed and as they came.
        queries = shape.heads * (2 * shape.qk_nope_head_dim + 3 * shape.qk_rope_head_dim)
        into_attention = (shape.hidden_size + queries + shape.q_lora_rank + 2 * shape.latent) * width
        into_mlp = 2 * shape.hidden_size * width  # states behind attention, and normed
        attention, attention_block = self._attention
        # RMSNorm has normed states, a float32 copy (none where the model's type is that), square and product.
        found = {"norm": self.tokens * shape.hidden_size * (2 if width == FLOAT else 3) * FLOAT}
        # The indexer, per token: queries before and behind RoPE, with the rotated part by itself; keys, in float32 too;
        # the selection. In a block: scores of one head, their sum, and what settles the top-k (values, tokens, and
        # where they are tied, keys).
        index_queries = shape.index_heads * (2 * shape.index_head_dim + shape.qk_rope_head_dim) * width
        index_keys = shape.index_head_dim * (width + FLOAT)
        indexer = index_queries + index_keys + shape.index_heads * FLOAT + self.topk * INT
        rows = self.batch_size * min(block_size(self.tokens, self.block_elements), self.seq_len)
        block = rows * self.seq_len * (2 * FLOAT + LONG) + rows * self.topk * (LONG + FLOAT)
        found["indexer"] = self.tokens * (into_attention + indexer) + block
        found["attention"] = self.tokens * (into_attention + attention) + attention_block
        if shape.dense_layers:
            found["dense MLP"] = self.tokens * (into_mlp + 3 * shape.intermediate_size * width)
        if shape.dense_layers < shape.layers:
            # The router has a float32 copy of the states, and some tables of all experts.
            copy = 0 if width == FLOAT else shape.hidden_size * FLOAT
            found["router"] = self.tokens * (into_mlp + copy + 6 * shape.routed_experts * FLOAT)
            # Of each (token, expert) pair of a chunk: gate and up with what they are made of, or outputs, weighted and
            # reordered. Where there are several chunks, their outputs wait for one another.
            inner = (shape.hidden_size + 4 * shape.moe_intermediate_size) * width
            outer = shape.hidden_size * (2 * width + 2 * FLOAT)
            chunk = min(self.tokens, EXPERT_CHUNK_TOKENS)
            waiting = shape.hidden_size * width if chunk < self.tokens else 0
            pairs = chunk * shape.experts_per_token
            found["experts"] = self.tokens * (into_mlp + waiting) + pairs * max(inner, outer)
        return found

    def back_moments(self, cotangents: int) -> dict[str, int]:
        """As `moments`, of a layer that is differentiated (`model.gradients`) for so many cotangents, with these.

        Weights have no gradient, so autograd keeps little of a projection: float32 inputs of norms, the gate, the up
        projection and their product of an MLP, and outputs of experts. What comes back to attention waits for its
        backward by blocks, and in float32 for the sum over them.
        """
        shape, width, hidden = self.shape, self.dtype_bytes, self.shape.hidden_size
        chunk, pairs = min(self.tokens, EXPERT_CHUNK_TOKENS), self.tokens * shape.experts_per_token
        state, attended = hidden * width, shape.heads * shape.v_head_dim * width
        query = shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        copy = 0 if width == FLOAT else hidden * FLOAT  # of a norm's input
        # The entry, the selection; queries and latents, and attention; norms before and within it.
        before = state + self.topk * INT + (query + shape.latent) * width + attended
        before += copy + (shape.q_lora_rank + shape.latent) * FLOAT
        norm = 4 * hidden * FLOAT  # of its backward
        dense = 3 * shape.intermediate_size * width if shape.dense_layers else 0
        graph, working = self.tokens * dense, self.tokens * max(norm, 2 * shape.intermediate_size * width)
        again = 0
        if shape.dense_layers < shape.layers:
            kept = 3 * shape.moe_intermediate_size * width
            graph = max(graph, pairs * (kept + state + 5 * LONG) + self.tokens * shape.shared_experts * kept)
            working = max(working, pairs * 2 * hidden * FLOAT)
            again = chunk * shape.experts_per_token * (state + 2 * hidden * FLOAT)
        graph += self.tokens * hidden * FLOAT  # the norm behind attention
        back = cotangents * (state + attended)  # to the entry and to attention
        sums, own, block = self._attention_back(cotangents)
        core, core_block = self._attention
        # Queries as latents meet them; attention's change, and its product with a gradient.
        changed = (
            shape.heads * shape.latent * width if self.gathers else 0
        ) + 2 * shape.heads * shape.v_head_dim * FLOAT
        return {
            "again": self.tokens * (before + cotangents * state) + graph + again,
            "behind attention": self.tokens * (before + back + state) + graph + working,
            "attention": self.tokens * (before + back + sums) + max(block, self.tokens * (own if copy else 0)),
            "before attention": self.tokens * (before + back + own + norm),
            "pairs": self.tokens * (before + back + core + changed) + core_block,
        }

    def _attention_back(self, cotangents: int) -> tuple[int, int, int]:
        """Of attention's backward, per token: float32 sums of all cotangents, and them in the model's type; a block.

        In a block: gathered latents and their gradients, scores, weights and theirs; or dense scores and theirs.
        """
        shape, width = self.shape, self.dtype_bytes
        query = shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        own = cotangents * (query + shape.latent) * width
        if not self.gathers:
            seen = query + shape.heads * shape.v_head_dim  # keys and values
            rows = self.batch_size * min(block_size(self.tokens, self.block_elements), self.seq_len)
            sums = cotangents * (query + seen) * FLOAT + seen * width
            return sums, own, rows * self.seq_len * (shape.heads * 4 * FLOAT + 2)
        rows = self.batch_size * min(
            block_size(self.batch_size * self.topk * shape.latent, self.block_elements), self.seq_len
        )
        in_block = (3 * shape.latent + 4 * shape.heads) * FLOAT + 3 * LONG
        return cotangents * (query + shape.latent) * FLOAT, own, rows * self.topk * in_block

    @property
    def _attention(self) -> tuple[int, int]:
        """Per token: latents of one kind, or keys and values of every head; the output; the selection, if it is new.

        In a block: gathered latents, in float32 too, and scores and weights of every head; or a mask and dense scores.
        """
        shape, width = self.shape, self.dtype_bytes
        output, selection = shape.heads * shape.v_head_dim, self.topk * INT
        if not self.gathers:
            expanded = shape.heads * (2 * shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim)
            rows = self.batch_size * min(block_size(self.tokens, self.block_elements), self.seq_len)
            return (expanded + output) * width + selection, rows * self.seq_len * (2 + width)
        rows = self.batch_size * min(
            block_size(self.batch_size * self.topk * shape.latent, self.block_elements), self.seq_len
        )
        in_float32, own_scores = (0, 0) if width == FLOAT else (FLOAT, width)
        gathered, scores = shape.latent * (width + in_float32), shape.heads * (2 * FLOAT + own_scores)
        return (shape.latent + output) * width + selection, rows * self.topk * (gathered + scores + 3 * LONG)


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


def drawing_bytes(tokens: int, hidden_size: int, vocab_size: int, dtype_bytes: int, cotangents: int) -> int:
    """What labels' gradients at the last layer's states take: those states and gradients, and a chunk's logits.

    A chunk of logits has its probabilities, two tables of scores, and 128 rows of sums in float64.
    """
    chunk = min(HEAD_CHUNK_TOKENS, tokens)
    own = 0 if dtype_bytes == FLOAT else 2 * dtype_bytes
    logits = chunk * vocab_size * (own + 4 * FLOAT) + min(chunk, 128) * vocab_size * 2 * LONG
    return tokens * hidden_size * dtype_bytes * (1 + cotangents) + logits


@dataclass(frozen=True)
class BatchShape:
    """The numbers that memory follows from: one batch of one model."""

    batch_size: int
    seq_len: int
    hidden_size: int
    dtype_bytes: int
    index_topk: int
    index_heads: int
    index_head_dim: int
    attention_heads: int
    vocab_size: int
    call: Call | None = None  # of a layer with the block-wise arithmetic; None: the reference modules
    head_copies: int = NLL_HEAD_COPIES
    streams: int = 1  # of hidden states between layers
    selection_bytes: int | None = None  # of one query; None: index_topk indices, or as many as there are tokens
    left_numbers: int = 0  # that layers hand on for each token beside states and selection
    known: bool = True  # whether the reference modules take what is counted here; else that is a guess

    @property
    def guess(self) -> str:
        """What is to be said where the bytes of a call are one."""
        return "" if self.known else " (unknown for this family: counted as for dense attention and scores)"

    @property
    def branch_bytes(self) -> int:
        """One branch's state: hidden states, the selection, and what else layers hand on."""
        return sum(self._state_tensors)

    @property
    def pinned_bytes(self) -> int:
        """The same in pinned CPU memory, where torch takes the next power of two for each tensor."""
        return sum(1 << (size - 1).bit_length() for size in self._state_tensors)

    @property
    def entry_bytes(self) -> int:
        """A layer's entry without the selection: hidden states, and what else layers hand on."""
        states, _, *left = self._state_tensors
        return states + sum(left)

    @property
    def _state_tensors(self) -> list[int]:
        tokens = self.batch_size * self.seq_len
        selection = self.selection_bytes or min(self.index_topk, self.seq_len) * INT
        left = [tokens * self.left_numbers * self.dtype_bytes] if self.left_numbers else []
        return [tokens * self.streams * self.hidden_size * self.dtype_bytes, tokens * selection, *left]

    @property
    def final_bytes(self) -> int:
        """The final hidden states of one sequence."""
        return self.seq_len * self.hidden_size * self.dtype_bytes

    def selections_bytes(self, layers: int) -> int:
        """All layers' selections of one batch, in the smallest integer type that holds a position."""
        if self.selection_bytes is not None:
            return layers * self.batch_size * self.seq_len * self.selection_bytes  # or less
        width = 1 if self.seq_len <= 2**8 else 2 if self.seq_len <= 2**15 else 4
        return layers * self.batch_size * self.seq_len * min(self.index_topk, self.seq_len) * width

    @property
    def layer_bytes(self) -> int:
        """Estimate of what one call takes while it runs: of a layer, or of the LM head if that is more.

        The reference indexer holds scores per head twice and a copy of the keys per query, attention its scores per
        head: (2 H_index + D_index + 3 + H_attention) float32 values per pair of tokens. Modules of another make are
        counted as if they did, too (`known` False).
        """
        tokens = self.batch_size * self.seq_len
        head = head_bytes(tokens, self.hidden_size, self.vocab_size, self.dtype_bytes, self.head_copies)
        if self.call is not None:
            return max(self.call.bytes, head)
        per_pair = 2 * self.index_heads + self.index_head_dim + 3 + self.attention_heads
        return max(tokens * self.seq_len * per_pair * FLOAT, head)

    def differentiated_bytes(self, cotangents: int) -> int:
        """Estimate of what the table of second order takes of one batch at once, its entry and cotangents included.

        Of the reference modules, attention's probabilities and their gradients are counted beside what a call takes.
        """
        tokens, hidden = self.batch_size * self.seq_len, self.streams * self.hidden_size
        head = drawing_bytes(tokens, hidden, self.vocab_size, self.dtype_bytes, cotangents)
        forth = self.layer_bytes + 2 * self.branch_bytes
        if self.call is not None:
            return max(head, forth, *self.call.back_moments(cotangents).values())
        probabilities = tokens * self.seq_len * self.attention_heads * 4 * FLOAT
        return max(head, forth + probabilities + 3 * cotangents * tokens * hidden * self.dtype_bytes)


def blockwise_shape(call: Call, head_copies: int = NLL_HEAD_COPIES) -> BatchShape:
    """The shape of a batch whose layers compute with the block-wise arithmetic."""
    model = call.shape
    return BatchShape(
        batch_size=call.batch_size,
        seq_len=call.seq_len,
        hidden_size=model.hidden_size,
        dtype_bytes=call.dtype_bytes,
        index_topk=model.index_topk,
        index_heads=model.index_heads,
        index_head_dim=model.index_head_dim,
        attention_heads=model.heads,
        vocab_size=model.vocab_size,
        call=call,
        head_copies=head_copies,
    )
