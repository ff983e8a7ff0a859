"""A checkpoint as files: find it, check that every shard is whole, fingerprint it. No torch here.

What the tensors mean is the business of `conversion`; this module answers before anything large is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icsearch.core.errors import ModelError
from icsearch.core.files import demo_checkpoint, may_be_hub_id, typed_path
from icsearch.core.jsonfile import read_object, shown
from icsearch.core.text import first_line
from icsearch.model.config import check_config, check_sharing
from icsearch.model.header import read_header
from icsearch.model.quantisation import with_quantisation

DEMO = "demo"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HASH_ALL_BELOW = 1 << 30  # bytes; larger checkpoints are sampled, see `fingerprint`
SAMPLES, SAMPLE_BYTES = 256, 1 << 16
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_CODE = ["*.py"]
_EXPECTED = "expected a directory, a hub id such as zai-org/GLM-5, or demo"


@dataclass(frozen=True)
class Checkpoint:
    """A local directory with a config and whole safetensors shards; `revision`: the commit, if the hub delivered it."""

    name: str
    directory: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk, in bytes."""
        return sum(shard.stat().st_size for shard in self.shards)


def open_checkpoint(name_or_path: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Resolve MODEL (`demo`, a directory, a hub id) and check its files; raises ModelError.

    Python files of a hub checkpoint are fetched only with `trust_remote_code`.
    """
    local = _local(name_or_path)
    directory = local or _download(name_or_path, [*_HUB_FILES, *_HUB_CODE] if trust_remote_code else _HUB_FILES)
    config = with_quantisation(_read_json(directory / "config.json", "the checkpoint's config.json"), directory)
    check_config(config, name_or_path)
    check_sharing(config, name_or_path)
    shards = _shards(directory)
    revision = None if local else directory.name  # the hub's cache names a snapshot by its commit
    return Checkpoint(name_or_path, directory, config, shards, revision)


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over config.json and the shards: every byte below 1 GiB in all, else evenly spaced samples of each.

    Sampling keeps the fingerprint of a 700B checkpoint in seconds; it covers each shard's header (names, shapes,
    dtypes), its size, and 256 blocks of 64 KiB.
    """
    digest = hashlib.sha256()
    digest.update((checkpoint.directory / "config.json").read_bytes())
    whole = checkpoint.num_bytes < HASH_ALL_BELOW
    for shard in checkpoint.shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size};".encode())
        with open(shard, "rb") as file:
            if whole:
                while block := file.read(1 << 20):
                    digest.update(block)
                continue
            digest.update(file.read(1 << 20))
            for sample in range(SAMPLES):
                file.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _local(name_or_path: str) -> Path | None:
    """The directory of a checkpoint on this machine; None for a hub id, and ModelError for what is neither."""
    if not name_or_path:  # as a path it would be the working directory
        raise ModelError(f"MODEL is empty: {_EXPECTED}")
    if name_or_path == DEMO:
        return demo_checkpoint()
    path = typed_path(name_or_path, ModelError)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file: expected a checkpoint directory with config.json and safetensors shards")
    if not may_be_hub_id(name_or_path):
        raise ModelError(f"no checkpoint at {path}: {_EXPECTED}")
    return None


def _download(repo_id: str, files: list[str]) -> Path:
    """Fetch a hub checkpoint (or find it in the hub's cache) and return its directory."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=files))
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, not found, disk full
        raise ModelError(
            f"no directory {repo_id}, and the hub did not deliver {repo_id} ({first_line(error)}): "
            "check the name, the network and `hf auth login`, or give a local directory"
        ) from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"no {path.name} in {path.parent}: expected {what}; is this a checkpoint directory?")
    return read_object(path, expected=what, advice="download it again", error=ModelError)


def _instead_of_weights(directory: Path) -> tuple[str, str]:
    """What lies where weights should, and what to do about it."""
    files = sorted(path.name for path in directory.iterdir() if path.is_file())
    if indices := [name for name in files if name.endswith(".safetensors.index.json")]:
        return indices[0], f"rename it to {INDEX_NAME} if it lists the shards that lie beside it"
    if shards := [name for name in files if name.endswith(".safetensors")]:
        if len(shards) == 1 and "-of-" not in shards[0]:
            return f"only {shards[0]}", f"rename it to {SINGLE_NAME} if it holds the whole model"
        more = f" and {len(shards) - 1} more of its kind" if len(shards) > 1 else ""
        return f"{shards[0]}{more}, without the index that lists them", f"download {INDEX_NAME} too"
    others = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    return f"only {others[0]}" if others else "no weights", "convert the checkpoint to safetensors"


def _shards(directory: Path) -> tuple[Path, ...]:
    """The checkpoint's safetensors files, each present, whole, and holding the tensors that the index promises."""
    if (directory / INDEX_NAME).exists():
        weight_map = _read_json(directory / INDEX_NAME, "the safetensors index").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{directory / INDEX_NAME} has no weight_map: download it again")
        promised: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str):
                raise ModelError(
                    f"{INDEX_NAME} of {directory} has {shown(file)} for {shown(tensor)}: expected a file name; "
                    "download it again"
                )
            promised.setdefault(file, set()).add(tensor)
    elif (directory / SINGLE_NAME).exists():
        promised = {SINGLE_NAME: set()}
    else:
        found, advice = _instead_of_weights(directory)
        raise ModelError(f"found {found} in {directory}: expected {SINGLE_NAME} or {INDEX_NAME}; {advice}")
    for file, tensors in promised.items():
        path = directory / file
        if Path(file).name != file or file in ("", "..") or not file.isprintable():  # the first ones lead out of it
            raise ModelError(f"{INDEX_NAME} names {file!r}: expected a file name inside {directory}; download it again")
        if not typed_path(str(path), ModelError).exists():
            raise ModelError(f"shard {file} is missing from {directory}: {INDEX_NAME} lists it; download it again")
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"shard {file} of {directory} is no file: download it again")
        if missing := tensors - {entry.name for entry in read_header(path).entries}:
            raise ModelError(f"shard {file} lacks {sorted(missing)[0]}, which {INDEX_NAME} promises: download it again")
    return tuple(directory / file for file in sorted(promised))
