"""What a user can ask for, checked: frozen requests that commands pass on as one object. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from icsearch.commands.specs import Target, resolve_specs
from icsearch.core.errors import IcsearchError, PatternError
from icsearch.core.jsonfile import shown
from icsearch.core.pattern import Pattern, num_full, parse_retention
from icsearch.core.text import did_you_mean
from icsearch.model.config import Backbone
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.search.greedy import split_stages
from icsearch.search.registry import DEFAULT_CONFIDENCE, STRATEGIES, Options
from icsearch.sweep.distributed.launch import pipeline_blocks

KL = "kl"
OBJECTIVES = ("lm-loss", KL)
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")  # and cuda:0
KERNELS = ("auto", "blockwise", "reference")
AUTO = "auto"
OFFLOADS = (AUTO, RESIDENT, CPU, DISK)
MIN_BLOCK_ELEMENTS = 2**10
# More than any run has use for. What a library makes of far more is a crash, or work without end.
MOST = {
    "--seq-len": 2**31 - 1,
    "--num-sequences": 2**31 - 1,
    "--batch-size": 2**31 - 1,
    "--threads": 1024,
    "--block-elements": 2**40,
    "--tasks": 10**6,
    "--task-length": 2**31 - 1,
    "--context": 2**40,
    "--measure": 2**31 - 1,
}
REFINEMENTS = ("swaps",)
DEMO_HELDOUT = {"demo": "demo:heldout", "demo:calibration": "demo:heldout"}  # what is held out of the built-in corpus
DEFAULT_RETENTION = Fraction(1, 4)
RequestT = TypeVar("RequestT", bound="PatternRequest")


@dataclass(frozen=True)
class CalibrationRequest:
    """Which batches to score on. None means: choose for me."""

    model: str
    source: str
    seq_len: int | None = None
    num_sequences: int | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_most("--seq-len", self.seq_len)
        _check_most("--num-sequences", self.num_sequences)


@dataclass(frozen=True)
class RunRequest:
    """What every command that runs a model can be asked. None means: choose for me."""

    calibration: CalibrationRequest
    out: Path
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    memory: int | None = None
    threads: int | None = None
    fresh: bool = False
    kernels: str = "auto"
    block_elements: int | None = None
    offload: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--kernels", self.kernels, KERNELS)
        _check_choice("--offload", self.offload, OFFLOADS)
        _check_most("--batch-size", self.batch_size)
        _check_most("--threads", self.threads)
        _check_most("--block-elements", self.block_elements)
        if self.block_elements is not None and self.kernels == "reference":
            raise IcsearchError("--block-elements belongs to the block-wise kernels: leave it out, or --kernels")
        if self.block_elements is not None and self.block_elements < MIN_BLOCK_ELEMENTS:
            raise IcsearchError(
                f"--block-elements {self.block_elements} is too small: give {MIN_BLOCK_ELEMENTS} or more"
            )

    @property
    def model(self) -> str:
        return self.calibration.model

    @property
    def heldout_source(self) -> str | None:
        """Where held-out sequences come from, for a command that needs some beside those that it scores on."""
        return None

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        """Refuse what cannot be done with a model of this start pattern; raises PatternError.

        `layers` are its decoder layers, by default one for each letter.
        """


@dataclass(frozen=True)
class PatternRequest(RunRequest):
    """How many layers to share, and which never: what greedy and the DP baseline have in common."""

    retention: Fraction | None = None
    num_shared: int | None = None
    stages: int | None = None
    keep_full: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retention is not None and self.num_shared is not None:
            raise IcsearchError("--retention and --num-shared both say how far to go: give one of them")

    @property
    def num_stages(self) -> int:
        """Pipeline blocks that are searched in turn."""
        return 1 if self.stages is None else self.stages

    def settled(self: RequestT, recorded: dict[str, Any]) -> RequestT:
        """With the stages of an existing run, unless others are asked for."""
        known = recorded.get("stages")
        return self if self.stages is not None or known is None else replace(self, stages=known)

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        self.resolve_num_shared(start)

    def resolve_num_shared(self, start: Pattern) -> int:
        """K, the number of flips from `start`; refused with the largest possible K where it cannot be reached."""
        self._check_layers(start)
        largest = len(self.flippable(start))
        wanted = self._wanted_flips(start)
        if wanted > largest:
            raise PatternError(
                f"cannot share {shown(wanted)} more layers: {largest or 'none'} of the {len(start)} DSA layers can be "
                "flipped (layer 0, --keep-full, first layers of stages and native S layers stay as they are); "
                f"{self._advice(largest)}"
            )
        return wanted

    def _advice(self, largest: int) -> str:
        """What to do where only so many layers can be flipped."""
        if largest:
            return f"give --num-shared {largest} or less"
        options = {"fewer --stages": self.num_stages > 1, "less to --keep-full": bool(self.keep_full)}
        given = [words for words, used in options.items() if used]
        return f"give {' or '.join(given)}" if given else "there is nothing to search in this checkpoint"

    def flippable(self, start: Pattern) -> list[int]:
        """The layers that a search may flip."""
        blocks = split_stages(len(start), self.num_stages)
        kept = {0} | self.keep_full | {block.start for block in blocks}
        return [layer for layer in start.full_layers if layer not in kept]

    def _check_layers(self, start: Pattern) -> None:
        total = len(start)
        for layer in sorted(self.keep_full):
            if layer >= total:
                raise PatternError(f"--keep-full names layer {layer}: expected DSA layers 0 to {total - 1}")
            if not start.is_full(layer):
                raise PatternError(f"--keep-full names layer {layer}, which the checkpoint itself shares: leave it out")
        if not 1 <= self.num_stages <= total:
            raise PatternError(
                f"--stages {shown(self.num_stages)} is out of range: give 1 to {total} for {total} DSA layers"
            )
        blocks = split_stages(total, self.num_stages)
        if len(blocks) != self.num_stages:
            raise PatternError(
                f"--stages {self.num_stages} cuts {total} DSA layers into {len(blocks)} blocks of {len(blocks[0])}: "
                f"give --stages {len(blocks)}, or a number that divides them better"
            )

    def _wanted_flips(self, start: Pattern) -> int:
        if self.num_shared is not None:
            if self.num_shared < 1:
                raise PatternError(f"--num-shared {self.num_shared} is out of range: give at least 1")
            return self.num_shared
        retention = self.retention or DEFAULT_RETENTION
        kept, full = num_full(retention, len(start)), len(start.full_layers)
        if kept >= full:
            raise PatternError(
                f"--retention {retention} keeps {kept} F layers and the checkpoint has {full}: "
                "nothing to flip; give a smaller retention"
            )
        return full - kept


@dataclass(frozen=True)
class GreedyRequest(PatternRequest):
    """Everything that a greedy search can be asked."""

    objective: str = "lm-loss"
    strategy: str = "exact"
    confidence: float | None = None
    tie_margin: float | None = None
    refine: str | None = None
    refine_on: str | None = None
    dp: int | None = None
    pp: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("--objective", self.objective, OBJECTIVES)
        _check_choice("--strategy", self.strategy, STRATEGIES)
        self._check_race()
        self._check_refinement()

    @property
    def num_stages(self) -> int:
        """As many as the blocks of a pipeline that was asked for; one chosen for lack of memory changes nothing."""
        return (self.pp or 1) if self.stages is None else self.stages

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        pipeline_blocks(len(start), range(len(start)), self.pp or 1)
        known = self if self.stages is not None else replace(self, stages=1)  # a run that goes on may have others
        known.resolve_num_shared(start)

    @property
    def heldout_source(self) -> str | None:
        """--refine-on, by default the held-out part of the built-in corpus where the calibration is of that."""
        if self.refine is None:
            return None
        return self.refine_on or DEMO_HELDOUT.get(self.calibration.source)

    def _check_refinement(self) -> None:
        if self.refine is None:
            if self.refine_on is not None:
                raise IcsearchError("--refine-on says what --refine swaps confirms on: give both, or neither")
            return
        _check_choice("--refine", self.refine, REFINEMENTS)
        if self.heldout_source is None:
            raise IcsearchError(
                "--refine swaps needs --refine-on DIR|SOURCE: sequences that the calibration does not hold, to confirm "
                "swaps on"
            )

    @property
    def race_options(self) -> dict[str, Any]:
        """What a run's options say of a race and of near-ties: nothing where the strategy has none."""
        confidence = DEFAULT_CONFIDENCE if self.confidence is None else self.confidence
        return {
            **({"confidence": confidence} if Options(self.strategy).races else {}),
            **({} if self.tie_margin is None else {"tie_margin": self.tie_margin}),
        }

    def _check_race(self) -> None:
        if self.confidence is not None and not Options(self.strategy).races:
            raise IcsearchError("--confidence belongs to a race: leave it out, or give --strategy race or race+lazy")
        if self.tie_margin is not None and self.strategy == "exact":
            raise IcsearchError(
                "--tie-margin settles near-ties, and exact leaves none open: leave it out, or give --strategy race, "
                "lazy or race+lazy"
            )
        if self.confidence is not None and not 0.5 < self.confidence < 1:
            raise IcsearchError(f"--confidence {self.confidence} is out of range: give a value between 0.5 and 1")
        if self.tie_margin is not None and not 0 < self.tie_margin < math.inf:
            raise IcsearchError(
                f"--tie-margin {self.tie_margin} is out of range: give nats per token above 0, such as 0.001"
            )


