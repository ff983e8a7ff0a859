"""Calibration batches: text packed into sequences of equal length, and whether a model can be searched on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.sources import TOKENS_FILE, TextSource
from icsearch.core import __version__
from icsearch.core.errors import CalibrationError

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


def check_length(length: int, limits: Limits) -> None:
    """Raise CalibrationError for sequences too short to choose from, or longer than the model goes."""
    if length <= limits.index_topk:
        plain = limits.holds in ("", f"{limits.index_topk} tokens")
        holds = "" if plain else f" (a selection keeps {limits.holds})"
        raise CalibrationError(
            f"sequences of {length} tokens are not longer than the model's index_topk of {limits.index_topk}{holds}: "
            "every selection would be all tokens, and every layer free to share; use longer sequences, such as "
            f"--seq-len {4 * limits.index_topk}"
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


PACKING = (
    "documents joined, each followed by EOS; a sequence starts where a document starts; a document that crosses "
    "the end of a sequence is cut and its rest dropped, unless the rest fills the next sequence"
)

# Tokenised together: enough for a fast tokenizer to use its threads, little enough not to read far ahead.
BATCH_DOCUMENTS = 16
BATCH_CHARS = 1_000_000

MIN_SEQ_LEN = 2  # the first token is never predicted
MAX_TOKENS = 2**28  # far above any calibration: some 10 GB while they are packed, a year of searching

# A tokenizer of transformers. Not imported for its type: that would import the library.
Tokenizer = Any


def pack(documents: Iterable[list[int]], seq_len: int, eos: int | None) -> Iterator[list[int]]:
    """Sequences of exactly `seq_len` tokens from tokenised documents, in their order.

    Documents are joined, each followed by `eos` where there is one. Every sequence starts where a document
    starts, so that nothing in it refers to a beginning that is not there: a document that crosses the end of a
    sequence is cut, and its rest dropped, unless that rest (with its `eos`) fills the whole next sequence.
    Empty documents and what does not fill a last sequence are left out. A document is taken from the iterable
    only when it is needed.
    """
    ending = [] if eos is None else [eos]
    sequence: list[int] = []
    for document in documents:
        tokens = document + ending if document else []
        start = 0
        while start < len(tokens):
            end = start + seq_len - len(sequence)
            sequence += tokens[start:end]
            start = end
            if len(sequence) == seq_len:
                yield sequence
                sequence = []
                if len(tokens) - start < seq_len:
                    break


def build(
    source: TextSource, tokenizer: Tokenizer, key: Mapping[str, Any], *, vocab_size: int, shortest: int = MIN_SEQ_LEN
) -> Calibration:
    """Read, tokenise and pack `num_sequences` sequences of `seq_len` tokens; reads no further than needed.

    `key` is that of `cache_key`. Its `seed` decides the order of the documents (of the built-in corpus: the documents).
    Raises CalibrationError where the text is too little or its tokens do not fit a vocabulary of `vocab_size`.
    `shortest` is the least length that the model makes sense of: no shorter one is advised.
    """
    seq_len, num_sequences = key["seq_len"], key["num_sequences"]
    check_request(tokenizer, seq_len, num_sequences)
    prefix, eos = document_prefix(tokenizer), tokenizer.eos_token_id
    used: list[int] = []  # the length of each document that packing took, with prefix and EOS
    documents = _tokenised(source.documents(key["seed"]), tokenizer, prefix, used, 0 if eos is None else 1)
    sequences = list(islice(pack(documents, seq_len, eos), num_sequences))
    if len(sequences) < num_sequences:
        raise CalibrationError(_too_little(source, used, len(sequences), key, shortest))
    input_ids = np.array(sequences, dtype=np.int64)  # [sequences, length]
    check_ids(input_ids, vocab_size)
    origin = {
        "source": source.text,
        **key,
        "source_revision": source.revision,
        "documents": len(used),
        "document_prefix": prefix,
        "eos_token_id": eos,
        "icsearch_version": __version__,
    }
    return described(input_ids, None, origin)


def document_prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text by default: BOS, several tokens ([gMASK]<sop> in GLM), or nothing."""
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _tokenised(
    documents: Iterable[str], tokenizer: Tokenizer, prefix: list[int], used: list[int], ending: int
) -> Iterator[list[int]]:
    """The tokens of each document that has any; its length and the `ending` behind it go into `used`."""
    for batch in _batches(documents):
        # verbose=False: documents may be longer than the model's positions, sequences are what counts.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if ids:
                used.append(len(prefix) + len(ids) + ending)
                yield prefix + ids


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of what decides the tokens of a text; the same in every process.

    Of a fast tokenizer: its serialised form without padding and truncation, which earlier calls leave there.
    Of a slow one: its vocabulary and its tokens for a fixed text.
    """
    if tokenizer is None:
        raise CalibrationError(_NO_TOKENIZER)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        probe = "Tokens of a fixed text: 0123456789, äöü, 漢字,\n\ttab."
        content = [sorted(tokenizer.get_vocab().items()), list(tokenizer(probe)["input_ids"])]
    special = [document_prefix(tokenizer), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


_NO_TOKENIZER = (
    f"the model has no tokenizer, which text needs: put its tokenizer files beside the model, or give a directory with "
    f"ready tokens ({TOKENS_FILE})"
)


def check_request(tokenizer: Tokenizer, seq_len: int, num_sequences: int) -> None:
    if tokenizer is None:
        raise CalibrationError(_NO_TOKENIZER)
    if seq_len < MIN_SEQ_LEN:
        raise CalibrationError(
            f"--seq-len is {seq_len}: expected at least {MIN_SEQ_LEN}, as the first token is never predicted"
        )
    if num_sequences < 1:
        raise CalibrationError(f"--num-sequences is {num_sequences}: expected at least 1")
    if seq_len * num_sequences > MAX_TOKENS:
        raise CalibrationError(
            f"--num-sequences {num_sequences} of {seq_len} tokens are more than memory would hold, and a search could "
            f"use: give at most {MAX_TOKENS // seq_len}"
        )


def _too_little(source: TextSource, used: list[int], filled: int, key: Mapping[str, Any], shortest: int) -> str:
    seq_len, num_sequences, tokens = key["seq_len"], key["num_sequences"], sum(used)
    if tokens == 0:
        return f"{source.text} holds no text: {num_sequences} sequences need {num_sequences * seq_len} tokens; add text"
    ways = [f"--num-sequences {filled}"] if filled else []
    if seq_len > shortest and tokens >= num_sequences * shortest:
        ways.append(f"a smaller --seq-len (at least {shortest})")
    advice = f"pass {' or '.join(ways)}, or give a source with more text"
    if not ways:
        shorter = f", or {num_sequences * shortest} with --seq-len {shortest}" if shortest < seq_len else ""
        advice = f"give a source with at least that many{shorter}; a sequence of this model has {shortest} or more"
    return (
        f"too little text: {source.text} holds {tokens} tokens in {len(used)} documents, which fill "
        f"{filled} sequences of {seq_len} (rests of cut documents are left out), but {num_sequences} sequences need "
        f"{num_sequences * seq_len} tokens: {advice}"
    )
