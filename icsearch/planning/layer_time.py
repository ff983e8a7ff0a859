"""Seconds of a layer call on a device: an estimate, by a formula with constants. No torch.

A call is cut into parts. A part takes at least max(FLOPs / rate, bytes / bandwidth), with the device's peak numbers;
that over the part's efficiency, and a constant for each operation that is launched, make the estimate:

    seconds = sum over parts of max(FLOPs / rate, bytes / bandwidth) / efficiency  +  launches x seconds of a launch.

FLOPs are those of `cost`. Bytes are what our arithmetic moves (`ops`): weights once, activations between kernels, and
what the buffers of a block are read and written, as far as a buffer does not fit the device's cache. Index scores and
attention scores are computed in float32 whatever the model's type.

The constants of the CPU are fitted on measured calls and checked on others: benchmarks/forecast.py, which prints the
errors. Those of GPUs are assumptions: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from icsearch.model.shape import EXPERT_CHUNK_TOKENS, HEAD_CHUNK_TOKENS, block_size
from icsearch.planning.devices import CPU, Device
from icsearch.planning.footprint import FLOAT, Call
from icsearch.planning.work import Breakdown, Widths, layer_work

FITTED, ASSUMED = "fitted on measured runs on a CPU", "assumed; nothing was measured on this device"


@dataclass(frozen=True)
class Efficiency:
    """Part of the peak that each kind of work reaches, and seconds of launching one operation."""

    projections: float
    scores: float
    topk: float
    attention: float
    dense_attention: float
    mlp: float
    elementwise: float
    head: float
    loss: float
    launch: float

    def of(self, kind: str) -> float:
        return float(getattr(self, kind))


KINDS = tuple(field.name for field in fields(Efficiency) if field.name != "launch")

# benchmarks/forecast.py, 2026-11-21: fitted on 50 calls; 60 others are met with a median error of 16%, 58% at most, and
# four whole searches within 15%.
CPU_EFFICIENCY = Efficiency(
    projections=0.449,
    scores=0.286,
    topk=0.151,
    attention=0.0618,
    dense_attention=0.213,
    mlp=0.749,
    elementwise=1.0,
    head=1.0,
    loss=1.0,
    launch=5.89e-6,
)
# Half of the peak for large products; top-k and gathering well below the memory's bandwidth, as they are anywhere.
GPU_EFFICIENCY = Efficiency(
    projections=0.5,
    scores=0.5,
    topk=0.1,
    attention=0.4,
    dense_attention=0.4,
    mlp=0.4,
    elementwise=0.6,
    head=0.5,
    loss=0.5,
    launch=5e-6,
)


def efficiency_of(device: Device) -> tuple[Efficiency, str]:
    """The constants for a device, and where they come from."""
    return (CPU_EFFICIENCY, FITTED) if device.kind == CPU else (GPU_EFFICIENCY, ASSUMED)


@dataclass(frozen=True)
class Part:
    """Some work of one kind. `block_bytes` is traffic of a block's buffers, free where `buffer` bytes fit the cache."""

    kind: str
    flops: float = 0
    bytes: float = 0
    in_float32: bool = False
    block_bytes: float = 0
    buffer: float = 0

    def least_seconds(self, device: Device, dtype_bytes: int) -> float:
        """By the device's peak numbers."""
        rate = device.float32_flops if self.in_float32 or dtype_bytes == FLOAT else device.flops
        moved = self.bytes + (self.block_bytes if self.buffer > device.cache else 0)
        return max(self.flops / rate, moved / device.bandwidth)


@dataclass(frozen=True)
class CallWork:
    """The parts of one call, and how many operations it launches."""

    parts: tuple[Part, ...]
    launches: int
    dtype_bytes: int

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    def seconds(self, device: Device, efficiency: Efficiency) -> float:
        least = ((part.kind, part.least_seconds(device, self.dtype_bytes)) for part in self.parts)
        return sum(seconds / efficiency.of(kind) for kind, seconds in least) + self.launches * efficiency.launch


def layer_call(call: Call, index: int, full: bool) -> CallWork:
    """A call of a DSA layer, with its own indexer or without."""
    widths = Widths(weights=call.dtype_bytes, latents=call.dtype_bytes, index_keys=FLOAT)
    work = layer_work(call.shape, index, full, call.seq_len, widths)
    projections = work.projections.flops + work.index_projections.flops
    weights = call.shape.projection_weights + (call.shape.index_weights if full else 0)
    moved = (weights + call.tokens * _projection_width(call, full)) * call.dtype_bytes
    parts = [Part("projections", projections * call.batch_size, moved), _elementwise(call), _mlp(call, index, work)]
    launches = FIXED_LAUNCHES + (2 * call.shape.routed_experts if index >= call.shape.dense_layers else 0)
    if full:
        parts += _indexer(call, work)
        launches += _blocks(call, call.tokens) * (3 * call.shape.index_heads + BLOCK_LAUNCHES)
    parts += _gathered(call, work) if call.gathers else [_dense(call)]
    per_query = call.batch_size * call.topk * call.shape.latent if call.gathers else call.tokens
    launches += _blocks(call, per_query) * BLOCK_LAUNCHES
    return CallWork(tuple(parts), launches, call.dtype_bytes)


