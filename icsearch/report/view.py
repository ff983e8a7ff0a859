"""A replayed run as the numbers that a report shows. Everything is computed from the journal; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.kink import MIN_POINTS, Kink, find_kink
from icsearch.runs.record import RunRecord

SIMILARITY_METHOD = "dp-baseline"  # chooses a whole pattern: no steps, no candidates


@dataclass(frozen=True)
class Point:
    """A pattern on the loss curve. Step 0 is the baseline, without a layer. Losses in nats per token.

    A similarity baseline has one step, its pattern, and it has no layer either.
    """

    step: int
    layer: int | None
    decoder_layer: int | None
    pattern: Pattern
    loss: float
    difference: Difference  # to the baseline
    kl: Difference | None = None  # mean KL to the baseline's predictions, where the search went by it

    @property
    def full(self) -> int:
        return len(self.pattern.full_layers)

    @property
    def shared(self) -> int:
        return len(self.pattern.shared_layers)


@dataclass(frozen=True)
class Reference:
    """A uniform pattern scored on the same batches, and the searched pattern with as many F layers, where it exists."""

    name: str
    pattern: Pattern
    loss: float
    difference: Difference  # to the baseline
    searched: Point | None
    searched_minus_uniform: Difference | None

    @property
    def label(self) -> str:
        return self.name.replace(":", " ")

    @property
    def avoided(self) -> float | None:
        """Share of the uniform pattern's cost that the search avoids; None where that cost is not above two errors."""
        cost = self.difference
        if self.searched is None or not cost.delta > 2 * cost.std_err:
            return None
        return (cost.delta - self.searched.difference.delta) / cost.delta


@dataclass(frozen=True)
class Cell:
    """One candidate of one step: the objective (loss or KL) with this layer shared too, minus that before the step.

    `given_up_after` is the number of sequences that it is known on, None where that is all of them.
    """

    step: int
    layer: int
    cost: Difference
    committed: bool
    tied: bool
    given_up_after: int | None = None


@dataclass(frozen=True)
class Tie:
    """A step whose winner could not be told from others: (layer, difference in the objective to the winner's)."""

    step: int
    layer: int
    others: tuple[tuple[int, Difference], ...]


@dataclass(frozen=True)
class RunView:
    """All that a report shows of one run. `points` is empty while the baseline is not scored."""

    name: str
    record: RunRecord
    points: tuple[Point, ...]
    references: tuple[Reference, ...]
    cells: tuple[Cell, ...]
    ties: tuple[Tie, ...]
    kink: Kink | None
    refined: Point | None = None  # the pattern behind the swaps of a refinement, where there are any

    @property
    def start(self) -> dict[str, Any]:
        return self.record.start

    @property
    def by_similarity(self) -> bool:
        """Whether the pattern was chosen as a whole, by similarity, and not flip by flip."""
        return bool(self.start["options"]["method"] == SIMILARITY_METHOD)

    @property
    def too_few_for_kink(self) -> bool:
        """Whether no two lines can be told from one, however the curve goes."""
        return len(self.points) < MIN_POINTS

    @property
    def objective(self) -> str:
        """What the search went by, in words."""
        return "KL" if self.record.by_kl else "loss"

    @property
    def steps(self) -> tuple[Point, ...]:
        """The flips in order; none where the pattern was chosen as a whole."""
        return () if self.by_similarity else self.points[1:]

    @property
    def num_layers(self) -> int:
        return len(self.record.start_pattern)

    @property
    def finished(self) -> bool:
        return self.record.finished

    @property
    def final(self) -> Point:
        """The pattern that the run recommends."""
        return self.refined or self.points[-1]

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Pipeline stages as [first, last) positions in the pattern; one block when there is no split."""
        blocks = self.start.get("blocks") or [[0, self.num_layers]]
        return tuple((first, last) for first, last in blocks)

    @property
    def native_shared(self) -> tuple[int, ...]:
        return tuple(self.start["model"].get("native_shared") or ())

    @property
    def baseline_name(self) -> str:
        return "the checkpoint's own pattern" if self.native_shared else "the all-F baseline"

    @property
    def layer_indices(self) -> tuple[int, ...]:
        return tuple(self.start["layer_indices"])

    @property
    def same_retention(self) -> Reference | None:
        """The uniform pattern with exactly as many F layers as the pattern reached, if one was scored."""
        if not self.points:
            return None
        return next((r for r in self.references if r.searched is self.final), None)

    def step_cost(self, step: int) -> Difference | None:
        """What the flip of a step cost: the loss difference to the pattern before it."""
        return next((cell.cost for cell in self.cells if cell.step == step and cell.committed), None)


def view_run(record: RunRecord, name: str = "") -> RunView:
    """Compute the numbers of a report. `name` tells runs apart where a page shows several."""
    by_similarity = record.start["options"]["method"] == SIMILARITY_METHOD
    points = _chosen_points(record) if by_similarity else _points(record)
    cells = _cells(record) if points and not by_similarity else ()
    refined = _refined_point(record, points)
    return RunView(
        name=name,
        record=record,
        points=points,
        references=_references(record, points, refined),
        cells=cells,
        ties=_ties(record),
        kink=_kink(points),
        refined=refined,
    )


def _kink(points: Sequence[Point]) -> Kink | None:
    """The curve's kink; none where its end is not above the baseline by more than two standard errors."""
    if not points or not points[-1].difference.delta > 2 * points[-1].difference.std_err:
        return None
    return find_kink([float(p.shared) for p in points], [p.difference.delta for p in points])


