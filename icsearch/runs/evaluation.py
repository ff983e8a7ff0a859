"""What an evaluation's journal says, replayed, and the rows of eval.json that follow from it. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icsearch.core.errors import IcsearchError, JournalError
from icsearch.core.jsonfile import FieldError, read_object
from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference, mean_loss, paired_difference, wilson_interval
from icsearch.runs.journal import Event, Record
from icsearch.runs.schema import ALL_TOKENS, WAYS, check_document, check_eval_start, check_later

EVAL_FORMAT = "icsearch.eval/1"
_FROM_START = ("icsearch_version", "start_pattern", "layer_indices", "model", "calibration", "options", "environment")
CLEAR_LOSS, HEAVY_LOSS = 0.01, 0.1  # nats per token, where a verdict's words begin


@dataclass(frozen=True)
class SequenceMeasures:
    """Sums over the counted tokens of one sequence under one pattern; nll and kl in nats.

    `bucket_nll` splits `nll` by position; `overlap` holds, by S layer, the summed share of its borrowed selection
    that its own indexer would have chosen, over the queries that have more than index_topk tokens to choose from.
    Where a mask says which tokens count, `all_nll` and `all_kl` are the sums over all of them.
    """

    nll: float
    kl: float
    agree: float
    bucket_nll: tuple[float, ...]
    overlap: dict[int, float]
    all_nll: float = math.nan
    all_kl: float = math.nan


@dataclass
class EvalRecord(Record):
    """The state of an evaluation."""

    start: Event = field(default_factory=dict)
    measures: dict[str, dict[int, SequenceMeasures]] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Event] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layer_sequences: int = 0
    seconds: float = 0.0
    weight_bytes: int = 0
    finished: bool = False

    def check(self, event: Event) -> None:
        if not self.start:
            check_eval_start(event)
            return
        check_later(event, self.start)
        for letters, table in event["patterns"].items() if event["event"] == "measures" else ():
            known = self.measures.get(letters)
            if known and {str(layer) for layer in next(iter(known.values())).overlap} != table["overlap"].keys():
                raise FieldError(f"overlap of {letters} has other layers than before")

    def apply(self, event: Event) -> None:
        self.check(event)
        kind = event["event"]
        if kind == "start":
            self.start = event
        elif kind == "measures":
            self._apply_measures(event)
        elif kind == "task":
            self.tasks[event["pattern"], event["kind"]] = event
        elif kind == "extra":
            self.extras[event["name"]] = event["value"]
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "finish":
            self.finished = True

    def _apply_measures(self, event: Event) -> None:
        first, last = event["sequences"]
        for letters, table in event["patterns"].items():
            known = self.measures.setdefault(letters, {})
            for offset, sequence in enumerate(range(first, last)):
                overlap = {int(layer): sums[offset] for layer, sums in table["overlap"].items()}
                known[sequence] = SequenceMeasures(
                    table["nll"][offset],
                    table["kl"][offset],
                    table["agree"][offset],
                    tuple(table["bucket_nll"][offset]),
                    overlap,
                    *(table[name][offset] for name in ALL_TOKENS if name in table),
                )
        self.layer_sequences += event["layer_sequences"]
        self.seconds += event["seconds"]
        self.weight_bytes += event.get("weight_bytes") or 0

    def of(self, letters: str) -> list[SequenceMeasures]:
        """All sequences' measures in order; raises JournalError where some are missing."""
        known = self.measures.get(letters, {})
        if len(known) != len(self.start["tokens"]):
            raise JournalError(f"the journal has no complete measures of {letters}: continue the evaluation first")
        return [known[sequence] for sequence in range(len(known))]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pattern, most F layers first, all-F at the top."""
        rows = [self._row(named) for named in self.start["patterns"]]
        return sorted(rows, key=lambda row: (row["name"] != "full", -row["retention"], row["loss"]))

    def loss(self, letters: str) -> float:
        """Nats per token of a pattern that was measured on all sequences."""
        return mean_loss([measures.nll for measures in self.of(letters)], self.tokens)

    def _row(self, named: dict[str, Any]) -> dict[str, Any]:
        letters, full = named["pattern"], self.start["start_pattern"]
        own, base, tokens = self.of(letters), self.of(full), self.tokens
        nll = [measures.nll for measures in own]
        difference = paired_difference(nll, [measures.nll for measures in base], tokens)
        kl = paired_difference([measures.kl for measures in own], [0.0] * len(own), tokens)
        loss = mean_loss(nll, tokens)
        queries = self.start["choosing_queries"] * len(own)
        return {
            **named,
            "retention": Pattern(letters).retention,
            "full_layers": list(Pattern(letters).full_layers),
            "loss": loss,
            "delta": difference.delta,
            "std_err": difference.std_err,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "kl": kl.delta,
            "kl_std_err": kl.std_err,
            "top1_agreement": sum(measures.agree for measures in own) / sum(tokens),
            **self._all_tokens(own, base),
            "positions": self._positions(own, base),
            "borrowed_overlap": {
                str(layer): sum(measures.overlap[layer] for measures in own) / queries
                for layer in sorted(own[0].overlap)
            },
            "tasks": [_task_row(event) for (pattern, _), event in self.tasks.items() if pattern == letters],
            "verdict": verdict(difference, letters == full),
        }

    def _all_tokens(self, own: Sequence[SequenceMeasures], base: Sequence[SequenceMeasures]) -> dict[str, Any]:
        """Loss and KL over all tokens, where a mask counts some alone."""
        if not self.start.get("masked"):
            return {}
        tokens = [self.start["calibration"]["seq_len"] - 1] * len(own)
        nll = [measures.all_nll for measures in own]
        difference = paired_difference(nll, [measures.all_nll for measures in base], tokens)
        kl = paired_difference([measures.all_kl for measures in own], [0.0] * len(own), tokens)
        return {
            "all_tokens": {
                "loss": mean_loss(nll, tokens),
                "delta": difference.delta,
                "std_err": difference.std_err,
                "kl": kl.delta,
                "kl_std_err": kl.std_err,
            }
        }

    def _positions(self, own: Sequence[SequenceMeasures], base: Sequence[SequenceMeasures]) -> list[dict[str, Any]]:
        """Loss by position bucket: the far positions are where sharing hurts."""
        edges, rows = self.start["bucket_edges"], []
        for bucket in range(len(edges) - 1):
            tokens = [counts[bucket] for counts in self.start["bucket_tokens"]]
            if not sum(tokens):
                continue
            nll = [measures.bucket_nll[bucket] for measures in own]
            difference = paired_difference(nll, [measures.bucket_nll[bucket] for measures in base], tokens)
            rows.append(
                {
                    "first": edges[bucket],
                    "last": edges[bucket + 1],
                    "loss": mean_loss(nll, tokens),
                    "delta": difference.delta,
                    "std_err": difference.std_err,
                }
            )
        return rows

    def gap_closed(self, letters: str, uniform: str) -> Difference | None:
        """(uniform - searched) / (uniform - full), with its error by the delta method over sequences.

        None where uniform does not cost more than its own error, so that there is no gap to close.
        """
        tokens = self.tokens
        searched, spaced, full = (
            [m.nll for m in self.of(one)] for one in (letters, uniform, self.start["start_pattern"])
        )
        gap = paired_difference(spaced, full, tokens)
        if not gap.delta > 2 * gap.std_err:
            return None
        ratio = paired_difference(spaced, searched, tokens).delta / gap.delta
        # A ratio of sums: its error is that of the residuals (uniform - searched) - ratio * (uniform - full).
        left = [u - s for u, s in zip(spaced, searched, strict=True)]
        right = [ratio * (u - f) for u, f in zip(spaced, full, strict=True)]
        return Difference(ratio, paired_difference(left, right, tokens).std_err / gap.delta)

    def to_json(self) -> dict[str, Any]:
        """The document of the contract, format icsearch.eval/1."""
        return {
            "format": EVAL_FORMAT,
            **{name: self.start[name] for name in _FROM_START},
            "rows": self.rows(),
            "gaps": self._gaps(),
            "cost": {
                "layer_evaluations": round(self.layer_sequences / len(self.start["tokens"])),
                "layer_sequences": self.layer_sequences,
                "seconds": round(self.seconds, 3),
                **({"weight_bytes": self.weight_bytes} if self.weight_bytes else {}),
            },
            **({"notes": self.notes} if self.notes else {}),
            **self.extras,
        }

    def _gaps(self) -> list[dict[str, Any]]:
        """How much of uniform's loss each pattern with as many F layers avoids."""
        named = self.start["patterns"]
        found = []
        for uniform in (one for one in named if one["method"] == "uniform"):
            for other in named:
                same = other["pattern"].count("F") == uniform["pattern"].count("F")
                if not same or other["method"] in ("uniform", "full"):
                    continue
                gap = self.gap_closed(other["pattern"], uniform["pattern"])
                found.append(
                    {
                        "name": other["name"],
                        "uniform": uniform["name"],
                        "retention": Pattern(other["pattern"]).retention,
                        "gap_closed": None if gap is None else gap.delta,
                        "std_err": None if gap is None else gap.std_err,
                    }
                )
        return found


