"""Calibration batches: text tokenised and packed into equal sequences, once, and cached for every candidate.

A calibration is a directory with ``calibration.safetensors`` (``input_ids`` int64 [sequences, length], and
optionally ``loss_mask`` bool of the same shape) and ``calibration.json``, the manifest. The tokens alone are
enough: bring your own. All losses are of these tokens and of no others, so the fingerprint over them is what
a run and its result refer to.

Imports no torch: numpy arrays, which `torch.from_numpy` takes as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icsearch import __version__
from icsearch.errors import CalibrationError
from icsearch.files import is_disk_full, make_directory, remove_stale_temporaries, sync_directory, write_atomically
from icsearch.jsonfile import read_object, shown, write_object
from icsearch.sources import MANIFEST_FILE, TOKENS_FILE, ReadyTokens, TextSource, parse_source

CALIBRATION_FORMAT = "icsearch.calibration/1"
PACKING = (
    "documents joined, each followed by EOS; a sequence starts where a document starts; a document that crosses "
    "the end of a sequence is cut and its rest dropped, unless the rest fills the next sequence"
)

# What decides the tokens: a cache is used again only where all of these agree.
KEY = (
    "source_fingerprint",
    "corpus_version",
    "tokenizer_fingerprint",
    "packing",
    "seq_len",
    "num_sequences",
    "seed",
)

# Tokenised together: enough for a fast tokenizer to use its threads, little enough not to read far ahead.
BATCH_DOCUMENTS = 16
BATCH_CHARS = 1_000_000

# A tokenizer of transformers. Not imported for its type: that would import the library.
Tokenizer = Any


class DamagedCacheError(CalibrationError):
    """A file of a calibration that is there and cannot be read."""


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


def build(source: TextSource, tokenizer: Tokenizer, key: Mapping[str, Any], *, vocab_size: int) -> Calibration:
    """Read, tokenise and pack `num_sequences` sequences of `seq_len` tokens; reads no further than needed.

    `key` is that of `cache_key`. Its `seed` decides the order of the documents (of the built-in corpus: the documents).
    Raises CalibrationError where the text is too little or its tokens do not fit a vocabulary of `vocab_size`.
    """
    seq_len, num_sequences = key["seq_len"], key["num_sequences"]
    _check_request(tokenizer, seq_len, num_sequences)
    prefix, eos = document_prefix(tokenizer), tokenizer.eos_token_id
    tally = Tally()
    documents = tally.count(_tokenised(source.documents(key["seed"]), tokenizer, prefix), 0 if eos is None else 1)
    sequences = list(islice(pack(documents, seq_len, eos), num_sequences))
    if len(sequences) < num_sequences:
        raise CalibrationError(_too_little(source, tally, len(sequences), seq_len, num_sequences))
    input_ids = np.array(sequences, dtype=np.int64)  # [sequences, length]
    _check_ids(input_ids, vocab_size)
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
    input_ids, loss_mask = _read_tokens(directory / TOKENS_FILE)
    path = directory / MANIFEST_FILE
    manifest = _read_manifest(path) if path.exists() else {}
    calibration = described(input_ids, loss_mask, {"source": str(directory), **manifest})
    for name in ("num_sequences", "seq_len", "fingerprint"):
        expected, found = manifest.get(name), calibration.manifest[name]
        if expected is not None and expected != found:
            raise CalibrationError(
                f"calibration in {directory} is damaged: its tokens have {name} {_short(found)}, {MANIFEST_FILE} says "
                f"{_short(expected)}: delete both files to have them made again, or only {MANIFEST_FILE} if you "
                "changed the tokens"
            )
    return calibration


def _read_tokens(path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    from safetensors import SafetensorError, safe_open

    try:
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
    _check_arrays(input_ids, loss_mask)
    return input_ids, loss_mask


def _read_manifest(path: Path) -> dict[str, Any]:
    advice = f"delete it if the tokens are your own, and {TOKENS_FILE} too if icsearch made them: it makes them again"
    expected = "the description of the tokens beside it"
    manifest = read_object(path, expected=expected, advice=advice, error=DamagedCacheError)
    if manifest.get("format") != CALIBRATION_FORMAT:
        raise CalibrationError(
            f"{path} has format {shown(manifest.get('format'))}: expected {CALIBRATION_FORMAT!r}; {advice}"
        )
    return manifest


def obtain(
    source_text: str,
    tokenizer_loader: Callable[[], Tokenizer],
    cache_dir: Path,
    *,
    seq_len: int | None,
    num_sequences: int | None,
    default_seq_len: int,
    default_num_sequences: int,
    seed: int,
    limits: Limits,
    rebuild: bool = False,
    copy_ready: bool = False,
) -> tuple[Calibration, bool]:
    """The calibration that SOURCE names, checked against the model's limits, and whether it was there already.

    A directory with tokens is loaded as it is, and refused where `seq_len` or `num_sequences` are not None and ask
    for other sizes; with `copy_ready` the tokens are also saved in `cache_dir`. Any other source is built into
    `cache_dir` (with the defaults for sizes that are None), or taken from it where it was built from the same text,
    with the same tokenizer and options. What else lies there is overwritten only with `rebuild`. `tokenizer_loader`
    returns None for a model without tokenizer; that is an error only where text has to be tokenised.
    """
    source = parse_source(source_text)
    if isinstance(source, ReadyTokens):
        calibration = load(source.directory)
        _check_sizes(calibration, source.directory, {"seq_len": seq_len, "num_sequences": num_sequences})
        _check_same_tokenizer(calibration, tokenizer_loader, source.directory)
        check(calibration, limits)
        return calibration, not copy_ready or _copy(calibration, source.directory, cache_dir, rebuild)
    seq_len = default_seq_len if seq_len is None else seq_len
    num_sequences = default_num_sequences if num_sequences is None else num_sequences
    check_length(seq_len, limits)  # before anything is written: a cache of the wrong length would be in the way
    tokenizer = tokenizer_loader()
    _check_request(tokenizer, seq_len, num_sequences)
    fingerprint = tokenizer_fingerprint(tokenizer)
    key = cache_key(source, fingerprint, seq_len, num_sequences, seed)

    def make() -> Calibration:
        return build(source, tokenizer, key, vocab_size=limits.vocab_size)

    there = not rebuild and (cache_dir / TOKENS_FILE).exists()
    calibration, hit = _from_cache(cache_dir, key, make) if there else (make(), False)
    check(calibration, limits)
    if not hit:
        save(calibration, cache_dir)
    return calibration, hit


def _check_sizes(calibration: Calibration, directory: Path, asked: Mapping[str, int | None]) -> None:
    for name, wanted in asked.items():
        found = getattr(calibration, name)
        if wanted not in (None, found):
            option = f"--{name.replace('_', '-')}"
            raise CalibrationError(
                f"the ready tokens in {directory} have {name} {found}, but {option} asks for {wanted}: leave {option} "
                f"out, or give a text source"
            )


def _copy(calibration: Calibration, directory: Path, cache_dir: Path, rebuild: bool) -> bool:
    """Save ready tokens of `directory` in another one; True where the same tokens were there already."""
    if cache_dir.resolve() == directory.resolve():
        return True
    if (cache_dir / TOKENS_FILE).exists() and not rebuild:
        there = load(cache_dir)
        if there.fingerprint != calibration.fingerprint:
            raise CalibrationError(
                f"{cache_dir} holds other tokens (fingerprint {_short(there.fingerprint)}, those of {directory} have "
                f"{_short(calibration.fingerprint)}): choose another directory, or overwrite them with --fresh"
            )
        return True
    save(calibration, cache_dir)
    return False


def cache_key(source: TextSource, tokenizer: str, seq_len: int, num_sequences: int, seed: int) -> dict[str, Any]:
    """What decides the tokens of a text source; `tokenizer` is its fingerprint."""
    values = (source.fingerprint, source.corpus_version, tokenizer, PACKING, seq_len, num_sequences, seed)
    return dict(zip(KEY, values, strict=True))


def _from_cache(cache_dir: Path, key: Mapping[str, Any], make: Callable[[], Calibration]) -> tuple[Calibration, bool]:
    """The batches of a cache, and True; those of a damaged one made again, and False. Raises CalibrationError.

    What cannot be read is replaced only where the other file says that it was the same.
    """
    try:
        return _cached(cache_dir, key), True
    except DamagedCacheError:
        made = make()
        if _fingerprint_left(cache_dir) != made.fingerprint:
            raise
        return made, False


def _fingerprint_left(cache_dir: Path) -> object:
    """The fingerprint that a damaged cache was of, by its manifest or else by its tokens; None by neither."""
    with contextlib.suppress(DamagedCacheError):
        return _read_manifest(cache_dir / MANIFEST_FILE).get("fingerprint")
    with contextlib.suppress(DamagedCacheError):
        return Calibration(*_read_tokens(cache_dir / TOKENS_FILE)).fingerprint
    return None


def _cached(cache_dir: Path, key: Mapping[str, Any]) -> Calibration:
    calibration = load(cache_dir)
    if "source_fingerprint" not in calibration.manifest:
        raise CalibrationError(
            f"{cache_dir} holds tokens that icsearch did not build: give {cache_dir} itself as SOURCE, choose another "
            f"directory, or overwrite them with --fresh"
        )
    differences = [
        f"{name} (there {_short(calibration.manifest.get(name))}, asked for {_short(wanted)})"
        for name, wanted in key.items()
        if calibration.manifest.get(name) != wanted
    ]
    if differences:
        raise CalibrationError(
            f"calibration in {cache_dir} was built with another {', '.join(differences)}: choose another directory, "
            f"give the same options, or rebuild with --fresh"
        )
    return calibration


def _check_same_tokenizer(calibration: Calibration, load_tokenizer: Callable[[], Tokenizer], directory: Path) -> None:
    """Token ids of another model's tokenizer fit the vocabulary by chance, and mean nothing."""
    recorded = calibration.manifest.get("tokenizer_fingerprint")
    tokenizer = load_tokenizer() if recorded else None
    if tokenizer is None:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found != recorded:
        raise CalibrationError(
            f"calibration in {directory} was made with another tokenizer ({_short(recorded)}, the model's is "
            f"{_short(found)}): run icsearch calibrate for this model, or delete {directory / MANIFEST_FILE} to use "
            f"the tokens as they are"
        )


