"""DSA arithmetic by blocks of queries: the indexer's selection, attention over it, and its gradients. Pure functions.

The reference modules of transformers hold scores of every query, head and key at once and attend densely behind a
mask. Here a block of queries sees its causal prefix only, and memory is O(block x T). How many queries make a block
follows from shapes and `block_elements` (the numbers that one block's buffer may hold), never from what is free, so
the bits do not depend on the machine's mood.

Ties: the ReLU makes many index scores exactly zero. Of equal scores the earliest token is chosen; so a query that
sees fewer than k tokens selects 0 to k - 1. A selection is in ascending token order. The rule is the same for every
block size, batch and device. It is about scores as computed: ReLU zeros are zero in any shape, but two equal keys may
get scores a rounding apart where a product has another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.nn import functional

from icsearch.model.shape import MIN_BLOCK, block_size

GROUP, HEAP_RATIO = 4, 64  # where, and in what groups, tokens compete by their highest score first: see `highest`


def blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """[first, last) cut into ranges of `size`; the last may be smaller."""
    return ((start, min(start + size, last)) for start in range(first, last, size))


def rotate_interleaved(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on pairs (0, 1), (2, 3), ...: GLM's indexer. [B, S, H, R] with cos, sin [B, S, R]; pairs come out split."""
    cos, sin = _halves(cos), _halves(sin)
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def rotate_half_split(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on pairs (i, i + R/2): the indexer of DeepSeek-V3.2. [B, S, H, R] with cos, sin [B, S, R]."""
    low, high = states.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return states * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


def _halves(angles: torch.Tensor) -> torch.Tensor:
    return angles[..., : angles.shape[-1] // 2].unsqueeze(2)


def index_scores(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Lightning-indexer scores: sum over heads of weight x ReLU(query . key).

    queries [B, b, H, D], keys [B, T, D], weights [B, b, H], all float32. Returns float32 [B, b, T]. One head is
    multiplied at a time and added on, so that [B, b, H, T] never exists.
    """
    transposed = keys.transpose(1, 2)  # [B, D, T]
    total = torch.bmm(queries[:, :, 0], transposed).relu_().mul_(weights[:, :, :1])
    for head in range(1, queries.shape[2]):
        scores = torch.bmm(queries[:, :, head], transposed).relu_()
        total.addcmul_(scores, weights[:, :, head : head + 1])
    return total


def select(
    queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, topk: int, block_elements: int
) -> torch.Tensor:
    """Each query's selection among the tokens up to itself: int32 [B, S, min(topk, S)], ascending.

    queries [B, S, H, D], keys [B, S, D], weights [B, S, H]. Scores are float32 whatever these are.
    """
    batch, length = queries.shape[:2]
    keys, weights = keys.float(), weights.float()
    topk = min(topk, length)
    selection = torch.empty(batch, length, topk, dtype=torch.int32, device=queries.device)
    selection[:, :topk] = torch.arange(topk, dtype=torch.int32, device=queries.device)  # they see no more than topk
    for first, last in blocks(topk, length, block_size(batch * length, block_elements)):
        scores = index_scores(queries[:, first:last].float(), keys[:, :last], weights[:, first:last])
        selection[:, first:last] = top_tokens(mask_future(scores, first), topk)
    return selection


def mask_future(scores: torch.Tensor, first: int) -> torch.Tensor:
    """Scores [B, b, T] of queries `first` to T - 1, with -inf at keys behind the query; changes them in place."""
    count = scores.shape[1]
    future = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
    scores[:, :, first : first + count].masked_fill_(future, float("-inf"))
    return scores


def top_tokens(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """The `topk` highest of the last dimension, [..., T] to int32 [..., topk], ascending; earliest of equal ones.

    `torch.topk` picks among equal scores by shape and device. That matters only where the last one in equals the
    first one out; those rows are chosen again by `earliest_top_tokens`.
    """
    if topk == scores.shape[-1]:
        return torch.arange(topk, dtype=torch.int32, device=scores.device).expand(*scores.shape[:-1], topk)
    values, tokens = highest(scores, topk + 1)
    chosen = tokens[..., :topk].to(torch.int32)
    tied = values[..., topk - 1] == values[..., topk]  # [...]
    if tied.any():
        chosen[tied] = earliest_top_tokens(scores[tied], topk)
    return chosen.sort(dim=-1).values


def highest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` of the last dimension: values, descending, and tokens; which of equal ones is left open.

    On CPU `torch.topk` keeps a heap where a row is HEAP_RATIO times as long as `count`, and is slow below that.
    There groups of GROUP tokens compete by their highest score first, which is vectorised: a token outside of the
    `count` best groups is no better than `count` others.
    """
    width = scores.shape[-1] // GROUP
    if scores.device.type != "cpu" or not 2 * GROUP * count <= scores.shape[-1] < HEAP_RATIO * count:
        best = scores.topk(count, dim=-1)
        return best.values, best.indices
    grouped = width * GROUP  # token t is in group t % width; those from `grouped` on always compete
    groups = scores[..., :grouped].unflatten(-1, (GROUP, width)).amax(dim=-2).topk(count, sorted=False).indices
    members = groups.unsqueeze(-2) + torch.arange(0, grouped, width).unsqueeze(-1)  # [..., GROUP, count]
    rest = torch.arange(grouped, scores.shape[-1]).expand(*scores.shape[:-1], -1)
    tokens = torch.cat([members.flatten(-2), rest], dim=-1)
    best = scores.gather(-1, tokens).topk(count, dim=-1)
    return best.values, tokens.gather(-1, best.indices)


def earliest_top_tokens(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As `top_tokens`, unsorted, by keys that no two tokens share: [n, T] float32 to int32 [n, topk].

    The high half of a key orders as the score does (floats order as their bits, negative ones reversed), the low
    half counts down with the token.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one score
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    countdown = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered << 32 | countdown).topk(topk, dim=-1).indices.to(torch.int32)


def gather_attention(
    query: torch.Tensor,
    latents: torch.Tensor,
    selection: torch.Tensor,
    up_key: torch.Tensor,
    up_value: torch.Tensor,
    scaling: float,
    block_elements: int,
) -> torch.Tensor:
    """Multi-head latent attention in absorbed form over each query's selection (DeepSeek-V2 paper, section 2.1).

    query [B, H, S, N + R]: N without and R with RoPE; latents [B, S, L + R]: compressed keys and values, and the
    key's RoPE part; selection int [B, S, k]; up_key [H, N, L] and up_value [H, V, L]: the halves of kv_b_proj.
    Returns [B, S, H, V]. Scores and softmax are float32.
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, up_value.shape[1])
    for first, last in gather_blocks(latents, selection, block_elements):
        absorbed = absorb(query[:, :, first:last], up_key)
        output[:, first:last] = gather_block(absorbed, latents, selection[:, first:last], first, up_value, scaling)
    return output


def gather_blocks(latents: torch.Tensor, selection: torch.Tensor, block_elements: int) -> Iterator[tuple[int, int]]:
    """The queries [first, last) of each block of `gather_attention`."""
    batch, length, topk = selection.shape
    return blocks(0, length, block_size(batch * topk * latents.shape[-1], block_elements))


def absorb(query: torch.Tensor, up_key: torch.Tensor) -> torch.Tensor:
    """Queries [B, H, b, N + R] as latents meet them: [B*b, H, L + R]."""
    no_rope = up_key.shape[1]
    return _by_query(torch.cat([query[..., :no_rope] @ up_key, query[..., no_rope:]], dim=-1))


def gather_block(
    absorbed: torch.Tensor,
    latents: torch.Tensor,
    selection: torch.Tensor,
    first: int,
    up_value: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`gather_attention` of the b queries from `first` on: absorbed [B*b, H, L + R], selection [B, b, k].

    Latents may end behind the last token that is selected. Returns [B, b, H, V].
    """
    batch, count, _ = selection.shape
    heads, _, latent = up_value.shape
    weights, gathered = _gathered(absorbed, latents, selection, first, scaling)
    mixed = torch.bmm(weights.to(latents.dtype), gathered[..., :latent]).view(batch, count, heads, latent)
    return (mixed.transpose(1, 2) @ up_value.transpose(1, 2)).transpose(1, 2)


def _gathered(
    absorbed: torch.Tensor, latents: torch.Tensor, selection: torch.Tensor, first: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a block's queries the attention weights, float32 [B*b, H, k], and the latents they are of [B*b, k, L + R]."""
    batch, count, topk = selection.shape
    length, width = latents.shape[1:]
    chosen = selection.long()
    rows = latents.reshape(batch * length, width)
    offsets = torch.arange(batch, device=latents.device).view(batch, 1, 1) * length
    gathered = rows.index_select(0, (chosen + offsets).flatten()).view(-1, topk, width)  # [B*b, k, L + R]
    scores = torch.bmm(absorbed.float(), gathered.float().transpose(1, 2)).mul_(scaling)  # [B*b, H, k]
    future = chosen > torch.arange(first, first + count, device=latents.device).view(1, -1, 1)
    scores.masked_fill_(future.view(-1, 1, topk), float("-inf"))
    return scores.softmax(dim=-1), gathered


def attention_weights(
    query: torch.Tensor,
    latents: torch.Tensor,
    selection: torch.Tensor,
    up_key: torch.Tensor,
    scaling: float,
    block_elements: int,
) -> torch.Tensor:
    """The weights of `gather_attention`, mean over the heads: float32 [B, S, k], in the order of the selection."""
    weights = torch.empty(selection.shape, dtype=torch.float32, device=query.device)
    for first, last in gather_blocks(latents, selection, block_elements):
        chosen, absorbed = selection[:, first:last], absorb(query[:, :, first:last], up_key)
        of_heads, _ = _gathered(absorbed, latents, chosen, first, scaling)
        weights[:, first:last] = of_heads.mean(dim=1).view(chosen.shape)
    return weights


def kept_mass(
    weights: torch.Tensor, own: torch.Tensor, other: torch.Tensor, length: int, block_elements: int
) -> torch.Tensor:
    """The sum of weights [B, n, k] of tokens that another selection has too: float32 [B, n].

    `own` int [B, n, k] and `other` int [B, n, m] are selections of the same n queries among `length` tokens.
    """
    batch, count, _ = own.shape
    kept = torch.empty(batch, count, dtype=torch.float32, device=weights.device)
    for first, last in blocks(0, count, block_size(batch * length, block_elements)):
        part = slice(first, last)
        inside = torch.zeros(batch, last - first, length, dtype=torch.bool, device=weights.device)
        inside.scatter_(-1, other[:, part].long(), True)
        kept[:, part] = (weights[:, part] * inside.gather(-1, own[:, part].long())).sum(-1)
    return kept


def pull_back(
    block: Callable[..., torch.Tensor],
    query: torch.Tensor,
    seen: Sequence[torch.Tensor],
    ranges: Iterable[tuple[int, int, int]],
    cotangents: Sequence[torch.Tensor],
) -> list[list[torch.Tensor]]:
    """Gradients of attention that is computed by blocks, for each cotangent [B, S, H, V]: of the query, and of `seen`.

    query [B, H, S, Q]; seen [..., S, W]; `block(query part, *seen parts, first, last)` is [B, b, H, V]. Each range is
    (first, last, stop): its queries, and where the tokens that they see end. A block's graph is let go of before the
    next one; sums over blocks are float32.
    """
    found = [[torch.zeros_like(each, dtype=torch.float32) for each in (query, *seen)] for _ in cotangents]
    for first, last, stop in ranges:
        part, *parts = (
            each.detach().requires_grad_() for each in (query[:, :, first:last], *(s.narrow(-2, 0, stop) for s in seen))
        )
        with torch.enable_grad():
            output = block(part, *parts, first, last)
        for cotangent, (of_query, *of_seen) in zip(cotangents, found, strict=True):
            gradient, *others = torch.autograd.grad(
                output, (part, *parts), cotangent[:, first:last], retain_graph=cotangent is not cotangents[-1]
            )
            of_query[:, :, first:last] = gradient
            for total, other in zip(of_seen, others, strict=True):
                total.narrow(-2, 0, stop).add_(other)
    return [[each.to(query.dtype) for each in gradients] for gradients in found]


def gradients(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    needed: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """What comes back to the inputs, zeros where nothing does, and to those `needed`; the graph stays for others.

    RuntimeError where no output has a gradient, or nothing comes back to one that is needed.
    """
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not pairs:
        raise RuntimeError("its outputs do not require grad")
    ends, grads = zip(*pairs, strict=True)
    wanted = [*inputs, *needed]
    found = torch.autograd.grad(ends, wanted, grads, retain_graph=True, allow_unused=True)
    if any(grad is None for grad in found[len(inputs) :]):
        raise RuntimeError("autograd finds no way from its outputs back to its core attention")
    return [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(wanted, found, strict=True)]


def _by_query(states: torch.Tensor) -> torch.Tensor:
    """[B, H, b, D] to [B*b, H, D]."""
    batch, heads, count, width = states.shape
    return states.transpose(1, 2).reshape(batch * count, heads, width)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: torch.Tensor,
    scaling: float,
    block_elements: int,
) -> torch.Tensor:
    """Attention of blocks of queries to their whole causal prefix, all but the selection masked.

    query [B, H, S, Q], key [B, H, S, Q], value [B, H, S, V], selection int [B, S, k]. Returns [B, S, H, V].
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    for first, last in dense_blocks(selection, block_elements):
        seen = (key[:, :, :last], value[:, :, :last])
        output[:, first:last] = dense_block(query[:, :, first:last], *seen, selection[:, first:last], first, scaling)
    return output


def dense_blocks(selection: torch.Tensor, block_elements: int) -> Iterator[tuple[int, int]]:
    """The queries [first, last) of each block of `dense_attention`."""
    batch, length, _ = selection.shape
    return blocks(0, length, block_size(batch * length, block_elements))


def dense_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: torch.Tensor,
    first: int,
    scaling: float,
) -> torch.Tensor:
    """`dense_attention` of the b queries from `first` on to the keys up to the last of them: [B, b, H, V]."""
    mask = _block_mask(selection, first, first + query.shape[2])
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float
) -> torch.Tensor:
    """Attention of each query to itself and the `window` - 1 tokens before it, by blocks of `window` queries.

    query [B, H, S, Q], key [B, H, S, Q], value [B, H, S, V]. Returns [B, S, H, V].
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    for first, last in blocks(0, length, max(window, MIN_BLOCK)):
        begin = max(0, first - window + 1)
        distance = torch.arange(first, last, device=query.device).unsqueeze(1) - torch.arange(
            begin, last, device=query.device
        )
        mask = (distance >= 0) & (distance < window)  # [b, t]
        seen = (key[:, :, begin:last], value[:, :, begin:last])
        attended = functional.scaled_dot_product_attention(query[:, :, first:last], *seen, mask, scale=scaling)
        output[:, first:last] = attended.transpose(1, 2)
    return output


def _block_mask(selection: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """True where queries `first` to `last` - 1 look: [B, b, k] selections to bool [B, 1, b, last]."""
    batch, count, topk = selection.shape
    mask = torch.zeros(batch, count, max(last, topk), dtype=torch.bool, device=selection.device)
    mask.scatter_(-1, selection.long(), True)
    mask[..., first:last].tril_()  # a selection may name tokens behind the query
    return mask[:, None, :, :last]
