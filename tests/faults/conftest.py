"""Commands to disturb, and what they end with when nobody does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_harness import Case, Commands

TEXT = " ".join(
    f"The {word} of day {day} was {day * 7 % 31} steps from the mill." for day in range(30) for word in "ab"
)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path / "output")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, so that a run makes its calibration itself."""
    path = tmp_path_factory.mktemp("text") / "days.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def cases(glm_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """greedy, fisher, dp-baseline and eval on a tiny checkpoint and 12 sequences of 40 tokens, run to their ends."""
    calibration = ("--calibration", text, "--seq-len", 40, "--num-sequences", 12)
    common = (glm_checkpoint, *calibration, "--threads", 1)
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments: dict[str, tuple[object, ...]] = {
        "greedy": ("greedy", *common, "--batch-size", 4, "--num-shared", 3),
        "fisher": ("fisher", *common, "--batch-size", 4, "--num-shared", 3, "--draws", 1, "--finalists", 2),
        "dp-baseline": ("dp-baseline", *common, "--batch-size", 2, "--num-shared", 3),
        "eval": ("eval", *common, "--batch-size", 2, "--pattern", "uniform:1/2", "--pattern", "FFSFFS"),
    }
    made = {name: Case(words, folder / name) for name, words in arguments.items()}
    commands = Commands(folder / "output")
    for case in made.values():
        ended = commands.run(case.into(case.finished))
        assert ended.status == 0, ended.err
    return made
