"""What a run's journal says, replayed: losses, commits, cost. Search, report and export all read a run through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from icsearch.errors import JournalError, PatternError
from icsearch.journal import Event, Journal
from icsearch.jsonfile import (
    DURATION,
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    FieldError,
    Kind,
    check_fields,
    layers,
    letters,
    list_of,
    optional,
    shown,
    whole,
)
from icsearch.pattern import CALIBRATION_FIELDS, MODEL_FIELDS, Pattern, PatternFile, Step
from icsearch.refinement import CALIBRATION_SET, HELDOUT_SET, OUTCOMES, Refinement, Trial, event_fields
from icsearch.statistics import Difference, mean_loss, paired_difference

JOURNAL_NAME = "journal.jsonl"

# What the fields of the first event must be; `_check_start` adds what has to agree among them.
START_FIELDS = {
    "icsearch_version": TEXT,
    "options": OBJECT,
    "model": OBJECT,
    "calibration": OBJECT,
    "environment": optional(OBJECT),
    "start_pattern": letters(),
    "layer_indices": layers(),
    "decoder_layers": whole(1),
    "references": OBJECT,
    "tokens": list_of(whole(1)),
    "refine_on": optional(OBJECT),
}
OPTION_FIELDS = {
    "method": TEXT,
    "strategy": TEXT,
    "objective": TEXT,
    "num_shared": optional(whole(0)),
    "stages": optional(whole(1)),
    "keep_full": optional(layers()),
    "confidence": optional(NUMBER),
    "tie_margin": optional(NUMBER),
    "batch_size": optional(whole(1)),
    "threads": optional(whole(1)),
}


REFINING = -1  # stands for a step in `asked`: what a refinement scored on the calibration sequences


@dataclass(frozen=True)
class Commit:
    """One committed flip, and the flips it was chosen from.

    `candidates` are the layers that were scored, `ties` those of them that the winner could not be told from (within
    one paired std_err). The rest is of strategies other than exact: see `strategies.Choice`.
    """

    step: int
    layer: int
    pattern: str
    candidates: tuple[int, ...]
    ties: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    within_margin: tuple[int, ...] = ()
    stale: tuple[int, ...] = ()
    violations: tuple[int, ...] = ()
    settled: int | None = None
    missed: bool = False

    @property
    def given_up(self) -> tuple[int, ...]:
        """The candidates that were not scored on all sequences."""
        return tuple(sorted((*self.dropped, *self.within_margin)))


@dataclass(frozen=True)
class Candidate:
    """One flip scored in a step: the layer, its loss (nats per token) and the difference to the all-F baseline.

    `sequences` is the number of those that this is known on, the first ones.
    """

    step: int
    layer: int
    pattern: str
    loss: float
    difference: Difference
    sequences: int


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
            raise FieldError(f"similarity of sequence {first} behind {self.sequences} sequences")
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

    `nll[pattern][sequence]` is the summed NLL in nats, and `kl` the same of the KL to the start pattern where the
    objective is the KL; `asked[step]` lists the patterns scored in a step
    (step 0: the start pattern and the uniform references). `heldout` is the same of the held-out sequences that a
    refinement confirms on: its losses, and nothing else.
    """

    start: Event = field(default_factory=dict)
    nll: dict[str, dict[int, float]] = field(default_factory=dict)
    kl: dict[str, dict[int, float]] = field(default_factory=dict)
    asked: dict[int, list[str]] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    similarity_sums: SimilaritySums = field(default_factory=SimilaritySums)
    chosen: Event | None = None
    refinement: Refinement | None = None
    heldout: RunRecord | None = None
    layer_sequences: int = 0
    seconds: float = 0.0
    finished: bool = False
    _fields: dict[str, dict[str, Kind]] = field(default_factory=dict, repr=False)

    @classmethod
    def replay(cls, events: Iterable[Event]) -> RunRecord:
        record = cls()
        for number, event in enumerate(events, start=1):
            try:
                record.apply(event)
            except (ValueError, PatternError) as error:
                raise JournalError(
                    f"journal line {number} is damaged ({error}): restore the file, or start over with --fresh"
                ) from None
        return record

    def apply(self, event: Event) -> None:
        """Take one event in; raises ValueError or PatternError, and changes nothing, where it does not fit."""
        kind = event.get("event")
        if not self.start:
            _check_start(event)
            self.start, self._fields = event, _event_fields(event)
            self.heldout = _heldout_record(event)
            return
        if kind == "losses" and event.get("set") == HELDOUT_SET:
            self._apply_heldout(event)
            return
        if kind not in list(self._fields):
            raise FieldError(f"event is {shown(kind)}: expected one of {', '.join(self._fields)}")
        check_fields(event, self._fields[kind])
        if kind == "losses":
            self._apply_losses(event)
        elif kind == "commit":
            self._apply_commit(event)
        elif kind == "similarity":
            self.similarity_sums.add(event)
            self._add_cost(event)
        elif kind == "chosen":
            self.chosen = event
        elif kind == "refine":
            self._apply_refine(event)
        elif kind in OUTCOMES:
            self._apply_outcome(event)
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "finish":
            self.finished = True

    def _apply_losses(self, event: Event) -> None:
        first, last = event["sequences"]
        if event["step"] > len(self.commits) + 1:
            raise FieldError(f"losses of step {event['step']} behind {len(self.commits)} commits")
        for name in ("nll", "kl") if self.by_kl else ("nll",):
            if [len(sums) for sums in event[name]] != [last - first] * len(event["patterns"]):
                raise FieldError(f"{name} does not hold one sum for each pattern and sequence")
        asked = self.asked.setdefault(REFINING if event.get("set") == CALIBRATION_SET else event["step"], [])
        for pattern, sums in zip(event["patterns"], event["nll"], strict=True):
            self.nll.setdefault(pattern, {}).update(zip(range(first, last), sums, strict=True))
            if pattern not in asked:
                asked.append(pattern)
        for pattern, sums in zip(event["patterns"], event["kl"] if self.by_kl else (), strict=False):
            self.kl.setdefault(pattern, {}).update(zip(range(first, last), sums, strict=True))
        self._add_cost(event)

    def _apply_heldout(self, event: Event) -> None:
        if self.heldout is None:
            raise FieldError(f"losses of set {HELDOUT_SET}, but the run has no held-out sequences")
        self.heldout.apply({**event, "set": None, "step": 0})
        self._add_cost(event)

    def _apply_refine(self, event: Event) -> None:
        if self.heldout is None or self.refinement is not None or event["pattern"] != self.searched.letters:
            raise FieldError(f"a refinement of {event['pattern']}, which does not follow from what is before it")
        self.refinement = Refinement(Pattern(event["pattern"]), event["costs"])

    def _apply_outcome(self, event: Event) -> None:
        if self.refinement is None or self.heldout is None:
            raise FieldError(f"{event['event']} without a refinement")
        if event["event"] == "swap":
            self._check_swap(event["before"], event["pattern"])
        self.refinement.apply(event)

    def _check_swap(self, before: str, after: str) -> None:
        """Raise FieldError unless both sets say that the pattern is better for the swap."""
        for record in filter(None, (self, self.heldout)):
            known = record.sums(after) is not None and record.sums(before) is not None
            if not known or not record.objective_difference(after, before).delta < 0:
                raise FieldError(f"a swap to {after}, which does not gain on both sets")

    def _apply_commit(self, event: Event) -> None:
        if self.refinement is not None:
            raise FieldError("a commit behind the beginning of the refinement")
        before, expected = self.pattern, len(self.commits) + 1
        commit = _commit_of(event)
        if commit.step != expected:
            raise FieldError(f"step is {commit.step}: expected {expected}")
        flips = {layer: before.flip(layer).letters for layer in (*commit.candidates, *commit.stale)}
        scored, others = set(commit.candidates), {*commit.ties, *commit.given_up, *commit.violations}
        if commit.pattern != flips.get(commit.layer) or commit.layer not in scored or not scored >= others:
            raise FieldError(f"layer, pattern and ties of step {expected} do not follow from its candidates")
        if scored & set(commit.stale) or commit.layer in commit.given_up:
            raise FieldError(f"what step {expected} says of its candidates does not agree")
        self.commits.append(commit)

    def _add_cost(self, event: Event) -> None:
        self.layer_sequences += event["layer_sequences"]
        self.seconds += event["seconds"]

    @property
    def by_kl(self) -> bool:
        """Whether the search goes by the KL to the start pattern, and not by the loss."""
        return bool(self.start["options"]["objective"] == "kl")

    @property
    def _objective(self) -> dict[str, dict[int, float]]:
        return self.kl if self.by_kl else self.nll

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
        """The pattern so far: the refined one where there is one, else that of the search."""
        return self.searched if self.refinement is None else self.refinement.pattern

    @property
    def searched(self) -> Pattern:
        """The pattern of the search so far: the last commit's, or the one that the dynamic program chose."""
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

    def objective_sums(self, letters: str, first: int, last: int) -> list[float]:
        """What the search goes by, on the sequences [first, last): sums over tokens, in nats.

        Raises JournalError where the pattern was not scored on one of them.
        """
        known = self._objective.get(letters, {})
        if not all(sequence in known for sequence in range(first, last)):
            raise JournalError(f"the journal lacks losses of {letters}: continue the run first")
        return [known[sequence] for sequence in range(first, last)]

    def objective_difference(self, letters: str, reference: str) -> Difference:
        """What the search goes by, minus that of `reference`, in nats per token, paired over sequences."""
        count = len(self.tokens)
        return paired_difference(
            self.objective_sums(letters, 0, count), self.objective_sums(reference, 0, count), self.tokens
        )

    def mean_kl(self, letters: str) -> Difference | None:
        """KL(start pattern || pattern) in nats per token, with its standard error; None in runs that have no KL."""
        if not self.by_kl:
            return None
        sums = self.objective_sums(letters, 0, len(self.tokens))
        return paired_difference(sums, [0.0] * len(sums), self.tokens)

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
        difference, kl = self.difference(commit.pattern), self.mean_kl(commit.pattern)
        return Step(
            commit.step,
            commit.layer,
            self.loss(commit.pattern),
            difference.delta,
            difference.std_err,
            commit.pattern,
            kl=kl.delta if kl else None,
            kl_std_err=kl.std_err if kl else None,
        )

    def candidates(self, step: int) -> list[Candidate]:
        """Every flip scored completely in a step (the last one may still be at work), by layer."""
        before = self._before(step)
        if step <= len(self.commits):
            layers = self.commits[step - 1].candidates
        else:
            asked = set(self.asked.get(step, []))
            layers = tuple(layer for layer in before.full_layers[1:] if before.flip(layer).letters in asked)
        flips = [(layer, before.flip(layer).letters) for layer in sorted(layers)]
        return [self._candidate(step, layer, letters) for layer, letters in flips if self.sums(letters) is not None]

    def given_up(self, step: int) -> list[Candidate]:
        """The flips that a committed step did not score on all sequences, by layer, by those that they were."""
        before = self._before(step)
        flips = [(layer, before.flip(layer).letters) for layer in self.commits[step - 1].given_up]
        return [self._candidate(step, layer, letters) for layer, letters in flips if self.known_sequences(letters)]

    def _candidate(self, step: int, layer: int, letters: str) -> Candidate:
        known = self.known_sequences(letters)
        nll = [self.nll[letters][sequence] for sequence in range(known)]
        difference = self.known_difference(letters, self.start_pattern.letters)
        return Candidate(step, layer, letters, mean_loss(nll, self.tokens[:known]), difference, known)

    def _before(self, step: int) -> Pattern:
        """The pattern that a step began with."""
        return Pattern(self.commits[step - 2].pattern) if step > 1 else self.start_pattern

    def known_sequences(self, letters: str) -> int:
        """How many sequences a pattern was scored on, from the first one on without a gap."""
        known = self.nll.get(letters, {})
        return next(n for n in range(len(known) + 1) if n not in known)

    def known_difference(self, letters: str, reference: str) -> Difference:
        """Difference to `reference` on the sequences that both were scored on, paired; JournalError if none."""
        return self._common_difference(self.nll, letters, reference)

    def known_objective_difference(self, letters: str, reference: str) -> Difference:
        """As `known_difference`, of what the search goes by."""
        return self._common_difference(self._objective, letters, reference)

    def _common_difference(self, known: dict[str, dict[int, float]], letters: str, reference: str) -> Difference:
        common = min(self.known_sequences(letters), self.known_sequences(reference))
        if not common:
            raise JournalError(f"the journal lacks losses of {letters} or {reference}: continue the run first")
        sums, others = ([known[name][i] for i in range(common)] for name in (letters, reference))
        return paired_difference(sums, others, self.tokens[:common])

    def cost(self) -> dict[str, Any]:
        """What the search took. A layer evaluation is one decoder layer run once over all calibration sequences.

        A candidate that was scored on a part of the sequences counts as that part of an evaluation. A naive search
        scores every candidate of every step on all sequences, those that this one left stale or gave up too.
        """
        refined = self._refinement_evaluations()
        candidates = self._search_evaluations() + refined
        flips = sum(len(commit.candidates) + len(commit.stale) for commit in self.commits)
        scored = flips + refined + len(self.asked.get(0, []))
        return {
            "candidate_evaluations": candidates,
            "layer_evaluations": self._layer_evaluations(),
            "naive_layer_evaluations": scored * self.start["decoder_layers"],
            "seconds": round(self.seconds, 3),
            **({"refinement_evaluations": refined} if self.refinement else {}),
        }

    def _search_evaluations(self) -> int | float:
        """Candidates scored by the committed steps; a whole number where all were scored on all sequences."""
        given_up = [len(commit.given_up) for commit in self.commits]
        whole_ones = sum(len(commit.candidates) for commit in self.commits) - sum(given_up)
        if not any(given_up):
            return whole_ones
        parts = sum(one.sequences for step, some in enumerate(given_up, start=1) if some for one in self.given_up(step))
        total = round(whole_ones + parts / len(self.tokens), 3)
        return int(total) if total.is_integer() else total

    def _refinement_evaluations(self) -> int:
        """Patterns that the refinement had scored, on either set; what the search had scored already is not in it."""
        heldout = self.heldout.asked.get(0, []) if self.heldout else []
        return len(self.asked.get(REFINING, [])) + len(heldout)

    def _layer_evaluations(self) -> float:
        """Layer runs over all sequences of a set; those of the held-out set count as one over all of that set."""
        heldout = self.heldout.layer_sequences if self.heldout else 0
        tokens = self.heldout.start["tokens"] if self.heldout else [1]
        return (self.layer_sequences - heldout) / len(self.start["tokens"]) + heldout / len(tokens)

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
            refinement=self._refinement_document(),
        )

    def _refinement_document(self) -> dict[str, Any] | None:
        """What pattern.json says of the refinement; None where there was none, or its held-out start is not scored."""
        refinement, heldout = self.refinement, self.heldout
        if refinement is None or heldout is None:
            return None
        start, end = refinement.start.letters, refinement.pattern.letters
        return {
            "start_pattern": start,
            "start_loss": self.loss(start),
            "pattern": end,
            "loss": self.loss(end),
            **_changes(self, end, start),
            "heldout": _heldout_document(heldout, start, end),
            "swaps": [_swap_document(self, heldout, trial) for trial in refinement.swaps],
        }


