"""The tokenizer of the demo checkpoint, and packed batches of the built-in corpus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from icsearch.calibration import corpus

EOS = "<|endoftext|>"
VOCAB_SIZE = 1024
NO_TARGET = -100
NUM_TAPS = 3


def train_tokenizer(num_documents: int = 8000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of its own, learned from the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = corpus.documents("train", seed=1)
    tokenizer.train_from_iterator([next(stream) for _ in range(num_documents)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, model_max_length=2048)


@dataclass(frozen=True)
class Batch:
    """Packed sequences. `hops[i]` holds, where an answer with a trail begins, the i-th token of that trail."""

    input_ids: torch.Tensor  # [B, T]
    answers: torch.Tensor  # [B, T] bool: this token follows from what stands before it
    hops: torch.Tensor  # [NUM_TAPS, B, T] token id or NO_TARGET, at the position of the answer token
    num_hops: torch.Tensor  # [B, T] length of the trail, 0 elsewhere


class Packer:
    """Batches of exactly `seq_len` tokens per sequence.

    Documents are joined, each followed by EOS. Every sequence starts at a document start; the document that
    crosses its end is cut there and the rest dropped, unless the rest fills a sequence of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: str, seed: int, max_hops: int = 3) -> None:
        self.tokenizer = tokenizer
        self.documents = corpus.annotated_documents(split, seed)
        self.max_hops = max_hops
        self.first_token = {w: tokenizer.encode(f" {w}")[0] for w in (*corpus.NAMES, *corpus.WARES)}
        self.carried: list[tuple] = []

    def batch(self, batch_size: int, seq_len: int) -> Batch:
        """The next `batch_size` sequences of the stream."""
        rows = [self._sequence(seq_len) for _ in range(batch_size)]
        ids, answers, hops, num_hops = (torch.tensor(column) for column in zip(*rows, strict=False))
        return Batch(ids, answers, hops.transpose(0, 1).contiguous(), num_hops)

    def _sequence(self, seq_len: int) -> tuple:
        tokens, self.carried = self.carried, []
        while len(tokens) < seq_len:
            tokens = tokens + self._document()
        rest = tokens[seq_len:]
        self.carried = rest if len(rest) >= seq_len else []
        ids, answers, hops, num_hops = zip(*tokens[:seq_len], strict=False)
        return ids, answers, list(zip(*hops, strict=False)), num_hops

    def _document(self) -> list[tuple]:
        document = next(self.documents)
        while any(len(answer.trail) > self.max_hops for answer in document.answers):
            document = next(self.documents)
        encoding = self.tokenizer._tokenizer.encode(document.text)
        nothing = (NO_TARGET,) * NUM_TAPS
        tokens = [(token, False, nothing, 0) for token in encoding.ids]
        for answer in document.answers:
            self._mark(tokens, encoding.offsets, answer)
        return [*tokens, (self.tokenizer.eos_token_id, False, nothing, 0)]

    def _mark(self, tokens: list[tuple], offsets: list[tuple[int, int]], answer: corpus.Answer) -> None:
        inside = [i for i, (start, end) in enumerate(offsets) if answer.start <= start and end <= answer.end]
        for i in inside:
            tokens[i] = (tokens[i][0], True, *tokens[i][2:])
        if answer.trail and inside:
            padded = (*answer.trail, *(answer.trail[-1],) * NUM_TAPS)[:NUM_TAPS]
            hops = tuple(self.first_token[word] for word in padded)
            tokens[inside[0]] = (tokens[inside[0]][0], True, hops, len(answer.trail))
