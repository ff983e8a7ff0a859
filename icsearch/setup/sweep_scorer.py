"""The layer sweep as the search sees it: scores patterns on batches, with what is kept between sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from icsearch.block import Batch, BranchState, cut_waves
from icsearch.divergence import make_sweeper
from icsearch.pattern import Pattern
from icsearch.planning import offload, plan
from icsearch.planning.stage_starts import stage_notes
from icsearch.processes.ledger import CALIBRATION, HELDOUT, Ledger
from icsearch.requests import KL
from icsearch.runs.guessing import guessing_notes
from icsearch.runs.record import RunRecord
from icsearch.search import Progress, Scorer, Scores, Scoring
from icsearch.setup.prepare import Loaded, Opened
from icsearch.setup.start_event import environment_notes
from icsearch.states import Keeping, StateStore
from icsearch.sweep import Sweeper, kernel_notes
from icsearch.weights.layout import Layout


class SweepScorer:
    """The layer sweep as the search sees it. Resident weights: one batch is one wave; streamed ones: as many as fit."""

    def __init__(self, sweeper: Sweeper, batches: Sequence[Batch], patterns: int, batches_per_wave: int = 1) -> None:
        self.patterns_per_sweep = patterns
        self._sweeper = sweeper
        self._waves = {(wave[0].first, wave[-1].last): wave for wave in cut_waves(batches, batches_per_wave)}
        self._shrunk = False

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        return list(self._waves)

    def retain(self, base: Pattern) -> None:
        self._sweeper.retain(base)

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        return self._sweeper.expected([(patterns, self._waves[wave]) for patterns, wave in work])

    def announce(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> None:
        """One process begins with nothing before it is asked to."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        weights = self._sweeper.model.weights
        before = weights.bytes_read
        with kernel_notes() as notes:
            result = self._sweeper.sweep(patterns, self._waves[wave], on_layer)
        read = weights.bytes_read - before
        return Scores(result.nll, result.layer_sequences, tuple(sorted(notes)), result.kl, read)

    def shrink(self, patterns: int) -> bool:
        """Half as many patterns at once as failed, and half of what was kept. Once: after that the plan is no guide."""
        if self._shrunk:
            return False
        self._shrunk, self.patterns_per_sweep = True, max(1, patterns // 2)
        freed = self._sweeper.shrink()
        return patterns > 1 or freed > 0


def make_scoring(
    here: Opened, record: RunRecord, loaded: Loaded, listener: Progress, kept: plan.Kept | None = None
) -> Scoring:
    """The scoring of a run by the layer sweep; notes what has changed around a run that goes on.

    `kept` says which states are kept between sweeps; by default none.
    """
    layout = here.inputs.layout
    kept = kept or _keep_nothing(layout)
    scorer = _scorer(loaded, CALIBRATION, loaded.batches, kept, record)
    scoring = Scoring(here.run.journal, record, scorer, listener)
    changed = environment_notes(here.existing, here.start)
    scoring.note([*changed, *loaded.notes, *weight_notes(loaded), *stage_notes(here.start)])
    return scoring


def heldout_scorer(here: Opened, record: RunRecord, loaded: Loaded) -> Scorer:
    """Scores the held-out sequences of a refinement; few patterns ever come there, and no states are kept."""
    return _scorer(loaded, HELDOUT, loaded.heldout, _keep_nothing(here.inputs.layout), record)


def _scorer(loaded: Loaded, name: str, batches: Sequence[Batch], kept: plan.Kept, record: RunRecord) -> Scorer:
    """Measures what the run's objective needs; by all processes of the run, where it has several."""
    by_kl, keep_full_states = record.start["options"]["objective"] == KL, loaded.memory.full_states > 0
    if loaded.crew is not None:
        full = loaded.dsa.start_pattern if by_kl else None
        ledger = Ledger(kept.keeping, record.pattern, full, keep_full_states)
        ranges = [(batch.first, batch.last) for batch in batches]
        memory = loaded.memory
        sizes = memory.patterns_per_sweep, memory.batches_per_wave
        return loaded.crew.scorer(name, ledger, ranges, *sizes, memory.resting > 0)
    store: StateStore[BranchState] = StateStore(kept.keeping, record.pattern, kept.budget)
    sweeper = make_sweeper(loaded.dsa, store, by_kl, keep_full_states, loaded.memory.resting > 0)
    return SweepScorer(sweeper, batches, loaded.memory.patterns_per_sweep, loaded.memory.batches_per_wave)


def process_rows(loaded: Loaded) -> list[tuple[str, str]]:
    """The plan's row on processes, where there are several."""
    if loaded.crew is None:
        return []
    return [("processes", loaded.memory.grid_words(sum(len(batch.input_ids) for batch in loaded.batches)))]


def weight_rows(loaded: Loaded, patterns: int) -> list[tuple[str, str]]:
    """The plan's rows on weights, for steps of so many patterns at most."""
    passes = loaded.memory.passes(patterns, sum(len(batch.input_ids) for batch in loaded.batches))
    return offload.rows(loaded.memory.offload, passes, loaded.bytes_per_second)


def score_baseline(scoring: Scoring, layout: Layout, *more: Pattern) -> None:
    """Step 0 of a run, and a note where its loss says that something is wrong."""
    scoring.score_references(*more)
    loss = scoring.record.loss(scoring.record.start_pattern.letters)
    for text in guessing_notes(loss, layout.vocab_size):
        scoring.progress.info(text)
        scoring.note([text])


def weight_notes(loaded: Loaded) -> list[str]:
    """Where the losses came from, as far as it is not the usual: the bits do not follow from it."""
    if not loaded.memory.offload.streamed:
        return []
    return [f"weights were streamed layer by layer (--offload {loaded.memory.offload.where}): the same bits"]


def _keep_nothing(layout: Layout) -> plan.Kept:
    return plan.Kept(Keeping(layout.num_layers, layout.layer_indices), 0, 0)


def count_in_sweeps(layout: Layout, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()) -> int:
    """Layer runs of scoring these patterns, with so many in one sweep, and others that run along in each."""
    starts = range(0, len(patterns), per_sweep)
    return sum(layout.count_layer_runs([*patterns[start : start + per_sweep], *along]) for start in starts)
