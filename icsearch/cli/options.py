"""The options that several commands share: type, name and help of each. No heavy imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.config import use_config


def _offer(choices: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """For the shell's completion: the choices that begin with what is typed. They are imported only then."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices() if choice.startswith(incomplete)]

    return complete


def _requested(name: str) -> Callable[[str], list[str]]:
    """Completes the choices that `requests` has under that name."""

    def choices() -> Iterable[str]:
        from icsearch.commands import requests

        return getattr(requests, name)

    return _offer(choices)


def _engines() -> Iterable[str]:
    from icsearch.engines.table import ENGINES

    return ENGINES


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Options as TOML, in tables \\[common] and \\[greedy], \\[eval], ... Flags stand above environment "
        "variables, such as ICSEARCH_GREEDY_SEED for --seed, and these above the file.",
        allow_from_autoenv=False,  # ICSEARCH_CONFIG is that of all commands
        is_eager=True,  # before the options that it has values for
        callback=use_config,
        show_default=False,
    ),
]

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id, or demo.")]
SeqLen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per sequence.", show_default="4 x index_topk, at least 256"),
]
NumSequences = Annotated[int | None, typer.Option(min=1, help="Calibration sequences.", show_default="24")]
Seed = Annotated[int, typer.Option(help="Seed of the choice and order of calibration texts.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run code that the checkpoint brings along.")
]
QuietFlag = Annotated[bool, typer.Option("--quiet/--no-quiet", help="No plan and no progress, only the result.")]
SOURCE_HELP = (
    "Ready batches (a directory with calibration.safetensors), or a text source: demo, demo:heldout, "
    "FILE.txt, FILE.jsonl, FILE.parquet, hf:NAME[:CONFIG][:SPLIT]."
)
Calibration = Annotated[str, typer.Option(metavar="DIR|SOURCE", help=SOURCE_HELP)]
Retention = Annotated[
    str | None,
    typer.Option(help="Share of layers to keep F, as 1/4 or 0.25: ceil(r x N) layers stay.", show_default="1/4"),
]
NumShared = Annotated[int | None, typer.Option(help="Flip exactly this many layers, instead of --retention.")]
KeepFull = Annotated[str, typer.Option(metavar="0,5,9", help="Layers that must stay F.", show_default=False)]
Device = Annotated[
    str, typer.Option(help="auto (cuda, then cpu), cpu, cuda, cuda:0.", autocompletion=_requested("DEVICES"))
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.", autocompletion=_requested("DTYPES")),
]
Fresh = Annotated[bool, typer.Option("--fresh/--no-fresh", help="Discard what the directory holds and start over.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences per layer call; the bits follow it.", show_default="1024 tokens' worth"),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory budget, such as 8GB. It decides how many patterns live at once, never the bits.",
        show_default="80% of what is free",
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="auto, blockwise (our DSA arithmetic: memory linear in length, one rule for ties), or reference "
        "(transformers' own modules).",
        autocompletion=_requested("KERNELS"),
    ),
]
BlockElements = Annotated[
    int | None,
    typer.Option(
        help="Numbers in one buffer of the block-wise kernels; the bits follow it.", show_default="2^19, on CUDA 2^26"
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="Where the weights of layers rest: auto (on the device if they fit, else the nearest place that they fit "
        "into), none (on the device), cpu, disk (read from the shards, layer by layer). The bits do not follow "
        "from it.",
        autocompletion=_requested("OFFLOADS"),
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; the bits follow them.", show_default="torch's")]

STRATEGY_HELP = (
    "exact: every remaining layer is scored in every step; Algorithm 1's choices on these sequences, of equal losses "
    "the smaller layer. "
    "race: so are all, batch by batch, until they are confidently worse than the leader; each step commits exact's "
    "choice with --confidence, by one-sided paired t tests on sequences, corrected (Bonferroni) for looks x "
    "(candidates - 1). Sequences are taken in the order in which they lie, which must be random: text sources are "
    "shuffled by --seed, ready batches are not. "
    "lazy: older scores rule layers out, with a learned slack and regular full rescans; exact's choices as long as a "
    "flip does not become cheaper than that, and what did is counted. "
    "race+lazy: lazy chooses whom a race is run among. The committed losses are exact in all of them. "
    "Where weights are streamed from disk or CPU memory, exact reads them least: each portion of lazy reads them "
    "again, and a race can drop candidates only between waves, nobody where one wave holds all sequences."
)
Strategy = Annotated[str, typer.Option(help=STRATEGY_HELP, autocompletion=_requested("STRATEGIES"))]
Objective = Annotated[
    str,
    typer.Option(
        help="What a flip is judged by: lm-loss, or kl, the KL to the all-F model.",
        autocompletion=_requested("OBJECTIVES"),
    ),
]
Refine = Annotated[
    str | None,
    typer.Option(
        metavar="swaps",
        help="Improve the found pattern: move single indexers to other layers while that lowers the objective "
        "(loss or KL) by more than 2 paired standard errors, and on held-out sequences by more than 1. By the "
        "objective, the result is never worse than its start on either set of sequences.",
        show_default=False,
        autocompletion=_requested("REFINEMENTS"),
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        help="transformers, vllm, sglang, trtllm, lmdeploy, atom, vllm-ascend, llamacpp or megatron.",
        autocompletion=_offer(_engines),
    ),
]

DataRanks = Annotated[
    int | None,
    typer.Option(
        "--dp",
        min=1,
        metavar="D",
        help="Of several processes (torchrun -m icsearch ...), so many share the sequences.",
        show_default="all, if the weights fit in each one's share of memory",
    ),
]
PipelineRanks = Annotated[
    int | None,
    typer.Option(
        "--pp",
        min=1,
        metavar="P",
        help="Of several processes, so many share the layers, a contiguous block each. --dp x --pp is their number.",
        show_default="1, or as many as the weights need",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        min=5, metavar="SECONDS", help="Several processes: end the run when one gives no sign of life for so long."
    ),
]
