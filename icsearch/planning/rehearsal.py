"""A search played through before it runs, with made-up losses: evaluations and layer runs. Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.search.protocol import Strategy
from icsearch.sweep.states import Keeping, LayerRuns, Rehearsal


@dataclass(frozen=True)
class Sweep:
    """One sweep of a search that was played through: the patterns that it scores, and the layers that it runs."""

    patterns: int
    runs: LayerRuns


def preview(
    strategy: Strategy, tokens: Sequence[int], count: Callable[[list[Pattern]], int], in_pools: bool = False
) -> tuple[int, int]:
    """(candidate evaluations, layer evaluations) that a search takes at most, played through with made-up losses.

    Sequences do not differ in them, so that a race drops nobody, and from step to step every flip costs more than
    any did before, so that no older loss rules one out. The last candidate is committed always, which is the most
    that a search can take: the candidates left then fork off earliest. An exact search takes as many evaluations as
    that in any case. `in_pools`: a step's candidates come in portions that may turn out otherwise, so each of them is
    charged with a trunk up to the last F layer.
    """
    sequences = layer_runs = 0
    step, steepness = 1, 2.0 * len(strategy.pattern)
    strategy.begin([0.0] * len(tokens))
    while ask := strategy.ask():
        length = ask.last - ask.first
        sequences += len(ask.layers) * length
        longest = strategy.pattern.full_layers[-1:] if in_pools else ()
        layers = dict.fromkeys((*ask.layers, *longest))
        layer_runs += count([strategy.pattern.flip(layer) for layer in layers]) * length
        losses = {layer: step**2 * steepness - layer for layer in ask.layers}
        told = {layer: [loss * t for t in tokens[ask.first : ask.last]] for layer, loss in losses.items()}
        step += strategy.tell(told) is not None
    return sequences // len(tokens), layer_runs // len(tokens)


def rehearse(
    begin: Callable[[], Strategy],
    tokens: Sequence[int],
    references: Sequence[Pattern],
    keeping: Keeping,
    per_sweep: int,
    along: Sequence[Pattern] = (),
) -> int:
    """Layer evaluations that an exact search with states kept between steps is likely to take: see `rehearsed`."""
    return _layer_runs(rehearsed(begin, tokens, references, keeping, per_sweep, along))


def rehearsed(
    begin: Callable[[], Strategy],
    tokens: Sequence[int],
    references: Sequence[Pattern],
    keeping: Keeping,
    per_sweep: int,
    along: Sequence[Pattern] = (),
) -> list[Sweep]:
    """The sweeps that an exact search with states kept between steps is likely to take, over all sequences.

    It is played through with made-up losses, once committing the first candidate in each step and once the last; the
    one that takes more is returned. With everything kept, every pair of candidates costs the layers above the later one
    once, whichever of them is committed first: a search to the end then takes the same in any order, and a shorter one
    the most where the first layers are committed. With nothing kept it takes the most where the last ones are. In each
    sweep, the patterns `along` run beside those that are scored.
    """
    both = [_played(begin(), tokens, references, keeping, per_sweep, along, sign) for sign in (1.0, -1.0)]
    return max(both, key=_layer_runs)


def _layer_runs(sweeps: Sequence[Sweep]) -> int:
    return sum(sweep.runs.total for sweep in sweeps)


def _played(
    strategy: Strategy,
    tokens: Sequence[int],
    references: Sequence[Pattern],
    keeping: Keeping,
    per_sweep: int,
    along: Sequence[Pattern],
    sign: float,
) -> list[Sweep]:
    """The sweeps of a search in which a flip costs its layer's number (sign 1), or that much less (-1)."""
    rehearsal = Rehearsal(keeping, strategy.pattern)
    taken = swept(rehearsal, [strategy.pattern, *references], per_sweep, along)
    strategy.begin([0.0] * len(tokens))
    while ask := strategy.ask():
        rehearsal.retain(strategy.pattern)
        taken += swept(rehearsal, [strategy.pattern.flip(layer) for layer in ask.layers], per_sweep, along)
        strategy.tell({layer: [sign * layer * t for t in tokens[ask.first : ask.last]] for layer in ask.layers})
    return taken


def swept(
    rehearsal: Rehearsal, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()
) -> list[Sweep]:
    """The sweeps that score these patterns, at most so many in one."""
    chunks = [patterns[start : start + per_sweep] for start in range(0, len(patterns), per_sweep)]
    return [Sweep(len(chunk), rehearsal.runs([*chunk, *along], [0])) for chunk in chunks]
