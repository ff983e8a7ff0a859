"""The public Python API. `import icsearch` gives all of it; what a function needs is imported when it is called.

A patched model is the model itself with a slot in place of each indexer (`model.slot`): its forward, `generate`,
`save_pretrained`, `state_dict` and `deepcopy` are its own. Pattern and selection live in one store per model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from icsearch.commands.options import RequestT, declared, request_of
from icsearch.commands.requests import (
    CachedCalibrationRequest,
    EvalRequest,
    ExportRequest,
    FisherRequest,
    GreedyRequest,
    read_retention,
)
from icsearch.core.errors import IcsearchError, PatternError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.pattern_file import PatternFile, Step, load_pattern_file

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from icsearch.calibration.batches import Calibration
    from icsearch.engines.export import Export
    from icsearch.engines.native import NativeCheckpoint
    from icsearch.model.config import Backbone
    from icsearch.report.eval_view import EvalView

Model = TypeVar("Model", bound="nn.Module")
Retention = str | float | Fraction


class CalibrationOptions(TypedDict, total=False):
    """What batches are made of: tokens per sequence, sequences, seed of their choice and order."""

    seq_len: int
    num_sequences: int
    seed: int
    field: str | None
    trust_remote_code: bool


class RunOptions(CalibrationOptions, total=False):
    """How a model is run. `memory` is a budget in bytes, or text such as ``8GB``; `fresh` starts over."""

    device: str
    dtype: str
    batch_size: int
    memory: str | int
    threads: int
    kernels: str
    block_elements: int
    offload: str
    fresh: bool


class BatchOptions(RunOptions, total=False):
    """Which tokens count: ``all``, or ``far`` ones, whose loss falls by more than `far_gain` nats by far context."""

    count: str
    far_gain: float


class SearchOptions(RunOptions, total=False):
    """How far to go, which layers must stay F, and what belongs to one of the methods.

    `num_shared` is given instead of `retention`.
    """

    retention: Retention
    num_shared: int
    stages: int
    keep_full: str | Collection[int]
    objective: str
    strategy: str
    refine: str
    refine_on: str | Path
    draws: int
    finalists: int
    rounds: int
    table: str | Path
    confirm_on: str | Path


class EvalOptions(RunOptions, total=False):
    """What else to measure than the losses: see the options of `icsearch eval`."""

    retentions: Sequence[Retention]
    force: bool
    tasks: int
    task_length: int
    contexts: Sequence[int]
    measure: Sequence[int]
    lm_eval: str | Sequence[str]


def calibrate(
    model: str | Path,
    source: str | Path,
    out: str | Path,
    **options: Unpack[BatchOptions],
) -> Calibration:
    """Batches of a text source for a model, as `icsearch calibrate` makes them, cached in the directory `out`.

    `source` is what the command takes: ``demo``, a text file, ``hf:NAME``, or a directory of ready batches. The same
    call again reads the cache; another one is refused unless `fresh`. Raises IcsearchError for bad input.
    """
    from icsearch.commands.calibrate import calibrate as make

    named = {"model": str(model), "source": str(source), "out": Path(out)}
    return make(_request(CachedCalibrationRequest, options, **named))[0]


def find_pattern(
    model: str | Path,
    calibration: str | Path,
    out: str | Path,
    *,
    method: str = "greedy",
    on_step: Callable[[Step], object] | None = None,
    progress: bool = False,
    **options: Unpack[SearchOptions],
) -> PatternFile:
    """Search as `icsearch greedy` or `icsearch fisher` does, by `method`; the content of pattern.json.

    `out` is the RUN directory. `on_step` is called with each flip that this call commits, once that is in the journal.
    What it raises ends the search there and comes out of this call; the same call later continues behind that flip,
    and one of a finished run returns its result. `progress` shows on stderr what the command shows.

    Raises IcsearchError for bad input, and for a run that was begun with other options.
    """
    from icsearch.commands.fisher import fisher
    from icsearch.commands.greedy import greedy
    from icsearch.commands.progress import make_listener
    from icsearch.report.write import write_results

    if method not in ("greedy", "fisher"):
        raise IcsearchError(f"method {method!r} is unknown: give greedy or fisher")
    given: dict[str, Any] = {"model": str(model), "source": str(calibration), "out": Path(out)}
    with closing(make_listener(not progress, on_step)) as listener:
        if method == "fisher":
            fisher(_request(FisherRequest, options, **given), listener, write_results)
        else:
            greedy(_request(GreedyRequest, options, **given), listener, write_results)
    return load_pattern_file(Path(out) / "pattern.json")


def evaluate_patterns(
    model: str | Path,
    patterns: str | Path | Pattern | Sequence[str | Path | Pattern],
    calibration: str | Path,
    out: str | Path,
    *,
    progress: bool = False,
    **options: Unpack[EvalOptions],
) -> EvalView:
    """Measure patterns as `icsearch eval` does; `out` is the directory of its results.

    A pattern is a SPEC of the command line, a RUN directory, or a `Pattern`; one alone needs no list. The rows come
    with most F layers first, the unmodified model at the top; `document` is the content of eval.json. Raises
    IcsearchError for bad input.
    """
    from icsearch.commands.evaluate import evaluate
    from icsearch.commands.progress import make_listener
    from icsearch.report.eval_view import view_eval
    from icsearch.report.write import write_eval_results

    several = [patterns] if isinstance(patterns, (str, Path, Pattern)) else patterns
    given = {"source": str(calibration), "out": Path(out), "patterns": map(str, several)}
    request = _request(EvalRequest, options, model=str(model), **given)
    with closing(make_listener(not progress)) as listener:
        document = evaluate(request, listener, write_eval_results)
    return view_eval(document, request.out.resolve().name)


def _request(kind: type[RequestT], options: Mapping[str, Any], **given: Any) -> RequestT:
    """The request of a command, from keywords: its options under the names of its fields."""
    if unknown := options.keys() - {option.field for option in declared(kind)}:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    return request_of(kind, {**options, **given})


def export_pattern(
    pattern: PatternFile | str | Path,
    engine: str,
    retention: Retention | None = None,
    *,
    model_config: str | Path | None = None,
    serve_pp: str | int | None = None,
    repair: str | None = None,
) -> Export:
    """What an engine needs to run a pattern: `text` to paste, `how` it is used, `warnings`.

    `pattern` is what a search returned, a pattern.json, a RUN, ``RUN@1/2`` or ``published:NAME``; with `retention`, the
    run's pattern at that retention. `model_config` is the checkpoint's config.json, to check the pattern against;
    `serve_pp` the pipeline stages that it will be served in, 4 or ``0,20,40``, and `repair` what to do where one would
    start on S: ``add`` (by default), ``same`` or ``none``. Raises IcsearchError for an engine that is unknown, or
    cannot run the pattern.
    """
    from icsearch.commands.export import engine_settings, saved_pattern

    kept = None if retention is None else read_retention(retention)
    source, kept = (pattern, kept) if isinstance(pattern, PatternFile) else saved_pattern(str(pattern), kept)
    config = None if model_config is None else Path(model_config)
    options = {"engine": engine, "model_config": config, "serve_pp": serve_pp, "repair": repair}
    return engine_settings(_request(ExportRequest, options, retention=kept), source)


def export_checkpoint(
    pattern: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    retention: Retention | None = None,
    drop_indexers: bool = False,
    other_weights: bool = False,
) -> NativeCheckpoint:
    """Copy a checkpoint to `out` with a config.json that holds the pattern, as `icsearch export --checkpoint` does.

    `pattern` is a pattern.json, a RUN, ``RUN@1/2`` or ``published:NAME``; `model` is the one that was searched, unless
    another one is named. `drop_indexers` leaves the S layers' indexer weights out, `other_weights` lets weights through
    that were not searched on. Raises IcsearchError where the copy cannot be, or the model cannot have the pattern by
    its config.
    """
    from icsearch.commands.export import saved_pattern
    from icsearch.engines.native import export_checkpoint as write

    path, kept = saved_pattern(str(pattern), None if retention is None else read_retention(retention))
    source = None if model is None else str(model)
    return write(
        path, Path(out), model=source, retention=kept, drop_indexers=drop_indexers, other_weights=other_weights
    )


def load(
    name_or_path: str,
    pattern: str | Pattern | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A transformers model, checked as a search checks it, with the pattern applied (None: unmodified).

    `name_or_path` is a directory, a hub id or ``demo``; `dtype` and `device` are as on the command line. The model
    comes in eval mode, its parameters without gradients, so that its bits are those of a search (torch picks some
    matrix products by whether a weight needs a gradient). Raises ModelError for a checkpoint that cannot be used, and
    PatternError, before any weight is read, for a pattern that does not fit.
    """
    from icsearch.model import loading
    from icsearch.model.checkpoint import open_checkpoint
    from icsearch.model.layout import inspect

    checkpoint = open_checkpoint(name_or_path, trust_remote_code=trust_remote_code)
    layout = inspect(checkpoint, trust_remote_code)
    fitting = None if pattern is None else _fit(pattern, layout.start_pattern, layout.backbone)
    model = loading.load(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code).model
    return restore(model) if fitting is None else apply_pattern(model, fitting)


