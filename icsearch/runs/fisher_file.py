"""fisher.npz and the fisher.json beside it: a second-order table, written by one run and read by another. No torch.

Per sequence and draw, so that standard errors and every other budget, constraint or objective follow from it alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from icsearch.core.errors import IcsearchError
from icsearch.core.files import typed_path
from icsearch.core.jsonfile import OBJECT, TEXT, FieldError, check_fields, read_object, whole, write_object
from icsearch.runs.arrays import identity, read_arrays, save_arrays, square_of, triangle_of
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord, load_run

FISHER_FORMAT = "icsearch.fisher/1"
_DRAWING = ("draws", "seed")  # options that the labels follow
_EXPECTED, _ADVICE = "the fisher.npz and fisher.json that icsearch fisher wrote", "leave --table out"


def save_table(out: Path, record: RunRecord) -> None:
    """fisher.npz, as `arrays_of`, rows layers and columns sources; fisher.json says whose it is."""
    save_arrays(out / "fisher.npz", arrays_of(record))
    write_object(out / "fisher.json", {"format": FISHER_FORMAT, **_identity(record.start)})


def arrays_of(record: RunRecord) -> dict[str, Any]:
    """A record's table as `drawn` float64 [S, R, N, N] and `true` [S, N, N]."""
    drawn, true = record.fisher.drawn, record.fisher.true
    return {
        "drawn": np.array([list(map(square_of, draws)) for draws in drawn]),
        "true": np.array([*map(square_of, true)]),
    }


def _identity(start: Event) -> dict[str, Any]:
    """Of a table, how its labels were drawn too."""
    return {**identity(start), **{name: start["options"][name] for name in _DRAWING}}


def drawing_of(path: Path) -> dict[str, int]:
    """The options by which the labels of a saved table were drawn: `draws`, `seed`. Raises IcsearchError."""
    manifest = _manifest(path)
    return {name: manifest[name] for name in _DRAWING}


def read_table(path: Path, start: Event) -> Event:
    """A fisher.npz as the event of a run that began so.

    Raises IcsearchError unless it is whole, and of the same model, batches, draws and numerics.
    """
    manifest, wanted = _manifest(path), _identity(start)
    differing = [f"{name} {manifest[name]}, now {wanted[name]}" for name in _DRAWING if manifest[name] != wanted[name]]
    there, here = manifest["numerics"], wanted["numerics"]
    differing += [f"{name} {there.get(name)}, now {here[name]}" for name in here if there.get(name) != here[name]]
    differing += [f"another {name}" for name in ("model", "calibration") if manifest[name] != wanted[name]]
    if differing:
        raise IcsearchError(f"{path} belongs to another run ({'; '.join(differing)}): repeat its options, or {_ADVICE}")
    sequences, layers = len(start["tokens"]), start["num_layers"]
    arrays = _read(path, {"drawn": (sequences, wanted["draws"], layers, layers), "true": (sequences, layers, layers)})
    return {
        "event": "fisher",
        "sequences": [0, sequences],
        "drawn": [[triangle_of(square) for square in draws] for draws in arrays["drawn"]],
        "true": [triangle_of(square) for square in arrays["true"]],
        "layer_sequences": 0,
        "seconds": 0.0,
    }


def measured_beside(path: Path, start: Event) -> list[Event]:
    """What the run that saved a table measured of the unmodified model and of single flips, as events of another run.

    Every run on the table measures these, with the same bits. Nothing where no journal of such a run lies beside.
    """
    if not Journal(path.parent / JOURNAL_NAME).exists():
        return []
    record = load_run(path.parent)
    if not record.by_table or _identity(record.start) != _identity(start):
        return []
    first, complete = record.start_pattern.letters, [each for each in record.nll if record.nll.is_complete(each)]
    flips = [each for each in complete if sum(map(str.__ne__, each, first)) == 1]
    return [
        {
            "event": "losses",
            "step": step,
            "sequences": [0, len(record.tokens)],
            "patterns": patterns,
            "nll": [record.nll.sums(each) for each in patterns],
            "kl": [record.kl.sums(each) for each in patterns],
            "layer_sequences": 0,
            "seconds": 0.0,
        }
        for step, patterns in ((0, [each for each in complete if each == first]), (1, flips))
        if patterns
    ]


def _manifest(path: Path) -> dict[str, Any]:
    described = path.parent / f"{path.stem or 'fisher'}.json"
    manifest = read_object(described, expected=_EXPECTED, advice=_ADVICE, error=IcsearchError, version=FISHER_FORMAT)
    fields = {"model": TEXT, "calibration": TEXT, "draws": whole(1), "seed": whole(0), "numerics": OBJECT}
    try:
        check_fields(manifest, fields)
    except FieldError as error:
        raise IcsearchError(f"{described} is damaged ({error}): {_ADVICE}") from None
    return manifest


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arrays of these shapes; raises IcsearchError."""
    path = typed_path(str(path), IcsearchError)
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    arrays = read_arrays(path, numbers, _EXPECTED, _ADVICE)
    for name, shape in shapes.items():
        array = arrays.get(name, np.zeros(0))
        if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            raise IcsearchError(
                f"{name} of {path} is not finite float64 {list(shape)}: expected {_EXPECTED}; {_ADVICE}"
            )
    return arrays