def _points(record: RunRecord) -> tuple[Point, ...]:
    start = record.start_pattern
    if not record.nll.is_complete(start.letters):
        return ()
    loss, kl = record.loss(start.letters), record.mean_kl(start.letters)
    points = [Point(0, None, None, start, loss, Difference(0.0, 0.0), kl)]
    for step in record.steps():
        decoder_layer = record.start["layer_indices"][step.layer]
        difference, kl = Difference(step.delta, step.std_err), record.mean_kl(step.pattern)
        points.append(Point(step.step, step.layer, decoder_layer, Pattern(step.pattern), step.loss, difference, kl))
    return tuple(points)


def _chosen_points(record: RunRecord) -> tuple[Point, ...]:
    """The baseline and the pattern that was chosen as a whole, as far as they are scored."""
    start = _points(record)
    letters = record.pattern.letters
    if not start or record.pattern == record.start_pattern or not record.nll.is_complete(letters):
        return start
    return (*start, Point(1, None, None, record.pattern, record.loss(letters), record.difference(letters)))


def _refined_point(record: RunRecord, points: tuple[Point, ...]) -> Point | None:
    """The pattern behind the last swap, on the step of the last flip; None where no swap was made."""
    if not points or record.refinement is None or not record.refinement.swaps:
        return None
    letters = record.pattern.letters
    return replace(
        points[-1],
        layer=None,
        decoder_layer=None,
        pattern=record.pattern,
        loss=record.loss(letters),
        difference=record.difference(letters),
        kl=record.mean_kl(letters),
    )


def _references(record: RunRecord, points: tuple[Point, ...], refined: Point | None) -> tuple[Reference, ...]:
    """The references that are scored completely; a pattern with two names is shown once."""
    by_full = {point.full: point for point in (*points, refined) if point is not None}
    found: dict[str, Reference] = {}
    for name, letters in record.references.items():
        if not points or not record.nll.is_complete(letters) or letters in found:
            continue
        searched = by_full.get(len(Pattern(letters).full_layers))
        saved = record.difference(searched.pattern.letters, letters) if searched else None
        difference = record.difference(letters)
        found[letters] = Reference(name, Pattern(letters), record.loss(letters), difference, searched, saved)
    return tuple(found.values())


def _cells(record: RunRecord) -> tuple[Cell, ...]:
    commits = {commit.step: commit for commit in record.commits}
    cells = []
    for step in sorted(step for step in record.asked if 0 < step <= len(record.commits) + 1):
        before = record.before(step).letters
        commit = commits.get(step)
        for candidate in record.candidates(step):
            cost = record.objective.difference(candidate.pattern, before)
            committed = commit is not None and commit.layer == candidate.layer
            tied = commit is not None and candidate.layer in commit.ties
            cells.append(Cell(step, candidate.layer, cost, committed, tied))
        for candidate in record.given_up(step) if commit else ():
            known = candidate.sequences
            cost = record.objective.known_difference(candidate.pattern, before, known)
            part = known if known < len(record.tokens) else None  # a reference may be a flip, and is scored on all
            cells.append(Cell(step, candidate.layer, cost, False, False, part))
    return tuple(cells)