def apply_pattern(model: Model, pattern: str | Pattern) -> Model:
    """Make a loaded transformers model follow the pattern, in place; returns the model.

    `pattern` is a Pattern, its letters (one per DSA layer, layer 0 first), or any SPEC of the command line: a
    pattern.json, a RUN, ``RUN@1/2``, ``uniform:1/4``, ``published:NAME``, or what an engine is given, such as its
    config.json. A pattern that was applied before is replaced. Run one forward at a time on a patched model. A KV
    cache holds no indexer keys of S layers, so continue it only under the pattern that filled it. Saving writes the
    checkpoint as it was: a pattern travels as a pattern.json.

    Raises PatternError, and leaves the model alone, where the pattern has another length, asks F of a layer that the
    checkpoint itself shares, or the model has no indexers.
    """
    from icsearch.model.slot import Returned, SelectionStore, put_slot

    owners = _owners(model)
    if not owners:
        raise PatternError(
            f"{type(model).__name__} has no indexers: expected a DeepSeek-Sparse-Attention model of transformers, "
            "such as deepseek_v32 or glm_moe_dsa"
        )
    indexers = [getattr(owner.indexer, "inner", owner.indexer) for _, owner in owners]
    start = Pattern("".join(SHARED if indexer is None else FULL for indexer in indexers))
    store = SelectionStore(_fit(pattern, start, _backbone(model)))
    returned = Returned()
    for position, (_, owner) in enumerate(owners):
        put_slot(owner, position, returned).store = store
    return model


