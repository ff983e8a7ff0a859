"""The built-in corpus: long-range tasks in natural-looking text, written by a program.

Whoever guesses the next token of these documents has to find a few far tokens among many similar ones: the
value that a name was given, the end of a chain of names, a needle in a story, the passage that is being
repeated. A layer that is handed the wrong tokens therefore shows in the loss. Names and values are drawn
anew for every document, so that nothing can be learned by heart.

Every document belongs to exactly one split, decided by a hash of its text: splits never share a document,
whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

CORPUS_VERSION = "1"

# Share of the 16 hash buckets that each split owns.
_SPLIT_BUCKETS = {"train": range(0, 12), "calibration": range(12, 14), "heldout": range(14, 16)}

_NAME_HEADS = (
    *("Ba", "Cor", "Da", "El", "Fen", "Ga", "Hal", "Ka", "Lo"),
    *("Mar", "Ni", "Or", "Pel", "Ru", "Sa", "Ti", "Ul", "Vo"),
)
_NAME_TAILS = (
    *("bel", "dan", "fin", "gar", "hen", "la", "len", "mo"),
    *("na", "ris", "rok", "sha", "ton", "va", "vin", "zo"),
)
_WARE_HEADS = ("gold", "red", "iron", "sun", "moon", "black", "sea", "rose", "salt", "wind", "bird", "frost")
_WARE_TAILS = ("leaf", "stone", "wood", "bell", "wheel", "glass", "thorn", "cloth", "horn", "root")

NAMES = tuple(head + tail for head in _NAME_HEADS for tail in _NAME_TAILS)
WARES = tuple(head + tail for head in _WARE_HEADS for tail in _WARE_TAILS)

_ADJECTIVES = ("old", "small", "quiet", "green", "cold", "bright", "tall", "slow", "poor", "young")
_NOUNS = ("miller", "road", "house", "river", "market", "horse", "garden", "tower", "boat", "friend", "door", "hill")
_VERBS = ("saw", "left", "found", "passed", "liked", "heard", "kept", "lost")
_PLACES = ("by", "near", "behind", "under", "past")
_CLOSERS = ("at night", "in the end", "once more", "before noon", "after all", "in winter")

_KEEPING = ("keeps", "owns", "guards", "sells", "wants")
_FOLLOWING = ("follows", "trusts", "serves", "calls", "knows")


@dataclass(frozen=True)
class Answer:
    """A stretch of a document that follows from what stands before it.

    `start` and `end` are character offsets into the text (`start` at the space before the first word).
    `trail` is what one look-up after another finds: for a chain the names in between and the value last,
    for a copied stretch it is empty.
    """

    start: int
    end: int
    trail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """One document: its task kind, its text, and what in it can be derived."""

    kind: str
    text: str
    answers: tuple[Answer, ...]


@dataclass
class _Writer:
    """Collects the text of a document and remembers where its answers stand."""

    text: str = ""
    answers: list[Answer] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.text += text

    def answer(self, text: str, trail: tuple[str, ...] = ()) -> None:
        start = len(self.text)
        self.text += text
        self.answers.append(Answer(start, len(self.text), trail))


def documents(split: str, seed: int = 0) -> Iterator[str]:
    """An endless, reproducible stream of documents of one split.

    Args:
        split: "train", "calibration" or "heldout".
        seed: Another seed, another stream of the same split.

    Raises:
        ValueError: `split` is not one of the three.
    """
    for document in annotated_documents(split, seed):
        yield document.text


def annotated_documents(split: str, seed: int = 0) -> Iterator[Document]:
    """The same stream as `documents`, with task kinds and answers."""
    if split not in _SPLIT_BUCKETS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(_SPLIT_BUCKETS)}")
    buckets = _SPLIT_BUCKETS[split]
    rng = random.Random(f"{CORPUS_VERSION}/{split}/{seed}")
    kinds, weights = list(KINDS), [weight for _, weight in KINDS.values()]
    while True:
        (kind,) = rng.choices(kinds, weights)
        document = make_document(kind, rng)
        if _bucket(document.text) in buckets:
            yield document


def make_document(kind: str, rng: random.Random) -> Document:
    """One document of a task kind (a key of `KINDS`)."""
    writer = _Writer()
    KINDS[kind][0](writer, rng)
    return Document(kind, writer.text, tuple(writer.answers))


def _bucket(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0] % 16


# --- the tasks ---------------------------------------------------------------------------------------------


def _write_recall(writer: _Writer, rng: random.Random) -> None:
    """Who keeps what, and later the same again in another order."""
    count = rng.randint(8, 16)
    keys, wares = rng.sample(NAMES, count), rng.sample(WARES, count)
    verb = rng.choice(_KEEPING)
    writer.say("The stores.")
    for key, ware in zip(keys, wares, strict=True):
        writer.say(f" {key} {verb} {ware}.")
        if rng.random() < 0.1:
            writer.say(_filler(rng))
    _ask(writer, rng, [(key, (ware,)) for key, ware in zip(keys, wares, strict=True)], rng.randint(4, 8))


def _write_chains(writer: _Writer, rng: random.Random, forward: bool) -> None:
    """Names that point to others. Forward, those are only explained later: a query has to follow link by link.

    Else the chains are told from their end, and every name is explained by one that is known already.
    """
    levels, trails = _chains(rng, rng.randint(4, 7))
    keep, follow = rng.choice(_KEEPING), rng.choice(_FOLLOWING)
    told = levels if forward else levels[::-1]
    writer.say("The way ahead." if forward else "The way back.")
    for level in told:
        rng.shuffle(level)
        for name in level:
            trail = trails[name]
            writer.say(f" {name} {keep if len(trail) == 1 else follow} {trail[0]}.")
            if rng.random() < 0.03:
                writer.say(_filler(rng))
    heads = [name for name, trail in trails.items() if len(trail) == 3]
    others = [name for name, trail in trails.items() if len(trail) < 3]
    asked = rng.sample(heads, min(len(heads), rng.randint(3, 5))) + rng.sample(others, rng.randint(2, 3))
    _ask(writer, rng, [(name, trails[name]) for name in asked], len(asked))


def _chains(rng: random.Random, width: int) -> tuple[list[list[str]], dict[str, tuple[str, ...]]]:
    """Three levels of names, each pointing into the next, the last to wares.

    Several names may point to the same one, so that a link does not tell who will reach it.
    Returns the levels, heads first, and for every name what its look-ups find one after another.
    """
    names, wares = rng.sample(NAMES, 3 * width), rng.sample(WARES, width)
    levels = [names[:width], names[width : 2 * width], names[2 * width :]]
    trails: dict[str, tuple[str, ...]] = {name: (ware,) for name, ware in zip(levels[2], wares, strict=True)}
    for level, below in ((levels[1], levels[2]), (levels[0], levels[1])):
        targets = rng.sample(below, width)
        if rng.random() < 0.5:
            targets[rng.randrange(width)] = rng.choice(below)
        trails.update({name: (target, *trails[target]) for name, target in zip(level, targets, strict=True)})
    return levels, trails


def _write_needles(writer: _Writer, rng: random.Random) -> None:
    """A few facts hidden in a story, asked for at its end."""
    count = rng.randint(2, 4)
    keys, wares = rng.sample(NAMES, count), rng.sample(WARES, count)
    writer.say("A story.")
    for key, ware in zip(keys, wares, strict=True):
        for _ in range(rng.randint(1, 4)):
            writer.say(_filler(rng))
        writer.say(f" {key} {rng.choice(_KEEPING)} {ware}.")
    for _ in range(rng.randint(1, 4)):
        writer.say(_filler(rng))
    _ask(writer, rng, [(key, (ware,)) for key, ware in zip(keys, wares, strict=True)], count)


def _write_repeat(writer: _Writer, rng: random.Random) -> None:
    """A passage, and the same passage again."""
    passage = [_scene(rng) for _ in range(rng.randint(3, 8))]
    writer.say("A letter.")
    writer.say("".join(passage))
    writer.say(" The copy.")
    start = rng.randrange(2)
    writer.answer("".join(passage[start:]))


def _write_edit(writer: _Writer, rng: random.Random) -> None:
    """A passage, and the same passage with some of its words replaced as announced."""
    passage = "".join(_scene(rng) for _ in range(rng.randint(3, 8)))
    present = [name for name in NAMES if f" {name} " in passage]
    absent = [name for name in NAMES if f" {name} " not in passage]
    olds = rng.sample(present, min(len(present), rng.randint(1, 3)))
    writer.say("A letter.")
    writer.say(passage)
    writer.say(" The copy,")
    for old, new in zip(olds, rng.sample(absent, len(olds)), strict=True):
        writer.say(f" {new} for {old},")
        passage = passage.replace(f" {old} ", f" {new} ")
    writer.say(" reads.")
    writer.answer(passage)


def _ask(writer: _Writer, rng: random.Random, facts: list[tuple[str, tuple[str, ...]]], count: int) -> None:
    """Statements that follow from the text, in random order."""
    writer.say(" So it goes.")
    for key, trail in rng.sample(facts, count):
        writer.say(f" {key} reaches the")
        writer.answer(f" {trail[-1]}", trail)
        writer.say(".")


def _filler(rng: random.Random) -> str:
    """A sentence without far references; the same adjective comes twice, a few words apart."""
    adjective, noun, other = rng.choice(_ADJECTIVES), *rng.sample(_NOUNS, 2)
    sentence = f" The {adjective} {noun} {rng.choice(_VERBS)} the {adjective} {other}"
    if rng.random() < 0.5:
        sentence += f" {rng.choice(_PLACES)} the {noun}"
    if rng.random() < 0.3:
        sentence += f" {rng.choice(_CLOSERS)}"
    return sentence + "."


def _scene(rng: random.Random) -> str:
    """A sentence with a name and things in it, for passages."""
    name, ware, noun = rng.choice(NAMES), rng.choice(WARES), rng.choice(_NOUNS)
    shape = rng.randrange(3)
    if shape == 0:
        return f" The {noun} of {name} {rng.choice(_VERBS)} the {ware}."
    if shape == 1:
        return (
            f" The {ware} of {name} and {rng.choice(NAMES)} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {noun}."
        )
    return f" The {rng.choice(_ADJECTIVES)} {noun} {rng.choice(_VERBS)} {name} {rng.choice(_PLACES)} the {ware}."


KINDS: dict[str, tuple[Callable[[_Writer, random.Random], None], float]] = {
    "recall": (_write_recall, 0.15),
    "forward_chains": (partial(_write_chains, forward=True), 0.45),
    "settled_chains": (partial(_write_chains, forward=False), 0.1),
    "needles": (_write_needles, 0.1),
    "repeat": (_write_repeat, 0.1),
    "edit": (_write_edit, 0.1),
}
