"""What an indexer's selection holds: tokens, compressed entries, pools, blocks, or a mask of tokens. No torch here.

Nothing but its reach is needed to search: up to how many tokens a query has no choice, and what a selection takes in
memory. An S layer hands on whatever an F layer's indexer returned.
"""

from __future__ import annotations

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


# The attributes of an indexer that tell the form of its selections, the more telling ones first.
_FORMS = (
    ("index_topk", "index_kpool"),
    ("index_topk", "compress_rate"),
    ("token_budget", "compress_ratio"),
    ("topk_blocks", "block_size", "num_heads"),
    ("index_topk",),
)
_HEADS = ("n_heads", "num_heads", "index_n_heads")
_HEAD_DIM = ("head_dim", "index_head_dim")


def read_form(indexer: Any) -> SelectionForm:
    """The form that an indexer's own numbers tell; raises ModelError where they tell none, or are no counts."""
    names = next((names for names in _FORMS if all(hasattr(indexer, name) for name in names)), ())
    sizes = [_count(indexer, name) for name in names]
    match names:
        case (_, "index_kpool"):  # whole pools of consecutive tokens, and the tokens of the last, unfinished one
            topk, pool = sizes
            most = topk + pool - 1
            words = f"{topk} tokens in pools of {pool}, and an unfinished pool"
            return SelectionForm(words, most, most, INT32, padded=True)
        case (_, "compress_rate"):  # compressed entries; those of an unfinished window cannot be chosen
            topk, rate = sizes
            words = f"{topk} compressed entries of {rate} tokens"
            return SelectionForm(words, topk * rate + rate - 1, topk, INT64, rate)
        case (_, "compress_ratio"):  # a mask of all tokens: blocks up to a budget, and the last, unfinished one
            budget, rate = sizes
            words = f"a mask of {budget} tokens in blocks of {rate}, and an unfinished block"
            return SelectionForm(words, budget + rate - 1, 0, BOOL)
        case (_, "block_size", _):  # numbers of blocks of tokens
            topk, size, groups = sizes
            words = f"{topk} blocks of {size} tokens for each of {groups} groups of heads"
            return SelectionForm(words, topk * size, topk, INT64, size, groups)
        case ("index_topk",):
            (topk,) = sizes
            return SelectionForm(f"{topk} tokens", topk, topk, INT32)
    known = "; ".join(" and ".join(names) for names in _FORMS)
    raise ModelError(
        f"{type(indexer).__name__} does not say how many tokens it selects: expected the attributes {known}"
    )


def index_heads(indexer: Any) -> tuple[int, int]:
    """(heads, their dimension) of an indexer, 0 where it does not tell: estimates of memory follow from them."""
    heads, dimension = (
        next((_count(indexer, name) for name in names if hasattr(indexer, name)), 0) for names in (_HEADS, _HEAD_DIM)
    )
    return heads, dimension


def _count(indexer: Any, name: str) -> int:
    value = getattr(indexer, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"its indexer has {name} {value}, expected positive numbers: use the config of these weights")
    return value
