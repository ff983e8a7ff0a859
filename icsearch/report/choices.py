"""What a report says of how flips were chosen: a strategy's guarantee, and what it left out. Exact leaves none out."""

from __future__ import annotations

from icsearch.report import numbers
from icsearch.runs.record import Commit, RunRecord


def guarantee(record: RunRecord) -> str:
    """What the run's strategy does, and what can be relied on; empty where there was no search flip by flip."""
    options = record.start["options"]
    parts = str(options.get("strategy")).split("+")
    if parts == ["exact"]:
        return "Exact: these are the choices of Algorithm 1 on these sequences; of equal ones, the smaller layer."
    found, margin = [], options.get("tie_margin")
    if "lazy" in parts:
        found.append(
            "Lazy: a layer whose cost when it was last scored, less a slack learned from how far such costs have "
            "fallen, was above the best new one was not scored again; the layers around the last flip always were, "
            "and everyone every few steps. The choices are those of an exact search as long as no flip became cheaper "
            "than that."
        )
        if margin is not None:
            found.append(
                f"Near-ties were settled: the best new cost was taken once no such bound was below it by more than "
                f"{margin:g} nats per token."
            )
    if "race" in parts:
        found.append(_race(options.get("confidence"), margin))
    if "lazy" in parts and "race" in parts:
        found.append(
            "Where a race had dropped a layer, its older cost is an estimate from a part of the sequences, taken one "
            "standard error lower: what that rules out is not certain at any stated confidence."
        )
    if found:
        found.append("The losses of committed flips are those of all sequences.")
    return " ".join(found)


def leaves_out(record: RunRecord) -> bool:
    """Whether the strategy can leave candidates out of a step, or give them up in it."""
    return bool({"lazy", "race"} & set(str(record.start["options"].get("strategy")).split("+")))


def _race(confidence: float | None, margin: float | None) -> str:
    sure = f" {100 * confidence:g}%" if confidence is not None else ""
    text = (
        f"Race: candidates were scored batch by batch, and dropped once they were worse than the leader with a "
        f"confidence of{sure} for the step as a whole: one-sided paired t tests on sequences, at least 5, each at a "
        f"level corrected (Bonferroni) for looks x (candidates - 1). The sequences were taken in the order in which "
        "they lie, and that must be random: those of a text source are shuffled by --seed (large files "
        "through a buffer), ready batches are taken as they are."
    )
    if margin is None:
        return text
    return (
        f"{text} Near-ties were settled: a leader that nobody was better than by more than {margin:g} nats per token, "
        "at the same confidence, was taken."
    )


def what_was_left_out(record: RunRecord) -> str:
    """How much the strategy saved, and how often it erred as far as it can tell; empty for an exact search."""
    if not leaves_out(record) or not record.commits:
        return ""
    scored = sum(len(commit.candidates) for commit in record.commits)
    counts = {
        "not scored": sum(len(commit.stale) - len(commit.spared) for commit in record.commits),
        "not scored by the tie margin": sum(len(commit.spared) for commit in record.commits),
        "dropped": sum(len(commit.dropped) for commit in record.commits),
        "given up within the tie margin": sum(len(commit.within_margin) for commit in record.commits),
    }
    of = scored + sum(len(commit.stale) for commit in record.commits)
    listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    text = f"Of {of} candidates in {numbers.plural(len(record.commits), 'step')}: {listed or 'none left out'}."
    if "lazy" in str(record.start["options"]["strategy"]):
        violations = sum(len(commit.violations) for commit in record.commits)
        missed = sum(commit.missed for commit in record.commits)
        text += (
            f" {numbers.plural(violations, 'layer')} turned out cheaper than the slack allowed for; "
            f"{missed} of the full rescans chose a layer that would not have been scored without."
        )
    return text


def arithmetic_note(record: RunRecord) -> tuple[str, ...]:
    """How runs with our arithmetic break ties among tokens; nothing for others."""
    if record.start["options"].get("kernels") != "blockwise":
        return ()
    return (
        "Block-wise kernels: of equal index scores the earliest token is chosen. The top-k of transformers chooses "
        "among them by shape, so losses by --kernels reference differ a little (on the demo checkpoint at 2048 tokens, "
        "0.24% of the queries have such a tie; it moved the loss by 0.002; benchmarks/kernels.py).",
    )


def step_note(commit: Commit) -> str:
    """One step's choice in a few words, such as ``7 of 23 scored, 4 dropped``; empty where all were scored fully."""
    candidates = len(commit.candidates) + len(commit.stale)
    parts = [f"{len(commit.candidates)} of {candidates} scored"] if commit.stale else []
    parts += [f"{len(commit.spared)} left by the tie margin"] if commit.spared else []
    parts += [f"{len(commit.dropped)} dropped"] if commit.dropped else []
    if commit.settled is not None:
        parts.append(f"settled after {numbers.plural(commit.settled, 'sequence')}, {len(commit.within_margin)} tied")
    if commit.violations:
        parts.append(f"layer {', '.join(map(str, commit.violations))} cheaper than allowed for")
    if commit.missed:
        parts.append("found by the rescan")
    return ", ".join(parts)
