"""What a run's journal says, replayed: losses, commits, cost. Search, report and export all read a run through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icsearch.errors import JournalError
from icsearch.journal import Event, Journal
from icsearch.pattern import Pattern, PatternFile, Step
from icsearch.statistics import Difference, mean_loss, paired_difference

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Commit:
    """One committed flip, and the flips it was chosen from.

    `ties` are the layers that the winner could not be told from (within one paired std_err).
    """

    step: int
    layer: int
    pattern: str
    candidates: tuple[int, ...]
    ties: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One flip scored in a step: the layer, its loss (nats per token) and the difference to the all-F baseline."""

    step: int
    layer: int
    pattern: str
    loss: float
    difference: Difference


@dataclass
class SimilaritySums:
    """Lower triangles summed over choosing queries, as they come in batch by batch."""

    cosine: list[list[float]] = field(default_factory=list)
    overlap: list[list[float]] = field(default_factory=list)
    sequences: int = 0
    queries: int = 0

    def add(self, event: Event) -> None:
        first, last = event["sequences"]
        if first != self.sequences:
            raise ValueError(f"similarity of sequence {first} behind {self.sequences} sequences")
        self.sequences, self.queries = last, self.queries + event["queries"]
        self.cosine = _added(self.cosine, event["cosine"])
        self.overlap = _added(self.overlap, event["overlap"])

    def means(self) -> dict[str, Any]:
        """`cosine` and `overlap` as means, and the number of `queries` that they are taken over."""
        triangles = {"cosine": self.cosine, "overlap": self.overlap}
        means = {name: [[x / self.queries for x in row] for row in rows] for name, rows in triangles.items()}
        return {**means, "queries": self.queries}


def _added(sums: list[list[float]], more: list[list[float]]) -> list[list[float]]:
    if not sums:
        return [list(row) for row in more]
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, more, strict=True)]


