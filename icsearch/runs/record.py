"""What the journal of a search says, replayed: losses, the flips that were committed, similarities, a refinement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from icsearch.core.errors import JournalError
from icsearch.core.jsonfile import FieldError, Kind
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import Step
from icsearch.core.statistics import Difference, mean_loss, paired_difference
from icsearch.runs.journal import Event, Journal, Record
from icsearch.runs.refinement import CALIBRATION_SET, HELDOUT_SET, OUTCOMES, Refinement
from icsearch.runs.schema import check_event, check_run_start, event_fields, measures_kl


@dataclass(frozen=True)
class Choice:
    """One committed flip, and the flips that it was chosen from: `candidates` are the layers that were scored.

    `ties` are those of them that the winner could not be told from (within one paired std_err).
    """

    step: int
    layer: int
    pattern: str
    candidates: tuple[int, ...]
    ties: tuple[int, ...]

    @classmethod
    def from_event(cls, event: Event) -> Choice:
        """What a commit event says, its fields checked."""
        candidates, ties = tuple(event["candidates"]), tuple(event["ties"])
        return cls(event["step"], event["layer"], event["pattern"], candidates, ties)

    def to_event(self) -> Event:
        lists = {"candidates": list(self.candidates), "ties": list(self.ties)}
        return {"event": "commit", "step": self.step, "layer": self.layer, "pattern": self.pattern, **lists}

    def check(self, step: int, before: Pattern) -> None:
        """Raise FieldError unless this can be that step of a search which has come to the pattern `before`."""
        if self.step != step:
            raise FieldError(f"step is {self.step}: expected {step}")
        flips = {layer: before.flip(layer).letters for layer in self.candidates}
        if self.pattern != flips.get(self.layer) or not flips.keys() >= set(self.ties):
            raise FieldError(f"layer, pattern and ties of step {step} do not follow from its candidates")


@dataclass(frozen=True)
class Candidate:
    """One flip scored in a step: the layer, its loss (nats per token) and the difference to the all-F baseline."""

    step: int
    layer: int
    pattern: str
    loss: float
    difference: Difference


class LossTable(dict[str, dict[int, float]]):
    """`table[letters][sequence]` is the NLL or the KL of one sequence, summed over its counted tokens, in nats.

    `tokens` are the counted tokens of each sequence. What is asked of a pattern that was not scored on the sequences
    in question raises JournalError.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self._tokens = tuple(tokens)

    def add(self, letters: str, first: int, sums: Sequence[float]) -> None:
        """Take in the sums of the sequences from `first` on."""
        self.setdefault(letters, {}).update(enumerate(sums, start=first))

    def is_complete(self, letters: str) -> bool:
        """Whether the pattern was scored on every sequence."""
        return len(self.get(letters, ())) == len(self._tokens)

    def sums(self, letters: str) -> list[float]:
        """The sums of all sequences, in order."""
        if not self.is_complete(letters):
            raise JournalError(f"the journal has no complete loss of {letters}: continue the run first")
        known = self[letters]
        return [known[sequence] for sequence in range(len(self._tokens))]

    def loss(self, letters: str) -> float:
        """Nats per token over all sequences."""
        return mean_loss(self.sums(letters), self._tokens)

    def mean(self, letters: str) -> Difference:
        """As `loss`, with its standard error over sequences."""
        sums = self.sums(letters)
        return paired_difference(sums, [0.0] * len(sums), self._tokens)

    def difference(self, letters: str, reference: str) -> Difference:
        """The pattern's loss minus that of `reference`, paired over all sequences."""
        return paired_difference(self.sums(letters), self.sums(reference), self._tokens)


