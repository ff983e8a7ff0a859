"""`icsearch calibrate`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import SOURCE_HELP, ConfigFile, ModelArgument, NumSequences, Remote, Seed, SeqLen


def calibrate_batches(
    model: ModelArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="Directory for calibration.safetensors and calibration.json.")],
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh/--no-fresh", help="Replace other batches that lie in --out.")] = False,
    trust_remote_code: Remote = False,
    config: ConfigFile = None,
) -> None:
    """Tokenise a text source with the model's tokenizer, pack it into sequences, and cache them."""
    from icsearch.commands.requests import CalibrationRequest
    from icsearch.commands.setup import calibrate as make

    request = CalibrationRequest(model, source, seq_len, num_sequences, seed, trust_remote_code)
    batches, hit = make(request, out, fresh)
    state = "already there, reused" if hit else "written"
    size = f"{batches.num_sequences} x {batches.seq_len} tokens"
    typer.echo(f"{out}: {size}, {state} (fingerprint {batches.fingerprint[:12]})")
