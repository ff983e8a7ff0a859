"""One step of a search as its journal has it: the flip that was committed, and the flips it was chosen from."""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.journal import Event
from icsearch.jsonfile import FieldError
from icsearch.pattern import Pattern
from icsearch.statistics import Difference


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
    spared: tuple[int, ...] = ()

    @classmethod
    def from_event(cls, event: Event) -> Commit:
        """A commit event whose fields are checked; what exact searches and old journals do not say is empty."""
        lists = ("dropped", "within_margin", "stale", "violations", "spared")
        return cls(
            event["step"],
            event["layer"],
            event["pattern"],
            tuple(event["candidates"]),
            tuple(event["ties"]),
            **{name: tuple(event.get(name) or ()) for name in lists},
            settled=event.get("settled"),
            missed=bool(event.get("missed")),
        )

    @property
    def given_up(self) -> tuple[int, ...]:
        """The candidates that were not scored on all sequences."""
        return tuple(sorted((*self.dropped, *self.within_margin)))

    def check(self, step: int, before: Pattern) -> None:
        """Raise FieldError unless this can be that step of a search which has come to the pattern `before`."""
        if self.step != step:
            raise FieldError(f"step is {self.step}: expected {step}")
        flips = {layer: before.flip(layer).letters for layer in (*self.candidates, *self.stale)}
        scored, others = set(self.candidates), {*self.ties, *self.given_up, *self.violations}
        if self.pattern != flips.get(self.layer) or self.layer not in scored or not scored >= others:
            raise FieldError(f"layer, pattern and ties of step {step} do not follow from its candidates")
        if scored & set(self.stale) or self.layer in self.given_up or not set(self.stale) >= set(self.spared):
            raise FieldError(f"what step {step} says of its candidates does not agree")


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
