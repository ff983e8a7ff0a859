"""The blocks of a Markdown page: commands to run, Python to execute, files to write. And which a page says not to run.

A fenced block is of commands where its language is console, bash, sh or none and a line of it calls icsearch. It is
one to run where it begins with such a call. In a console block commands stand behind `$ `, the rest is output. A
comment in the line before a block says more of it:
`<!-- not run: REASON -->`, or `<!-- file: NAME -->` for what the commands behind it read.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDER_PAGES = sorted(page for page in ROOT.glob("*/README.md") if not page.parent.name.startswith("."))
SHELLS = ("", "console", "bash", "sh")
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|file): *(?P<said>.*?) *-->\n+)?"
    r"^(?P<fence>`{3,})(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_TOP = "icsearch|tests|docs|benchmarks|calibration|checkpoint|patterns"  # the directories of the repository
_PATH = re.compile(rf"(?<![\w/.-])(?:{_TOP})/[\w./-]*\w/?")
_LINK = re.compile(r"\]\((?!https?://)([^()\s#]*)(?:#([^()\s]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_PLACEHOLDER = "…"


@dataclass(frozen=True)
class Block:
    """One fenced block. `reason` says why it is not run, None where it is; `file` names the file that it is."""

    language: str
    text: str
    line: int
    reason: str | None
    file: str | None

    @property
    def commands(self) -> list[Command]:
        """Its calls of icsearch, in order; none in a block of another kind."""
        if self.language not in SHELLS or self.file:
            return []
        return [command for line in self._lines() if (command := parse(line)) is not None]

    @property
    def begins_with_a_call(self) -> bool:
        """Whether its first command is a call of icsearch in this process."""
        first = next(iter(self.commands), None)
        return first is not None and not first.launcher and parse(self._code()[0]) == first

    @property
    def others(self) -> list[str]:
        """The lines of a block of commands that call something else, or start several processes."""
        return [line for line in self._code() if (command := parse(line)) is None or command.launcher]

    def _code(self) -> list[str]:
        return [line for line in self._lines() if line and not line.startswith("#")]

    def _lines(self) -> list[str]:
        lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", self.text).splitlines()]
        if self.language == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return lines


@dataclass(frozen=True)
class Command:
    """One call of icsearch: its arguments, the variables set in front of it, and the launcher that starts it."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    launcher: tuple[str, ...] = ()
    shortened: bool = False  # by …, so that some of it is missing


def parse(line: str) -> Command | None:
    """The call of icsearch in a line of a shell; None where it is none."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote of a sentence: no command
        return None
    shortened = _PLACEHOLDER in words
    words = [word for word in words if word != _PLACEHOLDER]
    environment = {}
    while words and _ASSIGNMENT.fullmatch(words[0]):
        name, _, environment[name] = words[0].partition("=")
        words = words[1:]
    if words[:1] == ["icsearch"]:
        return Command(tuple(words[1:]), environment, (), shortened)
    at = words.index("-m") if "-m" in words else len(words)
    if words[at + 1 : at + 2] == ["icsearch"]:
        return Command(tuple(words[at + 2 :]), environment, tuple(words[:at]), shortened)
    return None


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(
            found["language"],
            found["text"],
            page.count("\n", 0, found.start("text")) + 1,
            found["said"] if found["mark"] == "not run" else None,
            found["said"] if found["mark"] == "file" else None,
        )
        for found in _FENCE.finditer(page)
    ]


def paths(page: str) -> list[str]:
    """The files and directories of the repository that a page names, wherever in it: what begins with a top folder."""
    return [found[0] for found in _PATH.finditer(page)]


def links(page: str) -> list[tuple[str, str]]:
    """(target, anchor) of each link that stays within the repository; the target is empty within the page itself."""
    return [(found[1], found[2] or "") for found in _LINK.finditer(page)]


def anchors(page: str) -> set[str]:
    """What a link may name behind #, as GitHub makes it of headings: letters, digits, - and _; spaces become -."""
    headings = _HEADING.findall(re.sub(r"^(`{3,}).*?^\1$", "", page, flags=re.MULTILINE | re.DOTALL))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
