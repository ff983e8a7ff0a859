"""What a run read of weights that were streamed, in words."""

from __future__ import annotations

from icsearch.core.text import format_bytes
from icsearch.runs.record import RunRecord
from icsearch.runs.results import weights_read


def weights_sentence(record: RunRecord) -> str:
    """Such as `8.0 MB a step, 1.00 times the checkpoint; 96.0 MB in all`; empty where weights stayed on the device."""
    read = weights_read(record)
    if not read:
        return ""
    in_all = f"{format_bytes(read['weight_bytes'])} in all"
    a_step, checkpoint = read["weight_bytes_per_step"], read["checkpoint_bytes"]
    if a_step is None:
        return in_all
    multiple = f", {a_step / checkpoint:.2f} times the checkpoint" if checkpoint else ""
    return f"{format_bytes(a_step)} a step{multiple}; {in_all}"