@dataclass(frozen=True)
class BaselineRequest(PatternRequest):
    """Everything that the similarity baseline can be asked. `similarity`: a similarity.npz to use again."""

    similarity: Path | None = None


@dataclass(frozen=True)
class EvalRequest(RunRequest):
    """Everything that an evaluation can be asked."""

    patterns: tuple[str, ...] = ()
    retentions: tuple[Fraction, ...] = ()
    force: bool = False
    tasks: int = 0
    task_length: int | None = None
    contexts: tuple[int, ...] = ()
    measure: tuple[int, ...] = ()
    lm_eval: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_most("--tasks", self.tasks)
        _check_most("--task-length", self.task_length)
        _check_most("--context", *self.contexts)
        _check_most("--measure", *self.measure)

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        resolve_specs(self.patterns, Target("", "", start, "", layers=layers), self.retentions, force=True)


def parse_share(retention: str | None) -> Fraction | None:
    """--retention as typed, or None where it was not given."""
    return None if retention is None else parse_retention(retention)


def parse_layers(text: str, option: str) -> frozenset[int]:
    """A list of layers as typed, such as `0,5,9`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    bad = [part for part in parts if not part.isdecimal() or len(part) > 6]
    if bad:
        raise IcsearchError(f"{option} has {shown(bad[0])}: expected layer numbers with commas between, such as 0,5,9")
    return frozenset(int(part) for part in parts)


def _check_most(option: str, *values: int | None) -> None:
    for value in values:
        if value is not None and value > MOST[option]:
            raise IcsearchError(f"{option} {shown(value)} is out of range: give at most {MOST[option]}")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        meant = did_you_mean(value, choices)
        raise IcsearchError(f"{option} {value!r} is unknown: {f'{meant} ' if meant else ''}give {' or '.join(choices)}")