def _heldout_document(heldout: RunRecord, start: str, end: str) -> dict[str, Any]:
    """The losses before and after on the held-out sequences, None where no move came so far, and whose they are."""
    scored = heldout.sums(start) is not None
    return {
        "start_loss": heldout.loss(start) if scored else None,
        "loss": heldout.loss(end) if scored else None,
        **(_changes(heldout, end, start) if scored else {"delta": None, "std_err": None}),
        **{name: heldout.start["calibration"].get(name) for name in (*CALIBRATION_FIELDS, "sequences")},
    }


def _swap_document(record: RunRecord, heldout: RunRecord, trial: Trial) -> dict[str, Any]:
    return {
        "from_layer": trial.from_layer,
        "to_layer": trial.to_layer,
        "pattern": trial.pattern,
        "loss": record.loss(trial.pattern),
        **_changes(record, trial.pattern, trial.before),
        **_changes(heldout, trial.pattern, trial.before, "heldout_"),
    }


def _changes(record: RunRecord, after: str, before: str, prefix: str = "") -> dict[str, float]:
    """Differences of the loss, and of the KL where a run goes by that, in nats per token with paired errors."""
    changes = {"": record.difference(after, before)}
    if record.by_kl:
        changes["kl_"] = record.objective_difference(after, before)
    return {
        f"{prefix}{name}{of}": getattr(change, of) for name, change in changes.items() for of in ("delta", "std_err")
    }


