"""Every command of README.md and docs/ is parsed by the command's own parser, and run, page by page, where it can."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from doc_pages import FOLDER_PAGES, PAGES, ROOT, Block, Command, anchors, blocks, links, parse, paths
from icsearch.cli import app

# Pages whose commands take no more than some 5 seconds; the others are run by make test-all.
QUICK = {"engines.md", "formats.md"}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ALL_NAMES = [*NAMES, *(str(page.relative_to(ROOT)) for page in FOLDER_PAGES)]


def blocks_of(name: str) -> list[Block]:
    return blocks((ROOT / name).read_text(encoding="utf-8"))


def runnable(name: str) -> list[Block]:
    """The blocks of a page that are run: commands, Python, and the files for them."""
    kinds = [block for block in blocks_of(name) if block.language == "python" or block.file or block.begins_with_a_call]
    return [block for block in kinds if block.reason is None]


def marked(name: str) -> list[object]:
    return [name] if Path(name).name in QUICK else [pytest.param(name, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one(name: str) -> None:
    """Options, their values and arguments, of the blocks that are not run too."""
    for block in blocks_of(name):
        for command in block.commands:
            check(command)


def check(command: Command) -> None:
    """Parse a call as the command does, and go no further. Of one that is shortened, its options are looked at."""
    group: Any = typer.main.get_command(app.app)
    name, *words = command.arguments
    options = {option for parameter in (group, group.commands.get(name)) if parameter for option in known(parameter)}
    named = {word.partition("=")[0] for word in command.arguments if word.startswith("--")}
    assert named <= options, f"{name} has no {', '.join(named - options)}"
    assert name in group.commands or name.startswith("--"), f"Unknown command {name}"
    configured = "--config" in named or "ICSEARCH_CONFIG" in command.environment  # the file is there in a page's run
    if name in group.commands and not (command.shortened or configured or "--help" in named):
        with group.commands[name].make_context(name, words):
            pass


def known(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_path_is_there(name: str) -> None:
    named = paths((ROOT / name).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target, anchor in links(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_run_says_why(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    reasons = [block.reason for block in blocks_of(name) if block.reason is not None]
    assert all(reason and len(reason.split()) >= 2 for reason in reasons), reasons
    assert len(re.findall(r"<!-- not run", text)) == len(reasons), "a mark that stands before no block"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_run_call_nothing_else(name: str) -> None:
    for block in runnable(name):
        assert block.language == "python" or block.file or block.others == [], f"line {block.line}: mark the block"


@pytest.mark.parametrize("name", [one for name in NAMES for one in (marked(name) if runnable(name) else [])])
def test_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks in order, in a directory of their own; Python blocks share their names."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in runnable(name):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"{name}:{block.line}", "exec"), names)
        for command in block.commands:
            with monkeypatch.context() as variables:
                for variable, value in command.environment.items():
                    variables.setenv(variable, value)
                status = app._run(list(command.arguments), debug=False)
            assert status == 0, f"{name}, line {block.line}: {' '.join(command.arguments)}\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_the_python_page_is_typed(tmp_path: Path) -> None:
    """A user's mypy --strict, which finds py.typed and the types behind the lazy names."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(block.text for block in blocks_of("docs/python-api.md") if block.language == "python"))
    wrong = tmp_path / "wrong.py"
    wrong.write_text('import icsearch\n\nicsearch.find_pattern("demo", "demo", "run", num_shared="4", retenton=1)\n')
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\nfollow_untyped_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini"]
    result = subprocess.run([*command, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    result = subprocess.run([*command, "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "num_shared" in result.stdout and "retenton" in result.stdout


# --- the reader of pages itself -----------------------------------------------------------------------------------


def test_the_paths_and_links_of_a_page() -> None:
    page = (
        "# What it *does*: a `try`\n`pytest tests/test_gone.py::one`, see icsearch/sweep.py. [more](docs/a.md#b-c), "
        "[web](https://x.org/docs/no.md), [here](#up) x/tests/no.py docs/ ![p](docs/c.png)\n```\n# a comment\n```\n"
    )
    assert paths(page) == ["tests/test_gone.py", "icsearch/sweep.py", "docs/a.md", "docs/c.png"]
    assert links(page) == [("docs/a.md", "b-c"), ("", "up"), ("docs/c.png", "")]
    assert anchors(page) == {"what-it-does-a-try"}


PAGE = """
```
icsearch plan demo   # a comment
FILES=1 icsearch export x \\
  --engine vllm
```

<!-- not run: needs a GPU -->
```bash
torchrun --nproc-per-node 2 -m icsearch greedy …
```

<!-- file: a.toml -->

```toml
[greedy]
```

```console
$ icsearch report x --out y
wrote y
```

```
step 1: it's output
```
"""


def test_the_blocks_of_a_page() -> None:
    plain, launched, file, console, output = blocks(PAGE)
    assert [command.arguments for command in plain.commands] == [("plan", "demo"), ("export", "x", "--engine", "vllm")]
    assert plain.commands[1].environment == {"FILES": "1"}
    assert (plain.reason, plain.others, plain.line) == (None, [], 3)
    assert launched.reason == "needs a GPU"
    assert launched.commands[0] == Command(("greedy",), {}, ("torchrun", "--nproc-per-node", "2"), shortened=True)
    assert [block.begins_with_a_call for block in (plain, launched, output)] == [True, False, False]
    assert (file.file, file.text, file.commands) == ("a.toml", "[greedy]\n", [])
    assert [command.arguments for command in console.commands] == [("report", "x", "--out", "y")]
    assert console.others == []
    assert output.commands == []


@pytest.mark.parametrize("line", ["icsearch gredy demo", "icsearch greedy demo --retenton 1 …", "icsearch greedy demo"])
def test_what_is_wrong_with_a_call_is_seen(line: str) -> None:
    command = parse(line)
    assert command is not None
    with pytest.raises(Exception, match=r"no --retenton|Missing|Unknown"):
        check(command)


def test_what_is_no_call_is_none() -> None:
    assert [parse(line) for line in ("pip install .", "", "# icsearch plan", "python -m pytest", "it's")] == [None] * 5
