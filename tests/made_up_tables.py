"""Made-up loss tables, and strategies played on them: one float per pattern and sequence, no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss
from icsearch.search.protocol import Choice, Task, looks_of
from icsearch.search.registry import Options, make_strategy

# The objective's sum of a pattern on each sequence.
Table = Callable[[Pattern], Sequence[float]]


def make_task(
    num_layers: int,
    flips: int,
    sequences: int = 24,
    *,
    batch_size: int = 4,
    stages: int = 1,
    tokens: Sequence[int] | None = None,
) -> Task:
    counted = tuple(tokens or (10,) * sequences)
    return Task(Pattern.full(num_layers), frozenset(), flips, stages, counted, looks_of(len(counted), batch_size))


@dataclass
class Played:
    """What a strategy did. `evaluations` in sequences."""

    layers: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    evaluations: int = 0
    asks: int = 0


def play(task: Task, options: Options, table: Table) -> Played:
    """A whole search; every choice is checked against what was asked."""
    strategy, played = make_strategy(task, options), Played()
    strategy.begin(table(task.start))
    asked: dict[int, int] = {}
    while ask := strategy.ask():
        assert ask == strategy.ask()
        assert ask.first < ask.last
        for layer in ask.layers:
            assert asked.get(layer, 0) == ask.first  # no gap, nothing twice
            asked[layer] = ask.last
        before = strategy.pattern
        sums = {layer: table(before.flip(layer))[ask.first : ask.last] for layer in ask.layers}
        choice = strategy.tell(sums)
        played.asks += 1
        played.evaluations += len(ask.layers) * (ask.last - ask.first)
        if choice is not None:
            _check(choice, asked, len(task.tokens))
            asked = {}
            assert strategy.pattern == before.flip(choice.layer)
            played.layers.append(choice.layer)
            played.choices.append(choice)
    assert len(played.layers) == task.num_shared
    return played


def _check(choice: Choice, asked: dict[int, int], sequences: int) -> None:
    assert choice.scored == tuple(sorted(asked))
    partial = {layer for layer, done in asked.items() if done < sequences}
    assert partial == {*choice.dropped, *choice.within_margin}
    assert choice.layer not in partial
    assert not set(choice.stale) & set(choice.scored)
    assert set(choice.spared) <= set(choice.stale)
    assert set(choice.violations) <= set(choice.scored)
    assert bool(choice.within_margin) == (choice.settled is not None)


def final_loss(task: Task, played: Played, table: Table) -> float:
    pattern = task.start
    for layer in played.layers:
        pattern = pattern.flip(layer)
    return mean_loss(table(pattern), task.tokens)


def noisy_table(
    task: Task, seed: int, cost: Callable[[Pattern], float], noise: Callable[[random.Random], float]
) -> Table:
    """`cost` in nats per token, and per pattern and sequence a noise beside that of the sequence itself."""
    known: dict[str, list[float]] = {}

    def table(pattern: Pattern) -> list[float]:
        if pattern.letters not in known:
            own = random.Random(f"{seed}/{pattern}")
            level = cost(pattern)
            known[pattern.letters] = [
                (2 + random.Random(f"{seed}/{i}").gauss(0, 0.3) + level + noise(own)) * count
                for i, count in enumerate(task.tokens)
            ]
        return known[pattern.letters]

    return table


def additive(weights: Sequence[float]) -> Callable[[Pattern], float]:
    """Every shared layer costs its own, whatever the others do."""
    return lambda pattern: sum(weights[layer] for layer in pattern.shared_layers)


def arbitrary(seed: int, scale: float = 1.0) -> Callable[[Pattern], float]:
    """Every pattern its own cost: no flip says anything about another, and bounds are worth nothing."""
    return lambda pattern: scale * random.Random(f"{seed}:{pattern}").random()
