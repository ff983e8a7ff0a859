"""Pipeline stages of a serving layout: how engines cut the layers, and where a stage would start on S.

The selection is not sent from stage to stage, so the first DSA layer of each stage must be F.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from icsearch.engines.letters import ExportError
from icsearch.pattern import Pattern

PIPELINE_SIZES = (2, 4, 8)
Split = Callable[[int, int], list[int]]  # (layers, stages) to layers per stage


def split_front(num_layers: int, stages: int) -> list[int]:
    """Layers per stage, as even as can be, the larger stages first."""
    size, rest = divmod(num_layers, stages)
    return [size + (stage < rest) for stage in range(stages)]


def split_vllm(num_layers: int, stages: int) -> list[int]:
    """Layers per stage as vLLM divides them: left-over layers go to the stages before the last one, backwards."""
    size, rest = divmod(num_layers, stages)
    sizes = [size] * stages
    for back in range(2, rest + 2):
        sizes[-back] += 1
    return sizes


def serving_sizes(text: str, num_layers: int, title: str, split: Split | None) -> list[int]:
    """Layers per stage of a layout as typed: `4`, cut as the engine does, or each stage's first layer, `0,20,40`.

    Raises ExportError where it does not fit the layers, or how the engine cuts is not known.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 6 for part in parts):
        raise ExportError(
            f"--serve-pp {text[:40]!r}: expected a number of stages, as 2, or first layers, as "
            f"{_example(num_layers, 2)}"
        )
    numbers = [int(part) for part in parts]
    if len(numbers) > 1:
        return _sizes_from_starts(numbers, num_layers)
    if not 1 <= numbers[0] <= num_layers:
        raise ExportError(f"--serve-pp {text} is out of range: give 1 to {num_layers} stages for {num_layers} layers")
    if split is None and numbers[0] > 1:
        raise ExportError(
            f"how {title} cuts {num_layers} layers into {numbers[0]} stages is not known here: give the first layer "
            f"of each, as --serve-pp {_example(num_layers, numbers[0])}"
        )
    return [num_layers] if split is None else split(num_layers, numbers[0])


def _example(num_layers: int, stages: int) -> str:
    """First layers of so many stages (a few, where that are many), as even as can be."""
    sizes = split_front(num_layers, min(stages, 4, num_layers))
    return ",".join(map(str, accumulate([0, *sizes[:-1]])))


def _sizes_from_starts(starts: list[int], num_layers: int) -> list[int]:
    ends = [*starts, num_layers]
    if starts[0] != 0 or any(a >= b for a, b in pairwise(ends)):
        raise ExportError(
            f"--serve-pp {','.join(map(str, starts))}: expected first layers that begin with 0, increase, and stay "
            f"below {num_layers}, the number of layers"
        )
    return [b - a for a, b in pairwise(ends)]


def stage_starts(layer_indices: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The position in the pattern of each stage's first DSA layer, without position 0, which is F anyway."""
    starts = []
    for first in list(accumulate(sizes))[:-1]:
        position = bisect_left(layer_indices, first)
        if 0 < position < len(layer_indices) and position not in starts:
            starts.append(position)
    return starts


def stages_on_shared(pattern: Pattern, layer_indices: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(stage from 1, decoder layer) of each stage whose first DSA layer is S: it would have no selection to reuse."""
    found = []
    first = 0
    for stage, size in enumerate(sizes, start=1):
        position = bisect_left(layer_indices, first)
        first += size
        if position < len(layer_indices) and layer_indices[position] < first and not pattern.is_full(position):
            found.append((stage, layer_indices[position]))
    return found


def usual_sizes_on_shared(pattern: Pattern, layer_indices: Sequence[int], num_layers: int, split: Split) -> list[int]:
    """Of the usual numbers of stages, those in which one would start on S."""
    possible = [stages for stages in PIPELINE_SIZES if stages <= num_layers]
    return [stages for stages in possible if stages_on_shared(pattern, layer_indices, split(num_layers, stages))]


def cut_in_words(numbers: Sequence[int]) -> str:
    """What goes wrong in each of these numbers of stages, in a few words."""
    return f"cut into {' or '.join(map(str, numbers))} pipeline stages, one would start on S"


def aligned_partition(pattern: Pattern, layer_indices: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """Stage sizes near `sizes` where every stage begins on an F layer, or None if the F layers do not allow it."""
    full = [layer_indices[position] for position in pattern.full_layers]
    starts = [0]
    wanted = list(accumulate(sizes))[:-1]
    for later, start in zip(range(len(wanted) - 1, -1, -1), wanted, strict=True):
        free = [layer for layer in full if layer > starts[-1]]
        free = free[: max(0, len(free) - later)]  # one is left for each stage behind this one
        if not free:
            return None
        starts.append(min(free, key=lambda layer: (abs(layer - start), layer)))
    return [end - start for start, end in zip(starts, [*starts[1:], sum(sizes)], strict=True)]


def describe(sizes: Sequence[int], wrong: Sequence[tuple[int, int]]) -> str:
    """Which stages would start on S, in one sentence without its full stop."""
    stages = ", ".join(str(stage) for stage, _ in wrong)
    layers = ", ".join(str(layer) for _, layer in wrong)
    plural = "s" if len(wrong) > 1 else ""
    return (
        f"with {len(sizes)} pipeline stages ({'+'.join(map(str, sizes))} layers), stage{plural} {stages} would start "
        f"on S (layer{plural} {layers}), with no selection to reuse"
    )
