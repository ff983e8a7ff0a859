"""What a second-order table said of the patterns that were measured, beside what was measured. Numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference, paired_difference, rank_correlation
from icsearch.runs.record import RunRecord
from icsearch.search.protocol import KL, LOSS

if TYPE_CHECKING:
    from icsearch.search.second_order import SecondOrderTable

FLIP, PATH, FINALIST, UNIFORM = "single flip", "nested path", "finalist", "uniform"
FEWEST_RANKED = 3  # patterns below which an order says nothing


@dataclass(frozen=True)
class Prices:
    """Loss above the start pattern's, and KL to it: nats per token, with standard errors over sequences."""

    loss: Difference
    kl: Difference


@dataclass(frozen=True)
class Measured:
    """A pattern that was measured. `kind` is the first that asked for it, `told` names it more closely.

    `layer`: of a single flip, the one that shares. `heldout`: the loss above the start pattern's on held-out sequences,
    where these chose among the best.
    """

    pattern: Pattern
    kind: str
    told: str
    predicted: Prices
    measured: Prices
    layer: int | None
    heldout: Difference | None

    @property
    def full(self) -> int:
        return len(self.pattern.full_layers)


@dataclass(frozen=True)
class Ranked:
    """Spearman's rank correlations of what was predicted and measured, over so many patterns."""

    patterns: int
    loss: float
    kl: float


@dataclass(frozen=True)
class FisherView:
    """`pair_loss[layer][source]`, `pair_kl`: what one layer costs alone under one source; so many `draws`.

    `measured` holds every pattern once but the start pattern.
    """

    draws: int
    pair_loss: list[list[Difference]]
    pair_kl: list[list[Difference]]
    measured: tuple[Measured, ...]

    def of(self, pattern: Pattern) -> Measured | None:
        """What is known of a pattern; None where it was not measured, and of the start pattern."""
        return next((known for known in self.measured if known.pattern == pattern), None)

    def finalists(self, full: int) -> list[Measured]:
        """All that was measured with so many F layers."""
        return [known for known in self.measured if known.full == full]

    def ranked(self, kind: str | None = None) -> Ranked | None:
        """How well the table put the patterns of one kind in order, or all; None for too few."""
        some = [known for known in self.measured if kind in (None, known.kind)]
        if len(some) < FEWEST_RANKED:
            return None
        loss, kl = (
            rank_correlation(
                [getattr(known.predicted, name).delta for known in some],
                [getattr(known.measured, name).delta for known in some],
            )
            for name in ("loss", "kl")
        )
        return Ranked(len(some), loss, kl)


def view_fisher(record: RunRecord) -> FisherView | None:
    """None for a search without a table, and while the table is not whole."""
    tables = tables_of(record) if record.by_table else []
    if not tables:
        return None
    asked = _asked(record)
    predicted = predict(tables, list(asked))
    full = set(record.start_pattern.full_layers)
    flipped = {pattern: min(full - set(pattern.full_layers)) for pattern in asked}  # its first layer that shares
    start, heldout = record.start_pattern.letters, record.heldout
    known = heldout.nll if heldout is not None and record.refinement is None else None
    measured = tuple(
        Measured(
            pattern,
            *asked[pattern],
            prices,
            Prices(record.difference(pattern.letters), record.kl.mean(pattern.letters)),
            flipped[pattern] if asked[pattern][0] == FLIP else None,
            known.difference(pattern.letters, start) if known and known.is_complete(pattern.letters) else None,
        )
        for pattern, prices in zip(asked, predicted, strict=True)
    )
    return FisherView(record.start["options"]["draws"], pair_costs(tables, LOSS), pair_costs(tables, KL), measured)


def _asked(record: RunRecord) -> dict[Pattern, tuple[str, str]]:
    """Kind and name of every pattern that was measured on all sequences, but the start pattern."""
    flips = len(record.start_pattern.full_layers) - 1
    path, *rounds = record.proposals or [[]]
    told = [(letters, FINALIST, f"round {i}") for i, patterns in enumerate(rounds, start=1) for letters in patterns]
    told += [(letters, FINALIST, "swaps") for letters in record.nll]  # what nothing else names
    told = [(letters, PATH, f"nested path, step {step}") for step, letters in enumerate(path, start=1)] + told
    told = [(letters, UNIFORM, name.replace(":", " ")) for name, letters in record.references.items()] + told
    told = [(letters, FLIP, FLIP) for letters in record.nll if letters.count("F") == flips] + told
    names: dict[Pattern, tuple[str, str]] = {}
    for letters, kind, name in told:
        if record.nll.is_complete(letters) and letters != record.start_pattern.letters:
            names.setdefault(Pattern(letters), (kind, name))
    return names


def tables_of(record: RunRecord) -> list[SecondOrderTable]:
    """The second-order table of each sequence, since errors are taken over them; none while it is not whole."""
    if len(record.fisher.true) < len(record.tokens):
        return []
    from icsearch.search.proposals import table_of  # with numpy, which no other page needs
    from icsearch.search.second_order import SecondOrderTable

    table = table_of(record)
    each = [slice(at, at + 1) for at in range(len(table.tokens))]
    return [SecondOrderTable(table.drawn[at], table.true[at], table.tokens[at]) for at in each]


def pair_costs(tables: Sequence[SecondOrderTable], price: int) -> list[list[Difference]]:
    """What each layer alone costs under each earlier one's selection, in nats per token: a lower triangle."""
    tokens = [table.tokens[0] for table in tables]
    pairs = [table.pair_costs()[price] * table.tokens[0] for table in tables]  # [N, N] of each sequence, in nats
    return [[_mean([sums[i, j] for sums in pairs], tokens) for j in range(i)] for i in range(len(pairs[0]))]


def predict(tables: Sequence[SecondOrderTable], patterns: Sequence[Pattern]) -> list[Prices]:
    """What the tables of all sequences say of each pattern; nothing where there is no table."""
    from icsearch.search.second_order import full_of

    if not patterns or not tables:
        return []
    sums = [table.predict(full_of(patterns)) * table.tokens[0] for table in tables]  # [2, P] of each sequence, in nats
    tokens = [table.tokens[0] for table in tables]
    return [
        Prices(*(_mean([of_sequence[row, at] for of_sequence in sums], tokens) for row in (LOSS, KL)))
        for at in range(len(patterns))
    ]


def _mean(sums: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Nats per token of sums over sequences, in nats."""
    return paired_difference(list(map(float, sums)), [0.0] * len(sums), tokens)
