"""From SOURCE to batches: built once, kept as a directory, and found again by every run that asks for the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.batches import (
    CALIBRATION_FORMAT,
    PACKING,
    Calibration,
    Limits,
    Tokenizer,
    build,
    check,
    check_arrays,
    check_length,
    check_request,
    described,
    document_prefix,
    tokenizer_fingerprint,
)
from icsearch.calibration.far import ALL, Counting
from icsearch.calibration.fields import TEXT_FIELD, template_of
from icsearch.calibration.sources import MANIFEST_FILE, TOKENS_FILE, ReadyTokens, TextSource, parse_source
from icsearch.core.errors import CalibrationError
from icsearch.core.files import make_directory, refusing, remove_stale_temporaries, sync_directory, write_atomically
from icsearch.core.jsonfile import TEXT, FieldError, check_fields, optional, read_object, shown, write_object


class DamagedCacheError(CalibrationError):
    """A file of a calibration that is there and cannot be read."""


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
    counting: Counting | None = None,
    field: str | None = None,
) -> tuple[Calibration, bool]:
    """The calibration that SOURCE names, checked against the model's limits, and whether it was there already.

    A directory with tokens is loaded as it is, and refused where `seq_len` or `num_sequences` are not None and ask
    for other sizes; with `copy_ready` the tokens are also saved in `cache_dir`. Any other source is built into
    `cache_dir` (with the defaults for sizes that are None), or taken from it where it was built from the same text,
    with the same tokenizer and options. What else lies there is overwritten only with `rebuild`. `tokenizer_loader`
    returns None for a model without tokenizer; that is an error only where text has to be tokenised. `counting` says
    which of the tokens count; ready ones come into `cache_dir` then, whatever the source.
    """
    source = parse_source(source_text, field)
    if isinstance(source, ReadyTokens):
        sizes = {"seq_len": seq_len, "num_sequences": num_sequences}
        calibration = _ready(source.directory, sizes, tokenizer_loader, limits)
        if counting is not None:
            if source.directory.resolve() == cache_dir.resolve():
                raise CalibrationError(f"--out {cache_dir} is the SOURCE itself: give another directory")
            if "count" in calibration.manifest:
                raise CalibrationError(
                    f"{source.directory} counts {calibration.manifest['count']} tokens alone already: give the text or "
                    "the tokens that it was made of"
                )
            key = {"source_fingerprint": calibration.fingerprint, **counting.key}
            return _obtain(cache_dir, key, partial(_masked, calibration, counting, key), limits, rebuild)
        return calibration, not copy_ready or _copy(calibration, source.directory, cache_dir, rebuild)
    seq_len = default_seq_len if seq_len is None else seq_len
    num_sequences = default_num_sequences if num_sequences is None else num_sequences
    check_length(seq_len, limits)  # before anything is written: a cache of the wrong length would be in the way
    tokenizer = tokenizer_loader()
    check_request(tokenizer, seq_len, num_sequences)
    source.render = template_of(tokenizer, document_prefix(tokenizer))
    key = cache_key(source, tokenizer_fingerprint(tokenizer), seq_len, num_sequences, seed)
    key |= of_field(source, tokenizer)
    make = partial(build, source, tokenizer, key, vocab_size=limits.vocab_size, shortest=limits.index_topk + 1)
    if counting is None:
        return _obtain(cache_dir, key, make, limits, rebuild)
    key_of_mask = {**key, **counting.key}
    return _obtain(cache_dir, key_of_mask, lambda: _masked(make(), counting, key_of_mask), limits, rebuild)


def _masked(calibration: Calibration, counting: Counting, key: Mapping[str, Any]) -> Calibration:
    """The same tokens, of which fewer count: of those that counted. Their manifest has the `key` too."""
    mask = counting.mask(calibration) & calibration.counted()
    return described(calibration.input_ids, mask, {**calibration.manifest, **key})


def _obtain(
    cache_dir: Path, key: Mapping[str, Any], make: Callable[[], Calibration], limits: Limits, rebuild: bool
) -> tuple[Calibration, bool]:
    """What `make` makes, or what a cache of this key holds; and whether it was there already."""
    hit = not rebuild and (cache_dir / TOKENS_FILE).exists()
    try:
        calibration = _cached(cache_dir, key) if hit else make()
    except DamagedCacheError:  # replaced only where the other file says that it was the same
        hit, calibration = False, make()
        if _fingerprint_left(cache_dir) != calibration.fingerprint:
            raise
    check(calibration, limits)
    if not hit:
        save(calibration, cache_dir)
    return calibration, hit


def _ready(
    directory: Path, sizes: Mapping[str, int | None], tokenizer_loader: Callable[[], Tokenizer], limits: Limits
) -> Calibration:
    """The tokens that lie in a directory, checked against the sizes asked for and the model."""
    calibration = load(directory)
    for name, wanted in sizes.items():
        found = getattr(calibration, name)
        if wanted not in (None, found):
            option = f"--{name.replace('_', '-')}"
            raise CalibrationError(
                f"the ready tokens in {directory} have {name} {found}, but {option} asks for {wanted}: "
                f"leave {option} out, or give a text source"
            )
    # Token ids of another model's tokenizer fit the vocabulary by chance, and mean nothing.
    recorded = calibration.manifest.get("tokenizer_fingerprint")
    tokenizer = tokenizer_loader() if recorded else None
    if tokenizer is not None and (own := tokenizer_fingerprint(tokenizer)) != recorded:
        raise CalibrationError(
            f"calibration in {directory} was made with another tokenizer ({short(recorded)}, the model's is "
            f"{short(own)}): run icsearch calibrate for this model, or delete {directory / MANIFEST_FILE} to use "
            f"the tokens as they are"
        )
    check(calibration, limits)
    return calibration


def _copy(calibration: Calibration, directory: Path, cache_dir: Path, rebuild: bool) -> bool:
    """Save ready tokens of `directory` in another one; True where the same tokens were there already."""
    if cache_dir.resolve() == directory.resolve():
        return True
    if (cache_dir / TOKENS_FILE).exists() and not rebuild:
        there = load(cache_dir)
        if there.fingerprint != calibration.fingerprint:
            raise CalibrationError(
                f"{cache_dir} holds other tokens (fingerprint {short(there.fingerprint)}, those of {directory} have "
                f"{short(calibration.fingerprint)}): give another --out, or overwrite them with --fresh"
            )
        return True
    save(calibration, cache_dir)
    return False


def cache_key(source: TextSource, tokenizer: str, seq_len: int, num_sequences: int, seed: int) -> dict[str, Any]:
    """What decides the tokens of a text: a cache is used again only where all of it agrees.

    `tokenizer` is its fingerprint.
    """
    return {
        "source_fingerprint": source.fingerprint,
        "corpus_version": source.corpus_version,
        "tokenizer_fingerprint": tokenizer,
        "packing": PACKING,
        "seq_len": seq_len,
        "num_sequences": num_sequences,
        "seed": seed,
    }


def of_field(source: TextSource, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the tokens where another field of rows than the text is read: it, and the template of chats."""
    if (field := source.chosen_field) in (None, TEXT_FIELD):
        return {}
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {"field": field, "chat_template": hashlib.sha256(template.encode()).hexdigest()}