@dataclass
class SimilaritySums:
    """Lower triangles summed over choosing queries, as they come in batch by batch.

    `kept` and `importance`, what Kascade's score is made of, are sums over sequences; empty as soon as some have none.
    `numerics` are those that they were measured with, where that was another run's.
    """

    cosine: list[list[float]] = field(default_factory=list)
    overlap: list[list[float]] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)
    importance: list[float] = field(default_factory=list)
    sequences: int = 0
    queries: int = 0
    numerics: dict[str, Any] | None = None

    def add(self, event: Event) -> None:
        """Take in an event whose sequences are those that come next."""
        first, last = event["sequences"]
        self.numerics = event.get("numerics")
        self.sequences, self.queries = last, self.queries + event["queries"]
        self.cosine = _added(self.cosine, event["cosine"])
        self.overlap = _added(self.overlap, event["overlap"])
        known = event.get("importance") is not None and (first == 0 or bool(self.importance))
        if known:
            before = self.importance or [0.0] * len(event["importance"])
            self.kept = _added(self.kept, event["kept"])
            self.importance = [a + b for a, b in zip(before, event["importance"], strict=True)]
        else:
            self.kept, self.importance = [], []

    def means(self) -> dict[str, Any]:
        """`cosine` and `overlap` as means, and the number of `queries` that they are taken over.

        `kascade`, where it is known, is a triangle with its diagonal: a layer's score under its own selection, of which
        nothing is lost, is its importance.
        """
        triangles = {"cosine": self.cosine, "overlap": self.overlap}
        means: dict[str, Any] = {
            name: [[x / self.queries for x in row] for row in rows] for name, rows in triangles.items()
        }
        if self.importance:
            importance = [x / self.sequences for x in self.importance]
            means["kascade"] = [
                [*(kept / self.sequences * weight for kept in row), weight]
                for row, weight in zip(self.kept, importance, strict=True)
            ]
        return {**means, "queries": self.queries}


