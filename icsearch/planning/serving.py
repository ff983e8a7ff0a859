"""What sharing saves where a model is served: bytes of the cache and of weights, and the tokens that then fit.

It holds for engines that build no indexer for an S layer, and keep no index keys of it. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.model.shape import ModelShape
from icsearch.planning.work import Widths

INDEX_SCALE = 4  # bytes: the float32 scale of a token's index key in FP8, as engines store it


@dataclass(frozen=True)
class Footprint:
    """Counted bytes of a pattern: of one token in the cache, and of the indexers' weights.

    `latents` are all layers' keys and values of core attention, `index_keys` those of F layers' indexers, of which S
    layers keep none.
    """

    latents: float
    index_keys: float
    index_weights: float

    @property
    def per_token(self) -> float:
        return self.latents + self.index_keys


def footprint(shape: ModelShape, pattern: Pattern, weight_bytes: float, widths: Widths | None = None) -> Footprint:
    """Of a model whose indexers' weights take `weight_bytes` each; a cache in 16 bits, index keys in FP8 by default."""
    widths, full = widths or Widths(), len(pattern.full_layers)
    scale = INDEX_SCALE if widths.index_keys == 1 else 0
    return Footprint(
        latents=shape.layers * shape.latent * widths.latents,
        index_keys=full * (shape.index_head_dim * widths.index_keys + scale),
        index_weights=full * (shape.index_weights + 2 * shape.index_head_dim) * weight_bytes,
    )


@dataclass(frozen=True)
class Saved:
    """What one pattern saves of another one's footprint; counted."""

    index_keys: float  # bytes a token
    per_token: float  # bytes that a token takes before, in all
    index_weights: float

    @classmethod
    def between(cls, before: Footprint, after: Footprint) -> Saved:
        return cls(before.index_keys - after.index_keys, before.per_token, before.index_weights - after.index_weights)

    @property
    def share(self) -> float:
        """Of a token's cache."""
        return self.index_keys / self.per_token

    @property
    def more_tokens(self) -> float:
        """How many times as many tokens the same cache holds, weights aside."""
        return self.per_token / (self.per_token - self.index_keys)


def tokens(memory: float, weights: float, cached: Footprint, removed_weights: float = 0) -> int:
    """Tokens whose cache fits into so many bytes beside the weights, of which some may be removed; 0 for none."""
    return max(0, int((memory - weights + removed_weights) // cached.per_token))