@dataclass
class RunRecord:
    """The state of a run. It changes by `apply` alone, so live and resumed runs share one path.

    `nll[pattern][sequence]` is the summed NLL in nats; `asked[step]` lists the patterns scored in a step
    (step 0: the start pattern and the uniform references).
    """

    start: Event = field(default_factory=dict)
    nll: dict[str, dict[int, float]] = field(default_factory=dict)
    asked: dict[int, list[str]] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    similarity_sums: SimilaritySums = field(default_factory=SimilaritySums)
    chosen: Event | None = None
    layer_sequences: int = 0
    seconds: float = 0.0
    finished: bool = False

    @classmethod
    def replay(cls, events: Iterable[Event]) -> RunRecord:
        record = cls()
        for number, event in enumerate(events, start=1):
            try:
                record.apply(event)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise JournalError(
                    f"journal line {number} is damaged ({type(error).__name__}: {error}): "
                    "restore the file, or start over with --fresh"
                ) from None
        return record

    def apply(self, event: Event) -> None:
        """Take one event in."""
        kind = event["event"]
        if kind == "start":
            self.start = event
        elif kind == "losses":
            self._apply_losses(event)
        elif kind == "commit":
            self.commits.append(
                Commit(
                    event["step"], event["layer"], event["pattern"], tuple(event["candidates"]), tuple(event["ties"])
                )
            )
        elif kind == "similarity":
            self.similarity_sums.add(event)
            self.layer_sequences += event["layer_sequences"]
            self.seconds += event["seconds"]
        elif kind == "chosen":
            self.chosen = event
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "finish":
            self.finished = True
        else:
            raise ValueError(f"unknown event {kind!r}")

    def _apply_losses(self, event: Event) -> None:
        first, last = event["sequences"]
        asked = self.asked.setdefault(event["step"], [])
        for letters, sums in zip(event["patterns"], event["nll"], strict=True):
            sequences = self.nll.setdefault(letters, {})
            sequences.update(zip(range(first, last), sums, strict=True))
            if letters not in asked:
                asked.append(letters)
        self.layer_sequences += event["layer_sequences"]
        self.seconds += event["seconds"]

    @property
    def tokens(self) -> list[int]:
        """Counted tokens of each calibration sequence."""
        return list(self.start["tokens"])

    @property
    def start_pattern(self) -> Pattern:
        """All F, but for layers that the checkpoint itself shares."""
        return Pattern(self.start["start_pattern"])

    @property
    def pattern(self) -> Pattern:
        """The pattern so far: the last commit's, or the one that the dynamic program chose."""
        if self.chosen is not None:
            return Pattern(self.chosen["pattern"])
        return Pattern(self.commits[-1].pattern) if self.commits else self.start_pattern

    @property
    def similarity(self) -> dict[str, Any] | None:
        """Mean cosine similarity and overlap (lower triangles, row i has i entries) of a similarity baseline.

        `objective` is the chosen pattern's sum of similarities over its S layers; None in other runs.
        """
        sums = self.similarity_sums
        if self.chosen is None or not sums.queries:
            return None
        return {**sums.means(), "objective": self.chosen["objective"]}

    @property
    def references(self) -> dict[str, str]:
        """Name to letters of the patterns scored for comparison, such as uniform:1/4."""
        return dict(self.start["references"])

    def sums(self, letters: str) -> list[float] | None:
        """The pattern's NLL sums in sequence order, or None while some are missing."""
        known = self.nll.get(letters, {})
        count = len(self.start["tokens"])
        return [known[i] for i in range(count)] if len(known) == count else None

    def loss(self, letters: str) -> float:
        """Nats per token; raises JournalError if the pattern was not scored on every sequence."""
        return mean_loss(self._all_sums(letters), self.tokens)

    def difference(self, letters: str, reference: str | None = None) -> Difference:
        """Difference to `reference` (default: the start pattern), paired over sequences."""
        reference = reference or self.start_pattern.letters
        return paired_difference(self._all_sums(letters), self._all_sums(reference), self.tokens)

    def _all_sums(self, letters: str) -> list[float]:
        sums = self.sums(letters)
        if sums is None:
            raise JournalError(f"the journal has no complete loss of {letters}: continue the run first")
        return sums

    def steps(self) -> tuple[Step, ...]:
        """The committed flips with their losses: the curve."""
        return tuple(self._step(commit) for commit in self.commits)

    def _step(self, commit: Commit) -> Step:
        difference = self.difference(commit.pattern)
        return Step(
            commit.step, commit.layer, self.loss(commit.pattern), difference.delta, difference.std_err, commit.pattern
        )

    def candidates(self, step: int) -> list[Candidate]:
        """Every flip scored completely in a step (the last one may still be at work), by layer."""
        before = Pattern(self.commits[step - 2].pattern) if step > 1 else self.start_pattern
        if step <= len(self.commits):
            layers = self.commits[step - 1].candidates
        else:
            asked = set(self.asked.get(step, []))
            layers = tuple(layer for layer in before.full_layers[1:] if before.flip(layer).letters in asked)
        flips = [(layer, before.flip(layer).letters) for layer in sorted(layers)]
        return [
            Candidate(step, layer, letters, self.loss(letters), self.difference(letters))
            for layer, letters in flips
            if self.sums(letters) is not None
        ]

    def cost(self) -> dict[str, Any]:
        """What the search took. A layer evaluation is one decoder layer run once over all calibration sequences."""
        candidates = sum(len(commit.candidates) for commit in self.commits)
        scored = candidates + len(self.asked.get(0, []))
        return {
            "candidate_evaluations": candidates,
            "layer_evaluations": self.layer_sequences / len(self.start["tokens"]),
            "naive_layer_evaluations": scored * self.start["decoder_layers"],
            "seconds": round(self.seconds, 3),
        }

    def pattern_file(self) -> PatternFile:
        """The pattern.json of this run, as far as it has come."""
        options = self.start["options"]
        return PatternFile(
            pattern=self.pattern,
            layer_indices=tuple(self.start["layer_indices"]),
            method=options["method"],
            strategy=options["strategy"],
            objective=options["objective"],
            baseline_loss=self.loss(self.start_pattern.letters),
            loss=self.loss(self.pattern.letters),
            steps=self.steps(),
            model=self.start["model"],
            calibration=self.start["calibration"],
            cost=self.cost(),
            icsearch_version=self.start["icsearch_version"],
        )


def load_run(directory: Path) -> RunRecord:
    """Replay the journal of a RUN directory; raises JournalError where there is none."""
    journal = Journal(directory / JOURNAL_NAME)
    if not journal.exists():
        raise JournalError(f"{directory} holds no {JOURNAL_NAME}: expected the RUN directory of icsearch greedy")
    return RunRecord.replay(journal.events())
