"""What a journal says of a refinement, replayed: the moves that were scored, made and refused.

The events are `refine` (the flips are done, and this is the pattern to start from), `judged` (what calibration
sequences said of some moves) and `swap` or `refused` (what held-out sequences said of one). The losses are those of
the run itself, and of a record of their own for the held-out sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from icsearch.core.jsonfile import FieldError
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event

CALIBRATION_SET, HELDOUT_SET = "refine", "refine-on"  # `set` of the losses that a refinement asked for
OUTCOMES = ("judged", "swap", "refused")


@dataclass(frozen=True)
class Trial:
    """One move that held-out sequences were asked about, the patterns before and behind it, and whether it was made."""

    from_layer: int
    to_layer: int
    before: str
    pattern: str
    made: bool


@dataclass
class Refinement:
    """The state of a refinement. `costs`: what sharing each layer cost in the search, None where that is not known."""

    start: Pattern
    costs: list[float | None]
    outcomes: list[Event] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    moves_scored: int = 0
    moves_qualified: int = 0

    @property
    def swaps(self) -> list[Trial]:
        """The moves that were made, in order."""
        return [trial for trial in self.trials if trial.made]

    @property
    def pattern(self) -> Pattern:
        """The pattern so far."""
        return Pattern(self.swaps[-1].pattern) if self.swaps else self.start

    def check(self, event: Event) -> None:
        """Raise FieldError where one of OUTCOMES does not follow from the pattern so far."""
        judged = event["event"] == "judged"
        before = event["pattern"] if judged else event["before"]
        if before != self.pattern.letters:
            raise FieldError(f"a move starts from {before}: expected {self.pattern}")
        if not judged:
            if event["pattern"] != self._moved(event["from_layer"], event["to_layer"]):
                raise FieldError("pattern is not that behind the move")
            return
        moves = [tuple(move) for move in event["moves"]]
        for from_layer, to_layer in moves:
            self._moved(from_layer, to_layer)
        if not {tuple(move) for move in event["qualified"]} <= set(moves):
            raise FieldError("a move qualified that was not among those scored")

    def apply(self, event: Event) -> None:
        """Take in one of OUTCOMES that `check` lets through."""
        if event["event"] == "judged":
            self.moves_scored += len(event["moves"])
            self.moves_qualified += len(event["qualified"])
        else:
            layers, made = (event["from_layer"], event["to_layer"]), event["event"] == "swap"
            self.trials.append(Trial(*layers, event["before"], event["pattern"], made))
        self.outcomes.append(event)

    def _moved(self, from_layer: int, to_layer: int) -> str:
        """The letters behind a move; raises FieldError where no such move can be made."""
        pattern = self.pattern
        if from_layer == 0 or not pattern.is_full(from_layer) or pattern.is_full(to_layer):
            raise FieldError(f"no indexer can go from layer {from_layer} to {to_layer} of {pattern}")
        full = set(pattern.full_layers) - {from_layer} | {to_layer}
        return Pattern.from_full_layers(full, len(pattern)).letters
