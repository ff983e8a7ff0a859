"""A run as the numbers that a report shows, computed from its journal: nothing is drawn or worded here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report.fisher_view import FisherView, predict, tables_of, view_fisher
from icsearch.runs.record import RunRecord
from icsearch.runs.refinement import Refinement, Trial

if TYPE_CHECKING:
    from icsearch.search.second_order import SecondOrderTable

COMPARED = {"kascade": "Kascade", "fisher": "Fisher"}  # measures beside similarity, as they are called
SIMILARITY_METHOD = "dp-baseline"  # chooses a whole pattern: no steps, no candidates


class Counted:
    """What a pattern keeps, for all that have one."""

    pattern: Pattern

    @property
    def full(self) -> int:
        return len(self.pattern.full_layers)

    @property
    def shared(self) -> int:
        return len(self.pattern.shared_layers)


@dataclass(frozen=True)
class Point(Counted):
    """A pattern on the loss curve. Step 0 is the baseline, without a layer. Losses in nats per token.

    A similarity baseline has one step, its pattern, and it has no layer either.
    """

    step: int
    layer: int | None
    decoder_layer: int | None
    pattern: Pattern
    loss: float
    difference: Difference  # to the baseline
    kl: Difference | None = None  # mean KL to the baseline's predictions, where it was measured


@dataclass(frozen=True)
class Reference(Counted):
    """A uniform pattern scored on the same batches, and the searched pattern with as many F layers, where it exists."""

    label: str
    pattern: Pattern
    loss: float
    difference: Difference  # to the baseline
    searched: Point | None
    searched_minus_uniform: Difference | None

    @property
    def avoided(self) -> float | None:
        """Share of the uniform pattern's cost that the search avoids; None where that cost is not above two errors."""
        cost = self.difference
        if self.searched is None or not cost.delta > 2 * cost.std_err:
            return None
        return (cost.delta - self.searched.difference.delta) / cost.delta


@dataclass(frozen=True)
class CandidateCost:
    """One candidate of one step: the objective (loss or KL) with this layer shared too, minus that before the step."""

    step: int
    layer: int
    cost: Difference
    committed: bool
    tied: bool


@dataclass(frozen=True)
class Tie:
    """A step whose winner could not be told from others: (layer, difference in the objective to the winner's)."""

    step: int
    layer: int
    others: tuple[tuple[int, Difference], ...]


@dataclass(frozen=True)
class SetChange:
    """Loss or KL before and after a refinement on one set of sequences; `change` is None where no swap was made."""

    name: str
    sequences: int
    before: float
    after: float
    change: Difference | None


@dataclass(frozen=True)
class Swap:
    """A move that held-out sequences were asked about; differences of what the run goes by."""

    trial: Trial
    change: Difference
    heldout: Difference


@dataclass(frozen=True)
class Refined:
    """What a refinement did: before and after on both sets, and the swaps made and refused."""

    told: Refinement
    sets: tuple[SetChange, ...]
    made: tuple[Swap, ...]
    refused: tuple[Swap, ...]


@dataclass(frozen=True)
class Prediction(Counted):
    """The summed similarity of a pattern beside its loss; without a similarity for the baseline, which borrows none.

    `kept`: the share of attention that it keeps by Kascade's score, which counts layers by their importance.
    `foretold`: the loss above the baseline's that a second-order table says. Both where the run has them.
    """

    name: str
    pattern: Pattern
    similarity: float | None
    loss: float
    difference: Difference | None
    kept: float | None = None
    foretold: Difference | None = None

    @property
    def mean(self) -> float | None:
        """Similarity of an S layer on average."""
        return self.similarity / self.shared if self.similarity is not None and self.shared else None


