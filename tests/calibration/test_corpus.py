"""The built-in corpus: reproducible, split cleanly, and its answers really follow from the text."""

import itertools
import random
import re
import subprocess
import sys

import pytest

from icsearch.calibration import corpus

SPLITS = ("train", "calibration", "heldout")


def take(split, count, seed=0):
    return list(itertools.islice(corpus.annotated_documents(split, seed), count))


def facts_of(text):
    """Every `X verb Y.` statement of the told part: what X points to."""
    told = text.split(" So it goes.")[0]
    verbs = "|".join(corpus._KEEPING + corpus._FOLLOWING)
    return {m[1]: m[2] for m in re.finditer(rf" (\w+) (?:{verbs}) (\w+)(?=\.)", told)}


def test_a_stream_is_reproducible_and_depends_on_the_seed():
    first, again, other = (list(itertools.islice(corpus.documents("heldout", seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


def test_a_stream_does_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "from icsearch.calibration.corpus import documents; s = documents('train'); print([next(s) for _ in range(5)])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert len(outputs) == 1


def test_splits_share_no_document_whatever_the_seed():
    texts = {split: {d.text for seed in (0, 1, 2) for d in take(split, 300, seed)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
    buckets = {split: {corpus._bucket(text) for text in texts[split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not buckets[one] & buckets[other]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="calibration"):
        next(corpus.documents("test"))


def test_every_kind_appears_in_every_split():
    for split in SPLITS:
        assert {d.kind for d in take(split, 300)} == set(corpus.KINDS)


def test_names_and_wares_are_distinct_words():
    words = [*corpus.NAMES, *corpus.WARES]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("kind", ["recall", "needles", "forward_chains", "settled_chains"])
def test_answers_are_found_by_following_the_text(kind):
    rng = random.Random(kind)
    for _ in range(100):
        document = corpus.make_document(kind, rng)
        pointers = facts_of(document.text)
        assert document.answers
        for answer in document.answers:
            name = re.search(r"(\w+) reaches the$", document.text[: answer.start])[1]
            trail = [pointers[name]]
            while trail[-1] in pointers:
                trail.append(pointers[trail[-1]])
            assert tuple(trail) == answer.trail
            assert document.text[answer.start : answer.end] == f" {trail[-1]}"


def test_forward_chains_name_a_target_before_it_is_explained_and_settled_ones_after():
    rng = random.Random(5)
    for kind, sign in (("forward_chains", 1), ("settled_chains", -1)):
        text = corpus.make_document(kind, rng).text
        pointers = facts_of(text)
        place = {name: text.index(f" {name} ") for name in pointers}
        inner = [(name, target) for name, target in pointers.items() if target in pointers]
        told = {name: re.search(rf"\. {name} ", text).start() for name in place}
        assert inner and all(sign * (told[target] - told[name]) > 0 for name, target in inner)


def test_chains_of_all_lengths_are_asked_for():
    rng = random.Random(6)
    trails = [a.trail for _ in range(50) for a in corpus.make_document("forward_chains", rng).answers]
    assert {len(trail) for trail in trails} == {1, 2, 3}


def test_a_repeat_is_the_passage_word_for_word():
    rng = random.Random(7)
    for _ in range(50):
        document = corpus.make_document("repeat", rng)
        (answer,) = document.answers
        copied = document.text[answer.start : answer.end]
        assert document.text[: answer.start].endswith(" The copy.")
        assert copied in document.text[: answer.start]


def test_an_edit_is_the_passage_with_the_announced_replacements():
    rng = random.Random(8)
    for _ in range(50):
        document = corpus.make_document("edit", rng)
        (answer,) = document.answers
        passage, announced = document.text[: answer.start].removeprefix("A letter.").split(" The copy,")
        for new, old in re.findall(r" (\w+) for (\w+),", announced):
            passage = passage.replace(f" {old} ", f" {new} ")
        assert document.text[answer.start : answer.end] == passage


def test_the_corpus_needs_nothing_but_the_standard_library():
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, icsearch.calibration.corpus; print(*sorted(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