FIXED_LAUNCHES, BLOCK_LAUNCHES = 80, 20  # operations of a layer outside of blocks, and of a block of queries; about


def head_call(call: Call) -> CallWork:
    """Final norm, LM head and loss of one branch on one batch."""
    weights, chunks = call.shape.embedding_weights, -(-call.tokens // HEAD_CHUNK_TOKENS)
    logits = call.tokens * call.shape.vocab_size * (2 * call.dtype_bytes + 5 * FLOAT)
    head = Part("head", 2 * call.tokens * weights, chunks * weights * call.dtype_bytes)
    return CallWork((head, Part("loss", bytes=logits), _elementwise(call)), 10 * chunks, call.dtype_bytes)


def _blocks(call: Call, elements_per_query: int) -> int:
    return -(-call.seq_len // block_size(elements_per_query, call.block_elements))


def _pairs(call: Call) -> float:
    """Visible (query, key) pairs of the whole batch."""
    return call.batch_size * call.seq_len * (call.seq_len + 1) / 2


def _projection_width(call: Call, full: bool) -> int:
    """Numbers per token that go into and come out of the projections."""
    one = call.shape
    query = one.hidden_size + 2 * one.q_lora_rank + one.heads * (one.qk_nope_head_dim + one.qk_rope_head_dim)
    latent = one.hidden_size + 2 * one.latent + one.heads * one.qk_nope_head_dim
    output = 2 * one.heads * one.v_head_dim + one.hidden_size
    indexer = one.q_lora_rank + 2 * one.hidden_size + one.index_heads * (one.index_head_dim + 1) + one.index_head_dim
    return query + latent + output + (indexer if full else 0)


def _elementwise(call: Call) -> Part:
    """Two norms in float32, two sums."""
    return Part("elementwise", bytes=call.tokens * call.shape.hidden_size * (2 * 4 * FLOAT + 8 * call.dtype_bytes))


def _mlp(call: Call, index: int, work: Breakdown) -> Part:
    """Weights, of experts once a chunk; inputs, outputs and what is between, of each (token, expert) pair there."""
    one, width, again = call.shape, call.dtype_bytes, 0.0
    if index < one.dense_layers:
        moved = call.tokens * (2 * one.hidden_size + 6 * one.intermediate_size) * width
    else:
        pair = one.hidden_size * (4 * width + 4 * FLOAT) + 8 * one.moe_intermediate_size * width
        moved = call.tokens * one.experts_per_token * pair
        again = (-(-call.tokens // EXPERT_CHUNK_TOKENS) - 1) * one.expert_weights * one.routed_experts * width
    return Part("mlp", work.mlp.flops * call.batch_size, work.mlp.bytes + again + moved)


def _indexer(call: Call, work: Breakdown) -> list[Part]:
    """Each head's scores are written, passed through the ReLU, and added on to the sum; then the top-k reads that."""
    pairs, batch = _pairs(call), call.batch_size
    block = block_size(call.tokens, call.block_elements) * call.tokens * FLOAT
    traffic = pairs * call.shape.index_heads * 6 * FLOAT
    scores = Part("scores", work.index_scores.flops * batch, in_float32=True, block_bytes=traffic, buffer=block)
    return [scores, Part("topk", bytes=work.index_topk.bytes * batch)]


def _gathered(call: Call, work: Breakdown) -> list[Part]:
    """Latents gathered, and copied to float32; scores of every head scaled, masked, put through the softmax; mixed."""
    one, width = call.shape, call.dtype_bytes
    share = one.latent / (one.latent + one.kv_lora_rank)  # of the FLOPs: scores have the RoPE part, the mix has not
    flops = work.attention.flops * call.batch_size
    rows = flops / (2 * one.heads * (one.latent + one.kv_lora_rank))  # (query, selected token) pairs
    copies = 2 * width if width == FLOAT else 3 * width + 2 * FLOAT
    buffer = call.block_elements * FLOAT
    scores = Part(
        "attention",
        flops * share,
        in_float32=True,
        block_bytes=rows * (one.latent * copies + one.heads * 8 * FLOAT),
        buffer=buffer,
    )
    mix = Part("attention", flops * (1 - share), block_bytes=rows * one.latent * width, buffer=buffer)
    return [scores, mix]


def _dense(call: Call) -> Part:
    """Every visible pair of every head, behind a mask."""
    one = call.shape
    per_pair = 2 * one.heads * (one.qk_nope_head_dim + one.qk_rope_head_dim + one.v_head_dim)
    return Part("dense_attention", _pairs(call) * per_pair, _pairs(call))
