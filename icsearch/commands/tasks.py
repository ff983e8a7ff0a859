"""Tasks with an answer: made from the built-in corpus, or those of lm-evaluation-harness (icsearch[lm-eval])."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from icsearch.calibration import corpus
from icsearch.calibration.batches import document_prefix
from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.model.model import DsaModel


def lm_eval_results(
    dsa: DsaModel, tokenizer: Any, patterns: Sequence[Pattern], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """The harness's metrics for each pattern; `tasks` are its names, or task files (.yaml). Raises IcsearchError."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise IcsearchError(
            f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'icsearch[lm-eval]'"
        ) from None
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    results = []
    for pattern in patterns:
        with dsa.running(pattern):
            harness = HFLM(pretrained=dsa.model, tokenizer=tokenizer, batch_size=1)
            evaluated = lm_eval.simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0)
        results.append({"pattern": pattern.letters, "results": evaluated["results"]})
    return results


# Task kind to the corpus's kind of document, and the numbers of look-ups that are asked for in turn.
KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "recall": ("recall", (1,)),
    "chains": ("forward_chains", (1, 2, 3)),
    "needles": ("needles", (1,)),
}
SPREAD = 0.5  # share of the filling that stands between the facts; the rest stands in front
MAX_REFUSED = 200  # documents in a row; more means that length and tokenizer rule all of them out


class TaskError(IcsearchError):
    """Tasks that cannot be made as asked."""


@dataclass(frozen=True)
class Task:
    """A prompt and its answer as token ids. `hops`: look-ups one after another from the question to the answer."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    hops: int


@dataclass(frozen=True)
class _Question:
    """One question of a document. `told`: its sentences, facts and all, up to the questions, which are left out."""

    told: tuple[str, ...]
    asked: str  # " Tiva reaches the"
    answer: str  # " moonroot"
    names: frozenset[str]  # what the answer hangs on: the name asked for and the names that lead to the answer
    hops: int


class _Encoder:
    """Token ids of texts, as in calibration: no special tokens inside, `prefix` before and EOS behind a document."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown = tokenizer.unk_token_id
        self.prefix: list[int] = document_prefix(tokenizer)
        eos = tokenizer.eos_token_id
        self.ending: list[int] = [] if eos is None else [eos]

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def answer(self, before: list[int], text: str, answer: str) -> list[int] | None:
        """The answer's ids in running text behind `text` (ids `before`).

        None where a token crosses one of its two boundaries, or it has no tokens of its own.
        """
        whole, running = self.ids(text + answer), self.ids(text + answer + ".")
        ids = whole[len(before) :]
        fits = whole[: len(before)] == before and running[: len(whole)] == whole
        return ids if fits and ids and self._unknown not in ids else None


def make_tasks(
    tokenizer: Any,
    kind: str,
    *,
    length_tokens: int,
    count: int,
    seed: int,
    split: str = "heldout",
    spread: float = SPREAD,
) -> list[Task]:
    """`count` different tasks of a kind (a key of `KINDS`), each prompt exactly `length_tokens` long.

    The same arguments give the same tasks. `split` is the corpus's, for the document that is asked about. `chains`
    come with 1, 2 and 3 hops in turn. `spread` is the share of the filling that goes between the facts.

    Raises TaskError for an unknown kind, and where the length is too short or no tokenizer cuts the answers off.
    """
    if tokenizer is None:
        raise TaskError("the checkpoint brings no tokenizer: tasks with an answer are text, so they need one")
    if kind not in KINDS:
        raise TaskError(f"unknown kind of task {kind!r}: give one of {', '.join(KINDS)}")
    try:
        next(corpus.annotated_documents(split))
    except ValueError as error:
        raise TaskError(str(error)) from None
    if length_tokens < 1 or count < 1:
        raise TaskError(f"{count} tasks of {length_tokens} tokens: expected positive numbers")
    if not 0 <= spread <= 1:
        raise TaskError(f"spread {spread} is out of range: give a share of the filling from 0 to 1")
    maker = _Maker(_Encoder(tokenizer), kind, split, seed, length_tokens, spread)
    tasks: dict[tuple[int, ...], Task] = {}
    while len(tasks) < count:
        task = maker.task()
        tasks.setdefault(task.prompt, task)
    return list(tasks.values())


