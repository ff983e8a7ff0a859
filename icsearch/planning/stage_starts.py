"""Pipeline blocks of a search that begin with a layer which the checkpoint itself shares: what is said of them.

A search keeps the first layer of each block F, so that a serving stage can begin there. A layer that comes without an
indexer cannot be kept F: a server that is cut there would begin that stage without a selection, and no repair helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.engines.pipeline import aligned_partition


def stage_notes(start: dict[str, Any]) -> list[str]:
    """The note of a run, by the first event of its journal; none where every block begins on F."""
    pattern, blocks = Pattern(start["start_pattern"]), [first for first, _ in start.get("blocks") or ()]
    return shared_starts(pattern, blocks, start["layer_indices"])


def stage_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    """The same as a row of the plan."""
    return [("stages", text) for text in stage_notes(start)]


def shared_starts(start: Pattern, firsts: Sequence[int], layer_indices: Sequence[int]) -> list[str]:
    """Which blocks begin with a native S layer, and what to do, in one text; none where no block does.

    `firsts` are the first positions of the blocks in the pattern, `layer_indices` the decoder layers of all positions.
    """
    wrong = [number for number, first in enumerate(firsts) if not start.is_full(first)]
    if not wrong:
        return []
    blocks = ", ".join(str(number + 1) for number in wrong)
    layers = ", ".join(_named(firsts[number], layer_indices) for number in wrong)
    one = len(wrong) == 1
    return [
        f"{'block' if one else 'blocks'} {blocks} of --stages {len(firsts)} {'begins' if one else 'begin'} with "
        f"{'layer' if one else 'layers'} {layers}, which the checkpoint itself shares: F cannot be kept there, and a "
        f"serving stage that begins there would have no selection to reuse; {_elsewhere(start, firsts, layer_indices)}"
    ]


def _named(position: int, layer_indices: Sequence[int]) -> str:
    """A layer as its letter is counted; with its number in the decoder, where other layers lie between."""
    decoder = layer_indices[position]
    return str(position) if decoder == position else f"{position} (decoder layer {decoder})"


def _elsewhere(start: Pattern, firsts: Sequence[int], layer_indices: Sequence[int]) -> str:
    """Where else to cut: before the nearest layers that have an indexer."""
    ends = [*firsts[1:], len(start)]
    sizes = aligned_partition(start, range(len(start)), [end - first for first, end in zip(firsts, ends, strict=True)])
    if sizes is None:
        return f"too few layers have an indexer for {len(firsts)} stages: give fewer"
    cuts = [sum(sizes[:number]) for number in range(len(sizes))]
    kept = ",".join(map(str, cuts[1:]))
    served = ",".join(["0", *(str(layer_indices[cut]) for cut in cuts[1:])])
    return (
        f"cut the server at layers {served} in place, where it takes its cuts by hand: search with --keep-full {kept}, "
        f"or let icsearch export --serve-pp {served} repair the pattern"
    )
