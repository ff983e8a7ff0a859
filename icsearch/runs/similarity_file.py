"""similarity.npz and the similarity.json beside it: written by a similarity baseline, read by another. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from icsearch.core.errors import IcsearchError
from icsearch.core.files import typed_path
from icsearch.core.jsonfile import (
    OBJECT,
    TEXT,
    FieldError,
    check_fields,
    optional,
    read_object,
    strict,
    whole,
    write_object,
)
from icsearch.runs.arrays import identity, read_arrays, save_arrays, square_of, triangle_of
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord

SIMILARITY_FORMAT = "icsearch.similarity/1"
_ROUNDING = 1e-6  # by which a mean cosine may pass 1
_MANIFEST_FIELDS = {
    "format": TEXT,
    "queries": whole(1),
    "model": TEXT,
    "calibration": TEXT,
    "numerics": optional(OBJECT),
}
_ARRAYS, _KASCADE = ("cosine", "overlap"), "kascade"  # which is left out where it was not measured


def _is_share(square: Any) -> bool:
    return bool((np.abs(square) <= 1 + _ROUNDING).all())


def _is_kascade(square: Any) -> bool:
    """Whether no layer keeps more of its attention than all of it, which counts as the importance on the diagonal."""
    importance = square.diagonal()[:, None]
    return bool(((square >= 0) & (square <= importance * (1 + _ROUNDING)) & (importance <= 2 + _ROUNDING)).all())


_FITTING = {
    **dict.fromkeys(_ARRAYS, (_is_share, "from -1 to 1 alone")),
    _KASCADE: (_is_kascade, "from 0 to 2 alone, the largest of each row on the diagonal"),
}


def save_similarity(out: Path, record: RunRecord) -> None:
    """similarity.npz (lower triangles, zeros above) and similarity.json, which says what they belong to.

    `kascade` has a diagonal too, see `SimilaritySums.means`; it is left out where it was not measured. A similarity
    that was read from a file keeps the numerics that it was measured with there.
    """
    means = record.similarity_sums.means()
    arrays = {name: square_of(means[name]) for name in (*_ARRAYS, _KASCADE) if name in means}
    save_arrays(out / "similarity.npz", arrays)
    measured = record.similarity_sums.numerics
    manifest = {"format": SIMILARITY_FORMAT, "queries": means["queries"], **identity(record.start)}
    if measured is not None:
        manifest["numerics"] = measured
    write_object(out / "similarity.json", manifest)


def other_numerics(measured: dict[str, Any], start: Event) -> list[str]:
    """A note where a similarity from a file was measured with other numerics than the losses of this run."""
    here = identity(start)["numerics"]
    differing = [f"{name} {measured.get(name)}, here {here[name]}" for name in here if measured.get(name) != here[name]]
    if not differing:
        return []
    return [f"the similarity was measured in an earlier run with other numerics ({'; '.join(differing)})"]


def read_similarity(path: Path, start: Event) -> Event:
    """A similarity.npz as an event of a run that began so.

    Raises IcsearchError unless it is whole, and of the same model and batches.
    """
    expected, advice = "the similarity.json that dp-baseline wrote beside it", "leave --similarity out"
    path = typed_path(str(path), IcsearchError)
    described = path.parent / f"{path.stem or 'similarity'}.json"
    manifest = read_object(described, expected=expected, advice=advice, error=IcsearchError)
    try:
        check_fields(manifest, _MANIFEST_FIELDS)
    except FieldError as error:
        raise IcsearchError(f"{described} is damaged ({error}): {advice}") from None
    found = {name: manifest[name] for name in ("model", "calibration")}
    wanted = {name: identity(start)[name] for name in found}
    if manifest["format"] != SIMILARITY_FORMAT or found != wanted:
        other = [name for name in found if found[name] != wanted[name]] or ["format"]
        raise IcsearchError(f"{path} belongs to another {' and another '.join(other)}: {advice}")
    queries, sequences = manifest["queries"], len(start["tokens"])
    squares = _read_squares(path, start["num_layers"])
    return {
        "event": "similarity",
        "sequences": [0, sequences],
        "queries": queries,
        "numerics": strict(manifest.get("numerics") or {}),
        **{name: triangle_of(squares[name] * queries) for name in _ARRAYS},
        **(_kascade_sums(squares[_KASCADE], sequences) if _KASCADE in squares else {}),
        "layer_sequences": 0,
        "seconds": 0.0,
    }


def _kascade_sums(kascade: Any, sequences: int) -> dict[str, Any]:
    """Its two factors, summed over sequences; what a layer without importance keeps is not known, and plays no part."""
    importance = kascade.diagonal()
    kept = kascade / np.where(importance > 0, importance, 1.0)[:, None]
    return {"kept": triangle_of(kept * sequences), "importance": (importance * sequences).tolist()}


def _read_squares(path: Path, layers: int) -> dict[str, Any]:
    """The arrays of a similarity.npz, float64 [layers, layers] each; raises IcsearchError."""
    sizes = dict.fromkeys((*_ARRAYS, _KASCADE), layers * layers)
    expected, advice = "a similarity.npz of dp-baseline", "leave --similarity out"
    squares = read_arrays(path, sizes, expected, advice, optional=frozenset({_KASCADE}))
    if not squares or any(square.shape != (layers, layers) for square in squares.values()):
        raise IcsearchError(f"{path} is not {layers} x {layers}, the model's DSA layers: leave --similarity out")
    for name, square in squares.items():
        if square.dtype != np.float64 or not _FITTING[name][0](square):
            raise IcsearchError(
                f"{name} of {path} does not hold float64 numbers {_FITTING[name][1]}: expected what dp-baseline wrote; "
                "leave --similarity out"
            )
    return squares
