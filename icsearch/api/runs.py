"""The commands as functions: calibrate, search, evaluate. The same requests, the same code, the same directories."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icsearch.api.options import calibration_request, parsed
from icsearch.commands.progress import OnStep, make_listener
from icsearch.commands.requests import EvalRequest, GreedyRequest
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.report.eval_view import EvalView, view_eval
from icsearch.report.write import write_eval_results, write_results
from icsearch.runs import results

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from icsearch.api.options import CalibrationOptions, EvalOptions, SearchOptions
    from icsearch.calibration.batches import Calibration


def calibrate(
    model: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    fresh: bool = False,
    **options: Unpack[CalibrationOptions],
) -> Calibration:
    """Batches of a text source for a model, as `icsearch calibrate` makes them, cached in the directory `out`.

    `source` is what the command takes: ``demo``, a text file, ``hf:NAME``, or a directory of ready batches. The same
    call again reads the cache; another one is refused unless `fresh`. Raises IcsearchError for bad input.
    """
    from icsearch.commands.setup import calibrate as make

    return make(calibration_request(model, source, dict(options)), Path(out), fresh)[0]


def find_pattern(
    model: str | Path,
    calibration: str | Path,
    out: str | Path,
    *,
    on_step: OnStep | None = None,
    progress: bool = False,
    **options: Unpack[SearchOptions],
) -> PatternFile:
    """Search as `icsearch greedy` does, and return the content of pattern.json; `out` is the RUN directory.

    `on_step` is called with each flip that this call commits, once that is in the journal. What it raises ends the
    search there and comes out of this call; the same call later continues behind that flip, and one of a finished
    run returns its result. `progress` shows on stderr what the command shows.

    Raises IcsearchError for bad input, and for a run that was begun with other options.
    """
    from icsearch.commands.greedy import greedy

    asked: dict[str, Any] = dict(options)
    request = GreedyRequest(calibration_request(model, calibration, asked), out=Path(out), **parsed(asked))
    with closing(make_listener(not progress, on_step)) as listener:
        record = greedy(request, listener, write_results)
    return results.pattern_file(record)


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

    asked: dict[str, Any] = dict(options)
    several = [patterns] if isinstance(patterns, (str, Path, Pattern)) else patterns
    specs = tuple(map(str, several))
    where = calibration_request(model, calibration, asked)
    request = EvalRequest(where, out=Path(out), patterns=specs, **parsed(asked))
    with closing(make_listener(not progress)) as listener:
        document = evaluate(request, listener, write_eval_results)
    return view_eval(document, request.out.resolve().name)