def restore(model: Model) -> Model:
    """Take an applied pattern off again, in place: every `indexer` is then the object that it was; returns the model.

    A `DsaModel` made around the same model loses its slots by this: make a new one afterwards.
    """
    from icsearch.model.slot import take_slot

    for _, owner in _owners(model):
        take_slot(owner)
    return model


def _owners(model: Any) -> list[tuple[int, Any]]:
    """The modules whose `indexer` makes a DSA layer's selection, by decoder layer; none for another kind of model."""
    from icsearch.model.model import indexer_owners

    return indexer_owners(model) if hasattr(model, "config") and hasattr(model, "get_decoder") else []


def _backbone(model: Any) -> Backbone:
    """The decoder layers of a model, with its config.json where it was loaded from a directory.

    transformers' own config has keys that the file need not have, such as the `indexer_types` that it made of others.
    """
    from icsearch.model.config import Backbone, load_config
    from icsearch.model.families.decoder import decoder_layers

    origin = model.config.name_or_path
    known = bool(origin) and (Path(origin) / "config.json").is_file()
    config = load_config(Path(origin)) if known else model.config.to_dict()
    return Backbone.of_model(len(decoder_layers(model)), [index for index, _ in _owners(model)], config)


def _fit(pattern: str | Pattern, start: Pattern, layers: Backbone) -> Pattern:
    """The pattern, checked against the unmodified model's, whose decoder layers these are; raises PatternError."""
    from icsearch.commands.specs import pattern_of

    letters = isinstance(pattern, Pattern) or not set(pattern) - set("FfSs")
    spec = str(pattern)
    fitting = Pattern.parse(spec, len(start)) if letters else pattern_of(spec, start, layers)
    refused = [layer for layer in start.shared_layers if fitting.is_full(layer)]
    if refused:
        raise PatternError(
            f"pattern asks F of DSA layer {refused[0]}, which has no indexer in this checkpoint: "
            f"use S at {', '.join(map(str, start.shared_layers))}"
        )
    return fitting
