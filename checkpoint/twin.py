"""A differentiable twin of the reference decoder layer of `glm_moe_dsa`, working on the reference's own weights.

The reference indexer runs under no_grad and returns indices only; here its scores carry a gradient. Three ways to
attend: over all earlier tokens or a short window of them (`dense`), the same with the indexer's distance to that
attention (`distill`), and over the tokens that the indexer selects (`sparse`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved rotary embedding of x [B, T, H, D]; cos and sin [T, D/2]. The layout of the result is halves."""
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def project(attn: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Query residual [B, T, R], and queries, keys, values [B, H, T, D] of one attention layer."""
    batch, length, _ = x.shape
    nope, rope, heads = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.num_heads
    residual = rms_norm(attn.q_a_proj(x), attn.q_a_layernorm)
    query = attn.q_b_proj(residual).view(batch, length, heads, nope + rope)
    query = torch.cat([query[..., :nope], rotate(query[..., nope:], cos, sin)], dim=-1)
    latent, key_rope = attn.kv_a_proj_with_mqa(x).split([attn.kv_lora_rank, rope], dim=-1)
    expanded = attn.kv_b_proj(rms_norm(latent, attn.kv_a_layernorm)).view(batch, length, heads, -1)
    key_rope = rotate(key_rope.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
    key = torch.cat([expanded[..., :nope], key_rope.to(expanded.dtype)], dim=-1)
    value = expanded[..., nope:]
    return residual, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def index_scores(indexer: nn.Module, x: torch.Tensor, residual: torch.Tensor, cos, sin) -> torch.Tensor:
    """What the reference indexer ranks the tokens by, before the causal mask: [B, T, T], differentiable."""
    batch, length, _ = x.shape
    rope, heads, dim = indexer.qk_rope_head_dim, indexer.n_heads, indexer.head_dim
    query = indexer.wq_b(residual).view(batch, length, heads, dim)
    query = torch.cat([rotate(query[..., :rope], cos, sin), query[..., rope:]], dim=-1)
    key = F.layer_norm(indexer.wk(x), (dim,), indexer.k_norm.weight, indexer.k_norm.bias, 1e-6).unsqueeze(2)
    key = torch.cat([rotate(key[..., :rope], cos, sin), key[..., rope:]], dim=-1).squeeze(2)
    weights = indexer.weights_proj(x).float() * heads**-0.5  # [B, T, H]
    dots = torch.matmul(query.transpose(1, 2), key.unsqueeze(1).transpose(-1, -2)).float()  # [B, H, T, T]
    return (F.relu(dots * indexer.softmax_scale) * weights.transpose(1, 2).unsqueeze(-1)).sum(1)


def window_attention(query, key, value, window: int, scaling: float) -> torch.Tensor:
    """Attention to the last `window` tokens, in blocks that see themselves and the block before."""
    batch, heads, length, _ = query.shape
    blocks = length // window
    split = lambda x: x.reshape(batch, heads, blocks, window, -1)  # noqa: E731
    before = lambda x: torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)  # noqa: E731
    query, key, value = split(query), before(split(key)), before(split(value))
    row, column = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None]
    seen = (column <= row) & (column > row - window)
    seen = seen[None].repeat(blocks, 1, 1)
    seen[0, :, :window] = False
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, length, -1)


def causal_mask(length: int, window: int) -> torch.Tensor:
    """Bool [T, T]: what each query may see; window 0 means everything before it."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return (distance >= 0) & ((distance < window) if window else (distance >= 0))


def dense_attention(query, key, value, windows: tuple[int, ...], scaling: float) -> torch.Tensor:
    """Attention to all earlier tokens or to a window of them, as `windows` says for every head."""
    if len(set(windows)) > 1:
        half = next(i for i in range(len(windows)) if windows[i] != windows[0])
        near = dense_attention(query[:, half:], key[:, half:], value[:, half:], windows[half:], scaling)
        far = dense_attention(query[:, :half], key[:, :half], value[:, :half], windows[:half], scaling)
        return torch.cat([far, near], dim=1)
    if windows[0]:
        return window_attention(query, key, value, windows[0], scaling)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def attend(attn: nn.Module, x, cos, sin, mode: str, windows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the attention [B, T, hidden] and the indexer's KL in nats per query (zero when `dense`)."""
    residual, query, key, value = project(attn, x, cos, sin)
    batch, length, _ = x.shape
    kl = x.new_zeros((), dtype=torch.float32)
    if mode == "dense":
        out = dense_attention(query, key, value, windows, attn.scaling)
    else:
        seen = causal_mask(length, 0)
        scores = index_scores(attn.indexer, x.detach(), residual.detach(), cos, sin)
        scores = scores.masked_fill(~seen, float("-inf"))
        if mode == "sparse":
            chosen = scores.detach().topk(min(attn.indexer.index_topk, length), dim=-1).indices
            scores = scores.gather(-1, chosen)  # [B, T, k]
            seen = torch.isfinite(scores)
            out, weights = gathered_attention(query, key, value, chosen, seen, attn.scaling)
        else:
            logits = torch.matmul(query, key.transpose(-1, -2)).float() * attn.scaling
            attended = torch.stack([causal_mask(length, window) for window in windows])
            weights = logits.masked_fill(~attended, float("-inf")).softmax(-1)
            out = torch.matmul(weights.to(value.dtype), value)
        kl = divergence(weights.detach().mean(1), scores, seen)
    out = out.transpose(1, 2).reshape(batch, length, -1)
    return attn.o_proj(out), kl


def attend_shared(
    attn: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, chosen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Attention under a given selection [B, T, k], or under the layer's own where none is given.

    Returns the output [B, T, hidden], the head-averaged attention over all earlier tokens [B, T, T] (what an indexer
    that serves this layer should find), the indexer's scores [B, T, T] (None where it did not run), the selection.
    """
    residual, query, key, value = project(attn, x, cos, sin)
    batch, length, _ = x.shape
    seen, scores = causal_mask(length, 0), None
    if chosen is None:
        scores = index_scores(attn.indexer, x.detach(), residual.detach(), cos, sin).masked_fill(~seen, float("-inf"))
        chosen = scores.detach().topk(min(attn.indexer.index_topk, length), dim=-1).indices
    logits = torch.matmul(query, key.transpose(-1, -2)).float() * attn.scaling
    target = logits.detach().masked_fill(~seen, float("-inf")).softmax(-1).mean(1)
    selected = torch.zeros_like(target, dtype=torch.bool).scatter(-1, chosen, True) & seen
    weights = logits.masked_fill(~selected.unsqueeze(1), float("-inf")).softmax(-1)
    out = torch.matmul(weights.to(value.dtype), value).transpose(1, 2).reshape(batch, length, -1)
    return attn.o_proj(out), target, scores, chosen


def gathered_attention(query, key, value, chosen, seen, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the tokens `chosen` [B, T, k] where `seen`; also the weights [B, H, T, k]."""
    batch, heads, length, _ = query.shape
    offset = torch.arange(batch * heads).view(batch, heads, 1, 1) * length
    rows = (chosen.unsqueeze(1) + offset).flatten()

    def pick(x: torch.Tensor) -> torch.Tensor:
        picked = F.embedding(rows, x.reshape(batch * heads * length, -1))
        return picked.view(batch, heads, length, -1, x.shape[-1])

    logits = (query.unsqueeze(3) * pick(key)).sum(-1).float() * scaling
    weights = logits.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
    return (weights.to(value.dtype).unsqueeze(-1) * pick(value)).sum(3), weights


def divergence(target: torch.Tensor, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Mean over queries of KL(target || softmax of the scores of the tokens seen)."""
    log_q = scores.masked_fill(~seen, -1e4).log_softmax(-1)
    return (target * (target.clamp_min(1e-9).log() - log_q)).sum(-1).mean()


def feed_forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The dense MLP, or all experts weighted by the router (as few as four: cheaper than gathering)."""
    if not hasattr(mlp, "gate"):
        return swiglu(mlp, x)
    gate, experts = mlp.gate, mlp.experts
    scores = F.linear(x.float(), gate.weight.float()).sigmoid()
    chosen = (scores + gate.e_score_correction_bias).topk(gate.top_k, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    count, width, hidden = experts.gate_up_proj.shape
    both = F.linear(x, experts.gate_up_proj.reshape(count * width, hidden)).view(*x.shape[:-1], count, 2, width // 2)
    inner = F.silu(both[..., 0, :]) * both[..., 1, :] * weights.unsqueeze(-1).to(x.dtype)
    down = experts.down_proj.transpose(1, 2).reshape(count * width // 2, hidden)
    return inner.flatten(-2) @ down + swiglu(mlp.shared_experts, x)


def swiglu(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def run_layer(
    layer: nn.Module, hidden, cos, sin, mode: str, windows: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decoder layer: hidden states [B, T, hidden] and the KL of its indexer."""
    out, kl = attend(layer.self_attn, rms_norm(hidden, layer.input_layernorm), cos, sin, mode, windows)
    hidden = hidden + out
    return hidden + feed_forward(layer.mlp, rms_norm(hidden, layer.post_attention_layernorm)), kl


def run_layer_shared(layer: nn.Module, hidden, cos, sin, chosen):
    """One decoder layer by `attend_shared`: hidden states, attention target, scores, selection."""
    normed = rms_norm(hidden, layer.input_layernorm)
    out, target, scores, chosen = attend_shared(layer.self_attn, normed, cos, sin, chosen)
    hidden = hidden + out
    hidden = hidden + feed_forward(layer.mlp, rms_norm(hidden, layer.post_attention_layernorm))
    return hidden, target, scores, chosen


def rotary(model: nn.Module, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, rope/2] of the model's own frequencies."""
    angles = torch.arange(length).float()[:, None] * model.model.rotary_emb.inv_freq.float()[None]
    return angles.cos(), angles.sin()
