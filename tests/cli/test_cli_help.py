"""Help at 80 columns: a line for each option, in panels, and the page that says more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from icsearch.cli import app
from icsearch.cli.options import add
from icsearch.commands.options import OUTPUT, PANELS, SEARCH, Option, Request

GROUP: Any = typer.main.get_command(app.app)
DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"│ (--[a-z-]+)(.*)│")


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    assert app._run([*command, "--help"], debug=True) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", ["", *GROUP.commands])
def test_options_have_a_line_each(capsys: pytest.CaptureFixture[str], name: str) -> None:
    lines = help_of(capsys, *([name] if name else []))
    assert max(map(len, lines)) <= 80
    command = GROUP.commands[name] if name else GROUP
    flags = {one.opts[0] for one in command.params if one.opts[0].startswith("-")} | {"--help"}
    assert {found[1] for line in lines if (found := ROW.match(line))} == flags
    rows = [line for line in lines if line.startswith("│")]
    continued = [line for line in rows if line.startswith("│    ")]
    # at most one option takes two lines, and none takes more but the names of all engines
    assert len(continued) <= (2 if "--engine" in flags else 1)


@pytest.mark.parametrize("name", GROUP.commands)
def test_a_command_says_how_it_is_called_and_where_more_is_said(capsys: pytest.CaptureFixture[str], name: str) -> None:
    lines = help_of(capsys, name)
    needed = [one for one in GROUP.commands[name].params if one.required]
    [usage] = [line for line in lines if "Usage: " in line]
    assert usage.strip().startswith(f"Usage: icsearch {name} ")
    assert all(one.metavar in usage for one in needed)
    titles = {line.strip("╭╮─ ") for line in lines if line.startswith("╭")}
    assert titles <= {*PANELS, "Other"}
    assert not re.search(r"<(str|int|bool|path|list)", "\n".join(lines))
    pages = re.findall(r"docs/([a-z-]+\.md)", "\n".join(lines))
    assert pages and all((DOCS / page).exists() for page in pages)


def test_all_commands_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys)
    for name in GROUP.commands:
        assert len([line for line in lines if line.startswith(f"│ {name} ")]) == 1


@dataclass(frozen=True)
class Asked(Request):
    thing: Annotated[str, Option("What it is", SEARCH, "THING")]
    size: Annotated[int, Option("How large", SEARCH, "N", least=1)] = 4
    words: Annotated[tuple[str, ...], Option("Words; repeatable", SEARCH, "WORD", "word", many=True)] = ()
    where: Annotated[Path | None, Option("Where", OUTPUT, "DIR", default="here")] = None
    loud: Annotated[bool, Option("Shout", OUTPUT)] = False
    parts: Annotated[tuple[str, ...], Option("Parts", OUTPUT, "A,B", read=lambda text: tuple(text.split(",")))] = ()


def test_a_field_is_all_that_an_option_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parser, help, environment and config file follow from it."""
    heard: list[Asked] = []

    def take(request: Asked) -> None:
        """Take something."""
        heard.append(request)

    made = typer.Typer(context_settings={"auto_envvar_prefix": "ICSEARCH"})
    add(made, "take", take, "Panel", ["engines"], ["thing"])
    made.callback()(lambda: None)
    config = tmp_path / "a.toml"
    config.write_text('[take]\nword = ["a", "b"]\nsize = 2\nloud = true\n')
    monkeypatch.setenv("ICSEARCH_TAKE_WHERE", "there")
    for words in (["x"], ["x", "--config", str(config)], ["x", "--size", "3", "--parts", "p,q", "--no-loud"]):
        made(["take", *words], standalone_mode=False)
    assert heard == [
        Asked("x", where=Path("there")),
        Asked("x", 2, ("a", "b"), Path("there"), True),
        Asked("x", 3, (), Path("there"), False, ("p", "q")),
    ]
    made(["take", "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "--size N" in shown and "How large [4]" in shown and "Where [here]" in shown
