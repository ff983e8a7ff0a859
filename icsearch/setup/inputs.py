"""What a run reads: a checked checkpoint, its layout, and the batches to score on. No weights are read here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from icsearch import calibration
from icsearch.requests import CalibrationRequest, RunRequest
from icsearch.texts.sources import ReadyTokens, parse_source
from icsearch.weights import checkpoint, loading
from icsearch.weights.checkpoint import Checkpoint
from icsearch.weights.layout import Layout, inspect

DEFAULT_NUM_SEQUENCES = 24


@dataclass(frozen=True)
class Inputs:
    """A checked checkpoint, its layout, and the batches to score on."""

    source: Checkpoint
    layout: Layout
    batches: calibration.Calibration
    heldout: calibration.Calibration | None = None


def open_model(request: CalibrationRequest) -> tuple[Checkpoint, Layout]:
    """The checkpoint's files and layout."""
    source = checkpoint.open_checkpoint(request.model, trust_remote_code=request.trust_remote_code)
    return source, inspect(source, request.trust_remote_code)


def calibrate(request: CalibrationRequest, out: Path, fresh: bool) -> tuple[calibration.Calibration, bool]:
    """Batches of a source for a model, cached in `out`, and whether they were there already."""
    source, layout = open_model(request)
    return obtain(request, source, layout, out, fresh, copy_ready=True)


def obtain_heldout(
    request: RunRequest, source: Checkpoint, layout: Layout, batches: calibration.Calibration
) -> calibration.Calibration | None:
    """The held-out sequences of a refinement: as many and as long as the calibration's, where they are made."""
    if request.heldout_source is None:
        return None
    wanted = replace(request.calibration, source=request.heldout_source, seq_len=None, num_sequences=None)
    heldout, _ = obtain(wanted, source, layout, request.out / "refine-on", request.fresh, like=batches)
    calibration.check_heldout(heldout, batches, "--refine-on")
    return heldout


def obtain(
    request: CalibrationRequest,
    source: Checkpoint,
    layout: Layout,
    cache: Path,
    fresh: bool,
    copy_ready: bool = False,
    like: calibration.Calibration | None = None,
) -> tuple[calibration.Calibration, bool]:
    """Batches of a source, and whether they were in `cache` already; `like` others in size where none is asked for."""
    return calibration.obtain(
        request.source,
        lambda: loading.load_tokenizer(source, request.trust_remote_code),
        cache,
        seq_len=request.seq_len,
        num_sequences=request.num_sequences,
        default_seq_len=like.seq_len if like else default_seq_len(layout),
        default_num_sequences=like.num_sequences if like else DEFAULT_NUM_SEQUENCES,
        seed=request.seed,
        limits=limits(layout),
        rebuild=fresh,
        copy_ready=copy_ready,
    )


def is_ready(source: str) -> bool:
    """Whether SOURCE names tokens that are used as they are."""
    return isinstance(parse_source(source), ReadyTokens)


def limits(layout: Layout) -> calibration.Limits:
    """What the model can take, and what is too short for its queries to choose."""
    selection = layout.selection
    return calibration.Limits(layout.vocab_size, selection.kept, layout.max_positions, selection.holds)


def default_seq_len(layout: Layout) -> int:
    """Four times as long as a selection, so that most queries have to choose; at least 256 tokens."""
    return min(max(256, 4 * layout.selection.kept), layout.max_positions)
