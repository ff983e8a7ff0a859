"""A calibration as a directory: calibration.safetensors, the tokens, and calibration.json, the manifest.

The tokens alone are enough: bring your own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.batches import CALIBRATION_FORMAT, Calibration, check_arrays, described
from icsearch.errors import CalibrationError
from icsearch.files import is_disk_full, make_directory, remove_stale_temporaries, sync_directory, write_atomically
from icsearch.jsonfile import TEXT, FieldError, check_fields, optional, read_object, shown, write_object
from icsearch.texts.sources import MANIFEST_FILE, TOKENS_FILE


class DamagedCacheError(CalibrationError):
    """A file of a calibration that is there and cannot be read."""


def save(calibration: Calibration, directory: Path) -> None:
    """Write tokens and manifest, fsynced, over what is there.

    The tokens go away first and come last, so a killed run leaves a directory without tokens, which is built
    again, and never new tokens with an old manifest. Raises CalibrationError where the directory cannot be written
    to, and OSError where the disk is full.
    """
    from safetensors.numpy import save as to_bytes

    tensors: dict[str, NDArray[Any]] = {"input_ids": np.ascontiguousarray(calibration.input_ids)}
    if calibration.loss_mask is not None:
        tensors["loss_mask"] = np.ascontiguousarray(calibration.loss_mask)
    try:
        make_directory(directory)
        remove_stale_temporaries(directory)
        (directory / TOKENS_FILE).unlink(missing_ok=True)
        sync_directory(directory)
        write_object(directory / MANIFEST_FILE, calibration.manifest)
        write_atomically(directory / TOKENS_FILE, to_bytes(tensors))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise CalibrationError(
            f"cannot write the calibration to {directory}: {error.strerror or error}; choose another place"
        ) from None


def load(directory: Path) -> Calibration:
    """Tokens and manifest of a directory; without calibration.json the manifest is made from the tokens.

    Raises CalibrationError where the tokens cannot be read, have another dtype or shape than the contract's,
    or are not those that the manifest describes.
    """
    input_ids, loss_mask = read_tokens(directory / TOKENS_FILE)
    path = directory / MANIFEST_FILE
    manifest = read_manifest(path) if path.exists() else {}
    calibration = described(input_ids, loss_mask, {"source": str(directory), **manifest})
    for name in ("num_sequences", "seq_len", "fingerprint"):
        expected, found = manifest.get(name), calibration.manifest[name]
        if expected is not None and expected != found:
            raise CalibrationError(
                f"calibration in {directory} is damaged: its tokens have {name} {short(found)}, {MANIFEST_FILE} says "
                f"{short(expected)}: delete both files to have them made again, or only {MANIFEST_FILE} if you "
                "changed the tokens"
            )
    return calibration


def read_tokens(path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors takes a file that may not be read for one that is not there
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in ("input_ids", "loss_mask") if name in names}
    except FileNotFoundError:
        raise CalibrationError(f"no file {path}: expected input_ids, int64 [sequences, length]") from None
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise DamagedCacheError(
            f"{path} is damaged or cannot be read ({error}): expected input_ids, int64 [sequences, length], in a "
            f"safetensors file; bring the tokens again, or delete it if icsearch made it: then it is made again"
        ) from None
    if "input_ids" not in tensors:
        raise CalibrationError(
            f"{path} has no input_ids (found: {', '.join(names) or 'nothing'}): expected int64 [sequences, length]"
        )
    input_ids, loss_mask = tensors["input_ids"], tensors.get("loss_mask")
    check_arrays(input_ids, loss_mask)
    return input_ids, loss_mask


def read_manifest(path: Path) -> dict[str, Any]:
    advice = f"delete it if the tokens are your own, and {TOKENS_FILE} too if icsearch made them: it makes them again"
    expected = "the description of the tokens beside it"
    manifest = read_object(path, expected=expected, advice=advice, error=DamagedCacheError)
    if manifest.get("format") != CALIBRATION_FORMAT:
        raise CalibrationError(
            f"{path} has format {shown(manifest.get('format'))}: expected {CALIBRATION_FORMAT!r}; {advice}"
        )
    taken_over = ("source", "source_revision")  # by a run's journal
    try:
        check_fields(manifest, dict.fromkeys(taken_over, optional(TEXT)))
    except FieldError as error:
        raise DamagedCacheError(f"{path} is damaged ({error}): {advice}") from None
    return manifest


def short(value: Any) -> str:
    """A value for a message: digests to 12 letters, long texts to their beginning."""
    text = str(value)
    return text if len(text) <= 20 else text[:12]
