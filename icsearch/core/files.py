"""Files that are whole or not there, also after a kill or on a full disk; paths as typed, and those of the package."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

from icsearch.core.errors import IcsearchError

_PIECE = 2**20
MAX_READ_BYTES = 2**28  # some ten times the index of the largest checkpoint
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    """True where there was no room for what was written: on the disk, in a quota, or under a limit of file sizes."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


@contextlib.contextmanager
def refusing(tell: Callable[[str], Exception]) -> Iterator[None]:
    """Where a file system refuses what is done inside, raise what `tell` makes of its reason.

    The OSError of a full disk stays what it is.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise tell(error.strerror or str(error)) from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names the file: one of a write or fsync does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, fsync, rename: a reader sees the old file or the new one, never half of it.

    Text is written as UTF-8, and what has no UTF-8 (a path with byte 0xff) as an escape. Raises OSError where the
    disk is full or the directory is missing or read-only.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; raises OSError and UnicodeDecodeError.

    What is larger than any file that should be read whole is refused (EFBIG): some devices never end.
    """
    data = bytearray()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):  # read(n) takes room for n bytes at once, however few there are
            data += piece
            if len(data) > MAX_READ_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data.decode("utf-8-sig")  # some editors put a byte order mark in front


def make_directory(directory: Path) -> None:
    """Make a directory and its parents where they are missing, each so that it survives a power cut."""
    if directory.is_dir():
        return
    if directory.parent != directory:
        make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename or removal in `directory` survive a power cut.

    A no-op where it may not be read, on Windows, and on file systems that know no such thing (CIFS, FUSE, DrvFs).
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove_stale_temporaries(directory: Path) -> list[Path]:
    """Remove what `write_atomically` left in `directory` when its process was killed; returns what is gone.

    Files of processes that still live here stay. A directory that is missing or cannot be read has none.
    """
    if os.name != "posix":
        return []
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(directory.iterdir()):
            process = re.fullmatch(r"\..+\.([1-9]\d{0,9})\.tmp", path.name)
            if process and path.is_file() and not lives(int(process[1])):
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def lives(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def typed_path(text: str, error: type[IcsearchError]) -> Path:
    """A path as typed, `~` expanded; it need not exist. Raises `error` for one that can name no file."""
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as problem:  # too long or locked, a NUL byte, ~ of an unknown user
        reason = getattr(problem, "strerror", None) or problem
        short = text if len(text) <= 60 else f"{text[:56]}..."
        raise error(f"cannot use the path {short!r} ({reason}): give another one") from None
    return path


def may_be_hub_id(text: str) -> bool:
    """Whether what was typed for a checkpoint can be OWNER/NAME on the hub: ./x and ../x are paths."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def check_new(path: Path, error: type[IcsearchError]) -> None:
    """Raise `error` where a file cannot be written anew: it exists, or its directory is missing or locked."""
    path = typed_path(str(path), error)
    if path.exists():
        raise error(f"{path} exists: give another --out, or remove it first")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "may not be written to" if path.parent.is_dir() else "is no directory"
        raise error(f"cannot write {path}: {path.parent} {reason}; give another --out, or make it first")


_PACKAGE = Path(__file__).parent.parent


def demo_checkpoint() -> Path:
    """The small trained checkpoint."""
    return _PACKAGE / "demo"


def published_patterns() -> Path:
    """The folder of pattern files: inside the package in a wheel, at the top level in a checkout."""
    installed = _PACKAGE / "patterns"
    return installed if installed.is_dir() else _PACKAGE.parent / "patterns"
