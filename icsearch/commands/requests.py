"""What a user can ask for, checked: frozen requests that commands pass on as one object. No torch here.

Each field is an option of the command line and of Python, declared here and nowhere else (`options`); `api` gives
their types to Python, and what belongs to a session alone (`--quiet`, `--timeout`) stands in `cli.running`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

from icsearch.calibration.far import ALL, DEFAULT_GAIN, FAR
from icsearch.commands.options import (
    CALIBRATION,
    CHECKPOINT,
    ENGINE,
    MACHINES,
    MEASURE,
    NUMERICS,
    OUTPUT,
    PATTERN,
    READING,
    SEARCH,
    Option,
    Request,
    declared,
)
from icsearch.core.errors import IcsearchError, PatternError
from icsearch.core.jsonfile import MAX_LAYERS, shown
from icsearch.core.pattern import Pattern, num_full, parse_retention
from icsearch.core.text import parse_bytes
from icsearch.engines.pipeline import REPAIRS
from icsearch.engines.table import ENGINES
from icsearch.model.config import Backbone
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.planning.devices import parse_rate
from icsearch.search.greedy import split_stages
from icsearch.search.registry import EXACT, FINALISTS, ROUNDS, STRATEGIES
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
MOST_DRAWS, MOST_FINALISTS = 2**10, 2**12
MOST, MOST_THREADS, MOST_TASKS, MOST_NUMBERS = 2**31 - 1, 1024, 10**6, 2**40
REFINEMENTS = ("swaps",)
DEMO_HELDOUT = {"demo": "demo:heldout", "demo:calibration": "demo:heldout"}  # what is held out of the built-in corpus
DEFAULT_RETENTION = Fraction(1, 4)
DEFAULT_NUM_SEQUENCES = 24
LARGEST_DENOMINATOR = 4096  # far more than a model has layers
PatternRequestT = TypeVar("PatternRequestT", bound="PatternRequest")


def read_retention(retention: str | float | Fraction) -> Fraction:
    """A retention in (0, 1]; raises PatternError for another one.

    A float is the simplest fraction near it, so that 5/7 and "5/7" keep as many of 14 layers.
    """
    if isinstance(retention, float) and math.isfinite(retention):
        retention = Fraction(retention).limit_denominator(LARGEST_DENOMINATOR) or Fraction(retention)
    return parse_retention(str(retention))


def read_layers(layers: str | Collection[int]) -> frozenset[int]:
    """Layers to keep, also as typed: `0,5,9`."""
    if not isinstance(layers, str):
        return frozenset(layers)
    parts = [part.strip() for part in layers.split(",") if part.strip()]
    bad = [part for part in parts if not part.isdecimal() or len(part) > 6]
    if bad:
        raise IcsearchError(
            f"--keep-full has {shown(bad[0])}: expected layer numbers with commas between, such as 0,5,9"
        )
    return frozenset(int(part) for part in parts)


def _read_size(size: str | int) -> int:
    return parse_bytes(size) if isinstance(size, str) else size


def _read_names(names: str | Iterable[str]) -> tuple[str, ...]:
    parts = names.split(",") if isinstance(names, str) else names
    return tuple(part.strip() for part in parts if part.strip())


def _rate(option: str) -> Callable[[str | float], float]:
    """Reads a number a second, such as 989T or 4.8TB/s."""
    return lambda rate: parse_rate(rate, option) if isinstance(rate, str) else rate


# Options that several requests have.
ENGINE_NAMES = ", ".join(ENGINES)
SeqLen = Annotated[
    int | None, Option("Tokens per sequence", CALIBRATION, "N", default="4 x index_topk", least=2, most=MOST)
]
NumSequences = Annotated[int | None, Option("Sequences", CALIBRATION, "M", default="24", least=1, most=MOST)]
Retention = Annotated[
    Fraction | None, Option("Share of layers that stay F", SEARCH, "1/4|0.25", default="1/4", read=read_retention)
]
NumShared = Annotated[int | None, Option("Flip exactly K layers instead", SEARCH, "K")]
Stages = Annotated[int | None, Option("Pipeline blocks, each of which begins with F", SEARCH, "P", default="1")]
KeepFull = Annotated[frozenset[int], Option("Layers that must stay F", SEARCH, "0,5,9", read=read_layers)]
Dtype = Annotated[
    str, Option("float32, bfloat16, float16", NUMERICS, "DTYPE", default="auto: the checkpoint's", choices=DTYPES)
]
BatchSize = Annotated[
    int | None, Option("Sequences per layer call", NUMERICS, "B", default="1024 tokens' worth", least=1, most=MOST)
]


@dataclass(frozen=True)
class CalibrationRequest(Request):
    """Which batches to score on. None means: choose for me."""

    model: Annotated[str, Option("A checkpoint directory, a hub id, or demo", SEARCH, "MODEL")]
    source: Annotated[
        str, Option("Ready batches, demo, FILE.txt|jsonl|parquet, hf:NAME", CALIBRATION, "SOURCE", "calibration")
    ]
    seq_len: SeqLen = None
    num_sequences: NumSequences = None
    seed: Annotated[int, Option("Which texts, in which order", CALIBRATION, "S")] = 0
    field: Annotated[
        str | None,
        Option("What of a row is its text", CALIBRATION, "NAME", default="text, else chat messages", read=str),
    ] = None
    trust_remote_code: Annotated[bool, Option("Run code that the checkpoint brings along", CALIBRATION)] = False


@dataclass(frozen=True)
class RunRequest(Request):
    """What every command that runs a model can be asked. None means: choose for me."""

    calibration: CalibrationRequest
    out: Annotated[Path, Option("Directory of the run", OUTPUT, "RUN", default="runs/MODEL-COMMAND")]
    device: Annotated[
        str, Option("cpu, cuda, cuda:0", NUMERICS, "DEVICE", default="auto: cuda, then cpu", offers=DEVICES)
    ] = AUTO
    dtype: Dtype = AUTO
    batch_size: BatchSize = None
    memory: Annotated[
        int | None, Option("Memory budget", MACHINES, "8GB", default="80% of what is free", read=_read_size)
    ] = None
    threads: Annotated[
        int | None, Option("CPU threads", NUMERICS, "T", default="torch's", least=1, most=MOST_THREADS)
    ] = None
    fresh: Annotated[bool, Option("Start over: discard what the directory holds", OUTPUT)] = False
    kernels: Annotated[
        str, Option("blockwise, reference", NUMERICS, "KERNELS", default="auto: blockwise if it can", choices=KERNELS)
    ] = AUTO
    block_elements: Annotated[
        int | None,
        Option("Numbers in a blockwise buffer", NUMERICS, "E", default="2^19, on CUDA 2^26", most=MOST_NUMBERS),
    ] = None
    offload: Annotated[
        str, Option("Where weights rest: none, cpu, disk", MACHINES, "PLACE", default="auto: nearest", choices=OFFLOADS)
    ] = AUTO

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def after_interruption(self) -> str:
        """What the same command would do then, in words."""
        command = "the same command without --fresh" if self.fresh else "the same command"
        return f"{command} continues {self.out}"

    @property
    def heldout_source(self) -> str | None:
        """Where held-out sequences come from, for a command that needs some beside those that it scores on."""
        return None

    @property
    def heldout_option(self) -> str:
        """The option that says so."""
        return "--refine-on"

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        """Refuse what cannot be done with a model of this start pattern; raises PatternError.

        `layers` are its decoder layers, by default one for each letter.
        """


@dataclass(frozen=True)
class CachedCalibrationRequest(RunRequest):
    """Batches to make ready, and the directory for them. The model runs where far tokens are to be found."""

    out: Annotated[Path, Option("For calibration.safetensors and calibration.json", OUTPUT, "DIR")]
    fresh: Annotated[bool, Option("Replace other batches that lie there", OUTPUT)] = False
    count: Annotated[
        str, Option("Tokens whose loss counts: all, or far look-ups", CALIBRATION, "NAME", choices=(ALL, FAR))
    ] = ALL
    far_gain: Annotated[
        float | None, Option("Far: the far context gains more", CALIBRATION, "NATS", default=f"{DEFAULT_GAIN:g}")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in declared(type(self)) if self.count != FAR else ():
            of_a_run = option.field == "far_gain" or option.option.panel in (NUMERICS, MACHINES)
            if of_a_run and getattr(self, option.field) != option.default:
                raise IcsearchError(f"{option.flag} belongs to --count far: give both, or leave it out")
        if self.far_gain is not None and not 0 <= self.far_gain < math.inf:
            raise IcsearchError(f"--far-gain {self.far_gain:g} is out of range: give 0 or more nats")

    @property
    def after_interruption(self) -> str:
        return "nothing was kept: the same command begins again"


@dataclass(frozen=True)
class ShareRequest(Request):
    """How many layers to share, and which never: of a search, and of a plan for one."""

    retention: Retention = None
    num_shared: NumShared = None
    stages: Stages = None
    keep_full: KeepFull = frozenset()

    @property
    def num_stages(self) -> int:
        """Pipeline blocks that are searched in turn."""
        return 1 if self.stages is None else self.stages

    def resolve_num_shared(self, start: Pattern) -> int:
        """K, the number of flips from `start`; refused with the largest possible K where it cannot be reached."""
        self._check_layers(start)
        largest, wanted = len(self.flippable(start)), self.num_shared
        if wanted is None:
            retention = self.retention or DEFAULT_RETENTION
            kept, full = num_full(retention, len(start)), len(start.full_layers)
            if kept >= full:
                raise PatternError(
                    f"--retention {retention} keeps {kept} F layers and the checkpoint has {full}: "
                    "nothing to flip; give a smaller retention"
                )
            wanted = full - kept
        if wanted < 1:
            raise PatternError(f"--num-shared {wanted} is out of range: give at least 1")
        if wanted > largest:
            options = {"fewer --stages": self.num_stages > 1, "less to --keep-full": bool(self.keep_full)}
            less = " or ".join(words for words, used in options.items() if used)
            advice = f"give {less}" if less else "there is nothing to search in this checkpoint"
            if largest:
                advice = f"give --num-shared {largest} or less"
            raise PatternError(
                f"cannot share {shown(wanted)} more layers: {largest or 'none'} of the {len(start)} DSA layers can be "
                "flipped (layer 0, --keep-full, first layers of stages and native S layers stay as they are); "
                f"{advice}"
            )
        return wanted

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


@dataclass(frozen=True)
class PatternRequest(ShareRequest, RunRequest):
    """What greedy and the DP baseline have in common."""

    def settled(self: PatternRequestT, recorded: dict[str, Any]) -> PatternRequestT:
        """With the stages of an existing run, unless others are asked for."""
        known = recorded.get("stages")
        return self if self.stages is not None or known is None else replace(self, stages=known)

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        self.resolve_num_shared(start)


@dataclass(frozen=True)
class SearchRequest(PatternRequest):
    """What searches by losses have in common: greedy's, and the one on the second-order table."""

    stages: Annotated[
        int | None, Option("Blocks searched in turn; each begins with F", SEARCH, "P", default="as --pp")
    ] = None
    objective: Annotated[str, Option("lm-loss, or kl (to the all-F model)", SEARCH, "NAME", choices=OBJECTIVES)] = (
        "lm-loss"
    )
    refine: Annotated[
        str | None, Option("Then move single indexers while it helps", SEARCH, "swaps", choices=REFINEMENTS)
    ] = None
    refine_on: Annotated[
        str | None,
        Option("Held-out sequences for it", SEARCH, "SOURCE", default="of demo: demo:heldout", read=str),
    ] = None
    dp: Annotated[
        int | None, Option("Processes that share the sequences", MACHINES, "D", default="all, if they can", least=1)
    ] = None
    pp: Annotated[
        int | None, Option("Processes that share the layers", MACHINES, "P", default="1, or as needed", least=1)
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine is None and self.refine_on is not None:
            raise IcsearchError("--refine-on says what --refine swaps confirms on: give both, or neither")
        if self.refine is not None and self.heldout_source is None:
            raise IcsearchError(
                "--refine swaps needs --refine-on DIR|SOURCE: sequences that the calibration does not hold, to confirm "
                "swaps on"
            )

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


@dataclass(frozen=True)
class GreedyRequest(SearchRequest):
    """Everything that a greedy search can be asked."""

    strategy: Annotated[str, Option("How candidates are scored", SEARCH, "NAME", choices=STRATEGIES)] = EXACT


@dataclass(frozen=True)
class FisherRequest(SearchRequest):
    """Everything that a search on the second-order table can be asked. `table`: a fisher.npz to use again."""

    stages: Stages = None
    draws: Annotated[
        int | None, Option("Label draws a sequence", SEARCH, "R", default="4, or the table's", least=1, most=MOST_DRAWS)
    ] = None
    finalists: Annotated[int, Option("Patterns measured a round", SEARCH, "M", least=1, most=MOST_FINALISTS)] = (
        FINALISTS
    )
    rounds: Annotated[int, Option("Rounds at most; two in a row in vain end them", SEARCH, "N", least=1)] = ROUNDS
    table: Annotated[Path | None, Option("That of an earlier run on the same batches", SEARCH, "FILE.npz")] = None
    confirm_on: Annotated[
        str | None, Option("Held-out sequences that choose among the best", SEARCH, "SOURCE", read=str)
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine is not None and self.confirm_on is not None:
            raise IcsearchError("--confirm-on and --refine both choose on held-out sequences: give one of them")

    @property
    def num_stages(self) -> int:
        """By default one: processes that share layers change nothing here."""
        return 1 if self.stages is None else self.stages

    @property
    def heldout_source(self) -> str | None:
        return self.confirm_on or super().heldout_source

    @property
    def heldout_option(self) -> str:
        return super().heldout_option if self.confirm_on is None else "--confirm-on"


@dataclass(frozen=True)
class BaselineRequest(PatternRequest):
    """Everything that the similarity baseline can be asked.

    `similarity`: a similarity.npz to use again; `table`: a fisher.npz, whose pattern is compared too.
    """

    similarity: Annotated[Path | None, Option("That of an earlier run on the same batches", SEARCH, "FILE.npz")] = None
    table: Annotated[Path | None, Option("fisher.npz of the same batches, to compare with", SEARCH, "FILE.npz")] = None


@dataclass(frozen=True)
class EvalRequest(RunRequest):
    """Everything that an evaluation can be asked."""

    patterns: Annotated[
        tuple[str, ...],
        Option("full, uniform:1/4, published:NAME, a RUN; repeatable", MEASURE, "SPEC", "pattern", many=True),
    ] = field(kw_only=True)
    retentions: Annotated[
        tuple[Fraction, ...],
        Option(
            "Take runs' patterns at this retention; repeatable",
            MEASURE,
            "1/4|0.25",
            "retention",
            many=True,
            read=read_retention,
        ),
    ] = ()
    force: Annotated[bool, Option("Patterns of another model too, labelled", MEASURE)] = False
    tasks: Annotated[int, Option("Questions of each kind of task", MEASURE, "N", least=0, most=MOST_TASKS)] = 0
    task_length: Annotated[
        int | None, Option("Tokens of a task's prompt", MEASURE, "N", default="a sequence's", least=1, most=MOST)
    ] = None
    contexts: Annotated[
        tuple[int, ...],
        Option(
            "Length to estimate cost at; repeatable",
            MEASURE,
            "N",
            "context",
            default="the paper's 4",
            least=1,
            most=MOST_NUMBERS,
            many=True,
        ),
    ] = ()
    measure: Annotated[
        tuple[int, ...],
        Option("Length to time this machine at; repeatable", MEASURE, "N", least=1, most=MOST, many=True),
    ] = ()
    lm_eval: Annotated[
        tuple[str, ...], Option("Tasks of lm-evaluation-harness, commas between", MEASURE, "TASKS", read=_read_names)
    ] = ()

    def check(self, start: Pattern, layers: Backbone | None = None) -> None:
        from icsearch.commands.specs import Target, resolve_specs  # and with it all engines

        resolve_specs(self.patterns, Target("", "", start, "", layers=layers), self.retentions, force=True)


@dataclass(frozen=True)
class PlanRequest(ShareRequest):
    """A search to plan for, and the devices, all by what can be known from a config.json."""

    model: Annotated[str, Option("A config.json, a directory with one, a hub id, or demo", SEARCH, "MODEL")] = field(
        kw_only=True
    )
    seq_len: SeqLen = None
    num_sequences: NumSequences = None
    dtype: Dtype = AUTO
    batch_size: BatchSize = None
    devices: Annotated[str, Option("Such as 8xH200, 1xH100, 8xB200, 8xA100, 2xcpu", MACHINES, "NxDEVICE")] = "1xcpu"
    device_memory: Annotated[
        int | None, Option("Memory of one device", MACHINES, "80GB", default="the device's", read=_read_size)
    ] = None
    device_flops: Annotated[
        float | None,
        Option("Its dense 16-bit FLOP/s", MACHINES, "989T", default="the device's", read=_rate("--device-flops")),
    ] = None
    bandwidth: Annotated[
        float | None,
        Option("Bandwidth of its memory", MACHINES, "4.8TB/s", default="the device's", read=_rate("--bandwidth")),
    ] = None
    read_rate: Annotated[
        float | None,
        Option("What weights are read from disk with", MACHINES, "4GB/s", default="4GB/s", read=_rate("--read-rate")),
    ] = None
    serve: Annotated[bool, Option("What sharing buys in serving, in place of a plan", OUTPUT)] = False
    json: Annotated[bool, Option("Print it as JSON (icsearch.plan/1, serving/1)", OUTPUT)] = False


@dataclass(frozen=True)
class ExportRequest(Request):
    """Everything that an export can be asked: settings for `engine`, or a copy of the checkpoint at `checkpoint`."""

    file: Annotated[str, Option("A pattern.json, a RUN, RUN@1/2, or published:NAME", PATTERN, "FILE")] = ""
    retention: Annotated[
        Fraction | None, Option("Take the run's pattern at this retention", PATTERN, "1/4|0.25", read=read_retention)
    ] = None
    engine: Annotated[str, Option(ENGINE_NAMES, ENGINE, "NAME", offers=ENGINES)] = ""
    model_config: Annotated[Path | None, Option("Check against the model's config.json", ENGINE, "CONFIG")] = None
    serve_pp: Annotated[str | None, Option("Stages, or the first layer of each", ENGINE, "N|0,20,40", read=str)] = None
    repair: Annotated[
        str | None,
        Option("Of a stage that begins with S: add, same, none", ENGINE, "HOW", default="add", offers=REPAIRS),
    ] = None
    gguf: Annotated[Path | None, Option("llamacpp: the model to copy", ENGINE, "OLD.gguf")] = None
    out: Annotated[Path | None, Option("Write the file that the engine reads", ENGINE, "NEW")] = None
    checkpoint: Annotated[Path | None, Option("One whose config.json holds the pattern", CHECKPOINT, "OUT")] = None
    model: Annotated[
        str | None, Option("What to copy", CHECKPOINT, "MODEL", default="that of the pattern", read=str)
    ] = None
    drop_indexers: Annotated[bool, Option("Leave out the indexer weights of S layers", CHECKPOINT)] = False
    other_weights: Annotated[bool, Option("Weights that were not searched on may do", CHECKPOINT)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.engine and self.checkpoint is None:
            raise IcsearchError("export needs one of --engine NAME and --checkpoint OUT")
        if self.repair is not None and self.serve_pp is None:
            raise IcsearchError("--repair says what to do with the stages of --serve-pp: give both, or leave it out")
        if self.gguf is not None and self.out is None:
            raise IcsearchError("--gguf is copied to another file: give --out NEW.gguf")


@dataclass(frozen=True)
class ImportRequest(Request):
    """What an engine is given, and whose rules it is to be read by."""

    source: Annotated[
        tuple[str, ...],
        Option("config.json, checkpoint, GGUF, JSON, freq:4, letters", READING, "SOURCE", many=True),
    ]
    engine: Annotated[str | None, Option(ENGINE_NAMES, READING, "NAME", offers=ENGINES)] = None
    model_config: Annotated[Path | None, Option("The model's config.json", READING, "CONFIG")] = None
    layers: Annotated[
        int | None, Option("Or so many layers, all with an indexer", READING, "N", least=1, most=MAX_LAYERS)
    ] = None
    out: Annotated[Path | None, Option("Write a pattern.json, for eval and export", OUTPUT, "FILE")] = None


@dataclass(frozen=True)
class CheckRequest(Request):
    """A config, and the engine that is to run it; none: all that share in models of its type."""

    model: Annotated[str, Option("A config.json, a checkpoint, a hub id, or demo", READING, "MODEL")]
    engine: Annotated[str | None, Option(ENGINE_NAMES, READING, "NAME", offers=ENGINES)] = None
    json: Annotated[bool, Option("Print it as JSON (icsearch.check/1)", OUTPUT)] = False


@dataclass(frozen=True)
class ReportRequest(Request):
    """Runs to write about, and how."""

    runs: Annotated[tuple[Path, ...], Option("RUN directories, or those of an eval", OUTPUT, "RUN...", many=True)]
    out: Annotated[Path | None, Option("The page, or the card, to write", OUTPUT, "FILE")] = None
    model_card: Annotated[bool, Option("A section for a model card of the Hugging Face hub", OUTPUT)] = False
