"""A look at the header of a GGUF file before gguf's reader gets it: do all counts and lengths stay within the file?

That reader takes an array's length at its word, and goes through the elements one by one: a damaged one could keep it
busy for ever.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type


class _Cursor:
    """A place in the file. Whatever is behind its end raises ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 8
        (version,) = struct.unpack_from("<I", data, 4)
        self.order = "<" if version & 0xFFFF else ">"

    def number(self, kind: str) -> int:
        """The next unsigned integer: I for 4 bytes, Q for 8."""
        place = self.at
        self.skip(struct.calcsize(kind))
        return int(struct.unpack_from(self.order + kind, self.data, place)[0])

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"something of {size} bytes reaches behind the end of the file")

    def skip_values(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            return self.skip(_SIZES[kind] * count)
        for _ in range(count):
            if kind == _STRING:
                self.skip(self.number("Q"))
            elif kind == _ARRAY:
                inner = self.number("I")
                self.skip_values(inner, self.number("Q"))
            else:
                raise ValueError(f"a value of the unknown type {kind}")
        return None


def check_header(path: Path) -> None:
    """Walk through keys and tensor names; raises ValueError where a length cannot be, and OSError."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < 24 or data[:4] != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        cursor = _Cursor(data)
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        for _ in range(keys):
            cursor.skip(cursor.number("Q"))
            cursor.skip_values(cursor.number("I"), 1)
        for _ in range(tensors):
            cursor.skip(cursor.number("Q"))
            cursor.skip(8 * cursor.number("I"))
            cursor.skip(4 + 8)