def _commit_of(event: Event) -> Commit:
    """A commit event as the record keeps it; what exact searches and old journals do not say is empty."""
    lists = ("dropped", "within_margin", "stale", "violations")
    return Commit(
        event["step"],
        event["layer"],
        event["pattern"],
        tuple(event["candidates"]),
        tuple(event["ties"]),
        **{name: tuple(event.get(name) or ()) for name in lists},
        settled=event.get("settled"),
        missed=bool(event.get("missed")),
    )


def _check_start(event: Event) -> None:
    """Raise FieldError where the first event is no start event, lacks a field, or its fields disagree."""
    if event.get("event") != "start":
        raise FieldError(f"event is {shown(event.get('event'))}: expected start, which every journal begins with")
    check_fields(event, START_FIELDS)
    num_layers = len(event["start_pattern"])
    agreeing = {
        "num_layers": optional(whole(num_layers, num_layers)),
        "layer_indices": list_of(whole(0, event["decoder_layers"] - 1), num_layers),
        "tokens": Kind("at least one sequence", bool),
        "blocks": optional(Kind(f"stages that cover layers 0 to {num_layers - 1}", lambda b: _covers(b, num_layers))),
    }
    check_fields(event, agreeing)
    check_fields(event["options"], OPTION_FIELDS)
    check_fields(event["model"], {**MODEL_FIELDS, "native_shared": optional(layers(num_layers))})
    check_fields(event["calibration"], CALIBRATION_FIELDS)
    if event.get("refine_on") is not None:
        tokens = event["refine_on"].get("tokens")
        check_fields(event["refine_on"], {**CALIBRATION_FIELDS, "tokens": list_of(whole(1))})
        check_fields({"refine_on": tokens}, {"refine_on": Kind("at least one sequence", bool)})
    check_fields(event["references"], dict.fromkeys(event["references"], letters(num_layers)))


