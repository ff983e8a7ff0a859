"""How a run shows itself: a live display on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icsearch.core.pattern_file import Step
from icsearch.core.statistics import mean_loss
from icsearch.report import numbers
from icsearch.runs.record import RunRecord
from icsearch.runs.refinement import CALIBRATION_SET, HELDOUT_SET
from icsearch.search.loop import Progress
from icsearch.sweep.distributed.launch import TABLE

SECONDS_BETWEEN_LINES = 10.0
OnStep = Callable[[Step], object]


class Quiet(Progress):
    """Says nothing; hands each committed flip on to `on_step`."""

    def __init__(self, on_step: OnStep | None = None) -> None:
        self._on_step = on_step

    def opening(self, text: str) -> None: ...

    def committed(self, record: RunRecord) -> None:
        if self._on_step is not None:
            self._on_step(record.steps()[-1])

    def close(self) -> None: ...


class Plain(Quiet):
    """One line for each thing that happens: for logs and pipes."""

    def __init__(self, console: Console, on_step: OnStep | None = None) -> None:
        super().__init__(on_step)
        self.console = console
        self._clock = RunClock()
        self._last_line = 0.0
        self._step: int | str | None = None
        self._silent = True  # no loss will say how far the step at work is

    def info(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None:
        self._clock.total, self._clock.done = layer_sequences, done
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        for name, text in rows:
            table.add_row(name, escape(text))
        self.console.print(table)

    def step_started(self, step: int | str, patterns: int, layer_sequences: int) -> None:
        self._clock.start_step(step, layer_sequences)
        self._silent = patterns == 0
        if step != self._step:  # swaps are scored in rounds, and a smaller plan begins to score again
            scored = f"scoring {numbers.plural(patterns, 'pattern')}" if patterns else "every layer"
            self.info(f"{_step_name(step)}: {scored}{', forth and back' if step == TABLE else ''}")
        self._step = step

    def layer_done(self, layer_sequences: int) -> None:
        self._clock.advance(layer_sequences)
        if self._silent and self._step is not None:
            self._how_far(self._step)

    def losses_known(self, record: RunRecord, step: int | str) -> None:
        self._how_far(step, f", {best_so_far(record, step)}")

    def _how_far(self, step: int | str, best: str = "") -> None:
        """A line, unless there was one just now."""
        if time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        share = self._clock.step_done / max(self._clock.step_total, 1)
        self.info(f"{_step_name(step)}: {share:.0%}{best}, {self._clock.remaining()}")

    def committed(self, record: RunRecord) -> None:
        last = len(record.commits) == record.start["options"]["num_shared"]
        told = last or record.by_table  # a nested path is committed all at once
        self.info(commit_line(record) + ("" if told else f", {self._clock.remaining()}"))
        super().committed(record)

    def tried(self, record: RunRecord) -> None:
        """What became of the last move that held-out sequences were asked about."""
        if record.refinement is None or record.heldout is None:
            return
        trial = record.refinement.trials[-1]
        here, there = (known.objective.difference(trial.pattern, trial.before) for known in (record, record.heldout))
        self.info(
            f"swap {'made' if trial.made else 'refused'}: layer {trial.from_layer} to {trial.to_layer}, "
            f"{numbers.difference(here)}, held out {numbers.difference(there)}"
        )


class Live(Plain):
    """A progress bar for the step at work, above it one line for each commit."""

    def __init__(self, console: Console, on_step: OnStep | None = None) -> None:
        super().__init__(console, on_step)
        self._progress = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=20),
            bars.TextColumn("{task.percentage:>3.0f}%"),
            bars.TextColumn("{task.fields[note]}", style="dim"),
            bars.TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._status = console.status("")

    def opening(self, text: str) -> None:
        """Shown until the plan or the end comes: libraries are imported, and whatever can be refused is."""
        self._status.update(escape(text))
        self._status.start()

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None:
        self._status.stop()
        super().planned(rows, layer_sequences, done)

    def step_started(self, step: int | str, patterns: int, layer_sequences: int) -> None:
        self._clock.start_step(step, layer_sequences)
        self._silent = patterns == 0
        if self._task is None:
            self._progress.start()
        else:
            self._progress.remove_task(self._task)
        description = _step_name(step) + (f" · {numbers.plural(patterns, 'pattern')}" if patterns else "")
        self._task = self._progress.add_task(description, total=layer_sequences, note="")

    def layer_done(self, layer_sequences: int) -> None:
        self._clock.advance(layer_sequences)
        self._progress.advance(self._task, layer_sequences)
        if self._silent:
            self._progress.update(self._task, note=self._clock.remaining())

    def losses_known(self, record: RunRecord, step: int | str) -> None:
        self._progress.update(self._task, note=f"{best_so_far(record, step)} · {self._clock.remaining()}")

    def committed(self, record: RunRecord) -> None:
        self.info(commit_line(record))
        Quiet.committed(self, record)

    def close(self) -> None:
        self._status.stop()
        self._progress.stop()


class RunClock:
    """Remaining time, from the layer runs done in this process and those still to come (a bound from above)."""

    def __init__(self) -> None:
        self.total = self.done = self.step_total = self.step_done = 0
        self._measured = 0
        self._started: float | None = None
        self._step: int | str | None = None

    def start_step(self, step: int | str, layer_sequences: int) -> None:
        self._started = self._started or time.monotonic()
        if isinstance(step, str):  # how long a refinement goes on nobody knows: time left is that of what is at work
            self.total = self.done + layer_sequences
            if step != self._step:  # a backward pass is not as fast as what comes behind it
                self._started, self._measured = time.monotonic(), 0
        self._step = step
        self.step_total, self.step_done = layer_sequences, 0

    def advance(self, layer_sequences: int) -> None:
        self.step_done += layer_sequences
        self.done += layer_sequences
        self._measured += layer_sequences

    def remaining(self) -> str:
        """Such as `about 1 min 23 s left`.

        A run that goes on after an interruption, or whose plan was halved, does more than was planned from the start:
        then it is known only that what is left of the step at work will be done.
        """
        left = max(self.total - self.done, self.step_total - self.step_done)
        if self._started is None or not self._measured or left <= 0:
            return "time left unknown"
        rate = (time.monotonic() - self._started) / self._measured
        seconds = rate * left
        return f"about {numbers.duration(seconds)} left" if seconds >= 1 else "less than 1 s left"


def make_listener(quiet: bool, on_step: OnStep | None = None) -> Quiet:
    """The display that fits: nothing, a live bar on a terminal, or plain lines. All of it goes to stderr."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        return Quiet(on_step)
    return (Live if console.is_terminal else Plain)(console, on_step)


