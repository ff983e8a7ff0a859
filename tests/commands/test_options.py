"""Options as fields of requests: one declaration, read by the parser, by Python, and by the checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Annotated, Any

import pytest

from icsearch.commands import requests
from icsearch.commands.options import EXCLUSIVE, PANELS, SEARCH, Option, Request, declared, request_of
from icsearch.commands.requests import ExportRequest, read_retention
from icsearch.core.errors import IcsearchError
from icsearch.engines import table

KINDS = [kind for kind in vars(requests).values() if isinstance(kind, type) and issubclass(kind, Request)]


@dataclass(frozen=True)
class Inner(Request):
    depth: Annotated[int, Option("How deep", SEARCH, "D", least=1, most=9)]


@dataclass(frozen=True)
class Outer(Request):
    inner: Inner
    shares: Annotated[tuple[Fraction, ...], Option("Shares", SEARCH, name="share", many=True, read=read_retention)] = ()
    kind: Annotated[str, Option("What kind", SEARCH, choices=("soft", "hard"))] = "soft"
    spans: Annotated[tuple[int, ...], Option("Spans", SEARCH, least=2, many=True)] = ()


def test_a_request_is_made_of_what_was_given() -> None:
    made = request_of(Outer, {"depth": 3, "shares": ["1/2", 0.25], "kind": None, "spans": [2, 5]})
    assert made == Outer(Inner(3), (Fraction(1, 2), Fraction(1, 4)), "soft", (2, 5))


def test_names_and_flags() -> None:
    named = {option.field: (option.name, option.flag) for option in declared(Outer)}
    assert named == {
        "depth": ("depth", "--depth"),
        "shares": ("share", "--share"),
        "kind": ("kind", "--kind"),
        "spans": ("spans", "--spans"),
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"depth": 0}, "--depth 0 is out of range: give at least 1"),
        ({"depth": 10}, "--depth 10 is out of range: give at most 9"),
        ({"depth": 1, "spans": [3, 1]}, "--spans 1 is out of range: give at least 2"),
        ({"depth": 1, "kind": "sofd"}, "--kind 'sofd' is unknown: did you mean soft? give soft or hard"),
        ({"depth": 1, "shares": ["2"]}, "retention 2 is out of range"),
    ],
)
def test_what_can_be_said_of_one_option_is_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(IcsearchError) as caught:
        request_of(Outer, given)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_an_option(kind: type[Request]) -> None:
    """Of the request, or of one that it holds; with help of its own, in a panel that there is."""
    own = {option.field for option in declared(kind) if option.owner is kind}
    held = {field.name for field in fields(kind)} - own
    assert held <= {"calibration"}
    assert all(option.option.help and option.option.panel in PANELS for option in declared(kind))


def test_of_options_that_exclude_one_another_one_may_be_given() -> None:
    """Of each rule, any option of one way with any of another; whatever belongs to one way may come together."""
    values = {"retention": Fraction(1, 2), "num_shared": 2, "layers": 4}
    some: dict[str, Any] = {name: values.get(name, "x") for rule in EXCLUSIVE for way in rule.ways for name in way}
    by_leader = {
        "retention": requests.PlanRequest,
        "model_config": requests.ImportRequest,
        "engine": requests.ExportRequest,
    }
    needed = {"retention": {"model": "demo"}, "model_config": {"source": ("x",)}, "engine": {}}
    for rule in EXCLUSIVE:
        first, second = rule.ways
        kind, base = by_leader[first[0]], needed[first[0]]
        for one in first:
            for other in second:
                with pytest.raises(IcsearchError) as caught:
                    kind(**{**base, one: some[one], other: some[other]})
                flags = " and ".join(f"--{name.replace('_', '-')}" for name in (one, other))
                assert str(caught.value) == f"{flags} both say {rule.say}: give one of them"
        for way in rule.ways:
            kind(**{**base, **{name: some[name] for name in way}})


def test_help_names_all_engines() -> None:
    (engine,) = [option.option for option in declared(ExportRequest) if option.field == "engine"]
    assert engine.help.split(", ") == list(engine.offers) == list(table.ENGINES)
