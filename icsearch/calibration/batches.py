"""Calibration batches: tokens, which of them count, and whether a model can be searched on them.

All losses are of these tokens and of no others, so the fingerprint over them is what a run and its result refer to.
No torch: numpy arrays, which `torch.from_numpy` takes as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icsearch.errors import CalibrationError

CALIBRATION_FORMAT = "icsearch.calibration/1"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Packed tokens, which of them count, and where they come from.

    `input_ids` is int64 [sequences, length]. `loss_mask`, bool of the same shape or None, says of which tokens
    the prediction counts: mask[s, t] is about token t being predicted from those before it. Position 0 is
    never predicted, so never counted. `manifest` is the content of calibration.json.
    """

    input_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        return int(self.input_ids.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, tokens and mask, in little-endian bytes: the same on every machine."""
        digest = hashlib.sha256(json.dumps(self.input_ids.shape).encode())
        digest.update(np.ascontiguousarray(self.input_ids, dtype="<i8").tobytes())
        if self.loss_mask is not None:
            digest.update(b"mask" + np.ascontiguousarray(self.loss_mask).tobytes())
        return digest.hexdigest()

    def sequence_digests(self) -> list[str]:
        """A short digest of each sequence's tokens: by these, batches that share sequences know each other."""
        rows = np.ascontiguousarray(self.input_ids, dtype="<i8")
        return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]

    def counted(self) -> NDArray[np.bool_]:
        """Which predictions count, bool [sequences, length]; never that of position 0."""
        counted = np.ones(self.input_ids.shape, dtype=np.bool_) if self.loss_mask is None else self.loss_mask.copy()
        counted[:, 0] = False
        return counted

    def counted_tokens(self) -> list[int]:
        """How many predictions count in each sequence."""
        return [int(count) for count in self.counted().sum(axis=1)]


@dataclass(frozen=True)
class Limits:
    """What a model can take. `max_positions` None: it names no limit.

    `index_topk`: the tokens that a selection keeps; `holds` says what it is made of.
    """

    vocab_size: int
    index_topk: int
    max_positions: int | None
    holds: str = ""


def described(
    input_ids: NDArray[np.int64], loss_mask: NDArray[np.bool_] | None, origin: Mapping[str, Any]
) -> Calibration:
    """A calibration whose manifest says what its tokens are, and holds `origin`: where they come from."""
    bare = Calibration(input_ids, loss_mask)
    manifest = {
        "format": CALIBRATION_FORMAT,
        **origin,
        "fingerprint": bare.fingerprint,
        "num_sequences": bare.num_sequences,
        "seq_len": bare.seq_len,
        "counted_tokens": sum(bare.counted_tokens()),
    }
    return Calibration(input_ids, loss_mask, manifest)


def check(calibration: Calibration, limits: Limits) -> None:
    """Raise CalibrationError where a search for this model cannot run on these tokens, or would mean nothing."""
    check_arrays(calibration.input_ids, calibration.loss_mask)
    check_length(calibration.seq_len, limits)
    check_ids(calibration.input_ids, limits.vocab_size)
    for sequence, count in enumerate(calibration.counted_tokens()):
        if count == 0:
            raise CalibrationError(
                f"loss_mask counts no token of sequence {sequence}: expected at least one True after position 0; "
                f"leave the sequence out or mend the mask"
            )


def check_heldout(heldout: Calibration, calibration: Calibration, option: str) -> None:
    """Raise CalibrationError where held-out sequences cannot confirm what was chosen on a calibration."""
    shared = set(heldout.sequence_digests()) & set(calibration.sequence_digests())
    if shared:
        raise CalibrationError(
            f"{option} shares {len(shared)} of its {heldout.num_sequences} sequences with the calibration: give text "
            "that nothing was chosen on"
        )
    if heldout.seq_len != calibration.seq_len:
        raise CalibrationError(
            f"{option} has sequences of {heldout.seq_len} tokens, the calibration of {calibration.seq_len}: give "
            "sequences as long as those"
        )
    for found, name in ((heldout, option), (calibration, "--calibration")):
        if found.num_sequences < 2:
            raise CalibrationError(f"{name} is one sequence, whose loss has no standard error: give at least 2")


def _in_words(limits: Limits) -> str:
    plain = limits.holds in ("", f"{limits.index_topk} tokens")
    return "" if plain else f" (a selection keeps {limits.holds})"


def check_length(length: int, limits: Limits) -> None:
    """Raise CalibrationError for sequences too short to choose from, or longer than the model goes."""
    if length <= limits.index_topk:
        raise CalibrationError(
            f"sequences of {length} tokens are not longer than the model's index_topk of {limits.index_topk}"
            f"{_in_words(limits)}: every "
            f"selection would be all tokens, and every layer free to share; use longer sequences, such as --seq-len "
            f"{4 * limits.index_topk}"
        )
    if limits.max_positions is not None and length > limits.max_positions:
        raise CalibrationError(
            f"sequences of {length} tokens are longer than the model's {limits.max_positions} positions: "
            f"use --seq-len {limits.max_positions} or less"
        )


def check_arrays(input_ids: NDArray[Any], loss_mask: NDArray[Any] | None) -> None:
    if input_ids.dtype != np.int64 or input_ids.ndim != 2:
        raise CalibrationError(
            f"input_ids is {input_ids.dtype} {list(input_ids.shape)}: expected int64 [sequences, length]; convert it"
        )
    if input_ids.size == 0:
        raise CalibrationError(
            f"input_ids is empty, {list(input_ids.shape)}: expected at least one sequence [sequences, length]"
        )
    if loss_mask is not None and (loss_mask.dtype != np.bool_ or loss_mask.shape != input_ids.shape):
        raise CalibrationError(
            f"loss_mask is {loss_mask.dtype} {list(loss_mask.shape)}: expected bool {list(input_ids.shape)}, as "
            f"input_ids; convert it or leave it out"
        )


def check_ids(input_ids: NDArray[np.int64], vocab_size: int) -> None:
    outside = (input_ids < 0) | (input_ids >= vocab_size)  # [sequences, length]
    if not outside.any():
        return
    sequence, position = (int(index) for index in np.unravel_index(int(outside.argmax()), outside.shape))
    raise CalibrationError(
        f"{int(outside.sum())} token ids are outside the model's vocabulary of {vocab_size}, the first one "
        f"{int(input_ids[sequence, position])} at sequence {sequence}, position {position}: "
        f"use the tokenizer that belongs to the model"
    )
