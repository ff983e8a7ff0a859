"""F/S patterns: which DSA layers run their own indexer (F), and which reuse the selection before them (S).

A pattern has one letter per DSA layer, layer 0 first (IndexCache paper, section 3). The first letter is
always F: there is no earlier selection to reuse.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from icsearch.core.errors import PatternError
from icsearch.core.jsonfile import shown

FULL, SHARED = "F", "S"


@dataclass(frozen=True)
class Pattern:
    """An immutable, checked F/S string, such as ``FFSFSSSF``."""

    letters: str

    def __post_init__(self) -> None:
        if not self.letters:
            raise PatternError("empty pattern: expected one letter F or S for each DSA layer")
        for position, letter in enumerate(self.letters):
            if letter not in (FULL, SHARED):
                raise PatternError(
                    f"pattern has {letter!r} at position {position}: expected only the letters F and S (uppercase)"
                )
        if self.letters[0] != FULL:
            raise PatternError("pattern starts with S: the first DSA layer has no earlier selection to reuse; use F")

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> Pattern:
        """Letters in any case with surrounding space removed; checked against `num_layers` if given."""
        pattern = cls(text.strip().upper())
        if num_layers is not None and len(pattern) != num_layers:
            raise PatternError(
                f"pattern has {len(pattern)} letters, the model has {num_layers} DSA layers: give one letter per layer"
            )
        return pattern

    @classmethod
    def full(cls, num_layers: int) -> Pattern:
        """All layers F: the unmodified model."""
        return cls(FULL * num_layers)

    @classmethod
    def from_full_layers(cls, full_layers: set[int], num_layers: int) -> Pattern:
        """F at the given positions, S elsewhere."""
        return cls("".join(FULL if layer in full_layers else SHARED for layer in range(num_layers)))

    @classmethod
    def uniform(cls, num_layers: int, retention: Fraction) -> Pattern:
        """ceil(retention * N) layers F, evenly spaced from layer 0: 1/4 gives ``FSSSFSSS...``.

        This is the paper's uniform interleaving. The engines' freq/offset form is shifted (``FFSSSF...``).
        """
        kept = num_full(retention, num_layers)
        return cls.from_full_layers({i * num_layers // kept for i in range(kept)}, num_layers)

    def __len__(self) -> int:
        return len(self.letters)

    def __str__(self) -> str:
        return self.letters

    def is_full(self, layer: int) -> bool:
        return self.letters[layer] == FULL

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, letter in enumerate(self.letters) if letter == FULL)

    @property
    def shared_layers(self) -> tuple[int, ...]:
        return tuple(i for i, letter in enumerate(self.letters) if letter == SHARED)

    @property
    def retention(self) -> float:
        """Share of the layers that keep their indexer."""
        return len(self.full_layers) / len(self)

    def flip(self, layer: int) -> Pattern:
        """The pattern with one F layer turned into S."""
        if not 0 < layer < len(self) or not self.is_full(layer):
            raise PatternError(f"cannot share layer {layer} of {self.letters}: expected an F layer other than layer 0")
        return Pattern(self.letters[:layer] + SHARED + self.letters[layer + 1 :])

    def sources(self) -> tuple[int, ...]:
        """For each layer, the layer whose selection it uses: itself if F, else the nearest F before it."""
        nearest, sources = 0, []
        for layer, letter in enumerate(self.letters):
            nearest = layer if letter == FULL else nearest
            sources.append(nearest)
        return tuple(sources)


def parse_retention(text: str) -> Fraction:
    """A retention as typed, ``1/4`` or ``0.25``, as an exact fraction in (0, 1]."""
    try:
        if len(text) > 32 or re.search(r"e[+-]?\w{3}", text, re.IGNORECASE):
            raise ValueError("would be a number of many digits")
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise PatternError(
            f"retention {shown(text)} is not a number: give a fraction, as 1/4, or a decimal, as 0.25"
        ) from None
    if not 0 < value <= 1:
        raise PatternError(f"retention {text} is out of range: give a value above 0 and at most 1, such as 1/4")
    return value


def num_full(retention: Fraction, num_layers: int) -> int:
    """How many layers stay F: ceil(retention * N)."""
    return math.ceil(retention * num_layers)


REFERENCE_RETENTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))


def references(start: Pattern, num_shared: int) -> dict[str, str]:
    """Uniform patterns to compare with: at 1/2, 1/4, 1/8, and with as many F layers as the search will keep.

    Those that ask F of a native S layer cannot be run and are left out.
    """
    kept = Fraction(len(start.full_layers) - num_shared, len(start))
    found: dict[str, str] = {}
    for retention in (*REFERENCE_RETENTIONS, kept):
        pattern = Pattern.uniform(len(start), retention)
        possible = all(start.is_full(layer) for layer in pattern.full_layers)
        if possible and pattern.letters not in found.values():
            found[f"uniform:{retention}"] = pattern.letters
    return found
