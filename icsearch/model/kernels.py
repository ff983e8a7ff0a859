"""How DSA layers compute: transformers' own modules, or the block-wise arithmetic of `ops` in their place."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.model import ops, shape
from icsearch.model.families.attention import Core, Observer
from icsearch.model.families.calls import instead_of_forward

NAME = "icsearch"  # of our attention, in transformers' registry

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_EXPERT_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
_HARMLESS = ("dropout", "position_ids", "use_cache", "is_causal", "cache_position")  # no dropout: we do not train
# A lightning indexer multiplies queries of several heads with one key for each token: what it has, and is called with.
_INDEXER_ARGUMENTS = {"hidden_states", "position_embeddings", "attention_mask"}
_INDEXER_PARTS = ("wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "softmax_scale")
_ATTENTION_PARTS = ("expand_kv", "kv_b_proj", "qk_nope_head_dim", "v_head_dim")

PROBE_TOKENS, PROBE_TOPK = 256, 32
PROBE_TOLERANCE = 1e-2  # of the scores' spread; a right layout is off by rounding, 1e-6


def find_experts(layers: Iterable[nn.Module]) -> list[Any]:
    """The modules that take states of single tokens and each one's experts, as transformers' fused experts do."""
    modules = (module for layer in layers for module in layer.modules())
    return [m for m in modules if list(inspect.signature(type(m).forward).parameters)[1:] == _EXPERT_ARGUMENTS]


@contextlib.contextmanager
def chunked(experts: Iterable[Any]) -> Iterator[None]:
    """Within the block these modules work on EXPERT_CHUNK_TOKENS tokens at once; of no more they see one call."""
    with contextlib.ExitStack() as stack:
        for module in experts:
            by_so_many = partial(by_chunks, module.forward, shape.EXPERT_CHUNK_TOKENS)
            stack.enter_context(instead_of_forward(module, by_so_many))
        yield


def by_chunks(
    forward: Experts, size: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`forward` on [N, D] states, [N, e] experts and their weights [N, e], at most `size` tokens at once: [N, D]."""
    if len(hidden_states) <= size:
        return forward(hidden_states, top_k_index, top_k_weights)
    output = torch.empty_like(hidden_states)
    for first in range(0, len(hidden_states), size):
        part = slice(first, first + size)
        output[part] = forward(hidden_states[part], top_k_index[part], top_k_weights[part])
    return output


def has_arithmetic(owner: nn.Module, indexer: nn.Module | None) -> bool:
    """Whether a DSA layer is made of what the block-wise arithmetic works on, and of nothing that it does not know.

    A native S layer has no indexer. Whether an indexer scores as ours does, `find_rotation` tells.
    """
    if not all(hasattr(owner, name) for name in _ATTENTION_PARTS) or hasattr(owner, "sinks"):
        return False
    if indexer is None:
        return True
    taken = arguments(indexer).keys()
    source = "q_resid" in taken or hasattr(indexer, "q_input_norm")  # of queries: a latent, or hidden states
    return source and taken >= _INDEXER_ARGUMENTS and all(hasattr(indexer, name) for name in _INDEXER_PARTS)


def arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a call of the module takes, by name."""
    return inspect.signature(module.forward).parameters


def turns(indexer: Any) -> bool:
    """Whether RoPE turns this layer's queries and keys: some families have layers without."""
    return bool(getattr(indexer, "use_rope", True))


def is_windowed(layer: nn.Module) -> bool:
    """Whether a layer of another kind attends to a sliding window, which the block-wise arithmetic knows too."""
    return any(
        isinstance(getattr(module, "sliding_window", None), int) and hasattr(module, "expand_kv")
        for module in layer.modules()
    )


