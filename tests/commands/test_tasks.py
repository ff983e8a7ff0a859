"""Tasks with an answer: derivable, as long as asked, the same for the same seed; both ways of asking agree."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import icsearch
import tiny
from icsearch.calibration import corpus
from icsearch.commands import tasks
from icsearch.commands.tasks import Task, TaskError, generated_hits, make_tasks, teacher_forced_hits
from icsearch.core.files import demo_checkpoint
from icsearch.model.loading import quiet_transformers

quiet_transformers()
WORDS = "|".join(corpus.NAMES)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Trained on the corpus, so that words are one to three tokens."""
    return corpus_tokenizer()


def corpus_tokenizer(vocabulary: int = 600, **special: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = corpus.documents("train")
    tokenizer.train_from_iterator([next(stream) for _ in range(300)], trainer)
    if "bos_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **special})


def facts(text: str) -> dict[str, str]:
    """Every `X verb Y.` statement of a document: what X points to."""
    verbs = "|".join(corpus._KEEPING + corpus._FOLLOWING)
    return {m[1]: m[2] for m in re.finditer(rf" (\w+) (?:{verbs}) (\w+)(?=\.)", text)}


@pytest.mark.parametrize("kind", tasks.KINDS)
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_answers_follow_from_the_prompt(tokenizer: Any, kind: str, spread: float) -> None:
    for task in make_tasks(tokenizer, kind, length_tokens=600, count=9, seed=1, spread=spread):
        prompt = tokenizer.decode(task.prompt)
        *others, own = prompt.split("</s>")
        name = re.search(r"So it goes\. (\w+) reaches the$", own)[1]
        trail = [facts(own)[name]]
        while trail[-1] in facts(own):
            trail.append(facts(own)[trail[-1]])
        assert tokenizer.decode(task.answer) == f" {trail[-1]}"
        assert task.hops == len(trail)
        assert "reaches" not in own.removesuffix(" reaches the")  # no other question gives a link away
        named = {name, *trail[:-1]}
        assert not any(named & set(re.findall(r"\w+", other)) for other in others)


@pytest.mark.parametrize("kind", tasks.KINDS)
@pytest.mark.parametrize("length", [250, 600, 3000])
def test_lengths_are_exact_and_tasks_differ(tokenizer: Any, kind: str, length: int) -> None:
    made = make_tasks(tokenizer, kind, length_tokens=length, count=9, seed=2)
    assert {len(task.prompt) for task in made} == {length}
    assert len({task.prompt for task in made}) == 9
    assert {task.kind for task in made} == {kind}
    assert Counter(task.hops for task in made) == ({1: 3, 2: 3, 3: 3} if kind == "chains" else {1: 9})


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_tokens_are_those_of_running_text(tokenizer: Any, kind: str) -> None:
    for task in make_tasks(tokenizer, kind, length_tokens=400, count=5, seed=3):
        text = tokenizer.decode(task.prompt).split("</s>")[-1] + tokenizer.decode(task.answer)
        ids = tokenizer(text + ". The end", add_special_tokens=False)["input_ids"]
        both = [*task.prompt, *task.answer]
        own = both[len(both) - both[::-1].index(tokenizer.eos_token_id) :] if tokenizer.eos_token_id in both else both
        assert ids[: len(own)] == own


def test_the_spread_moves_facts_away_from_the_question(tokenizer: Any) -> None:
    def distance(spread: float) -> float:
        made = make_tasks(tokenizer, "recall", length_tokens=1500, count=10, seed=4, spread=spread)
        texts = [tokenizer.decode(task.prompt).split("</s>")[-1] for task in made]
        return sum(len(text) for text in texts) / len(texts)

    near, middle, far = (distance(spread) for spread in (0.0, 0.5, 1.0))
    assert 2 * near < middle and 1.5 * middle < far


def test_seed_kind_and_split_decide_the_tasks(tokenizer: Any) -> None:
    def make(**changes: Any) -> list[Task]:
        options = {"kind": "recall", "length_tokens": 400, "count": 4, "seed": 5, "split": "heldout"}
        return make_tasks(tokenizer, **{**options, **changes})

    assert make() == make()
    assert make(count=2) == make()[:2]
    for changes in ({"seed": 6}, {"split": "calibration"}, {"kind": "needles"}):
        assert not {task.prompt for task in make()} & {task.prompt for task in make(**changes)}


def test_documents_begin_as_the_tokenizer_has_it() -> None:
    tokenizer = corpus_tokenizer(bos_token="<s>")
    for spread in (0.0, 1.0):
        (task,) = make_tasks(tokenizer, "recall", length_tokens=700, count=1, seed=0, spread=spread)
        assert task.prompt[0] == 0 and len(task.prompt) == 700
        assert all(task.prompt[i + 1] == 0 for i, token in enumerate(task.prompt) if token == 1)


def test_a_tokenizer_without_end_of_text(tokenizer: Any) -> None:
    made = make_tasks(corpus_tokenizer(eos_token=None), "needles", length_tokens=500, count=2, seed=0)
    assert [len(task.prompt) for task in made] == [500, 500]


@pytest.mark.parametrize("known", [(), (*corpus.WARES, *(f"{ware}." for ware in corpus.WARES))])
def test_a_tokenizer_that_cannot_tell_answers_apart_is_refused(known: tuple[str, ...]) -> None:
    """Every ware unknown; or one token for a ware with its full stop, so that the answer cannot be cut off."""
    vocabulary = {word: i for i, word in enumerate(("<unk>", "</s>", *known))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(TaskError, match="no recall task of 900 tokens .* a tokenizer that keeps words apart"):
        make_tasks(tokenizer, "recall", length_tokens=900, count=1, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "brings no tokenizer"),
        ({"kind": "riddles"}, "unknown kind of task 'riddles': give one of recall, chains, needles"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"count": 0}, "expected positive numbers"),
        ({"length_tokens": 20}, "no recall task of 20 tokens .* give a greater length"),
        ({"spread": 1.5}, "spread 1.5 is out of range"),
    ],
)
def test_bad_requests(tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    options = {"tokenizer": tokenizer, "kind": "recall", "length_tokens": 300, "count": 1, "seed": 0}
    with pytest.raises(TaskError, match=message):
        make_tasks(**{**options, **changes})


# --- hits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """So many index heads that no score is zero: else the top-k chooses among ties, by shape."""
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("tasks"), index_n_heads=32)
    return icsearch.load(str(directory), "FSFSSS")


