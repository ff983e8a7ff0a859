"""Trains the indexers of the converted model by DSA's dense warm-up: everything else frozen. README.md has the runs.

    python checkpoint/real/train.py --texts runs/real/texts

Each layer's indexer learns, by KL, the softmax of its own layer's attention averaged over heads. Nothing flows from
one layer to another, so all of them learn in one forward of the frozen model, layer after layer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from convert import INDEX_TOPK, INDEXERS, base_digest, convert, interleaved, load_gguf, pack_indexers, package_file
from icsearch.model.ops import rotate_interleaved
from texts import run_script, sequences_of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, with the texts and the number of threads."""

    seed: int = 0
    steps: int = 600
    seq_len: int = 1024
    queries: int = 256  # a step, of those that have more to choose from than they may
    index_heads: int = 4
    lr: float = 1e-3
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.95)


class Frozen:
    """The Llama original, layer by layer: what an indexer sees, and what it should find."""

    def __init__(self, llama: nn.Module, length: int) -> None:
        self.llama, self.model = llama.requires_grad_(False), llama.model
        config = llama.config
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.cos, self.sin = self.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])  # [1, T, dim]

    def entry(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(ids)

    def project(self, layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [1, heads, T, dim], keys and values [1, groups, T, dim] of normed hidden states [1, T, hidden]."""
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in projections)
        query, key = apply_rotary_pos_emb(query, key, self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]])
        return query, key, value

    def target(self, query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The attention of the queries at `rows`, averaged over heads: [rows, T]."""
        grouped = query[0, :, rows].unflatten(0, (self.groups, -1))  # [groups, heads a group, rows, dim]
        scores = grouped @ key[0].unsqueeze(1).transpose(-1, -2) * self.dim**-0.5
        future = torch.arange(key.shape[2]) > rows[:, None]
        return scores.masked_fill(future, -math.inf).softmax(-1).mean((0, 1))

    def rest(self, layer: nn.Module, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states behind a layer whose attention gave [1, heads, T, dim]."""
        hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def losses(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = self.llama.lm_head(self.model.norm(hidden[0, :-1]))
        return F.cross_entropy(logits, ids[0, 1:], reduction="none")


def index_scores(
    indexer: nn.Module, x: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """What the indexer of transformers ranks tokens by, for the queries at `rows`: [rows, T], with a gradient."""
    heads, dim = indexer.n_heads, indexer.head_dim
    residual = torch.cat([x[:, rows], torch.ones(1, len(rows), 1)], dim=-1)  # as the converted model's latents are
    query = indexer.wq_b(residual).view(1, len(rows), heads, dim)
    key = indexer.k_norm(indexer.wk(x)).unsqueeze(2)
    query = rotate_interleaved(query, cos[:, rows], sin[:, rows])[0]  # [rows, heads, dim]
    key = rotate_interleaved(key, cos, sin)[0, :, 0]  # [T, dim]
    weights = indexer.weights_proj(x[0, rows]) * heads**-0.5  # [rows, heads]
    scores = F.relu(query.transpose(0, 1) @ key.T * indexer.softmax_scale)  # [heads, rows, T]
    total = (scores * weights.T.unsqueeze(-1)).sum(0)
    return total.masked_fill(torch.arange(x.shape[1]) > rows[:, None], -math.inf)


def divergence(target: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """KL(target || softmax of the scores), mean over queries, in nats; both [rows, T]."""
    log_found = scores.log_softmax(-1)
    terms = target * (target.clamp_min(1e-20).log() - log_found.masked_fill(target == 0, 0.0))
    return terms.sum(-1).mean()


@torch.no_grad()
def start_from_attention(indexer: nn.Module, layer: nn.Module, dim: int, x: torch.Tensor) -> None:
    """Keys as the layer's; one index head a group asks the mean of its queries, the rest next to nothing."""
    by_group = interleaved(layer.self_attn.q_proj.weight, dim).unflatten(0, (indexer.head_dim // dim, -1, dim)).mean(1)
    indexer.wk.weight.copy_(interleaved(layer.self_attn.k_proj.weight, dim))
    norm = indexer.wk(x).std(-1).mean()  # k_norm divides keys by about this
    rows = indexer.wq_b.weight.normal_(std=1e-3).view(indexer.n_heads, indexer.head_dim, -1)
    for head, group in enumerate(by_group[: indexer.n_heads]):
        rows[head, head * dim : (head + 1) * dim, :-1] += group * norm
    # The weights have no bias: the direction of x that comes nearest to one for every token gives them one.
    gram = x[0].T @ x[0] + 0.1 * x.shape[1] * torch.eye(x.shape[-1])
    direction = torch.linalg.solve(gram, x[0].sum(0))  # [hidden]
    indexer.weights_proj.weight.copy_(direction.expand(indexer.n_heads, -1))


class Trainer:
    def __init__(self, recipe: Recipe, llama: nn.Module) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.frozen = recipe, Frozen(llama, recipe.seq_len)
        model = convert(llama, recipe.index_heads)
        self.indexers = [layer.self_attn.indexer.requires_grad_() for layer in model.model.layers]
        rotary = model.model.rotary_emb(torch.zeros(1), torch.arange(recipe.seq_len)[None])
        self.cos, self.sin = rotary
        self.history: list[dict[str, float]] = []

    def sweep(self, ids: torch.Tensor, visit) -> torch.Tensor:
        """Final hidden states; `visit(index, layer, x, query, key)` may give a bool mask [T, T] of what is seen."""
        hidden = self.frozen.entry(ids)
        for index, layer in enumerate(self.frozen.model.layers):
            x = layer.input_layernorm(hidden)
            query, key, value = self.frozen.project(layer, x)
            seen = visit(index, layer, x, query, key)
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=True
            )
            hidden = self.frozen.rest(layer, hidden, attended)
        return hidden

    def start(self, ids: torch.Tensor) -> None:
        """Every indexer from its layer's own attention, its scores as sharp as the attention is."""
        rows = torch.arange(INDEX_TOPK, ids.shape[1], 4)

        def visit(index, layer, x, query, key):
            indexer = self.indexers[index]
            start_from_attention(indexer, layer, self.frozen.dim, x)
            target = self.frozen.target(query, key, rows)
            scores = index_scores(indexer, x, rows, self.cos, self.sin)
            sharpness = min((2.0**power for power in range(-6, 5)), key=lambda s: divergence(target, scores * s).item())
            indexer.weights_proj.weight.mul_(sharpness)

        with torch.no_grad():
            self.sweep(ids, visit)

    def kl(self, index: int, x, query, key, rows) -> torch.Tensor:
        scores = index_scores(self.indexers[index], x, rows, self.cos, self.sin)
        return divergence(self.frozen.target(query, key, rows), scores)

    def train(self, sequences: list[list[int]], heldout: list[list[int]]) -> None:
        recipe = self.recipe
        parameters = [p for indexer in self.indexers for p in indexer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        self.start(batch(sequences[0]))
        generator = torch.Generator().manual_seed(recipe.seed)
        started = time.time()
        for step in range(recipe.steps):
            ids = batch(sequences[step % len(sequences)])
            candidates = torch.arange(INDEX_TOPK, recipe.seq_len)
            rows = candidates[torch.randperm(len(candidates), generator=generator)[: recipe.queries]].sort().values
            kls: list[float] = []

            def visit(index, layer, x, query, key, rows=rows, kls=kls):
                with torch.enable_grad():
                    kl = self.kl(index, x, query, key, rows)
                kl.backward()
                kls.append(kl.item())

            with torch.no_grad():
                self.sweep(ids, visit)
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            entry = {"step": step + 1, "kl": sum(kls) / len(kls), "seconds": time.time() - started}
            if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
                entry |= self.measure(heldout[:2])
            self.history.append(entry)
            if step < 5 or (step + 1) % 10 == 0:
                print(json.dumps(entry), flush=True)

    def rate(self, step: int) -> float:
        recipe = self.recipe
        progress = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 + 0.5 * math.cos(math.pi * progress)) * 0.98 + 0.02

    @torch.no_grad()
    def measure(self, sequences: list[list[int]], oracle: bool = False) -> dict[str, float]:
        """Loss with all tokens visible and with the chosen ones; with `oracle` also with those attended to most."""
        rows = torch.arange(self.recipe.seq_len)
        shares: list[float] = []

        def chosen(index, layer, x, query, key):
            scores = index_scores(self.indexers[index], x, rows, self.cos, self.sin)
            seen = top_mask(scores)
            shares.append((self.frozen.target(query, key, rows) * seen)[INDEX_TOPK:].sum(-1).mean().item())
            return seen

        def best(index, layer, x, query, key):
            return top_mask(self.frozen.target(query, key, rows))

        ways = {"all": lambda *_: None, f"top{INDEX_TOPK}": chosen}
        if oracle:
            ways["oracle"] = best
        found = {
            name: sum(self.frozen.losses(self.sweep(ids, visit), ids).mean().item() for ids in map(batch, sequences))
            / len(sequences)
            for name, visit in ways.items()
        }
        return found | {"mass": sum(shares) / len(shares)}

    def save(self, path: Path, base: str) -> None:
        names = (f"model.layers.{index}.self_attn.indexer" for index in range(len(self.indexers)))
        tensors = {
            f"{name}.{inner}": tensor.detach()
            for name, indexer in zip(names, self.indexers, strict=True)
            for inner, tensor in indexer.state_dict().items()
        }
        metadata = {"base": base, "index_heads": str(self.recipe.index_heads)}
        save_file(pack_indexers(tensors), path, metadata)


def batch(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids)[None]


def top_mask(scores: torch.Tensor) -> torch.Tensor:
    """Bool [T, T]: the `INDEX_TOPK` highest of each row, and of rows that see fewer all that they see."""
    length = scores.shape[-1]
    kept = torch.zeros(length, length, dtype=torch.bool).scatter_(-1, scores.topk(INDEX_TOPK, dim=-1).indices, True)
    return kept & torch.ones_like(kept).tril()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="what texts.py wrote")
    parser.add_argument("--gguf", type=Path, help="another Llama-type GGUF file")
    parser.add_argument("--out", type=Path, help="training.json comes beside it [beside this script]")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    if arguments.gguf and not arguments.out:
        parser.error("--gguf needs --out: the indexers beside this script are those of the package's model")
    recipe, out = Recipe(steps=arguments.steps), arguments.out or INDEXERS
    run_script(lambda: run(recipe, arguments.gguf, arguments.texts, out))


def run(recipe: Recipe, gguf: Path | None, folder: Path, out: Path) -> None:
    llama, tokenizer = load_gguf(gguf or package_file())
    texts = sequences_of(folder / "docs-train.jsonl", tokenizer, recipe.steps, recipe.seq_len, recipe.seed)
    heldout = sequences_of(folder / "docs-heldout.jsonl", tokenizer, 16, recipe.seq_len, recipe.seed)
    trainer = Trainer(recipe, llama)
    started = time.time()
    trainer.train(texts, heldout)
    seconds = time.time() - started
    measured = trainer.measure(heldout, oracle=True)
    print(json.dumps(measured))
    trainer.save(out, base_digest(llama))
    record = {"recipe": asdict(recipe), "seconds": seconds, "threads": torch.get_num_threads(), "measured": measured}
    record["history"] = trainer.history
    out.with_name("training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
