"""A loss that guessing would beat: the note that a run or an evaluation keeps of it, and how a report knows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

MEANS_NOTHING = "no pattern found on them means anything"


def guessing_notes(loss: float, vocab_size: int) -> list[str]:
    """Where the unmodified model's loss, in nats per token, is above that of guessing among all tokens."""
    guessing = math.log(vocab_size)
    if not loss > guessing:
        return []
    return [
        f"the unmodified model's loss of {loss:.4f} nats per token is above {guessing:.4f}, that of guessing among its "
        f"{vocab_size} tokens: these are probably not its text, its tokens or its tokenizer, and {MEANS_NOTHING}"
    ]


def split_notes(notes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(cautions, other notes): those of `guessing_notes`, which belong beside the result, and the rest.

    A journal holds no vocabulary size, so that the note itself is what tells.
    """
    cautions = tuple(note for note in notes if note.endswith(MEANS_NOTHING))
    return cautions, tuple(note for note in notes if note not in cautions)
