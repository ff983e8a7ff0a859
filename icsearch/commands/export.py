"""What an export can be asked, checked, and its settings for an engine, from a saved pattern. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from icsearch.commands.specs import pattern_file_of, published_path, split_retention
from icsearch.core.errors import IcsearchError
from icsearch.core.files import typed_path
from icsearch.core.pattern import parse_retention
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.engines.export import Export, Serving, export, with_config
from icsearch.engines.native import NativeRequest, layers_with_indexer
from icsearch.engines.pipeline import ADD, Losses, losses_of_file, losses_of_run
from icsearch.engines.read import how_to_save, is_letters
from icsearch.model.config import load_config, read_backbone
from icsearch.runs.record import JOURNAL_NAME, load_run

FILE_NAME = "pattern.json"


@dataclass(frozen=True)
class ExportRequest:
    """Everything that an export can be asked: settings for `engine`, or a copy of the checkpoint at `checkpoint`.

    The options behind these two belong to one of them each, and are refused with the other one.
    """

    engine: str = ""
    checkpoint: Path | None = None
    retention: Fraction | None = None
    # with an engine
    model_config: Path | None = None
    serve_pp: str | None = None
    repair: str | None = None  # add
    gguf: Path | None = None
    out: Path | None = None
    # with a checkpoint
    model: str | None = None
    drop_indexers: bool = False
    other_weights: bool = False

    def __post_init__(self) -> None:
        if bool(self.engine) == (self.checkpoint is not None):
            raise IcsearchError("export needs one of --engine NAME and --checkpoint OUT")
        if self.engine:
            _refuse("--checkpoint OUT", "--engine", self._for_a_checkpoint)
            self._check_engine_options()
        else:
            _refuse("--engine NAME", "--checkpoint", self._for_an_engine)

    @property
    def _for_an_engine(self) -> dict[str, object]:
        return {
            "--model-config": self.model_config,
            "--serve-pp": self.serve_pp,
            "--repair": self.repair,
            "--gguf": self.gguf,
            "--out": self.out,
        }

    @property
    def _for_a_checkpoint(self) -> dict[str, object]:
        return {
            "--model": self.model,
            "--drop-indexers": self.drop_indexers or None,
            "--other-weights": self.other_weights or None,
        }

    def _check_engine_options(self) -> None:
        if self.repair is not None and self.serve_pp is None:
            raise IcsearchError("--repair says what to do with the stages of --serve-pp: give both, or leave it out")
        if self.gguf is not None and self.out is None:
            raise IcsearchError("--gguf is copied to another file: give --out NEW.gguf")

    def native(self, file: Path) -> NativeRequest | None:
        """The copy that is asked for, with the pattern of this file; None where settings for an engine are."""
        if self.checkpoint is None:
            return None
        return NativeRequest(file, self.checkpoint, self.model, self.retention, self.drop_indexers, self.other_weights)


def _refuse(owner: str, given: str, options: dict[str, object]) -> None:
    """Raise where an option was given that belongs to the other way to export."""
    others = [name for name, value in options.items() if value is not None]
    if others:
        belong = "belongs" if len(others) == 1 else "belong"
        raise IcsearchError(f"{', '.join(others)} {belong} to {owner}: leave out with {given}")


def saved_pattern(text: str, retention: Fraction | None = None) -> tuple[Path, Fraction | None]:
    """The pattern.json of what was typed (the file itself, a RUN, RUN@1/2, or published:NAME), and the retention.

    Raises IcsearchError for letters, for a run that is not finished, and where both name a retention.
    """
    if text.startswith("published:"):
        return published_path(text), retention
    if is_letters(text):
        raise IcsearchError(
            "letters alone do not say whose they are: expected a pattern.json, a RUN, RUN@1/2 or published:NAME; "
            f"{how_to_save(text)} writes one"
        )
    run, at = split_retention(text)
    path = pattern_file_of(run, IcsearchError)
    if not at or not path.exists():
        return (path if not at else typed_path(text, IcsearchError)), retention
    if retention is not None:
        raise IcsearchError(f"{text} and --retention both name a retention: give one of them")
    return path, parse_retention(at)


def engine_settings(request: ExportRequest, source: Path | PatternFile) -> Export:
    """What the request's engine needs to run the pattern of a pattern.json, or of what a search returned.

    Its warnings begin with what `model_config` says. Raises IcsearchError for an engine that is unknown, or cannot run
    the pattern, and for a config or a layout that does not fit.
    """
    file = source if isinstance(source, PatternFile) else load_pattern_file(source)
    notes: list[str] = []
    if request.model_config is not None:
        file, notes = _fitted(file, request.model_config)
    serving = None
    if request.serve_pp is not None:
        serving = Serving(request.serve_pp, request.repair or ADD, _losses(source, file))
    result = export(file, request.engine, request.retention, serving)
    return replace(result, warnings=(*notes, *result.warnings))


def _fitted(file: PatternFile, path: Path) -> tuple[PatternFile, list[str]]:
    """The file beside a config.json, or beside a checkpoint directory and the weights that lie there."""
    config = load_config(path)
    num_layers = read_backbone(config, str(path)).num_layers
    with_indexer = layers_with_indexer(path, num_layers) if path.is_dir() else None
    return with_config(file, config, str(path), with_indexer)


def _losses(source: Path | PatternFile, file: PatternFile) -> Losses:
    """All that the run measured where its journal is there, else what its pattern.json holds."""
    if isinstance(source, Path) and source.name == FILE_NAME and (source.parent / JOURNAL_NAME).exists():
        return losses_of_run(load_run(source.parent), len(file.pattern))
    return losses_of_file(file)
