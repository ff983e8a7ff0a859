"""What an indexer's selection holds: tokens, compressed entries, pools, blocks, or a mask of tokens. No torch here.

Nothing but its reach is needed to search: up to how many tokens a query has no choice, and what a selection takes in
memory. An S layer hands on whatever an F layer's indexer returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icsearch.core.errors import ModelError

INT32, INT64, BOOL = 4, 8, 1  # bytes


@dataclass(frozen=True)
class SelectionForm:
    """A selection of one query, as an indexer returns it.

    `kept`: the first `kept` queries of a sequence see no more than a selection holds, so they have no choice; a
    sequence must be longer. `most` numbers of `width` bytes, of which there are no more than one for `rate` tokens
    where the indexer cuts them to the sequence; a mask is one byte for each token (`most` 0).
    """

    holds: str  # in words
    kept: int
    most: int
    width: int
    rate: int = 1
    heads: int = 1  # selections that a query has, one for each of so many groups of heads
    padded: bool = False  # as long as it can be, whatever the sequence

    @property
    def plain(self) -> bool:
        """Whether it is so many tokens and nothing else, as in DeepSeek-V3.2 and GLM-5."""
        return (self.most, self.width, self.rate, self.heads, self.padded) == (self.kept, INT32, 1, 1, False)

    def bytes_per_query(self, seq_len: int) -> int:
        """What one query's selection takes in sequences of this length."""
        if not self.most:
            return seq_len * self.width
        numbers = self.most if self.padded else min(self.most, -(-seq_len // self.rate))
        return self.heads * numbers * self.width


# Builds the form from the numbers that an indexer has under these names.
_Build = Callable[[Mapping[str, int]], SelectionForm]


def _pools(one: Mapping[str, int]) -> SelectionForm:
    """Whole pools of consecutive tokens, and the tokens of the last, unfinished one."""
    tail = one["index_kpool"] - 1
    topk = one["index_topk"]
    words = f"{topk} tokens in pools of {one['index_kpool']}, and an unfinished pool"
    return SelectionForm(words, topk + tail, topk + tail, INT32, padded=True)


def _entries(one: Mapping[str, int]) -> SelectionForm:
    """Compressed entries, each of so many tokens; those of an unfinished window cannot be chosen."""
    rate, topk = one["compress_rate"], one["index_topk"]
    words = f"{topk} compressed entries of {rate} tokens"
    return SelectionForm(words, topk * rate + rate - 1, topk, INT64, rate)


def _mask(one: Mapping[str, int]) -> SelectionForm:
    """A mask of all tokens: blocks up to a budget, and the tokens of the last, unfinished one."""
    rate, budget = one["compress_ratio"], one["token_budget"]
    words = f"a mask of {budget} tokens in blocks of {rate}, and an unfinished block"
    return SelectionForm(words, budget + rate - 1, 0, BOOL)


def _blocks(one: Mapping[str, int]) -> SelectionForm:
    """Numbers of blocks of tokens, for each group of heads."""
    size, topk = one["block_size"], one["topk_blocks"]
    words = f"{topk} blocks of {size} tokens for each of {one['num_heads']} groups of heads"
    return SelectionForm(words, topk * size, topk, INT64, size, one["num_heads"])


def _tokens(one: Mapping[str, int]) -> SelectionForm:
    topk = one["index_topk"]
    return SelectionForm(f"{topk} tokens", topk, topk, INT32)


# The names that tell a form, the more telling ones first.
_FORMS: tuple[tuple[tuple[str, ...], _Build], ...] = (
    (("index_topk", "index_kpool"), _pools),
    (("index_topk", "compress_rate"), _entries),
    (("token_budget", "compress_ratio"), _mask),
    (("topk_blocks", "block_size", "num_heads"), _blocks),
    (("index_topk",), _tokens),
)
_HEADS = ("n_heads", "num_heads", "index_n_heads")
_HEAD_DIM = ("head_dim", "index_head_dim")


def read_form(indexer: Any) -> SelectionForm:
    """The form that an indexer's own numbers tell; raises ModelError where they tell none, or are no counts."""
    for names, build in _FORMS:
        if all(hasattr(indexer, name) for name in names):
            return build({name: _count(indexer, name) for name in names})
    known = "; ".join(" and ".join(names) for names, _ in _FORMS)
    raise ModelError(
        f"{type(indexer).__name__} does not say how many tokens it selects: expected the attributes {known}"
    )


def index_heads(indexer: Any) -> tuple[int, int]:
    """(heads, their dimension) of an indexer, 0 where it does not tell: estimates of memory follow from them."""
    return _first(indexer, _HEADS), _first(indexer, _HEAD_DIM)


def _first(indexer: Any, names: tuple[str, ...]) -> int:
    return next((_count(indexer, name) for name in names if hasattr(indexer, name)), 0)


def _count(indexer: Any, name: str) -> int:
    value = getattr(indexer, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"its indexer has {name} {value}, expected positive numbers: use the config of these weights")
    return value