@dataclass
class FisherRows:
    """The second-order table as it comes in: for each sequence, a lower triangle for each draw, and one of its labels.

    The cost is its part of the run's; `measuring` is that of the patterns that were measured then, in layer runs x
    sequences, by the part of the run.
    """

    drawn: list[list[list[list[float]]]] = field(default_factory=list)
    true: list[list[list[float]]] = field(default_factory=list)
    layer_sequences: int = 0
    seconds: float = 0.0
    measuring: dict[str, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take in an event whose sequences are those that come next."""
        self.drawn += event["drawn"]
        self.true += event["true"]
        self.layer_sequences += event["layer_sequences"]
        self.seconds += event["seconds"]


def _added(sums: list[list[float]], more: list[list[float]]) -> list[list[float]]:
    if not sums:
        return [list(row) for row in more]
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, more, strict=True)]


JOURNAL_NAME = "journal.jsonl"
FISHER_PARTS = ("single flips", "nested path", "rounds")  # what is measured, by how much was proposed before
REFINING = -1  # stands for a step in `asked`: what a refinement scored on the calibration sequences


@dataclass
class RunRecord(Record):
    """The state of a run.

    `nll` holds the losses, and `kl` the KL to the start pattern where it is measured; `asked[step]` lists the
    patterns scored in a step (step 0: the start pattern and the uniform references), and `scored[step]` counts them
    times the sequences that each was scored on there. `heldout` is the same of the held-out sequences that a refinement
    confirms on: its losses, and nothing else. `weight_bytes[step]` is what was read of streamed weights in a step.
    `compared` are the patterns that other measures than a similarity baseline's own choose, by the measure's name.
    `proposals` are what a second-order table had measured: the nested path, then each round's patterns.
    """

    start: Event = field(default_factory=dict)
    nll: LossTable = field(default_factory=LossTable)
    kl: LossTable = field(default_factory=LossTable)
    asked: dict[int, list[str]] = field(default_factory=dict)
    scored: dict[int, int] = field(default_factory=dict)
    commits: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    similarity_sums: SimilaritySums = field(default_factory=SimilaritySums)
    fisher: FisherRows = field(default_factory=FisherRows)
    proposals: list[list[str]] = field(default_factory=list)
    chosen: Event | None = None
    compared: dict[str, Event] = field(default_factory=dict)
    refinement: Refinement | None = None
    heldout: RunRecord | None = None
    layer_sequences: int = 0
    seconds: float = 0.0
    weight_bytes: dict[int, int] = field(default_factory=dict)
    finished: bool = False
    _fields: dict[str, dict[str, Kind]] = field(default_factory=dict, repr=False)

    def check(self, event: Event) -> None:
        kind = event.get("event")
        if not self.start:
            check_run_start(event)
        elif (own := _of_heldout(event)) is not None:
            if self.heldout is None:
                raise FieldError(f"losses of set {HELDOUT_SET}, but the run has no held-out sequences")
            self.heldout.check(own)
        else:
            check_event(event, self._fields)
            if kind == "losses":
                self._check_losses(event)
            elif kind == "commit":
                if self.refinement is not None:
                    raise FieldError("a commit behind the beginning of the refinement")
                Choice.from_event(event).check(len(self.commits) + 1, self.pattern)
            elif kind == "similarity":
                (first, _), known = event["sequences"], self.similarity_sums.sequences
                if first != known:
                    raise FieldError(f"similarity of sequence {first} behind {known} sequences")
                if (event.get("kept") is None) != (event.get("importance") is None):
                    raise FieldError("kept and importance are there together or not at all")
            elif kind == "fisher":
                (first, last), known = event["sequences"], len(self.fisher.true)
                if first != known or not len(event["drawn"]) == len(event["true"]) == last - first:
                    raise FieldError(f"the table of sequences {first} to {last - 1} behind {known} sequences")
            elif kind == "compared":
                measured = {"kascade": self.similarity_sums.importance, "fisher": self.fisher.true}
                if not measured[event["by"]]:
                    raise FieldError(f"a pattern by {event['by']}, of which nothing is known")
            elif kind == "proposed":
                if event["round"] != len(self.proposals):
                    raise FieldError(f"round {event['round']} behind {len(self.proposals)} rounds")
                self._check_proposed([Pattern(letters) for letters in event["patterns"]])
            elif kind == "chosen" and self.start["options"]["method"] == "fisher":
                if event["pattern"] not in map(str, self.measured()):
                    raise FieldError(f"{event['pattern']} is chosen and was not measured")
            elif kind == "refine":
                if self.heldout is None or self.refinement is not None or event["pattern"] != self.searched.letters:
                    raise FieldError(
                        f"a refinement of {event['pattern']}, which does not follow from what is before it"
                    )
            elif kind in OUTCOMES:
                if self.refinement is None or self.heldout is None:
                    raise FieldError(f"{kind} without a refinement")
                if kind == "swap":
                    self._check_swap(event["before"], event["pattern"])
                self.refinement.check(event)

    def _check_losses(self, event: Event) -> None:
        first, last = event["sequences"]
        if event["step"] > len(self.commits) + 1:
            raise FieldError(f"losses of step {event['step']} behind {len(self.commits)} commits")
        for name in self._tables():
            if [len(sums) for sums in event[name]] != [last - first] * len(event["patterns"]):
                raise FieldError(f"{name} does not hold one sum for each pattern and sequence")

    def _check_proposed(self, patterns: Sequence[Pattern]) -> None:
        """Raise FieldError unless these can be the nested path, or else a round of finalists."""
        flips = self.start["options"]["num_shared"]
        counts = range(1, flips + 1) if not self.proposals else [flips] * len(patterns)
        shared = [{*self.start_pattern.full_layers} - {*pattern.full_layers} for pattern in patterns]
        nested = bool(self.proposals) or all(one < other for one, other in pairwise(shared))
        allowed = all(layers.isdisjoint(self.stay_full) for layers in shared)
        if [len(layers) for layers in shared] != list(counts) or not nested or not allowed:
            raise FieldError(f"round {len(self.proposals)} proposes what this search cannot")

    def _check_swap(self, before: str, after: str) -> None:
        """Raise FieldError unless both sets say that the pattern is better for the swap."""
        for record in filter(None, (self, self.heldout)):
            table = record.objective
            known = table.is_complete(after) and table.is_complete(before)
            if not known or not table.difference(after, before).delta < 0:
                raise FieldError(f"a swap to {after}, which does not gain on both sets")

    def apply(self, event: Event) -> None:
        self.check(event)
        kind = event["event"]
        if not self.start:
            self.start, self._fields = event, event_fields(event)
            self.nll, self.kl = LossTable(self.tokens), LossTable(self.tokens)
            if (held := event.get("refine_on")) is not None:
                self.heldout = RunRecord()
                self.heldout.apply({**event, "tokens": held["tokens"], "calibration": held, "refine_on": None})
        elif self.heldout is not None and (own := _of_heldout(event)) is not None:
            self.heldout.apply(own)
            self._add_cost(event, REFINING)
        elif kind == "losses":
            self._apply_losses(event)
        elif kind == "commit":
            self.commits.append(Choice.from_event(event))
        elif kind == "similarity":
            self.similarity_sums.add(event)
            self._add_cost(event)
        elif kind == "fisher":
            self.fisher.add(event)
            self._add_cost(event)
        elif kind == "proposed":
            self.proposals.append(event["patterns"])
        elif kind == "chosen":
            self.chosen = event
        elif kind == "compared":
            self.compared[event["by"]] = event
        elif kind == "refine":
            self.refinement = Refinement(Pattern(event["pattern"]), event["costs"])
        elif kind in OUTCOMES and self.refinement is not None:
            self.refinement.apply(event)
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "finish":
            self.finished = True

    def _apply_losses(self, event: Event) -> None:
        first, last = event["sequences"]
        for name, table in self._tables().items():
            for letters, sums in zip(event["patterns"], event[name], strict=True):
                table.add(letters, first, sums)
        step = REFINING if event.get("set") == CALIBRATION_SET else event["step"]
        asked = self.asked.setdefault(step, [])
        asked += [letters for letters in dict.fromkeys(event["patterns"]) if letters not in asked]
        self.scored[step] = self.scored.get(step, 0) + len(event["patterns"]) * (last - first)
        if self.by_table:
            part, measuring = FISHER_PARTS[min(len(self.proposals), 2)], self.fisher.measuring
            part = "swaps" if step == REFINING else part if step else "baseline and uniform"
            measuring[part] = measuring.get(part, 0) + event["layer_sequences"]
        self._add_cost(event, step)

    def _tables(self) -> dict[str, LossTable]:
        """The tables that losses go to, by the name of their sums in an event."""
        return {"nll": self.nll, "kl": self.kl} if self.has_kl else {"nll": self.nll}

    def _add_cost(self, event: Event, step: int = 0) -> None:
        self.layer_sequences += event["layer_sequences"]
        self.seconds += event["seconds"]
        self.weight_bytes[step] = self.weight_bytes.get(step, 0) + (event.get("weight_bytes") or 0)

    @property
    def by_kl(self) -> bool:
        """Whether the search goes by the KL to the start pattern, and not by the loss."""
        return bool(self.start["options"]["objective"] == "kl")

    @property
    def by_table(self) -> bool:
        """Whether a second-order table proposes what is measured."""
        return bool(self.start["options"]["method"] == "fisher")

    @property
    def has_kl(self) -> bool:
        """Whether the KL to the start pattern is measured beside the loss."""
        return measures_kl(self.start["options"])

    @property
    def objective(self) -> LossTable:
        """What the search goes by: the loss, or the KL."""
        return self.kl if self.by_kl else self.nll

    @property
    def start_pattern(self) -> Pattern:
        """All F, but for layers that the checkpoint itself shares."""
        return Pattern(self.start["start_pattern"])

    @property
    def references(self) -> dict[str, str]:
        """Name to letters of the patterns scored for comparison, such as uniform:1/4."""
        return dict(self.start["references"])

    @property
    def pattern(self) -> Pattern:
        """The pattern so far: the refined one where there is one, else that of the search."""
        return self.searched if self.refinement is None else self.refinement.pattern

    @property
    def searched(self) -> Pattern:
        """The pattern of the search so far: the last commit's, or the one that was chosen as a whole."""
        if self.chosen is not None:
            return Pattern(self.chosen["pattern"])
        return Pattern(self.commits[-1].pattern) if self.commits else self.start_pattern

    def before(self, step: int) -> Pattern:
        """The pattern that a step began with."""
        return Pattern(self.commits[step - 2].pattern) if step > 1 else self.start_pattern

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
    def stay_full(self) -> frozenset[int]:
        """Layers that the search leaves F: those to keep, and the first ones of stages, where they have indexers."""
        firsts = {first for first, _ in self.start.get("blocks") or []}
        return frozenset(self.start_pattern.full_layers) & {*firsts, *(self.start["options"].get("keep_full") or ())}

    def measured(self) -> list[Pattern]:
        """The patterns that were scored on every sequence and have F where the search leaves it."""
        complete = (Pattern(letters) for letters in self.objective if self.objective.is_complete(letters))
        return [pattern for pattern in complete if self.stay_full <= {*pattern.full_layers}]

    def frontier(self) -> dict[int, Pattern]:
        """By the number of F layers, most first: the steadiest of the measured patterns.

        Down to what was asked for: below that nothing was searched, and only uniform patterns are known.
        """
        fewest = len(self.start_pattern.full_layers) - self.start["options"]["num_shared"]
        of_count: dict[int, list[Pattern]] = {}
        for pattern in (each for each in self.measured() if len(each.full_layers) >= fewest):
            of_count.setdefault(len(pattern.full_layers), []).append(pattern)
        return {count: self.steadiest(patterns) for count, patterns in sorted(of_count.items(), reverse=True)}

    def ranked(self, patterns: Iterable[Pattern]) -> list[Pattern]:
        """Measured patterns, the lowest objective first."""
        return sorted(patterns, key=lambda each: (self.objective.loss(each.letters), each.letters))

    def steadiest(self, patterns: Iterable[Pattern]) -> Pattern:
        """Of measured patterns that one standard error does not part from the lowest objective, the lowest KL.

        The lowest of many losses is partly luck, and the KL's relative error is several times smaller (the rule of one
        standard error: Breiman and others, Classification and Regression Trees, 1984).
        """
        lowest, *others = self.ranked(patterns)
        if self.by_kl or not self.has_kl:
            return lowest
        alike = [each for each in others if self.objective.difference(each.letters, lowest.letters).is_tie] + [lowest]
        return min(alike, key=lambda each: (self.kl.loss(each.letters), each.letters))

    def loss(self, letters: str) -> float:
        """Nats per token; raises JournalError if the pattern was not scored on every sequence."""
        return self.nll.loss(letters)

    def difference(self, letters: str, reference: str | None = None) -> Difference:
        """Difference of the loss to `reference` (default: the start pattern), paired over sequences."""
        return self.nll.difference(letters, reference or self.start_pattern.letters)

    def mean_kl(self, letters: str) -> Difference | None:
        """KL(start pattern || pattern) in nats per token, with its standard error; None in runs that have no KL."""
        return self.kl.mean(letters) if self.has_kl else None

    def steps(self) -> tuple[Step, ...]:
        """The committed flips with their losses: the curve."""
        steps = []
        for commit in self.commits:
            difference, kl = self.difference(commit.pattern), self.mean_kl(commit.pattern)
            steps.append(
                Step(
                    commit.step,
                    commit.layer,
                    self.loss(commit.pattern),
                    difference.delta,
                    difference.std_err,
                    commit.pattern,
                    kl=kl.delta if kl else None,
                    kl_std_err=kl.std_err if kl else None,
                )
            )
        return tuple(steps)

    def candidates(self, step: int) -> list[Candidate]:
        """Every flip that a step scored completely (the last one may still be at work), by layer."""
        before, asked = self.before(step), self.asked.get(step, [])
        if step <= len(self.commits):
            layers = sorted(self.commits[step - 1].candidates)
        else:
            layers = [layer for layer in before.full_layers[1:] if before.flip(layer).letters in asked]
        flips = [(layer, before.flip(layer).letters) for layer in layers]
        return [
            Candidate(step, layer, letters, self.loss(letters), self.difference(letters))
            for layer, letters in flips
            if self.nll.is_complete(letters)
        ]


def _of_heldout(event: Event) -> Event | None:
    """Losses of held-out sequences as the record of these has them; None for what is no such event."""
    held = event.get("event") == "losses" and event.get("set") == HELDOUT_SET
    return {**event, "set": None, "step": 0} if held else None


def why_no_pattern(directory: Path) -> str:
    """Why the directory of a run has no pattern.json; empty for one that is no run's. Raises JournalError."""
    journal = Journal(directory / JOURNAL_NAME)
    if not journal.exists():
        return ""
    if _is_evaluation(journal.events()):
        return f"{directory} holds an evaluation, which has no pattern of its own: give the RUN of a search"
    return (
        f"{directory} is a run that is not finished (it has a {JOURNAL_NAME} and no pattern.json): repeat its command "
        "to finish it"
    )


def _is_evaluation(events: Sequence[Event]) -> bool:
    options = events[0].get("options")
    return isinstance(options, dict) and options.get("method") == "eval"


def load_run(directory: Path) -> RunRecord:
    """Replay the journal of a RUN directory; raises JournalError where there is none."""
    journal = Journal(directory / JOURNAL_NAME)
    if not journal.exists():
        raise JournalError(f"{directory} holds no {JOURNAL_NAME}: expected the RUN directory of icsearch greedy")
    events = journal.events()
    if _is_evaluation(events):
        raise JournalError(f"{directory} holds an evaluation that is not finished: repeat its command to finish it")
    try:
        return RunRecord.replay(events)
    except JournalError as error:
        raise JournalError(f"{directory}: {error}") from None
