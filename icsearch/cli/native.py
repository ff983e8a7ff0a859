"""`icsearch export --checkpoint`: its options, and what it prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from icsearch.engines.native import NativeCheckpoint, NativeRequest

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="OUT",
        help="Write a copy of the checkpoint whose config.json holds the pattern. Unchanged shards are hard links "
        "where they can be.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="--checkpoint: what to copy, as MODEL elsewhere.", show_default="the one in the pattern file"
    ),
]
DropIndexers = Annotated[
    bool,
    typer.Option("--drop-indexers/--no-drop-indexers", help="--checkpoint: leave out the S layers' indexer weights."),
]
OtherWeights = Annotated[
    bool,
    typer.Option(
        "--other-weights/--no-other-weights",
        help="--checkpoint: the weights need not be those that the pattern was searched on.",
    ),
]


def write_checkpoint(request: NativeRequest) -> None:
    """Write the copy and say what was done; warnings go to stderr."""
    from icsearch.engines.native import export_checkpoint

    result = export_checkpoint(request, lambda line: typer.echo(f"copying: {line}", err=True))
    for note in result.notes:
        typer.echo(f"warning: {note}", err=True)
    for line in summary(result):
        typer.echo(line)


def summary(result: NativeCheckpoint) -> list[str]:
    """What was written, in a few lines."""
    from icsearch.core.text import format_bytes

    config = result.config
    place = "text_config of config.json" if config.nested else "config.json"
    lines = [
        f"{result.out}: {result.source} with {result.pattern}",
        f"  {place}: {', '.join(config.written)} written{_removed(config.removed)}",
        f"  {result.copied}",
    ]
    if result.dropped:
        lines.append(f"  {len(result.dropped)} indexer tensors left out: {format_bytes(result.bytes_saved)} saved")
    if result.left_out:
        kinds = Counter(Path(name).suffix for name in result.left_out)
        lines.append(f"  files left out: {', '.join(f'{count} x *{kind}' for kind, count in sorted(kinds.items()))}")
    return lines


def _removed(keys: tuple[str, ...]) -> str:
    return f"; {', '.join(keys)} removed" if keys else ""
