"""The layer sweep: many patterns scored in one pass over the layers, by loss and by KL.

`SweepScorer.score` is where a batch enters, `Sweeper.sweep` the pass over the layers, `sequence_nll` where its losses
come out: one float64 sum per sequence.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional

from icsearch.core.errors import NonFiniteLossError
from icsearch.core.pattern import Pattern
from icsearch.model.machine import is_out_of_memory, out_of_memory
from icsearch.model.model import DsaModel
from icsearch.model.shape import HEAD_CHUNK_TOKENS
from icsearch.model.slot import SelectionStore
from icsearch.search.loop import Scores
from icsearch.sweep.branches import (
    Batch,
    Branch,
    BranchState,
    InCpuMemory,
    LayerBlock,
    OnDevice,
    Probe,
    count_sequences,
    cut_waves,
)
from icsearch.sweep.states import Keeping, StateStore

LM_HEAD = "the LM head"  # where a loss is not finite though all states are

# By measure (nll, kl) and a pattern's letters: one sum per sequence, in nats.
Sums = dict[str, dict[str, list[float]]]


class SweepScorer:
    """The layer sweep as the search sees it. Resident weights: one batch is one wave; streamed ones: as many as fit."""

    def __init__(self, sweeper: Sweeper, batches: Sequence[Batch], patterns: int, batches_per_wave: int = 1) -> None:
        self.patterns_per_sweep = patterns
        self._sweeper = sweeper
        self._waves = {(wave[0].first, wave[-1].last): wave for wave in cut_waves(batches, batches_per_wave)}
        self.waves: Sequence[tuple[int, int]] = list(self._waves)
        self._shrunk = False

    def retain(self, base: Pattern) -> None:
        self._sweeper.kept.retain(base)

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        return self._sweeper.expected([(patterns, self._waves[wave]) for patterns, wave in work])

    def announce(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> None:
        """One process begins with nothing before it is asked to."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        return self._sweeper.sweep(patterns, self._waves[wave], on_layer)

    def shrink(self, patterns: int) -> bool:
        """Half as many patterns at once as failed, and half of what was kept. Once: after that the plan is no guide."""
        if self._shrunk:
            return False
        self._shrunk, self.patterns_per_sweep = True, max(1, patterns // 2)
        freed = self._sweeper.kept.shrink()
        return patterns > 1 or freed > 0


@contextlib.contextmanager
def computing(mode: Callable[[], contextlib.AbstractContextManager[object]] = torch.inference_mode) -> Iterator[None]:
    """Around what runs layers: no gradients, and memory that runs out is an error that names the options to change.

    `torch.no_grad` as the mode where gradients are taken within.
    """
    try:
        with mode():
            yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


@contextlib.contextmanager
def kernel_notes() -> Iterator[set[str]]:
    """Within the block, collects what torch warns of a kernel that has no deterministic form."""
    notes: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    notes.update(str(warning.message) for warning in caught if "deterministic" in str(warning.message))


class Sweeper:
    """Runs sweeps of one model, or in a pipeline this process's part of them: the layers that its model holds.

    With `kept`, which belongs to one set of batches, a sweep goes on from earlier ones' states and keeps new ones.
    `place` says where states are between layer calls.
    """

    def __init__(
        self, model: DsaModel, kept: StateStore[BranchState] | None = None, place: OnDevice | None = None
    ) -> None:
        self.model = model
        self.block = LayerBlock(model, place)
        self._nothing: StateStore[BranchState] = StateStore(
            Keeping(len(model.layers), tuple(model.layer_indices)), model.start_pattern
        )
        self.kept = self._nothing if kept is None else kept

    def expected(self, work: Iterable[tuple[Sequence[Pattern], Sequence[Batch]]]) -> int:
        """Layer runs x sequences that sweeps of these patterns over these waves, in this order, will take."""
        rehearsal = self.kept.rehearsal()
        return sum(
            rehearsal.sweep(patterns, [batch.first for batch in wave]) * count_sequences(wave)
            for patterns, wave in work
        )

    def sweep(
        self,
        patterns: Iterable[Pattern],
        wave: Sequence[Batch],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
    ) -> Scores:
        """The loss of every pattern on every sequence of the wave, which must be consecutive.

        `on_layer` hears the layer runs x sequences done by each layer. Raises NonFiniteLossError, OutOfMemoryError.
        """
        asked, firsts = list(dict.fromkeys(patterns)), [batch.first for batch in wave]
        starts = {pattern: self.kept.start(pattern, firsts) for pattern in self.with_others(asked, wave)}
        before = self.model.weights.bytes_read
        with kernel_notes() as notes:
            branches, layer_sequences = self.advance(starts, wave, on_layer)
            sums = self.measure(asked, wave, branches)
        read = self.model.weights.bytes_read - before
        return Scores(sums.get("nll", {}), layer_sequences, tuple(sorted(notes)), sums.get("kl", {}), read)

    def with_others(self, asked: Sequence[Pattern], wave: Sequence[Batch]) -> Sequence[Pattern]:
        """The patterns that run in a sweep: those asked for, and those that their measures need beside them."""
        return asked

    @computing()
    def advance(
        self,
        starts: Mapping[Pattern, int],
        wave: Sequence[Batch],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
        arriving: Sequence[Branch] = (),
    ) -> tuple[list[Branch], int]:
        """Branches behind the last of this sweeper's layers, and the layer runs x sequences: see LayerBlock.

        `starts` has the decoder layer where each pattern's branch begins: the deepest one whose entry is kept.
        """
        return self.block.advance(starts, wave, self.kept, on_layer, arriving=arriving)

    @computing()
    def measure(self, asked: Sequence[Pattern], wave: Sequence[Batch], branches: Sequence[Branch]) -> Sums:
        """The sums of branches that are behind the model's last layer, batch after batch."""
        tables: Sums = {}
        for number, batch in enumerate(wave):
            for name, sums in self.losses(asked, batch, states_of(branches, number)).items():
                for letters, values in sums.items():
                    tables.setdefault(name, {}).setdefault(letters, []).extend(values)
        return tables

    def losses(self, asked: Sequence[Pattern], batch: Batch, states: Mapping[str, torch.Tensor]) -> Sums:
        """The sums of one batch; `states` as in `states_of`. Raises NonFiniteLossError."""
        sums: dict[str, list[float]] = {}
        for pattern in asked:
            normed = self.normed(states[pattern.letters])
            nll = sequence_nll(normed, self.model.lm_head, batch.input_ids, batch.counted)
            self.check_finite(nll, batch, pattern)
            sums[pattern.letters] = nll.tolist()
        return {"nll": sums}

    @computing()
    def run(
        self,
        patterns: Iterable[Pattern],
        wave: Sequence[Batch],
        reduce: Callable[[Batch, dict[str, torch.Tensor]], None],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
        probe: Probe | None = None,
    ) -> int:
        """One pass over the layers; `reduce` gets each batch with the last layer's [B, T, D] states by pattern.

        With a `probe`, S layers run their own indexer too, and the probe hears both selections. It wants to see every
        layer, so this pass goes without what is kept. Returns the layer runs x sequences.
        """
        starts = dict.fromkeys(patterns, 0)
        branches, layer_sequences = self.block.advance(starts, wave, self._nothing, on_layer, probe)
        for number, batch in enumerate(wave):
            reduce(batch, states_of(branches, number))
        return layer_sequences

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last layer's states, wherever they are, behind the final norm and on the device."""
        return self.model.final_norm(self.block.place.fetch(hidden_states))

    def check_finite(self, sums: torch.Tensor, batch: Batch, pattern: Pattern) -> None:
        """Raise NonFiniteLossError with layer and sequence named, unless all of the [B] sums are finite."""
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            row = bad[0]
            where = ""
            if len(self.model.held) == len(self.model.layers):
                where = self.trace(pattern, batch, row)[0] or LM_HEAD
            raise NonFiniteLossError(str(sums[row].item()), batch.first + row, str(pattern), where)

    @computing()
    def trace(
        self, pattern: Pattern, batch: Batch, row: int, arriving: BranchState | None = None
    ) -> tuple[str, BranchState]:
        """Where in the layers that this process has a sequence's states are first not finite, "" where they all are.

        Layer by layer, from the embedding or from what the block before has handed on; with what these layers hand on.
        """
        calls = self.block.calls_for(batch)
        if arriving is None:
            arriving = BranchState(self.model.embed(batch.input_ids), None)
            if not torch.isfinite(arriving.hidden_states[row]).all():
                return "the embedding", arriving
        states, store = arriving.hidden_states, SelectionStore(pattern, arriving.selection)
        for index in self.model.held:
            with self.model.holding(index):
                states = self.model.run_layer(index, states, calls[index], store)
            if not torch.isfinite(states[row]).all():
                return f"decoder layer {index}", BranchState(states, store.selection)
        return "", BranchState(states, store.selection)


def states_of(branches: Sequence[Branch], number: int) -> dict[str, torch.Tensor]:
    """The [B, T, D] states of branches behind the last layer on one batch of the wave, by the pattern's letters."""
    return {branch.patterns[0].letters: branch.hidden_states[number] for branch in branches}


class KlSweeper(Sweeper):
    """A sweeper whose results have KL(unmodified || pattern) too, summed, in nats.

    The NLL has the bits of a sweep without KL. `keep_full_states`: all batches' final states have room in memory.
    """

    def __init__(
        self,
        model: DsaModel,
        kept: StateStore[BranchState] | None,
        keep_full_states: bool,
        place: OnDevice | None = None,
    ) -> None:
        super().__init__(model, kept, place)
        self._keep_full_states = keep_full_states
        self._full_states: dict[int, torch.Tensor] = {}  # by first sequence: [B, T, D] after the final norm

    def expected(self, work: Iterable[tuple[Sequence[Pattern], Sequence[Batch]]]) -> int:
        """As of any sweeper, with the runs of the unmodified model where its states are not known."""
        known, swept = set(self._full_states), []
        for patterns, wave in work:
            swept.append((self.with_others(patterns, wave, known), wave))
            known |= {batch.first for batch in wave if self._keep_full_states}
        return super().expected(swept)

    def with_others(
        self, asked: Sequence[Pattern], wave: Sequence[Batch], known: Iterable[int] | None = None
    ) -> Sequence[Pattern]:
        """The patterns asked for, and the unmodified model's unless its states on the whole wave are known."""
        if {batch.first for batch in wave} <= set(self._full_states if known is None else known):
            return asked
        return list(dict.fromkeys([*asked, self.model.start_pattern]))

    def losses(self, asked: Sequence[Pattern], batch: Batch, states: Mapping[str, torch.Tensor]) -> Sums:
        """NLL and KL sums; `states` holds the unmodified model's too, where they are not known."""
        reference = self._full_states.get(batch.first)
        if reference is None:
            reference = self.normed(states[self.model.start_pattern.letters])
            if self._keep_full_states:
                self._full_states[batch.first] = reference
        tables: Sums = {"nll": {}, "kl": {}}
        for pattern in asked:
            normed = self.normed(states[pattern.letters])
            nll, kl, _ = token_measures(normed, reference, self.model.lm_head, batch.input_ids)
            for name, values in (("nll", nll), ("kl", kl)):
                sums = per_sequence(values, batch.counted)
                self.check_finite(sums, batch, pattern)
                tables[name][pattern.letters] = sums.tolist()
        return tables


def make_sweeper(
    model: DsaModel, kept: StateStore[BranchState], by_kl: bool, keep_full_states: bool, in_cpu_memory: bool
) -> Sweeper:
    """A sweeper that measures the KL too where that is wanted, with states where the plan has them."""
    place = InCpuMemory(model.device) if in_cpu_memory else OnDevice()
    return KlSweeper(model, kept, keep_full_states, place) if by_kl else Sweeper(model, kept, place)


@torch.inference_mode()
def naive_nll(model: DsaModel, pattern: Pattern, batches: Sequence[Batch]) -> list[float]:
    """The slow, obvious twin: one whole forward per pattern and batch by the model's own code."""
    sums: list[float] = []
    for batch in batches:
        states = model.final_hidden_states(batch.input_ids, pattern)
        sums += sequence_nll(states, model.lm_head, batch.input_ids, batch.counted).tolist()
    return sums


def sequence_nll(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    counted: torch.Tensor,
) -> torch.Tensor:
    """Summed next-token NLL of each sequence, in nats.

    hidden_states: [B, T, D] after the final norm; input_ids: int64 [B, T]; counted: bool [B, T], True where the
    prediction of that token counts (position 0 is never predicted). Logits are float32, sums float64.
    Returns float64 [B].
    """
    return per_sequence(token_nll(hidden_states, lm_head, input_ids), counted)


def token_nll(
    hidden_states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], input_ids: torch.Tensor
) -> torch.Tensor:
    """NLL of each predicted token in nats, flat float32 [B*(T-1)]; shapes as in `sequence_nll`."""
    chunks = [
        functional.cross_entropy(lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(_chunks(hidden_states), _target_chunks(input_ids), strict=True)
    ]
    return torch.cat(chunks)


def token_measures(
    hidden_states: torch.Tensor,
    reference_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per predicted token: NLL, KL(reference || model), both in nats, and whether the most likely token is the same.

    Shapes as in `sequence_nll`; `reference_states` are those of the all-F model. Each result is flat [B*(T-1)],
    float32, float32, bool. The NLL has the bits of `sequence_nll`: the LM head sees the same chunks.
    """
    nll, kl, agree = [], [], []
    chunks = zip(_chunks(hidden_states), _chunks(reference_states), _target_chunks(input_ids), strict=True)
    for states, references, targets in chunks:
        logits, reference = lm_head(states).float(), lm_head(references).float()  # [chunk, V]
        nll.append(functional.cross_entropy(logits, targets, reduction="none"))
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        kl.append(functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agree.append(logits.argmax(-1) == reference.argmax(-1))
    return torch.cat(nll), torch.cat(kl), torch.cat(agree)


def per_sequence(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sums over the counted tokens of each sequence: flat [B*(T-1)] values to float64 [B]."""
    table = values.double().view(len(counted), -1)
    return torch.where(counted[:, 1:], table, 0.0).sum(dim=1)


def selection_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """|first & second| / |first| for each query, float64 [B, T] (IndexCache paper, Appendix A).

    Selections of any family: indices [B, T, k], in which negative ones hold nothing and each other one stands once;
    [B, H, T, k] for so many groups of heads, over which it is the mean; or a bool mask [B, 1, T, T]. 0 / 0 is NaN.
    """
    if first.dtype == torch.bool:
        common, size = (first & second).sum(-1), first.sum(-1)
    else:
        merged = torch.cat([first, second], dim=-1).sort(dim=-1).values  # [..., 2k]
        common = ((merged[..., 1:] == merged[..., :-1]) & (merged[..., 1:] >= 0)).sum(dim=-1)
        size = (first >= 0).sum(-1)
    share = common.double() / size
    return share if share.dim() == 2 else share.mean(1)


def _chunks(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states that predict, [B, T, D] without the last position, in the LM head's chunks."""
    return hidden_states[:, :-1].reshape(-1, hidden_states.shape[-1]).split(HEAD_CHUNK_TOKENS)


def _target_chunks(input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return input_ids[:, 1:].reshape(-1).split(HEAD_CHUNK_TOKENS)