def _ties(record: RunRecord) -> tuple[Tie, ...]:
    found = []
    for commit in record.commits:
        if not commit.ties:
            continue
        patterns = {c.layer: c.pattern for c in record.candidates(commit.step)}
        others = tuple(
            (layer, record.objective.difference(patterns[layer], commit.pattern))
            for layer in commit.ties
            if layer in patterns
        )
        found.append(Tie(commit.step, commit.layer, others))
    return tuple(found)


# --- sentences ----------------------------------------------------------------------------------------------------


def headline(view: RunView) -> str:
    """The result in one or two sentences, each number with its error. In-sample: on the batches searched on."""
    if not view.points:
        return "The baseline is not scored yet: there is no result to show."
    final = view.final
    lead = "" if view.finished else f"Not finished; {_progress(view)}: "
    kept = f"{final.full} of {view.num_layers} layers keep their indexer ({numbers.percent(final.pattern.retention)})"
    cost = f"{lead}{kept}; {_change(final.difference, view.baseline_name, view.points[0].loss)}."
    return " ".join(sentence for sentence in (cost, kl_sentence(view), _against_uniform(view)) if sentence)


def kl_sentence(view: RunView) -> str:
    """What the search went by, where that is not the loss; empty otherwise."""
    kl = view.final.kl
    if kl is None:
        return ""
    amount = numbers.with_error(kl.delta, kl.std_err, sign=False)
    return f"Chosen by the KL to {view.baseline_name}, which comes to {amount} nats per token."


def _progress(view: RunView) -> str:
    if view.by_similarity:
        return "pattern chosen" if len(view.points) > 1 else "no pattern scored yet"
    return f"after {numbers.plural(view.final.step, 'flip')}"


def _change(difference: Difference, baseline_name: str, baseline_loss: float) -> str:
    amount = numbers.with_error(abs(difference.delta), difference.std_err, sign=False)
    baseline = f"{baseline_name} at {numbers.loss(baseline_loss)}"
    if difference.delta == 0 and difference.std_err == 0:
        return f"that is {baseline} nats per token"
    if math.isnan(difference.std_err):
        signed = numbers.difference(difference)
        return f"the loss changes by {signed} nats per token from {baseline} (one sequence: no standard error)"
    if difference.is_tie:
        signed = numbers.difference(difference)
        return f"the loss is that of {baseline} within one standard error ({signed} nats per token)"
    rises = "rises" if difference.delta > 0 else "falls"
    return f"the loss {rises} by {amount} nats per token from {baseline}"


def _against_uniform(view: RunView) -> str:
    reference = view.same_retention
    if reference is None or reference.pattern == view.final.pattern:
        return ""
    uniform, difference = "The uniform pattern with as many F layers", reference.difference
    if difference.delta < -2 * difference.std_err:
        amount = numbers.with_error(-difference.delta, difference.std_err, sign=False)
        return f"{uniform} has a lower loss than {view.baseline_name}, by {amount}."
    if abs(difference.delta) <= 2 * difference.std_err:
        return f"{uniform} costs nothing measurable ({numbers.difference(difference)})."
    what_it_does = "costs" if difference.delta > 0 else "changes the loss by"  # one sequence: no error to hold it to
    text = f"{uniform} {what_it_does} {numbers.difference(difference)}"
    if reference.avoided is None or reference.avoided <= 0:
        return f"{text}."
    what = "the choice by similarity" if view.by_similarity else "the search"
    share = "all" if reference.avoided >= 1 else numbers.percent(reference.avoided)
    return f"{text}: {what} avoids {share} of that."


def kink_sentence(view: RunView) -> str:
    """Where the curve bends, or that no clear kink is there."""
    if view.too_few_for_kink:
        return "Too few steps for a kink."
    if view.kink is None:
        return "No clear kink: two lines do not fit this curve clearly better than one, or it does not turn steeper."
    kink, at = view.kink, round(view.kink.x)
    return (
        f"The curve bends at {numbers.plural(at, 'shared layer')} ({view.num_layers - at} F left): about "
        f"{numbers.compact(kink.slope_before)} nats per token for each flip before, "
        f"{numbers.compact(kink.slope_after)} after."
    )