def _task_row(event: Event) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": event["kind"], "count": len(event["forced"])}
    for way in WAYS:
        hits = sum(event[way])
        low, high = wilson_interval(hits, len(event[way]))
        row[way] = {"accuracy": hits / len(event[way]), "low": low, "high": high}
    return row


def verdict(difference: Difference, is_full: bool) -> str:
    """What the numbers say of a pattern, in words, and no more than they carry."""
    if is_full:
        return "the unmodified model"
    if math.isnan(difference.std_err):
        return "one sequence says nothing about the error: evaluate more"
    if abs(difference.delta) <= 2 * difference.std_err:  # what it may be instead is what decides
        if excludes_clear_loss(difference):
            return (
                f"no loss seen: within two standard errors of the unmodified model, and {CLEAR_LOSS:g} is beyond them"
            )
        return (
            f"not known: a loss of {CLEAR_LOSS:g} nats per token or more is within two standard errors, evaluate more"
        )
    if difference.delta < 0:
        return "lower loss than the unmodified model, beyond two standard errors"
    if difference.delta < CLEAR_LOSS:
        return f"a measurable loss, under {CLEAR_LOSS:g} nats per token"
    if difference.delta < HEAVY_LOSS:
        return f"a clear loss, under {HEAVY_LOSS:g} nats per token"
    return f"a heavy loss, {HEAVY_LOSS:g} nats per token or more"


def excludes_clear_loss(difference: Difference) -> bool:
    """Whether a clear loss is more than two standard errors above the difference; not where there is no error."""
    return difference.delta + 2 * difference.std_err < CLEAR_LOSS


def load_eval(path: Path) -> dict[str, Any]:
    """Read an eval.json; a version that this code does not know is refused."""
    expected, advice = "the eval.json of icsearch eval", "evaluate again with this version"
    document = read_object(path, expected=expected, advice=advice, error=IcsearchError, version=EVAL_FORMAT)
    try:
        check_document(document)
    except FieldError as error:
        raise IcsearchError(f"{path} is damaged ({error}): {advice}") from None
    return document
