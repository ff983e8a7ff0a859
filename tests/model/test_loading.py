"""Loading: every way in which a checkpoint can be wrong is its own clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import fingerprint, open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.model import DsaModel
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import Sweeper

loading.quiet_transformers()
Edit = Callable[[Path], None]


@pytest.fixture
def copy(glm_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(glm_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers in several shards."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("sharded"), num_hidden_layers=8)


def load(directory: Path, **options: str) -> DsaModel:
    checkpoint = open_checkpoint(str(directory))
    inspect(checkpoint)
    return loading.load(checkpoint, **options)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = float("nan")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN: dict[str, tuple[Edit, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list"),
    "unknown model type": (lambda d: edit_config(d, model_type="nonesuch"), "transformers cannot use"),
    "wrong type in config": (lambda d: edit_config(d, hidden_size="wide"), "transformers cannot use"),
    "zero heads": (lambda d: edit_config(d, index_n_heads=0), "expected positive numbers"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "found no weights"),
    "pickled weights only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "found only pytorch_model.bin .* convert the checkpoint to safetensors",
    ),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "truncated or damaged"),
    "config wider than the weights": (lambda d: edit_config(d, kv_lora_rank=20), "disagree with config.json"),
    "config deeper than the weights": (
        lambda d: edit_config(d, num_hidden_layers=7, mlp_layer_types=None, layer_types=None, indexer_types=None),
        "are not in the weights",
    ),
    "missing indexer": (
        lambda d: edit_weights(d, lambda t: [t.pop(k) for k in list(t) if "layers.3.self_attn.indexer" in k]),
        "are not in the weights .* such as model.layers.3.self_attn.indexer",
    ),
    "a tensor too many": (
        lambda d: edit_weights(d, lambda t: t.update({"model.layers.1.extra": torch.zeros(2)})),
        "have no place in the model",
    ),
    "NaN weights": (lambda d: edit_weights(d, poison), r"1 of \d+ values of model.layers.2.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(copy: Path, case: str) -> None:
    edit, expected = BROKEN[case]
    edit(copy)
    with pytest.raises(ModelError, match=expected) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_shards(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "model"))
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 2
    truncate(shards[1])
    with pytest.raises(ModelError, match=f"shard {shards[1].name} is truncated or damaged"):
        load(copy)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"shard {shards[1].name} is missing"):
        load(copy)


def test_shard_without_a_promised_tensor(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    first = sorted(set(document["weight_map"].values()))[0]
    document["weight_map"]["model.layers.0.invented"] = first
    index.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="lacks model.layers.0.invented"):
        load(copy)


def test_index_cannot_lead_out_of_the_directory(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(document["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="expected a file name inside"):
        load(copy)


def test_model_without_indexers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a llama model and has no indexers"):
        inspect(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("name", ["nowhere/at/all", "/no/such/dir", "nonesuch"])
def test_no_such_checkpoint(name: str) -> None:
    with pytest.raises(ModelError, match="no checkpoint at"):
        open_checkpoint(name)


def test_hub_id_offline() -> None:
    """The hub cannot be reached in the tests: the error says so and what to do."""
    with pytest.raises(ModelError, match="the hub did not deliver zai-org/GLM-5 .* give a local directory"):
        open_checkpoint("zai-org/GLM-5")


def test_a_file_is_not_a_checkpoint(glm_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        open_checkpoint(str(glm_checkpoint / "config.json"))


def test_sharded_checkpoint_loads(sharded: Path) -> None:
    assert len(load(sharded).slots) == 8


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda", "nonsense device"])
def test_bad_device(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ModelError, match="give"):
        loading.resolve_device(device)


def test_bad_dtype(glm_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load(glm_checkpoint, dtype="int8")


def test_tokenizer_missing_and_damaged(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer in .* cannot be used"):
        loading.load_tokenizer(open_checkpoint(str(copy)))
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert loading.load_tokenizer(open_checkpoint(str(copy))) is None


NATIVE = "FFSSFS"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5.2 style: S layers in the config, and no indexer weights there."""
    types = ["full" if letter == "F" else "shared" for letter in NATIVE]
    return tiny.save_checkpoint(tmp_path_factory.mktemp("native"), indexer_types=types)


def test_native_shared_layers_are_recognised(native: Path) -> None:
    layout = inspect(open_checkpoint(str(native)))
    assert layout.native_shared == (2, 3, 5)
    assert layout.start_pattern == Pattern(NATIVE)


def test_native_shared_layers_run_as_transformers_runs_them(native: Path) -> None:
    from transformers import AutoModelForCausalLM

    dsa = load(native)
    ids = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(native, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = plain.model(ids, use_cache=False).last_hidden_state
        assert torch.equal(dsa.final_hidden_states(ids, dsa.start_pattern), expected)
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    assert Sweeper(dsa).sweep([Pattern("FSSSFS"), Pattern("FSSSSS")], batches).nll.keys() == {"FSSSFS", "FSSSSS"}


def test_native_shared_layer_cannot_be_full(native: Path) -> None:
    dsa = load(native)
    ids = torch.zeros((1, 40), dtype=torch.long)
    with pytest.raises(ModelError, match="DSA layer 2 has no indexer"):
        dsa.final_hidden_states(ids, Pattern.full(6))


def test_unused_indexer_weights_of_native_shared_layers_are_fine(copy: Path) -> None:
    types = ["full" if letter == "F" else "shared" for letter in NATIVE]
    edit_config(copy, indexer_types=types)
    assert load(copy).native_shared == [2, 3, 5]


def test_fingerprint_follows_every_byte(copy: Path) -> None:
    before = fingerprint(open_checkpoint(str(copy)))
    assert before == fingerprint(open_checkpoint(str(copy)))
    edit_weights(copy, lambda t: t["lm_head.weight"].view(-1)[-1:].add_(1e-3))
    changed = fingerprint(open_checkpoint(str(copy)))
    assert changed != before
    edit_config(copy, index_topk=4)
    assert fingerprint(open_checkpoint(str(copy))) not in (before, changed)


def test_fingerprint_samples_large_checkpoints(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icsearch.model.checkpoint.HASH_ALL_BELOW", 1)
    before = fingerprint(open_checkpoint(str(copy)))
    edit_weights(copy, lambda t: t["lm_head.weight"].view(-1)[-1:].add_(1e-3))
    assert fingerprint(open_checkpoint(str(copy))) != before
