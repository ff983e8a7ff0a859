"""Pipeline stages of a serving layout: how engines cut the layers, where a stage would start on S, and the repair."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.engines.engine import ExportError, Split
from icsearch.runs.record import RunRecord

PIPELINE_SIZES = (2, 4, 8)


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
        ends = [*numbers, num_layers]
        if numbers[0] != 0 or any(a >= b for a, b in pairwise(ends)):
            raise ExportError(
                f"--serve-pp {','.join(map(str, numbers))}: expected first layers that begin with 0, increase, and "
                f"stay below {num_layers}, the number of layers"
            )
        return [b - a for a, b in pairwise(ends)]
    (stages,) = numbers
    if not 1 <= stages <= num_layers:
        raise ExportError(f"--serve-pp {text} is out of range: give 1 to {num_layers} stages for {num_layers} layers")
    if stages == 1:
        return [num_layers]
    if split is None:
        raise ExportError(
            f"how {title} cuts {num_layers} layers into {stages} stages is not known here: give the first layer "
            f"of each, as --serve-pp {_example(num_layers, stages)}"
        )
    return split(num_layers, stages)


def _example(num_layers: int, stages: int) -> str:
    """First layers of so many stages (a few, where that are many), as even as can be."""
    sizes = split_front(num_layers, min(stages, 4, num_layers))
    return ",".join(map(str, accumulate([0, *sizes[:-1]])))


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
        f"on S (layer{plural} {layers})"
    )


Losses = Mapping[str, float]  # letters to nats per token, all on the same sequences


def losses_of_file(file: PatternFile) -> dict[str, float]:
    """The losses in a pattern.json: where the search began, every step, and the end; empty where it has none."""
    found = {step.pattern: step.loss for step in file.steps}
    if file.steps and file.baseline_loss is not None:
        first = file.steps[0]
        found[first.pattern[: first.layer] + FULL + first.pattern[first.layer + 1 :]] = file.baseline_loss
    if file.loss is not None:
        found[file.pattern.letters] = file.loss
    return found


def losses_of_run(record: RunRecord, num_layers: int) -> dict[str, float]:
    """The losses in a run's journal: of every pattern of so many layers that was scored on all its sequences."""
    complete = [letters for letters in record.nll if record.nll.is_complete(letters) and len(letters) == num_layers]
    return {letters: record.loss(letters) for letters in complete}


def flip_costs(pattern: Pattern, losses: Losses) -> dict[int, float]:
    """What sharing each layer costs around a pattern, in nats per token, by position; unknown ones are left out.

    That is the difference of two measured losses, of patterns that differ in this layer alone. Of all such pairs it
    is the one that is most like `pattern` around the layer: first in how far away the F before and the F behind it
    are, which says whose selection is borrowed and by how many layers, then in all letters, then the one with the
    fewest F.
    """
    best: dict[int, tuple[int, int, int, str, str]] = {}
    for letters in losses:
        away = sum(a != b for a, b in zip(letters, pattern.letters, strict=True))
        for layer, letter in enumerate(letters):
            shared = letters[:layer] + SHARED + letters[layer + 1 :]
            if letter == FULL and shared in losses:
                near = (_context(letters, pattern.letters, layer), away, letters.count(FULL), letters, shared)
                best[layer] = min(best.get(layer, near), near)
    return {layer: losses[shared] - losses[letters] for layer, (*_, letters, shared) in best.items()}


def _context(letters: str, others: str, layer: int) -> int:
    """By how many layers the F before and the F behind a layer lie elsewhere in the other pattern."""
    before = abs(letters.rfind(FULL, 0, layer) - others.rfind(FULL, 0, layer))
    behind = [len(text) if (at := text.find(FULL, layer + 1)) < 0 else at for text in (letters, others)]
    return before + abs(behind[0] - behind[1])


ADD, SAME, NONE = "add", "same", "none"
REPAIRS = (ADD, SAME, NONE)


@dataclass(frozen=True)
class Repair:
    """A repaired pattern, the positions that changed, and its loss in nats per token.

    `loss` is None where the run's losses do not say; `measured` is False where it is an estimate.
    """

    pattern: Pattern
    made_full: tuple[int, ...]
    made_shared: tuple[int, ...] = ()
    loss: float | None = None
    measured: bool = False


def add_full(pattern: Pattern, must_be_full: Collection[int], losses: Losses) -> Repair:
    """With F at these positions, and all other letters as they are."""
    missing = tuple(sorted(layer for layer in set(must_be_full) if not pattern.is_full(layer)))
    at, loss = pattern, losses.get(pattern.letters)
    for layer in missing:
        at = Pattern.from_full_layers({*at.full_layers, layer}, len(at))
        loss = _loss_of(at, loss, flip_costs(at, losses).get(layer), -1, losses)
    return Repair(at, missing, loss=loss, measured=at.letters in losses)


def move_full(pattern: Pattern, must_be_full: Collection[int], losses: Losses) -> Repair | None:
    """With F at these positions and S at as many others: one by one the cheapest to share; layer 0 stays.

    None where the losses do not say what it costs to share as many other layers.
    """
    added = add_full(pattern, must_be_full, losses)
    at, loss, given_up = added.pattern, added.loss, []
    for _ in added.made_full:
        costs = flip_costs(at, losses)
        free = [layer for layer in at.full_layers if layer in costs and layer not in {0, *must_be_full}]
        if not free:
            return None
        cheapest = min(free, key=lambda layer: (costs[layer], layer))
        at = at.flip(cheapest)
        loss = _loss_of(at, loss, costs[cheapest], 1, losses)
        given_up.append(cheapest)
    return Repair(at, added.made_full, tuple(sorted(given_up)), loss, at.letters in losses)


def _loss_of(at: Pattern, before: float | None, cost: float | None, sign: int, losses: Losses) -> float | None:
    """The measured loss of a pattern, else the one before it and what the flip between them costs."""
    if at.letters in losses:
        return losses[at.letters]
    return None if before is None or cost is None else before + sign * cost
