"""The published patterns: whole, nested where the paper's are, and found from the package."""

from __future__ import annotations

import pytest

from icsearch.core.files import published_patterns
from icsearch.core.pattern_file import PatternFile, load_pattern_file

# Layers kept, counted in the letters as published (the paper's 1/8 pattern keeps 7 of 47, one more than ceil).
KEPT = {
    "glm-4.7-flash-dsa-1-2": (24, 47),
    "glm-4.7-flash-dsa-1-4": (12, 47),
    "glm-4.7-flash-dsa-1-8": (7, 47),
    "glm-5-1-2": (40, 78),
    "glm-5-1-4": (22, 78),
    "glm-5.2-native": (21, 78),
}


def published(name: str) -> PatternFile:
    return load_pattern_file(published_patterns() / f"{name}.json")


def test_the_folder_holds_these() -> None:
    assert {path.stem for path in published_patterns().glob("*.json")} >= KEPT.keys()


@pytest.mark.parametrize("name", KEPT)
def test_published_patterns_have_the_published_sizes(name: str) -> None:
    found = published(name)
    assert (len(found.pattern.full_layers), len(found.pattern)) == KEPT[name]
    assert found.method == "published"
    assert "source" in found.model


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ("glm-4.7-flash-dsa-1-4", "glm-4.7-flash-dsa-1-2"),
        ("glm-4.7-flash-dsa-1-8", "glm-4.7-flash-dsa-1-4"),
        ("glm-5-1-4", "glm-5-1-2"),
    ],
)
def test_smaller_patterns_are_nested_in_larger_ones(smaller: str, larger: str) -> None:
    assert set(published(smaller).pattern.full_layers) <= set(published(larger).pattern.full_layers)


def test_glm5_shows_the_mark_of_four_stages() -> None:
    letters = published("glm-5-1-4").pattern.letters
    assert [letters[first:last].count("S") for first, last in ((0, 20), (20, 40), (40, 60), (60, 78))] == [14] * 4