@dataclass(frozen=True)
class Blockwise:
    """The block-wise arithmetic of one model: its indexer's RoPE layout, and how many numbers a block may hold."""

    rotate: Rotate
    block_elements: int

    def select(self, indexer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a call of the indexer with these arguments returns: int32 [B, S, k], of [B, S, D] states."""
        queries, keys, weights = self.projections(indexer, *args, **kwargs)
        return ops.select(queries, keys, weights, indexer.index_topk, self.block_elements)

    def projections(self, indexer: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What scores are made of: queries [B, S, H, D], keys [B, S, D], and the heads' weights [B, S, H], scaled."""
        call = inspect.signature(indexer.forward).bind(*args, **kwargs).arguments
        hidden_states, angles = call["hidden_states"], call["position_embeddings"]
        source = call["q_resid"] if "q_resid" in call else indexer.q_input_norm(hidden_states)
        queries = indexer.wq_b(source).view(*hidden_states.shape[:2], indexer.n_heads, indexer.head_dim)
        if hasattr(indexer, "softmax_scaling"):  # grows with the position, by what each head has learned
            queries = indexer.softmax_scaling(queries, call["position_ids"], head_dim_first=False)
        keys = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)  # [B, S, 1, D]
        weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
        return (
            self._rotated(indexer, queries, angles),
            self._rotated(indexer, keys, angles).squeeze(2),
            weights * (indexer.n_heads**-0.5 * indexer.softmax_scale),
        )

    def _rotated(self, indexer: Any, states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if not turns(indexer):
            return states
        rope, rest = states.split([indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim], dim=-1)
        return torch.cat([self.rotate(rope, *angles), rest], dim=-1)


@dataclass(frozen=True)
class LatentAttention:
    """Core attention of one layer over compressed latents, under any selection.

    query [B, H, S, N + R]; latents [B, 1, S, L] and the RoPE part of keys [B, 1, S, R], as `expand_kv` is called with.
    """

    blockwise: Blockwise
    owner: Any
    query: torch.Tensor
    latents: torch.Tensor
    rope_keys: torch.Tensor
    scaling: float

    def __call__(self, selection: torch.Tensor) -> torch.Tensor:
        """[B, S, H, V] under a selection int [B, S, k]."""
        elements = self.blockwise.block_elements
        if self._gathers(selection):
            rows = self._rows(self.latents, self.rope_keys)
            return ops.gather_attention(self.query, rows, selection, *self._up_projections, self.scaling, elements)
        keys, values = self._expanded(self.latents, self.rope_keys)
        return ops.dense_attention(self.query, keys, values, selection, self.scaling, elements)

    def kept_mass(self, own: torch.Tensor, first: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Of the attention under its own selection, what any other one keeps: a function, [B, S, k] to [B, S - first].

        Float32, mean over the heads; of the queries from `first` on, which must see all that is in their selections.
        """
        elements, rows = self.blockwise.block_elements, self._rows(self.latents, self.rope_keys)
        weights = ops.attention_weights(self.query, rows, own, self._up_projections[0], self.scaling, elements)
        mine = weights[:, first:], own[:, first:]
        return lambda other: ops.kept_mass(*mine, other[:, first:], own.shape[1], elements)

    def prepared(self, output: torch.Tensor, selection: torch.Tensor) -> Core:
        """The same for many selections as large as this one, which gave `output`: what follows from none is made once.

        Blocks of queries that have no choice, since they see no more tokens than a selection holds, stay as they are.
        """
        elements, topk = self.blockwise.block_elements, selection.shape[-1]
        if self._gathers(selection):
            rows, (up_key, up_value) = self._rows(self.latents, self.rope_keys), self._up_projections
            blocks = [block for block in ops.gather_blocks(rows, selection, elements) if block[1] > topk]
            absorbed = {first: ops.absorb(self.query[:, :, first:last], up_key) for first, last in blocks}

            def attend(chosen: torch.Tensor, first: int, last: int) -> torch.Tensor:
                return ops.gather_block(absorbed[first], rows, chosen[:, first:last], first, up_value, self.scaling)
        else:
            keys, values = self._expanded(self.latents, self.rope_keys)
            blocks = [block for block in ops.dense_blocks(selection, elements) if block[1] > topk]

            def attend(chosen: torch.Tensor, first: int, last: int) -> torch.Tensor:
                seen = (keys[:, :, :last], values[:, :, :last])
                return ops.dense_block(self.query[:, :, first:last], *seen, chosen[:, first:last], first, self.scaling)

        def attention(chosen: torch.Tensor) -> torch.Tensor:
            found = output.clone()
            for first, last in blocks:
                found[:, first:last] = attend(chosen, first, last)
            return found

        return attention

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What gradients are taken of: query, latents, RoPE part of keys."""
        return self.query, self.latents, self.rope_keys

    def detached(self) -> LatentAttention:
        """The same without a graph."""
        query, latents, rope_keys = (tensor.detach() for tensor in self.inputs)
        return replace(self, query=query, latents=latents, rope_keys=rope_keys)

    def pull_back(self, selection: torch.Tensor, cotangents: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """For each cotangent [B, S, H, V], the gradients of `inputs`; each block of queries is computed once."""
        elements, gathers = self.blockwise.block_elements, self._gathers(selection)
        latents, rope_keys = (tensor.detach().requires_grad_() for tensor in (self.latents, self.rope_keys))
        with torch.enable_grad():
            made = (self._rows(latents, rope_keys),) if gathers else self._expanded(latents, rope_keys)

        up_key, up_value = self._up_projections

        def gather(part: torch.Tensor, rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
            absorbed = ops.absorb(part, up_key)
            return ops.gather_block(absorbed, rows, selection[:, first:last], first, up_value, self.scaling)

        def dense(part: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, last: int) -> torch.Tensor:
            return ops.dense_block(part, keys, values, selection[:, first:last], first, self.scaling)

        ranges = ops.gather_blocks(made[0], selection, elements) if gathers else ops.dense_blocks(selection, elements)
        pulled = ops.pull_back(
            gather if gathers else dense,
            self.query,
            [tensor.detach() for tensor in made],
            # a selection may name tokens behind the query, up to its own length
            [(first, last, max(last, selection.shape[-1]) if gathers else last) for first, last in ranges],
            cotangents,
        )
        return [(of_query, *ops.gradients(made, (latents, rope_keys), rest)) for of_query, *rest in pulled]

    def _gathers(self, selection: torch.Tensor) -> bool:
        heads, length, key_dim = self.query.shape[1:]
        sizes = (key_dim, self.owner.v_head_dim, self.latents.shape[-1], self.rope_keys.shape[-1])
        return shape.gathering_pays(length, selection.shape[-1], heads, *sizes)

    def _rows(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents, rope_keys], dim=-1).squeeze(1)  # [B, S, L + R]

    def _expanded(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return type(self.owner).expand_kv(self.owner, latents, rope_keys)

    @property
    def _up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, N, L] and [H, V, L], the halves of kv_b_proj."""
        heads, latent, value_dim = self.query.shape[1], self.latents.shape[-1], self.owner.v_head_dim
        no_rope = self.query.shape[-1] - self.rope_keys.shape[-1]
        up_key, up_value = self.owner.kv_b_proj.weight.view(heads, -1, latent).split([no_rope, value_dim], dim=1)
        return up_key, up_value


@contextlib.contextmanager
def attending(config: Any, owners: Sequence[Any], blockwise: Blockwise, observer: Observer | None) -> Iterator[None]:
    """Within the block the model's attention modules run ours, and the observer hears of every DSA layer.

    `owners` are the attention modules of these: their `expand_kv` hands on the compressed latents that it gets.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        owner: Any, query: Any, key: Any, value: Any, mask: Any, *, indices: Any, scaling: float, **more: Any
    ) -> tuple[torch.Tensor, None]:
        window = more.pop("sliding_window", None) if indices is None else None  # of a layer of another kind
        if unknown := sorted(name for name, value in more.items() if name not in _HARMLESS and value is not None):
            raise ModelError(  # sinks, windows, whatever else a family hands over by name
                f"{type(owner).__name__} asks its attention for {', '.join(unknown)}, which is not done here: "
                "give --kernels reference"
            )
        if window is not None:
            return ops.window_attention(query, key, value, window, scaling), None
        core = LatentAttention(blockwise, owner, query, key, value, scaling)
        if observer is None:
            return core(indices), None
        with torch.no_grad():
            output = core(indices)
        if torch.is_grad_enabled():  # a leaf: what comes back to it, `LatentAttention.pull_back` takes on by blocks
            output.requires_grad_()
        observer(output, indices, core)
        return output, None

    own = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    config._attn_implementation = NAME
    for owner in owners:
        owner.expand_kv = lambda latents, rope_keys: (latents, rope_keys)
    try:
        yield
    finally:
        for owner in owners:
            del owner.expand_kv
        config._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[NAME]


@torch.inference_mode()
def find_rotation(indexer: Any) -> Rotate:
    """The RoPE layout under whose scores the indexer's own choices are the best ones, on a short random input.

    Nothing in a config tells the layout. Scores are compared, not tokens: among equal scores any choice is right.
    Raises ModelError where no layout fits: the indexer then does something else.
    """
    inputs = _probe(indexer)
    topk, indexer.index_topk = indexer.index_topk, PROBE_TOPK
    try:
        own = indexer(**inputs)[:, PROBE_TOPK:].long()  # the queries that have a choice
    finally:
        indexer.index_topk = topk
    gaps = {}  # of the chosen tokens' scores to the highest ones, at most, in units of the scores' spread
    for rotate in (ops.rotate_interleaved, ops.rotate_half_split):
        queries, keys, weights = Blockwise(rotate, 1).projections(indexer, **inputs)
        scores = ops.mask_future(ops.index_scores(queries.float(), keys.float(), weights), 0)[:, PROBE_TOPK:]
        chosen = scores.gather(-1, own).sort(dim=-1, descending=True).values
        highest = scores.topk(PROBE_TOPK, dim=-1).values
        gaps[rotate] = float((highest - chosen).abs().max() / scores[scores.isfinite()].std())
    best = min(gaps, key=gaps.__getitem__)
    if not gaps[best] < PROBE_TOLERANCE:
        raise ModelError(
            "the block-wise arithmetic does not choose what this model's own indexers choose: give --kernels reference"
        )
    return best


def scores_alike(indexer: nn.Module) -> bool:
    """Whether an indexer of this make, its weights aside, chooses as the block-wise arithmetic does."""
    try:
        find_rotation(random_copy(indexer))
    except ModelError:
        return False
    return True


def random_copy(indexer: nn.Module) -> nn.Module:
    """An indexer of the same make on the CPU, in float32, with random weights: its RoPE layout does not follow them.

    So the layout is known of a model whose weights are on meta, and is the same on every device.
    """
    copied = copy.deepcopy(indexer)
    generator = torch.Generator().manual_seed(0)
    for module in copied.modules():
        for name, weight in module.named_parameters(recurse=False):
            values = torch.randn(weight.shape, generator=generator) * max(weight.shape[-1], 1) ** -0.5
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return copied.to("cpu")


def _probe(indexer: Any) -> dict[str, Any]:
    """Random hidden states, query residuals and angles, one sequence, the same every time; and the causal mask."""
    weight, rope = indexer.wk.weight, indexer.qk_rope_head_dim
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, PROBE_TOKENS, *shape, generator=generator).to(weight.device, weight.dtype)

    turns = noise(rope // 2).float().repeat(1, 1, 2)
    inputs = {
        "position_embeddings": (turns.cos().to(weight.dtype), turns.sin().to(weight.dtype)),
        "hidden_states": noise(weight.shape[1]),
        "q_resid": noise(indexer.wq_b.weight.shape[1]),
        "attention_mask": torch.ones(1, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device=weight.device).tril_(),
        "position_ids": torch.arange(PROBE_TOKENS, device=weight.device).unsqueeze(0),
    }
    return {name: value for name, value in inputs.items() if name in arguments(indexer)}