def _fingerprint_left(cache_dir: Path) -> object:
    """The fingerprint that a damaged cache was of, by its manifest or else by its tokens; None by neither."""
    with contextlib.suppress(DamagedCacheError):
        return read_manifest(cache_dir / MANIFEST_FILE).get("fingerprint")
    with contextlib.suppress(DamagedCacheError):
        return Calibration(*read_tokens(cache_dir / TOKENS_FILE)).fingerprint
    return None


def _cached(cache_dir: Path, key: Mapping[str, Any]) -> Calibration:
    calibration = load(cache_dir)
    if "source_fingerprint" not in calibration.manifest:
        raise CalibrationError(
            f"{cache_dir} holds tokens that icsearch did not build: give {cache_dir} itself as SOURCE, choose another "
            f"directory, or overwrite them with --fresh"
        )
    there = {"count": ALL, **calibration.manifest}
    differences = [
        f"{name} (there {short(there.get(name))}, asked for {short(wanted)})"
        for name, wanted in {"count": ALL, **key}.items()
        if there.get(name) != wanted
    ]
    if differences:
        raise CalibrationError(
            f"calibration in {cache_dir} was built with another {', '.join(differences)}: give another --out, "
            f"repeat the options, or start over with --fresh"
        )
    return calibration


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
    with _writing(directory):
        make_directory(directory)
        remove_stale_temporaries(directory)
        (directory / TOKENS_FILE).unlink(missing_ok=True)
        sync_directory(directory)
        write_object(directory / MANIFEST_FILE, calibration.manifest)
        write_atomically(directory / TOKENS_FILE, to_bytes(tensors))


@contextlib.contextmanager
def place(directory: Path) -> Iterator[None]:
    """A directory for a calibration that takes long to make; what was made for one that failed is not left behind.

    Raises CalibrationError where it cannot be made, and OSError where the disk is full.
    """
    made_now = not directory.exists()
    with _writing(directory):
        make_directory(directory)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            if made_now:
                directory.rmdir()
        raise


def _writing(directory: Path) -> contextlib.AbstractContextManager[None]:
    return refusing(
        lambda reason: CalibrationError(f"cannot write the calibration to {directory}: {reason}; choose another place")
    )


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
    taken_over = ("source", "source_revision", "count")  # by a run's journal
    try:
        check_fields(manifest, dict.fromkeys(taken_over, optional(TEXT)))
    except FieldError as error:
        raise DamagedCacheError(f"{path} is damaged ({error}): {advice}") from None
    return manifest


def short(value: Any) -> str:
    """A value for a message: digests to 12 letters, long texts to their beginning."""
    text = str(value)
    return text if len(text) <= 20 else text[:12]
