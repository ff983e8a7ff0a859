"""Text tokenised and packed into sequences of equal length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from icsearch import __version__
from icsearch.calibration.batches import Calibration, check_ids, described
from icsearch.errors import CalibrationError
from icsearch.texts.sources import TOKENS_FILE, TextSource

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
    tally = Tally()
    documents = tally.count(_tokenised(source.documents(key["seed"]), tokenizer, prefix), 0 if eos is None else 1)
    sequences = list(islice(pack(documents, seq_len, eos), num_sequences))
    if len(sequences) < num_sequences:
        raise CalibrationError(_too_little(source, tally, len(sequences), key, shortest))
    input_ids = np.array(sequences, dtype=np.int64)  # [sequences, length]
    check_ids(input_ids, vocab_size)
    origin = {
        "source": source.text,
        **key,
        "source_revision": source.revision,
        "documents": tally.documents,
        "document_prefix": prefix,
        "eos_token_id": eos,
        "icsearch_version": __version__,
    }
    return described(input_ids, None, origin)


@dataclass
class Tally:
    """What packing has used so far: documents, and tokens with prefix and EOS."""

    documents: int = 0
    tokens: int = 0

    def count(self, documents: Iterable[list[int]], ending: int) -> Iterator[list[int]]:
        for document in documents:
            self.documents += 1
            self.tokens += len(document) + ending
            yield document


def document_prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text by default: BOS, several tokens ([gMASK]<sop> in GLM), or nothing."""
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _tokenised(documents: Iterable[str], tokenizer: Tokenizer, prefix: list[int]) -> Iterator[list[int]]:
    for batch in _batches(documents):
        # verbose=False: documents may be longer than the model's positions, sequences are what counts.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if ids:
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


def _too_little(source: TextSource, tally: Tally, filled: int, key: Mapping[str, Any], shortest: int) -> str:
    seq_len, num_sequences = key["seq_len"], key["num_sequences"]
    if tally.tokens == 0:
        return f"{source.text} holds no text: {num_sequences} sequences need {num_sequences * seq_len} tokens; add text"
    ways = [f"--num-sequences {filled}"] if filled else []
    if seq_len > shortest and tally.tokens >= num_sequences * shortest:
        ways.append(f"a smaller --seq-len (at least {shortest})")
    advice = f"pass {' or '.join(ways)}, or give a source with more text"
    if not ways:
        shorter = f", or {num_sequences * shortest} with --seq-len {shortest}" if shortest < seq_len else ""
        advice = f"give a source with at least that many{shorter}; a sequence of this model has {shortest} or more"
    return (
        f"too little text: {source.text} holds {tally.tokens} tokens in {tally.documents} documents, which fill "
        f"{filled} sequences of {seq_len} (rests of cut documents are left out), but {num_sequences} sequences need "
        f"{num_sequences * seq_len} tokens: {advice}"
    )