@dataclass(frozen=True)
class RunView:
    """All that a report shows of one run. `points` is empty while the baseline is not scored.

    `frontier`, of a search on a second-order table: by number of F layers, the best of all that was measured.
    """

    name: str
    record: RunRecord
    by_similarity: bool  # the pattern was chosen as a whole, not flip by flip
    points: tuple[Point, ...]
    references: tuple[Reference, ...]
    cells: tuple[CandidateCost, ...]
    ties: tuple[Tie, ...]
    kink: Kink | None
    off_curve: Point | None = None  # the pattern found, where it is not the curve's end: chosen otherwise, or swapped
    refinement: Refined | None = None
    frontier: tuple[Point, ...] = ()
    fisher: FisherView | None = None

    @cached_property
    def tables(self) -> list[SecondOrderTable]:
        """A second-order table of each sequence, where the run has one."""
        return tables_of(self.record)

    @property
    def start(self) -> dict[str, Any]:
        return self.record.start

    @property
    def too_few_for_kink(self) -> bool:
        """Whether no two lines can be told from one, however the curve goes."""
        return len(self.points) < 2 * MIN_POINTS_EACH_SIDE - 1

    @property
    def model_name(self) -> str:
        return str(self.start["model"].get("name_or_path", "model"))

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
    def final(self) -> Point:
        """The pattern that the run recommends."""
        return self.off_curve or self.points[-1]

    @property
    def off_path(self) -> tuple[Point, ...]:
        """Of a search on a second-order table, the best of each size and the pattern found, where not on the curve."""
        shown = {point.pattern for point in self.points} | {reference.pattern for reference in self.references}
        points = {point.pattern: point for point in (*self.frontier, self.final)} if self.frontier else {}
        return tuple(point for pattern, point in points.items() if pattern not in shown)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Pipeline stages as [first, last) positions in the pattern; one block when there is no split."""
        blocks = self.start.get("blocks") or [[0, self.num_layers]]
        return tuple((first, last) for first, last in blocks)

    @property
    def native_shared(self) -> tuple[int, ...]:
        return tuple(self.start["model"].get("native_shared") or ())

    @property
    def counted_name(self) -> str:
        """What the tokens are called that losses are over, where it is not all of them; else ""."""
        count = self.start["calibration"].get("count")
        return f"{count} tokens" if count else ""

    @property
    def baseline_name(self) -> str:
        return "the checkpoint's own pattern" if self.native_shared else "the all-F baseline"

    @property
    def same_retention(self) -> Reference | None:
        """The uniform pattern with exactly as many F layers as the pattern reached, if one was scored."""
        return next((r for r in self.references if r.searched is self.final), None)


def view_run(record: RunRecord, name: str = "") -> RunView:
    """Compute the numbers of a report. `name` tells runs apart where a page shows several."""
    by_similarity = record.start["options"]["method"] == SIMILARITY_METHOD
    points = _points(record, by_similarity)
    on_curve = {point.pattern: point for point in points}
    scored = bool(points) and record.nll.is_complete(record.pattern.letters)
    off_curve = _point(record, record.pattern) if scored and record.pattern not in on_curve else None
    frontier: tuple[Point, ...] = ()
    if points and record.by_table:
        frontier = tuple(on_curve.get(pattern) or _point(record, pattern) for pattern in record.frontier().values())
    better = [point for point in frontier if point.pattern.letters not in record.references.values()]
    kink = None  # looked for only where the curve's end is above the baseline by more than two standard errors
    if points and points[-1].difference.delta > 2 * points[-1].difference.std_err:
        kink = find_kink([float(p.shared) for p in points], [p.difference.delta for p in points])
    return RunView(
        name=name,
        record=record,
        by_similarity=by_similarity,
        points=points,
        references=_references(record, (*points, *better, *([off_curve] if off_curve else points[-1:]))),
        cells=_cells(record) if points and not by_similarity else (),
        ties=tuple(
            Tie(
                commit.step,
                commit.layer,
                tuple(
                    (candidate.layer, record.objective.difference(candidate.pattern, commit.pattern))
                    for candidate in record.candidates(commit.step)
                    if candidate.layer in commit.ties
                ),
            )
            for commit in record.commits
            if commit.ties
        ),
        kink=kink,
        off_curve=off_curve,
        refinement=_refinement(record),
        frontier=frontier,
        fisher=view_fisher(record),
    )


def _point(record: RunRecord, pattern: Pattern) -> Point:
    """A pattern beside the curve, on the step of as many flips."""
    letters, step = pattern.letters, len(pattern.shared_layers) - len(record.start_pattern.shared_layers)
    losses = record.loss(letters), record.difference(letters), record.mean_kl(letters)
    return Point(step, None, None, pattern, *losses)


def _points(record: RunRecord, by_similarity: bool) -> tuple[Point, ...]:
    """The baseline, then each flip, or the pattern that was chosen as a whole, as far as they are scored."""
    start, letters = record.start_pattern, record.pattern.letters
    if not record.nll.is_complete(start.letters):
        return ()
    loss, kl = record.loss(start.letters), record.mean_kl(start.letters)
    points = [Point(0, None, None, start, loss, Difference(0.0, 0.0), kl)]
    if by_similarity:
        if record.pattern != start and record.nll.is_complete(letters):
            points.append(Point(1, None, None, record.pattern, record.loss(letters), record.difference(letters)))
        return tuple(points)
    for step in record.steps():
        decoder_layer = record.start["layer_indices"][step.layer]
        difference, kl = Difference(step.delta, step.std_err), record.mean_kl(step.pattern)
        points.append(Point(step.step, step.layer, decoder_layer, Pattern(step.pattern), step.loss, difference, kl))
    return tuple(points)


def _refinement(record: RunRecord) -> Refined | None:
    """What the refinement did; None where the run has none, or has not come so far."""
    refinement, heldout = record.refinement, record.heldout
    if refinement is None or heldout is None or not heldout.nll.is_complete(refinement.start.letters):
        return None
    before, after = refinement.start.letters, refinement.pattern.letters
    sets = []
    for name, known in (("searched on", record), ("held out", heldout)):
        values = [(name, known.loss(before), known.loss(after), known.difference(after, before))]
        old, new = known.mean_kl(before), known.mean_kl(after)
        if old is not None and new is not None:
            values.append((f"{name}, KL", old.delta, new.delta, known.kl.difference(after, before)))
        sets += [
            SetChange(label, len(known.tokens), first, now, None if before == after else change)
            for label, first, now, change in values
        ]
    swaps = [
        Swap(trial, *(known.objective.difference(trial.pattern, trial.before) for known in (record, heldout)))
        for trial in refinement.trials
    ]
    made, refused = (tuple(swap for swap in swaps if swap.trial.made == which) for which in (True, False))
    return Refined(refinement, tuple(sets), made, refused)


def similarity_sum(cosine: Sequence[Sequence[float]], pattern: Pattern) -> float:
    """What a similarity baseline goes by: the sum over S layers of the similarity to their source's selection."""
    pairs = enumerate(pattern.sources())
    return math.fsum(cosine[layer][source] for layer, source in pairs if layer != source)


