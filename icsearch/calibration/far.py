"""Far tokens: those whose prediction gains from text further back than a selection of the nearest tokens would reach.

They are few, and a mean loss hides what becomes of them, while they are what a bad pattern loses first. A token is far
where its loss is lower by more than a gain in nats with the whole sequence before it than with its nearest tokens alone
(the gain of a long over a short context is LongPPL's, arXiv 2410.23771). Nearest are at least `near` tokens, as many as
a selection holds, and fewer than twice as many: so all short contexts of a sequence cost no more than twice its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icsearch.core.errors import CalibrationError

if TYPE_CHECKING:  # the help names what is here, and loads no numpy
    import numpy as np
    from numpy.typing import NDArray

    from icsearch.calibration.batches import Calibration

ALL, FAR = "all", "far"
DEFAULT_GAIN = 1.0  # nats


@dataclass(frozen=True)
class Counting:
    """Which tokens a calibration is to count. `key` tells masks apart, as that of a cache the tokens."""

    key: Mapping[str, Any]
    mask: Callable[[Calibration], NDArray[np.bool_]]


def short_pieces(seq_len: int, near: int) -> list[tuple[int, int]]:
    """Pieces of 2 `near` tokens, as (start, first judged position): each position from 2 `near` on is judged once.

    A piece judges up to its own end. Before 2 `near` the short context is all there is, and no token is far. Raises
    CalibrationError where the sequences are no longer than that.
    """
    if seq_len <= 2 * near:
        raise CalibrationError(
            f"--count far compares with the nearest {near} to {2 * near - 1} tokens, and sequences of {seq_len} tokens "
            f"have no more: use --seq-len {4 * near} or so"
        )
    return [(min(first - near, seq_len - 2 * near), first) for first in range(2 * near, seq_len, near)]


def short_sequences(input_ids: NDArray[np.int64], near: int) -> NDArray[np.int64]:
    """The pieces of all sequences [S, T] as sequences of their own, [S x pieces, 2 `near`]."""
    import numpy as np

    pieces = short_pieces(input_ids.shape[1], near)
    return np.concatenate([[row[start : start + 2 * near] for start, _ in pieces] for row in input_ids])


def far_gains(long: NDArray[Any], short: NDArray[Any], near: int) -> NDArray[np.float64]:
    """What each token gains by the far past, in nats: [S, T]; -inf where the nearest tokens are all there is.

    `long` [S, T - 1] are the losses of whole sequences, `short` [S x pieces, 2 `near` - 1] those of their pieces; the
    first token of either is never predicted.
    """
    import numpy as np

    sequences, seq_len = long.shape[0], long.shape[1] + 1
    pieces = short_pieces(seq_len, near)
    by_piece = short.reshape(sequences, len(pieces), 2 * near - 1)
    gains = np.full((sequences, seq_len), -np.inf)
    for number, (start, first) in enumerate(pieces):
        last = min(first + near, seq_len)
        alone = by_piece[:, number, first - start - 1 : last - start - 1]
        gains[:, first:last] = alone - long[:, first - 1 : last - 1]
    return gains