def commit_line(record: RunRecord) -> str:
    """What the last commit did."""
    commit, step = record.commits[-1], record.steps()[-1]
    tie = f", tied with {', '.join(map(str, commit.ties))}" if commit.ties else ""
    kl = f"KL {numbers.compact(step.kl)}, " if step.kl is not None else ""
    return (
        f"step {commit.step}/{record.start['options']['num_shared']}: layer {commit.layer} shares, "
        f"{kl}loss {numbers.loss(step.loss)} ({numbers.with_error(step.delta, step.std_err)}){tie}"
    )


def best_so_far(record: RunRecord, step: int | str) -> str:
    """The leader of a step, on what all of its patterns have been scored on, but those of a sweep to come."""
    if isinstance(step, str) and record.refinement is not None:
        return f"{numbers.plural(len(record.refinement.swaps), 'swap')} made"
    if isinstance(step, str):
        scored = record.heldout if step == HELDOUT_SET and record.heldout is not None else record
        return f"{min(map(len, scored.nll.values()))} of {len(scored.tokens)} sequences"
    patterns = record.asked[step]
    if step:
        furthest = max(len(record.nll[letters]) for letters in patterns)
        patterns = [letters for letters in patterns if len(record.nll[letters]) == furthest]
    common = set.intersection(*(set(record.nll[letters]) for letters in patterns))
    if step == 0 or not common:
        return f"{len(common)} of {len(record.tokens)} sequences"
    order = sorted(common)
    tokens = [record.tokens[s] for s in order]
    known = record.kl if record.by_kl else record.nll
    losses = {p: mean_loss([known[p][s] for s in order], tokens) for p in patterns}
    best = min(losses, key=losses.__getitem__)
    before = record.pattern.letters
    layer = next(i for i, (a, b) in enumerate(zip(before, best, strict=True)) if a != b)
    what = "KL" if record.by_kl else "loss"
    return f"best so far layer {layer}, {what} {losses[best]:.4f} on {len(order)} of {len(record.tokens)} sequences"


def _step_name(step: int | str) -> str:
    if isinstance(step, str):
        return {HELDOUT_SET: "held-out sequences", CALIBRATION_SET: "swaps"}.get(step, step)
    return f"step {step}" if step else "baseline"