def kascade_share(kascade: Sequence[Sequence[float]], pattern: Pattern) -> float:
    """The sum of a pattern's scores over all layers, in parts of what it would be if all were F."""
    of_all = math.fsum(row[-1] for row in kascade)
    return math.fsum(kascade[layer][source] for layer, source in enumerate(pattern.sources())) / of_all if of_all else 1


def predictions(view: RunView) -> tuple[Prediction, ...]:
    """What each measure says of the baseline, of the patterns that the measures chose, and of the uniform ones.

    None before similarity and the baseline are known.
    """
    similarity, record = view.record.similarity, view.record
    if similarity is None or not view.points:
        return ()
    baseline, kascade = view.points[0], similarity.get("kascade")
    rows = [Prediction(view.baseline_name, baseline.pattern, None, baseline.loss, None)]
    chosen = [("chosen by similarity", record.pattern)] if len(view.points) > 1 else []
    chosen += [(f"chosen by {COMPARED[name]}", Pattern(event["pattern"])) for name, event in record.compared.items()]
    named = [(name, pattern) for name, pattern in chosen if record.nll.is_complete(pattern.letters)]
    named += [(reference.label, reference.pattern) for reference in view.references]
    for name, pattern in named:
        loss, difference = record.loss(pattern.letters), record.difference(pattern.letters)
        rows.append(Prediction(name, pattern, similarity_sum(similarity["cosine"], pattern), loss, difference))
    if kascade is not None:
        rows = [replace(row, kept=kascade_share(kascade, row.pattern)) for row in rows]
    foretold = predict(view.tables, [row.pattern for row in rows[1:]])
    if foretold:
        rows[1:] = [replace(row, foretold=prices.loss) for row, prices in zip(rows[1:], foretold, strict=True)]
    return tuple(rows)


