"""The command in a shell: `python -m icsearch`, `--version`, and completion of commands, options and their values."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from icsearch import __version__
from icsearch.engines.table import ENGINES
from icsearch.search.registry import STRATEGIES


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "icsearch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def completed(line: str) -> list[str]:
    """What bash is offered behind a line that ends where the cursor stands."""
    words = line.split(" ")
    result = module(_ICSEARCH_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_as_a_module_it_is_the_same_command() -> None:
    assert module("--version").stdout == f"icsearch {__version__}\n"
    usage = module("greedy", "--help").stdout
    assert "icsearch greedy MODEL --calibration SOURCE [OPTIONS]" in usage
    assert "[common]" in usage
    assert usage.count("ICSEARCH_") == 1  # the rule, and not a line for each option


def test_a_variable_turns_debugging_on() -> None:
    """As --debug, which may stand anywhere."""
    wrong = ("export", "none.json", "--engine", "vllm")
    assert "Traceback" not in module(*wrong).stderr
    assert "Traceback" in module(*wrong, ICSEARCH_DEBUG="1").stderr


def test_completion_of_commands_options_and_values() -> None:
    assert {"greedy", "eval", "export", "dp-baseline"} <= set(completed("icsearch "))
    assert completed("icsearch greedy demo --retent") == ["--retention"]
    assert set(completed("icsearch greedy demo --strategy ")) == set(STRATEGIES)
    assert set(completed("icsearch greedy demo --strategy ex")) == {"exact"}
    assert set(completed("icsearch export x.json --engine ")) == set(ENGINES)
    assert completed("icsearch eval demo --kernels b") == ["blockwise"]
    assert completed("icsearch export x.json --repair s") == ["same"]
    assert completed("icsearch greedy demo --device c") == ["cpu", "cuda"]


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish"))])
def test_the_script_to_install(shell: str, tmp_path: Path) -> None:
    """It asks the installed command, and lies where the shell looks for it."""
    test = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    script = module("--show-completion", shell, **test).stdout
    assert "_ICSEARCH_COMPLETE=" in script
    result = module("--install-completion", shell, **test)
    assert result.returncode == 0, result.stderr
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_ICSEARCH_COMPLETE=" in text for text in written)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_takes_the_script(tmp_path: Path) -> None:
    script = module("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    path = tmp_path / "completion.sh"
    path.write_text(script)
    result = subprocess.run(["bash", "-c", f"source {path} && complete -p icsearch"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("icsearch")