def check(calibration: Calibration, limits: Limits) -> None:
    """Raise CalibrationError where a search for this model cannot run on these tokens, or would mean nothing."""
    _check_arrays(calibration.input_ids, calibration.loss_mask)
    check_length(calibration.seq_len, limits)
    _check_ids(calibration.input_ids, limits.vocab_size)
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


_NO_TOKENIZER = (
    f"the model has no tokenizer, which text needs: put its tokenizer files beside the model, or give a directory with "
    f"ready tokens ({TOKENS_FILE})"
)


def _check_request(tokenizer: Tokenizer, seq_len: int, num_sequences: int) -> None:
    if tokenizer is None:
        raise CalibrationError(_NO_TOKENIZER)
    if seq_len < 2:
        raise CalibrationError(f"--seq-len is {seq_len}: expected at least 2, as the first token is never predicted")
    if num_sequences < 1:
        raise CalibrationError(f"--num-sequences is {num_sequences}: expected at least 1")


def _check_arrays(input_ids: NDArray[Any], loss_mask: NDArray[Any] | None) -> None:
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


def _check_ids(input_ids: NDArray[np.int64], vocab_size: int) -> None:
    outside = (input_ids < 0) | (input_ids >= vocab_size)  # [sequences, length]
    if not outside.any():
        return
    sequence, position = (int(index) for index in np.unravel_index(int(outside.argmax()), outside.shape))
    raise CalibrationError(
        f"{int(outside.sum())} token ids are outside the model's vocabulary of {vocab_size}, the first one "
        f"{int(input_ids[sequence, position])} at sequence {sequence}, position {position}: "
        f"use the tokenizer that belongs to the model"
    )


def _too_little(source: TextSource, tally: Tally, filled: int, seq_len: int, num_sequences: int) -> str:
    if tally.tokens == 0:
        return f"{source.text} holds no text: {num_sequences} sequences need {num_sequences * seq_len} tokens; add text"
    advice = f"--num-sequences {filled} or a smaller --seq-len" if filled else "a smaller --seq-len"
    return (
        f"too little text: {source.text} holds {tally.tokens} tokens in {tally.documents} documents, which fill "
        f"{filled} sequences of {seq_len} (rests of cut documents are left out), but {num_sequences} sequences need "
        f"{num_sequences * seq_len} tokens: pass {advice}, or give a source with more text"
    )


def _short(value: Any) -> str:
    """A value for a message: digests to 12 letters, long texts to their beginning."""
    text = str(value)
    return text if len(text) <= 20 else text[:12]