def _references(record: RunRecord, points: tuple[Point, ...]) -> tuple[Reference, ...]:
    """The references that are scored completely, each with the last point of its size; of two names, one is shown."""
    by_full = {point.full: point for point in points}
    found: dict[str, Reference] = {}
    for name, letters in record.references.items():
        if not points or not record.nll.is_complete(letters) or letters in found:
            continue
        pattern = Pattern(letters)
        searched = by_full.get(len(pattern.full_layers))
        saved = record.difference(searched.pattern.letters, letters) if searched else None
        difference = record.difference(letters)
        found[letters] = Reference(name.replace(":", " "), pattern, record.loss(letters), difference, searched, saved)
    return tuple(found.values())


def _cells(record: RunRecord) -> tuple[CandidateCost, ...]:
    """Every candidate of every step; of the steps of a nested path, the layer that went."""
    commits = {commit.step: commit for commit in record.commits}
    cells = []
    at_work = {step for step in record.asked if 0 < step <= len(record.commits) + 1}
    for step in commits if record.by_table else sorted(at_work):
        before = record.before(step).letters
        commit = commits.get(step)
        for candidate in record.candidates(step):
            cost = record.objective.difference(candidate.pattern, before)
            committed = commit is not None and commit.layer == candidate.layer
            if record.by_table and not committed:
                continue
            tied = commit is not None and candidate.layer in commit.ties
            cells.append(CandidateCost(step, candidate.layer, cost, committed, tied))
    return tuple(cells)


# --- where the curve bends --------------------------------------------------------------------------------------

MIN_POINTS_EACH_SIDE = 3  # the meeting point counts on both sides
MIN_EVIDENCE = 10.0  # difference in the Bayesian information criterion; above 10 counts as very strong
MIN_SLOPE_RATIO = 2.0
ROUNDING = 1e-12  # what is left of a perfect fit, as a share of the variance of y


@dataclass(frozen=True)
class Kink:
    """Two lines meeting at `x`: slopes in nats per token and layer, `fit` the (x, y) of start, bend and end."""

    x: float
    slope_before: float
    slope_after: float
    fit: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def find_kink(xs: Sequence[float], ys: Sequence[float]) -> Kink | None:
    """The bend of the curve, or None where one straight line does as well or the curve does not turn steeper.

    For each x with at least three points on either side, y = a + b*x + c*max(0, x - bend) is fitted by least
    squares, and the bend with the smallest squared error is taken. It counts when the Bayesian information
    criterion prefers it to one straight line by more than 10, and the slope behind it is at least twice the slope
    before it. `xs` increase.
    """
    bends = xs[MIN_POINTS_EACH_SIDE - 1 : len(xs) - MIN_POINTS_EACH_SIDE + 1]
    if not bends:
        return None
    mean = sum(ys) / len(ys)
    floor = ROUNDING * sum((y - mean) ** 2 for y in ys)
    straight = sum(r * r for r in _residuals(xs, ys))
    if straight <= floor:
        return None
    error, kink = min((_fit_bend(xs, ys, bend) for bend in bends), key=lambda fit: fit[0])
    evidence = len(xs) * math.log(straight / max(error, floor)) - 2 * math.log(len(xs))
    steeper = kink.slope_after > 0 and kink.slope_after >= MIN_SLOPE_RATIO * kink.slope_before
    return kink if evidence > MIN_EVIDENCE and steeper else None


def _fit_bend(xs: Sequence[float], ys: Sequence[float], bend: float) -> tuple[float, Kink]:
    """(squared error, fit) with the bend given. The change of slope comes first, out of what a line leaves of it."""
    beyond = [max(0.0, x - bend) for x in xs]
    alone = _residuals(xs, beyond)
    change = sum(a * y for a, y in zip(alone, ys, strict=True)) / sum(a * a for a in alone)
    rest = [y - change * b for y, b in zip(ys, beyond, strict=True)]
    slope, intercept = linear_regression(xs, rest)
    places = [(x, intercept + slope * x + change * max(0.0, x - bend)) for x in (xs[0], bend, xs[-1])]
    error = sum(r * r for r in _residuals(xs, rest))
    return error, Kink(bend, slope, slope + change, (places[0], places[1], places[2]))


def _residuals(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """What the least-squares line leaves."""
    slope, intercept = linear_regression(xs, ys)
    return [y - intercept - slope * x for x, y in zip(xs, ys, strict=True)]
