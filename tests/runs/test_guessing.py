"""The note on a loss that guessing would beat: made where it is above, and told from all other notes."""

from __future__ import annotations

import math

import pytest

from icsearch.runs.results import guessing_notes, split_notes


@pytest.mark.parametrize("vocab_size", [2, 1024, 154880])
def test_only_a_loss_above_that_of_guessing_is_noted(vocab_size: int) -> None:
    guessing = math.log(vocab_size)
    assert guessing_notes(guessing, vocab_size) == []
    (note,) = guessing_notes(guessing + 0.5, vocab_size)
    assert f"{guessing + 0.5:.4f} nats per token is above {guessing:.4f}" in note


def test_the_note_is_told_from_others() -> None:
    caution = guessing_notes(9.0, 1024)[0]
    others = ("weights were streamed", "a note that no pattern found on them means anything, and goes on")
    assert split_notes([others[0], caution, others[1]]) == ((caution,), others)
    assert split_notes([]) == ((), ())