def _heldout_record(start: Event) -> RunRecord | None:
    """An empty record of the held-out sequences of a run that is to be refined."""
    if start.get("refine_on") is None:
        return None
    record = RunRecord()
    others = {"tokens": start["refine_on"]["tokens"], "calibration": start["refine_on"], "refine_on": None}
    record.apply({**start, **others})
    return record


def _covers(blocks: Any, num_layers: int) -> bool:
    """True for [first, last) ranges that follow one another from 0 to the last layer."""
    pairs = list_of(list_of(whole(0), 2)).fits(blocks)
    edges = [0, *(last for _, last in blocks)] if pairs else []
    return pairs and edges[-1] == num_layers and [[a, b] for a, b in pairwise(edges)] == blocks


def _event_fields(start: Event) -> dict[str, dict[str, Kind]]:
    """What the fields of every later event must be, in a run that began so."""
    num_layers, sequences = len(start["start_pattern"]), len(start["tokens"])
    pattern = letters(num_layers)
    flipped = list_of(whole(1, num_layers - 1))
    waves = Kind(f"a range within 0 to {sequences}", lambda value: _is_range(value, sequences))
    triangle = Kind("a lower triangle of numbers", lambda value: _is_triangle(value, num_layers))
    cost = {"layer_sequences": whole(0), "seconds": DURATION}
    return {
        "losses": {
            "step": whole(0),
            "sequences": waves,
            "patterns": list_of(pattern),
            "nll": list_of(list_of(NUMBER)),
            **({"kl": list_of(list_of(NUMBER))} if start["options"]["objective"] == "kl" else {}),
            "set": optional(Kind(repr(CALIBRATION_SET), lambda value: value == CALIBRATION_SET)),
            **cost,
        },
        "commit": {
            "step": whole(1),
            "layer": whole(1, num_layers - 1),
            "pattern": pattern,
            "candidates": flipped,
            "ties": flipped,
            **dict.fromkeys(("dropped", "within_margin", "stale", "violations"), optional(flipped)),
            "settled": optional(whole(1, sequences)),
            "missed": optional(FLAG),
        },
        "similarity": {"sequences": waves, "queries": whole(1), "cosine": triangle, "overlap": triangle, **cost},
        "chosen": {"pattern": pattern, "objective": NUMBER},
        **event_fields(num_layers),
        "note": {"text": TEXT},
        "finish": {},
    }


def _is_range(value: Any, sequences: int) -> bool:
    return list_of(whole(0, sequences), 2).fits(value) and value[0] < value[1]


def _is_triangle(value: Any, num_layers: int) -> bool:
    rows = list_of(list_of(NUMBER), num_layers).fits(value)
    return rows and [len(row) for row in value] == list(range(num_layers))


def load_run(directory: Path) -> RunRecord:
    """Replay the journal of a RUN directory; raises JournalError where there is none."""
    journal = Journal(directory / JOURNAL_NAME)
    if not journal.exists():
        raise JournalError(f"{directory} holds no {JOURNAL_NAME}: expected the RUN directory of icsearch greedy")
    events = journal.events()
    options = events[0].get("options")
    if isinstance(options, dict) and options.get("method") == "eval":
        raise JournalError(f"{directory} holds an evaluation that is not finished: repeat its command to finish it")
    try:
        return RunRecord.replay(events)
    except JournalError as error:
        raise JournalError(f"{directory}: {error}") from None
