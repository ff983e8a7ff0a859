"""Arrays that a run leaves for another one: triangles by layer and source, in .npz files. No torch, no pickle."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icsearch.core.errors import IcsearchError
from icsearch.core.files import write_atomically
from icsearch.core.text import first_line

_HEADER_BYTES = 4096  # far more than numpy writes before an array
_NUMERICS = ("dtype", "device", "batch_size", "attention", "kernels", "block_elements", "threads")


def square_of(rows: list[list[float]]) -> Any:
    """A lower triangle of N rows as float64 [N, N], with zeros above."""
    square = np.zeros((len(rows), len(rows)))
    for layer, row in enumerate(rows):
        square[layer, : len(row)] = row
    return square


def triangle_of(square: Any) -> list[list[float]]:
    """What is below the diagonal of [N, N]: row i has i numbers."""
    return [row[:layer] for layer, row in enumerate(square.tolist())]


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def read_arrays(
    path: Path, numbers: Mapping[str, int], expected: str, advice: str, optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The arrays of an .npz by name, each of at most so many float64 `numbers`; none where one is larger.

    A small archive can hold arrays larger than memory, which are not read. Those that are `optional` may be absent.
    Raises IcsearchError, with what was expected, for any damage.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in numbers if name not in optional or name in archive.files]
            sizes = {name: archive.zip.getinfo(f"{name}.npy").file_size for name in names}
            small = all(size <= 8 * numbers[name] + _HEADER_BYTES for name, size in sizes.items())
            return {name: archive[name] for name in names} if small else {}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds by the kind of damage
        raise IcsearchError(
            f"cannot use {path} ({type(error).__name__}: {first_line(error)}): expected {expected}; {advice}"
        ) from None


def identity(start: Mapping[str, Any]) -> dict[str, Any]:
    """What arrays of a run that began so belong to: model, sequences, and the options that their bits follow."""
    options = start["options"]
    return {
        "model": start["model"]["fingerprint"],
        "calibration": start["calibration"]["fingerprint"],
        "numerics": {name: options.get(name) for name in _NUMERICS},
    }