def answered_by(model: Any, made: list[Task]) -> list[Task]:
    """The tasks with what the model itself writes for the answer, every second one with its last token changed."""
    written = tasks._generate(model, torch.tensor([task.prompt for task in made]), 3)
    changed = [[*tokens[:-1], (tokens[-1] + i % 2) % tiny.VOCABULARY] for i, tokens in enumerate(written)]
    return [Task(t.kind, t.prompt, tuple(answer), t.hops) for t, answer in zip(made, changed, strict=True)]


@pytest.fixture(scope="module")
def made(model: Any) -> list[Task]:
    """Random prompts that the model answers right, and nearly right, by turns."""
    prompts = torch.randint(1, tiny.VOCABULARY, (6, 60), generator=torch.Generator().manual_seed(0))
    return answered_by(model, [Task("recall", tuple(prompt), (), 1) for prompt in prompts.tolist()])


def test_tasks_of_the_checkpoints_own_tokenizer(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    own = make_tasks(tokenizer, "recall", length_tokens=500, count=2, seed=0)
    for some in (own, answered_by(model, own)):
        assert teacher_forced_hits(model, some) == generated_hits(model, some) == [some != own, False]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_teacher_forced_equals_generated(model: Any, made: list[Task], batch_size: int) -> None:
    expected = [True, False] * 3
    assert teacher_forced_hits(model, made, batch_size=batch_size) == expected
    assert generated_hits(model, made, batch_size=batch_size) == expected


def test_a_wrong_first_token_is_a_miss(model: Any, made: list[Task]) -> None:
    task = made[0]
    wrong = Task(task.kind, task.prompt, ((task.answer[0] + 1) % tiny.VOCABULARY, *task.answer[1:]), task.hops)
    assert teacher_forced_hits(model, [wrong]) == generated_hits(model, [wrong]) == [False]


def test_unequal_lengths_never_share_a_batch(model: Any, made: list[Task]) -> None:
    short = Task(made[0].kind, made[0].prompt, made[0].answer[:2], 1)
    front = Task(made[2].kind, made[2].prompt[1:], made[2].answer, 1)
    mixed = [made[1], short, made[0], front]
    for ways in (teacher_forced_hits, generated_hits):
        assert ways(model, mixed, batch_size=4)[:3] == [False, True, True]
        assert ways(model, mixed, batch_size=4) == ways(model, mixed)
    assert teacher_forced_hits(model, []) == generated_hits(model, []) == []


def test_an_early_end_of_text_is_a_miss(model: Any, made: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", made[0].answer[0])
    assert generated_hits(model, made[:1]) == [False]


def test_the_generation_config_of_the_checkpoint_is_set_aside(
    model: Any, made: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generated_hits(model, made) == [True, False] * 3


def test_the_pattern_decides_the_hits(model: Any, made: list[Task]) -> None:
    icsearch.apply_pattern(model, "FSSSSS")
    other = teacher_forced_hits(model, made)
    icsearch.apply_pattern(model, "FSFSSS")
    assert other != teacher_forced_hits(model, made)


@pytest.mark.skipif(not (demo_checkpoint() / "config.json").exists(), reason="the demo checkpoint is not there")
def test_the_demo_checkpoint_answers_far_above_chance() -> None:
    model = icsearch.load("demo")
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    for kind in tasks.KINDS:
        made = make_tasks(tokenizer, kind, length_tokens=192, count=9, seed=0)
        hits = teacher_forced_hits(model, made, batch_size=9)
        assert sum(hits) / len(hits) > 0.5  # chance: one in 120 wares, one in about 10 of those told
        assert hits == generated_hits(model, made, batch_size=9)