class _Maker:
    """Makes one task after another from one stream of documents."""

    def __init__(self, encoder: _Encoder, kind: str, split: str, seed: int, length: int, spread: float) -> None:
        self.encoder, self.kind, self.length, self.spread = encoder, kind, length, spread
        self.documents = corpus.annotated_documents(split, seed)
        self.rng = random.Random(f"tasks/{kind}/{split}/{seed}/{length}/{spread}")
        self.story = self._story()
        self.made = 0

    def task(self) -> Task:
        """The next task; raises TaskError where none comes out of many documents."""
        document_kind, hops = KINDS[self.kind]
        questions = self._questions(document_kind, hops[self.made % len(hops)])
        shortest = None
        for _ in range(MAX_REFUSED):
            question = next(questions)
            bare = self.encoder.prefix + self.encoder.ids("".join(question.told) + question.asked)
            shortest = min(shortest or len(bare), len(bare))
            task = self._fill(question, self.length - len(bare)) if len(bare) <= self.length else None
            if task is not None:
                self.made += 1
                return task
        raise TaskError(
            f"no {self.kind} task of {self.length} tokens came out of {MAX_REFUSED} documents (the shortest takes "
            f"{shortest} tokens): give a greater length (--task-length), or a tokenizer that keeps words apart"
        )

    def _questions(self, document_kind: str, hops: int) -> Iterator[_Question]:
        """From each further document of the kind, the first question that takes so many look-ups. Endless."""
        for document in self.documents:
            fitting = (answer for answer in document.answers if len(answer.trail) == hops)
            answer = next(fitting, None) if document.kind == document_kind else None
            if answer is None:
                continue
            text, first = document.text, document.answers[0].start
            told = text[: text.rindex(".", 0, first) + 1]
            asked = text[text.rindex(".", 0, answer.start) + 1 : answer.start]
            names = frozenset((asked.split()[0], *answer.trail[:-1]))
            yield _Question(tuple(_sentences(told)), asked, text[answer.start : answer.end], names, hops)

    def _fill(self, question: _Question, missing: int) -> Task | None:
        """The task with `missing` more tokens; None where a token crosses a boundary, or too few are left to fill."""
        among: list[list[str]] = [[] for _ in question.told]  # story sentences before each of the told ones
        budget = int(self.spread * missing)
        while (budget := budget - len(self.encoder.ids(sentence := next(self.story)))) >= 0:
            among[self.rng.randrange(1, len(among))].append(sentence)  # the first and the last keep their places
        told = [part for sentence, before in zip(question.told, among, strict=True) for part in (*before, sentence)]
        text = "".join(told) + question.asked
        ids = self.encoder.ids(text)
        answer = self.encoder.answer(ids, text, question.answer)
        if answer is None:
            return None
        front = self._front(self.length - len(self.encoder.prefix) - len(ids), question.names)
        if front is None:
            return None
        prompt = (*front, *self.encoder.prefix, *ids)
        return Task(self.kind, prompt, tuple(answer), question.hops)

    def _front(self, length: int, names: frozenset[str]) -> list[int] | None:
        """Whole documents that mention none of the names, `length` tokens in all, the first one cut at its front."""
        prefix, ids = self.encoder.prefix, list[int]()
        if length < 0 or 0 < length <= len(prefix):
            return None
        while len(ids) < length:
            document = next(d for d in self.documents if names.isdisjoint(re.findall(r"\w+", d.text)))
            ids = [*prefix, *self.encoder.ids(document.text), *self.encoder.ending, *ids]
        return prefix + ids[len(ids) - length + len(prefix) :] if length else []

    def _story(self) -> Iterator[str]:
        """Story sentences of the corpus, endlessly: those that hold no name."""
        while True:
            document = corpus.make_document("needles", self.rng)
            told = document.text[: document.answers[0].start]
            yield from (sentence for sentence in _sentences(told) if sentence.startswith(" The "))


def _sentences(text: str) -> list[str]:
    """The text in pieces that end with a full stop, nothing lost."""
    return re.findall(r"[^.]*\.", text)


@torch.inference_mode()
def teacher_forced_hits(model: Any, tasks: Sequence[Task], *, batch_size: int = 1) -> list[bool]:
    """For each task, whether every answer token is the most likely one behind the prompt and the answer before it.

    `model` is a causal language model of transformers that follows its pattern: by `icsearch.apply_pattern`, or
    within `DsaModel.running`. Only tasks of equal lengths share a batch.
    """
    hits: dict[int, bool] = {}
    for batch in _batches(tasks, batch_size):
        answers = _column(model, [tasks[i].answer for i in batch])  # [B, A]
        prompts = _column(model, [tasks[i].prompt for i in batch])  # [B, P]
        ids = torch.cat([prompts, answers[:, :-1]], dim=1)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=answers.shape[1]).logits  # [B, A, V]
        right = (logits.argmax(dim=-1) == answers).all(dim=1)
        hits.update(zip(batch, right.tolist(), strict=True))
    return [hits[i] for i in range(len(tasks))]


@torch.inference_mode()
def generated_hits(model: Any, tasks: Sequence[Task], *, batch_size: int = 1) -> list[bool]:
    """For each task, whether the model's own greedy `generate`, with KV cache, writes exactly the answer.

    Model and batches as for `teacher_forced_hits`; the results are the same but for what prefill and decode round
    differently.
    """
    hits: dict[int, bool] = {}
    for batch in _batches(tasks, batch_size):
        prompts = _column(model, [tasks[i].prompt for i in batch])  # [B, P]
        written = _generate(model, prompts, len(tasks[batch[0]].answer))
        for i, tokens in zip(batch, written, strict=True):
            hits[i] = tokens == list(tasks[i].answer)
    return [hits[i] for i in range(len(tasks))]


def _generate(model: Any, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Greedy continuations of [B, P] prompts; whatever the checkpoint's generation config asks for is set aside."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,  # behind an EOS, where the answer is missed already
        use_cache=True,
    )
    continuations: list[list[int]] = output[:, prompts.shape[1] :].tolist()
    return continuations


def _batches(tasks: Sequence[Task], batch_size: int) -> Iterator[list[int]]:
    """Numbers of tasks that run together: equal lengths of prompt and answer, at most `batch_size`."""

    def lengths(number: int) -> tuple[int, int]:
        return len(tasks[number].prompt), len(tasks[number].answer)

    for _, numbers in groupby(sorted(range(len(tasks)), key=lengths), key=lengths):
        group = list(numbers)
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _column(model: Any, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Equally long rows of ids as int64 [B, T] on the model's device."""
    return torch.tensor(rows, dtype=torch.int64, device=model.device)
