"""Loading a checkpoint with hundreds of experts a layer: transformers' own loading, ours, and one streamed pass.

The experts are small, so that what is measured is the work around each tensor and not the disk: the time of a tensor
is the same for large ones, their reading comes on top. In turns, as paired ratios, of wall-clock and of CPU seconds
(the latter say more on a machine that is not idle).

Usage: python benchmarks/loading.py [--experts 256] [--layers 4] [--repeats 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import RESULTS, WORK, Json, machine, ratios, spread, stamp, write_json

FORMAT = "icsearch.bench.loading/1"
HIDDEN, EXPERT = 64, 32  # a gate, up or down projection of 8 kB in float32


def checkpoint_of(experts: int, layers: int) -> Path:
    """A random glm_moe_dsa checkpoint, one dense layer and so many with experts; made once."""
    import torch
    from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

    directory = WORK / f"experts-{experts}x{layers}"
    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        sizes: Json = {"hidden_size": HIDDEN, "intermediate_size": 128, "moe_intermediate_size": EXPERT}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 24}
        sizes |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "vocab_size": 300, "index_topk": 8}
        sizes |= {"index_head_dim": 16, "index_n_heads": 2, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
        config = GlmMoeDsaConfig(
            **sizes, n_routed_experts=experts, num_hidden_layers=layers + 1, first_k_dense_replace=1
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds, of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(directory: Path, repeats: int) -> Json:
    from transformers import AutoModelForCausalLM

    from icsearch.model import loading
    from icsearch.model.checkpoint import open_checkpoint

    source = open_checkpoint(str(directory))
    streamed = loading.load(source, device="cpu", offload="disk")

    def one_pass() -> None:
        for index in streamed.held:
            with streamed.holding(index):
                pass

    ways: dict[str, Callable[[], Any]] = {
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(directory),
        "ours": lambda: loading.load(source, device="cpu"),
        "streamed": one_pass,
    }
    rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(1 + repeats)][1:]
    found: Json = {"tensors": len(list(_names(directory)))}
    for number, clock in enumerate(("wall", "cpu")):
        taken = {name: [one[name][number] for one in rounds] for name in ways}
        found[clock] = {name: spread(values) for name, values in taken.items()}
        found[f"{clock}_ratio"] = {name: ratios(taken[name], taken["transformers"]) for name in ("ours", "streamed")}
    return found


def _names(directory: Path) -> list[str]:
    from icsearch.model.shards import Shards

    return list(Shards(sorted(directory.glob("*.safetensors"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    asked = parser.parse_args()
    import torch

    from icsearch.model.loading import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()
    found = measure(checkpoint_of(asked.experts, asked.layers), asked.repeats)
    document = {"format": FORMAT, "machine": machine(1), **stamp(), "experts": asked.experts, "layers": asked.layers}
    write_json(asked.out, {**document, **found})
    for name in ("ours", "streamed"):
        wall, cpu = (found[f"{clock}_ratio"][name]["median"] for clock in ("wall", "cpu"))
        print(f"{name}: {wall:.2f} times transformers' loading (CPU seconds: {cpu:.2f} times)")
    print(f"{found['tensors']} tensors, transformers {found['wall']['transformers']['median']:.2f} s; {asked.out}")


if __name__ == "__main__":
    main()
