"""A copy of a checkpoint that is whole or not there: links to shards that stay the same, and new files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from icsearch.core.errors import IcsearchError, ShardError
from icsearch.core.files import (
    lives,
    make_directory,
    naming,
    refusing,
    sync_directory,
    typed_path,
    write_atomically,
)
from icsearch.core.text import format_bytes
from icsearch.model.checkpoint import INDEX_NAME, Checkpoint
from icsearch.model.header import BITS, Entry, Header, HeaderError, damaged, header_of, make_header, read_header

_BUFFER_BYTES = 2**22
# Weights in other forms, and other copies of the same ones: they would not fit the new config, or not be looked at.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".ckpt")
_NEW_FILES_BYTES = 2**20  # config and index, which are small; a file system wants some room for itself too


class CopyError(IcsearchError):
    """A place where no checkpoint can be written."""


@dataclass(frozen=True)
class CopyPlan:
    """What a copy is made of. Names are relative to source and copy; all shards of the source are in one of three."""

    source: Path
    linked: tuple[str, ...]  # shards that stay as they are
    rewritten: Mapping[str, Collection[str]]  # shards that lose these tensors
    gone: tuple[str, ...]  # shards that lose all tensors
    copied: tuple[str, ...]  # what is no weights
    written: Mapping[str, str]  # new files and their text
    left_out: tuple[str, ...]  # weights that the index does not name


@dataclass(frozen=True)
class Copied:
    """What was done, in files and bytes: `linked` ones take no room, `copied` ones could not be linked."""

    linked: int
    linked_bytes: int
    copied: int
    copied_bytes: int
    rewritten: int
    rewritten_bytes: int

    def __str__(self) -> str:
        parts = (
            f"{count} {what.replace('s ', ' ', 1) if count == 1 else what} ({format_bytes(size)})"
            for count, what, size in (
                (self.linked, "shards linked", self.linked_bytes),
                (self.rewritten, "shards rewritten", self.rewritten_bytes),
                (self.copied, "files copied", self.copied_bytes),
            )
        )
        return ", ".join(parts)


def plan_copy(checkpoint: Checkpoint, dropped: Mapping[str, Collection[str]], written: Mapping[str, str]) -> CopyPlan:
    """What to do with each file of a checkpoint whose shards lose the `dropped` tensors, by shard name.

    `written` replaces files, or adds them. Hidden files, and directories that are links, stay behind.
    """
    shards = [path.name for path in checkpoint.shards]
    gone = {name for name in dropped if len(dropped[name]) == len(read_header(checkpoint.directory / name).entries)}
    other = sorted(set(_files(checkpoint.directory)) - {*shards, *written, INDEX_NAME})
    return CopyPlan(
        source=checkpoint.directory,
        linked=tuple(name for name in shards if name not in dropped),
        rewritten={name: dropped[name] for name in shards if name in dropped and name not in gone},
        gone=tuple(sorted(gone)),
        copied=tuple(name for name in other if not name.endswith(_OTHER_WEIGHTS)),
        written=written,
        left_out=tuple(name for name in other if name.endswith(_OTHER_WEIGHTS)),
    )


def _files(directory: Path) -> Iterator[str]:
    """All files below a directory, relative to it; a link to a file, as in the hub's cache, is that file."""
    for folder, folders, files in os.walk(directory, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(directory).as_posix()


def free_place(out: Path) -> Path:
    """Where the copy will be, links resolved; raises CopyError where something is there."""
    target = typed_path(str(out), CopyError).resolve()
    if target == Path.cwd().resolve():  # whoever stands in it would be left in a directory that is gone
        raise CopyError("--checkpoint is the working directory: give a directory that does not exist yet")
    if target.exists() and not target.is_dir():
        raise CopyError(f"{out} is a file: give a --checkpoint directory that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise CopyError(f"{out} is not empty: give a --checkpoint directory that does not exist yet, or is empty")
    return target


def check_outside(target: Path, source: Path) -> None:
    """Raise CopyError where the copy would lie inside of its source."""
    if target.is_relative_to(source.resolve()):
        raise CopyError(f"{target} lies inside of the checkpoint {source}: give another --checkpoint directory")


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A new directory beside the target, which takes its name when the block is done, and is removed if it fails.

    A process that is killed leaves the directory under its own hidden name; the next one for this target removes it.
    """
    before, after = f".{target.name}.", ".tmp"
    temporary = target.parent / f"{before}{os.getpid()}{after}"
    with _explained(f"cannot write in {target.parent}", "give another --checkpoint directory"):
        make_directory(target.parent)
        for path in target.parent.iterdir():
            if path.name.startswith(before) and path.name.endswith(after) and not path.is_symlink():
                process = path.name.removeprefix(before).removesuffix(after)
                if process.isdecimal() and len(process) <= 10 and not lives(int(process)):
                    shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            sync_directory(Path(folder))
        with _explained(f"the finished copy cannot become {target}", "give another directory"):
            os.rename(temporary, target)  # also over an empty directory
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone by then, if all went well
    sync_directory(target.parent)


def _explained(what: str, advice: str) -> contextlib.AbstractContextManager[None]:
    return refusing(lambda reason: CopyError(f"{what} ({reason}): {advice}"))


def fill_directory(plan: CopyPlan, directory: Path, tell: Callable[[str], None]) -> Copied:
    """Make the files of a plan in an empty directory, and `tell` beforehand how much that is.

    Raises CopyError where there is no room for it.
    """
    linked = []
    for name in plan.linked:
        # Another file system, one without links, a file of somebody else: the copy then says what fails.
        with contextlib.suppress(OSError):
            os.link((plan.source / name).resolve(), directory / name)  # to the file itself, not to a link to it
            linked.append(name)
    copied = [*(name for name in plan.linked if name not in linked), *plan.copied]
    done = Copied(
        linked=len(linked),
        linked_bytes=sum((plan.source / name).stat().st_size for name in linked),
        copied=len(copied),
        copied_bytes=sum((plan.source / name).stat().st_size for name in copied),
        rewritten=len(plan.rewritten),
        rewritten_bytes=sum(
            rewritten_bytes(read_header(plan.source / name), dropped) for name, dropped in plan.rewritten.items()
        ),
    )
    free = shutil.disk_usage(directory).free
    tell(f"{done}; {format_bytes(free)} free")
    needed = done.copied_bytes + done.rewritten_bytes + _NEW_FILES_BYTES
    if needed > free:
        raise CopyError(
            f"{directory.parent} has {format_bytes(free)} free, and the copy needs {format_bytes(needed)} ({done}): "
            "free some space, or give a --checkpoint directory on the checkpoint's own disk, where shards are linked"
        )
    for name in copied:
        target = directory / name
        make_directory(target.parent)
        with naming(target):
            shutil.copyfile(plan.source / name, target)
            with open(target, "rb+") as file:
                os.fsync(file.fileno())
    for name, dropped in plan.rewritten.items():
        rewrite_shard((plan.source / name).resolve(), directory / name, dropped)
    for name, text in plan.written.items():
        write_atomically(directory / name, text)
    return done


def kept_entries(header: Header, dropped: Collection[str]) -> list[Entry]:
    """The tensors that stay, those of larger elements first, as safetensors orders them: so all lie aligned."""
    kept = [entry for entry in header.entries if entry.name not in dropped]
    return sorted(kept, key=lambda entry: -BITS.get(entry.dtype, 0))


def rewritten_bytes(header: Header, dropped: Collection[str]) -> int:
    """Size of the file that `rewrite_shard` writes."""
    kept = kept_entries(header, dropped)
    return len(make_header(kept, header.metadata)) + sum(entry.bytes for entry in kept)


def rewrite_shard(source: Path, target: Path, dropped: Collection[str]) -> None:
    """Write a new file with all tensors but the dropped ones, and bring it to the disk.

    Raises ModelError for a damaged source, ShardError for one that ends early, OSError where nothing can be written.
    """
    with naming(source), open(source, "rb", buffering=0) as file:
        try:
            header = header_of(file)
        except HeaderError as error:
            raise damaged(source, error) from None
        kept = kept_entries(header, dropped)
        with naming(target), open(target, "xb") as out:
            out.write(make_header(kept, header.metadata))
            for entry in kept:
                file.seek(entry.start)
                left = entry.bytes
                while left:
                    block = file.read(min(left, _BUFFER_BYTES))
                    if not block:
                        raise ShardError(
                            f"{source} ends {left} bytes early, in {entry.name}: was it changed? Repeat the command"
                        )
                    out.write(block)
                    left -= len(block)
            out.flush()
            os.fsync(out.fileno())
