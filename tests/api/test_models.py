"""The public API: a patched model is transformers' own native sharing, token for token, and comes off again."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import icsearch
import tiny
import tiny_families
from icsearch.commands.specs import Target, resolve_specs
from icsearch.core.errors import ModelError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.loading import quiet_transformers
from icsearch.model.model import DsaModel
from icsearch.model.slot import IndexerSlot

quiet_transformers()
LAYERS, PROMPT, NEW = 6, 30, 12  # prompts are longer than index_topk (8)
rng = random.Random(0)
PATTERNS = ["FSSSSS", "FSFSFS", *("F" + "".join(rng.choices("FS", k=LAYERS - 1)) for _ in range(6))]


def plain(directory: Path, **changes: Any) -> Any:
    """Transformers' own model of a checkpoint, no icsearch in it.

    Without gradients, as `icsearch.load` gives it: torch picks its matrix product by whether a weight needs one.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", **changes)
    return model.eval().requires_grad_(False)


def native_types(pattern: str) -> list[str]:
    return ["full" if letter == "F" else "shared" for letter in pattern]


def prompts(batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(1, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def generate(model: Any, input_ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, T + NEW], and the raw logits of prefill and each decode step [NEW, B, V]."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **settings,
    )
    return output.sequences, torch.stack(output.logits)


def assert_same(model: Any, other: Any, input_ids: torch.Tensor, **options: Any) -> None:
    """Equal tokens, and equal bits of every logit."""
    tokens, logits = generate(model, input_ids, **options)
    expected_tokens, expected_logits = generate(other, input_ids, **options)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def saved(model: Any, directory: Path) -> dict[str, bytes]:
    model.save_pretrained(directory)
    return files(directory)


def indexers(model: Any) -> list[Any]:
    return [layer.self_attn.indexer for layer in model.model.layers]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_equals_native_sharing(glm_checkpoint: Path, pattern: str, batch: int) -> None:
    native = plain(glm_checkpoint, indexer_types=native_types(pattern))
    assert [indexer is None for indexer in indexers(native)] == [letter == "S" for letter in pattern]
    patched = icsearch.load(str(glm_checkpoint), pattern)
    assert_same(patched, native, prompts(batch))
    with torch.inference_mode():
        forward = patched(prompts(batch), use_cache=False).logits
        assert torch.equal(forward, native(prompts(batch), use_cache=False).logits)


def test_patterns_differ_in_what_they_generate(glm_checkpoint: Path) -> None:
    """Else the comparisons above would compare nothing."""
    model = plain(glm_checkpoint)
    steps = [generate(icsearch.apply_pattern(model, pattern), prompts(1))[1] for pattern in ("FFFFFF", "FSSSSS")]
    assert not torch.equal(*steps)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_other_ways_to_generate_equal_native_sharing(glm_checkpoint: Path, options: dict[str, Any]) -> None:
    native = plain(glm_checkpoint, indexer_types=native_types("FSFSSS"))
    assert_same(icsearch.load(str(glm_checkpoint), "FSFSSS"), native, prompts(2), **options)


def test_left_padding_equals_native_sharing(glm_checkpoint: Path) -> None:
    native = plain(glm_checkpoint, indexer_types=native_types("FSFSSS"))
    patched = icsearch.load(str(glm_checkpoint), "FSFSSS")
    ids, mask = prompts(2), torch.ones_like(prompts(2))
    mask[0, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(patched.generate(ids, **settings), native.generate(ids, **settings))


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS", "FSSSSS"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cache_and_no_cache_agree(family: str, pattern: str, tmp_path: Path) -> None:
    """With so many index heads that no score is zero: else the top-k chooses among ties by shape, patched or not."""
    model = icsearch.load(str(tiny.save_checkpoint(tmp_path, family, index_n_heads=32)), pattern)
    tokens, logits = generate(model, prompts(2))
    expected_tokens, expected_logits = generate(model, prompts(2), use_cache=False)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-3)


def test_all_full_is_the_unmodified_model(family_checkpoint: Path) -> None:
    assert_same(icsearch.load(str(family_checkpoint), "FFFFFF"), plain(family_checkpoint), prompts(2))


def test_only_full_layers_run_their_indexer(family_checkpoint: Path) -> None:
    model = plain(family_checkpoint)
    ran: list[int] = []
    for position, indexer in enumerate(indexers(model)):
        indexer.register_forward_hook(lambda *_, position=position: ran.append(position))
    icsearch.apply_pattern(model, "FSFSSS")
    generate(model, prompts(1), max_new_tokens=2, min_new_tokens=2)
    assert ran == [0, 2, 0, 2]  # prefill, one decode step


def test_a_second_pattern_replaces_the_first(glm_checkpoint: Path) -> None:
    model = icsearch.load(str(glm_checkpoint), "FSSSSS")
    generate(model, prompts(1))
    assert icsearch.apply_pattern(model, Pattern("FFSFSF")) is model
    assert not any(isinstance(slot.inner, IndexerSlot) for slot in indexers(model))
    assert_same(model, icsearch.load(str(glm_checkpoint), "FFSFSF"), prompts(2))


def test_restore_gives_the_model_back(family_checkpoint: Path, tmp_path: Path) -> None:
    original, model = plain(family_checkpoint), plain(family_checkpoint)
    before, modules, state = indexers(model), list(model.named_modules()), list(model.state_dict())
    icsearch.apply_pattern(model, "FSFSSS")
    generate(model, prompts(1))
    assert list(model.state_dict()) == state
    assert saved(model, tmp_path / "patched") == saved(original, tmp_path / "original")
    assert icsearch.restore(model) is model
    assert all(now is then for now, then in zip(indexers(model), before, strict=True))
    assert list(model.named_modules()) == modules
    assert saved(model, tmp_path / "restored") == files(tmp_path / "original")
    assert_same(model, original, prompts(2))


def test_restore_of_an_unmodified_model_changes_nothing(glm_checkpoint: Path) -> None:
    model = plain(glm_checkpoint)
    before = indexers(model)
    icsearch.restore(icsearch.restore(model))
    assert all(now is then for now, then in zip(indexers(model), before, strict=True))
    assert isinstance(icsearch.restore(torch.nn.Linear(2, 2)), torch.nn.Linear)


def test_modes_and_dtypes_reach_the_indexers(glm_checkpoint: Path) -> None:
    model = icsearch.load(str(glm_checkpoint), "FSFSSS")
    icsearch.restore(model.train().to(torch.bfloat16))
    for indexer in indexers(model):
        assert indexer.training
        assert indexer.wk.weight.dtype == torch.bfloat16


def test_a_copy_has_a_store_of_its_own(glm_checkpoint: Path) -> None:
    model = icsearch.load(str(glm_checkpoint), "FSSSSS")
    twin = copy.deepcopy(model)
    stores = {id(slot.store) for slot in indexers(twin)}
    assert len(stores) == 1 and stores != {id(slot.store) for slot in indexers(model)}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "indexer" in name:
                parameter.neg_()
    assert_same(model, icsearch.load(str(glm_checkpoint), "FSSSSS"), prompts(1))
    assert not torch.equal(generate(twin, prompts(1))[1], generate(model, prompts(1))[1])
    icsearch.apply_pattern(twin, "FFFFFF")
    assert indexers(model)[0].store.pattern == Pattern("FSSSSS")


def test_two_models_do_not_touch_each_other(glm_checkpoint: Path) -> None:
    """Their forwards interleaved layer by layer, as threads would do it."""
    models = [icsearch.load(str(glm_checkpoint), pattern) for pattern in ("FSSSSS", "FFSSFS")]
    expected = [generate(model, prompts(1))[0] for model in models]
    models[0].model.layers[2].register_forward_hook(lambda *_: generate(models[1], prompts(1)) and None)
    assert torch.equal(generate(models[0], prompts(1), max_new_tokens=2, min_new_tokens=2)[0], expected[0][:, :-10])
    assert torch.equal(generate(models[1], prompts(1))[0], expected[1])


def test_layers_out_of_order_are_refused(glm_checkpoint: Path) -> None:
    """Gradient checkpointing runs layers again from the last to the first: the selection would be a later one."""
    model = icsearch.load(str(glm_checkpoint), "FSFSSF").requires_grad_(True).train()
    model.activation_checkpointing_enable()
    loss = model(prompts(1), labels=prompts(1), use_cache=False).loss
    with pytest.raises(ModelError, match="reads layer 2, but layer 5 ran last"):
        loss.backward()


def test_gradients_equal_native_sharing(glm_checkpoint: Path) -> None:
    gradients = []
    for model in (
        icsearch.load(str(glm_checkpoint), "FSFSSS"),
        plain(glm_checkpoint, indexer_types=native_types("FSFSSS")),
    ):
        model.requires_grad_(True)(prompts(2), labels=prompts(2), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_sweep_of_a_patched_model_leaves_its_pattern(glm_checkpoint: Path) -> None:
    model = icsearch.load(str(glm_checkpoint), "FSSSSS")
    expected = generate(model, prompts(1))[0]
    dsa = DsaModel(model)
    with torch.inference_mode():
        states = dsa.final_hidden_states(prompts(1), Pattern("FFFFFF"))
        assert torch.equal(states, plain(glm_checkpoint).model(prompts(1), use_cache=False).last_hidden_state)
    assert torch.equal(generate(model, prompts(1))[0], expected)


NATIVE = "FFSSFS"


@pytest.fixture(scope="module")
def native_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5.2 style: S layers in the config, and no indexer weights there."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("native"), indexer_types=native_types(NATIVE))


def test_native_shared_layers(native_checkpoint: Path, tmp_path: Path) -> None:
    original, model = plain(native_checkpoint), plain(native_checkpoint)
    attributes = [set(vars(layer.self_attn)) for layer in model.model.layers]
    before, modules = indexers(model), list(model.named_modules())
    assert_same(icsearch.apply_pattern(model, NATIVE), original, prompts(2))
    more = plain(native_checkpoint, indexer_types=native_types("FSSSFS"))
    assert_same(icsearch.apply_pattern(model, "FSSSFS"), more, prompts(2))
    assert saved(model, tmp_path / "patched") == saved(original, tmp_path / "original")
    icsearch.restore(model)
    assert all(now is then for now, then in zip(indexers(model), before, strict=True))
    assert [set(vars(layer.self_attn)) for layer in model.model.layers] == attributes
    assert list(model.named_modules()) == modules
    assert_same(model, original, prompts(1))


def test_full_on_a_native_shared_layer_is_refused(native_checkpoint: Path) -> None:
    model = plain(native_checkpoint)
    for refuse in (
        lambda: icsearch.apply_pattern(model, "FFFSFS"),
        lambda: icsearch.load(str(native_checkpoint), "FFFSFS"),
    ):
        with pytest.raises(PatternError, match="asks F of DSA layer 2, which has no indexer .* use S at 2, 3, 5"):
            refuse()
    assert not any(isinstance(indexer, IndexerSlot) for indexer in indexers(model))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("FSS", "pattern has 3 letters, the model has 6 DSA layers"),
        ("FSSSSSS", "pattern has 7 letters"),
        ("FSXSSS", "'X' at position 2"),
        ("SFFFFF", "starts with S"),
        ("", "empty pattern"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(glm_checkpoint: Path, pattern: str, message: str) -> None:
    model = icsearch.load(str(glm_checkpoint), "FSSSSS")
    with pytest.raises(PatternError, match=message):
        icsearch.apply_pattern(model, pattern)
    assert indexers(model)[0].store.pattern == Pattern("FSSSSS")
    with pytest.raises(PatternError, match=message):
        icsearch.load(str(glm_checkpoint), pattern)


def test_models_without_indexers_are_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=8, **sizes))
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes))  # its layers have another name
    for model in (llama, gpt2, torch.nn.Linear(2, 2)):
        with pytest.raises(PatternError, match=f"{type(model).__name__} has no indexers"):
            icsearch.apply_pattern(model, "FS")


def test_load_without_a_pattern_is_the_plain_model(family_checkpoint: Path) -> None:
    model = icsearch.load(str(family_checkpoint), device="cpu", dtype="float32")
    assert not any(isinstance(module, IndexerSlot) for module in model.modules())
    assert_same(model, plain(family_checkpoint), prompts(1))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, icsearch; icsearch.export_pattern, icsearch.find_pattern; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        icsearch.nonsense  # noqa: B018


def applied(model: Any) -> Pattern:
    """The pattern that a model follows."""
    (store,) = {id(slot.store): slot.store for slot in model.modules() if hasattr(slot, "store")}.values()
    return store.pattern


def test_specs_of_the_command_line_are_patterns_too(glm_checkpoint: Path, tmp_path: Path) -> None:
    PatternFile(Pattern("FSSFSF"), tuple(range(6)), "greedy").save(tmp_path / "pattern.json")
    for spec, letters in ((str(tmp_path), "FSSFSF"), ("uniform:1/2", "FSFSFS"), ("full", "FFFFFF")):
        assert applied(icsearch.load(str(glm_checkpoint), spec)).letters == letters
    with pytest.raises(PatternError, match="unknown pattern 'runs/nowhere'"):
        icsearch.load(str(glm_checkpoint), "runs/nowhere")


@pytest.mark.parametrize(
    ("family", "spec", "letters"),
    [
        ("deepseek_v4", 'vllm-ascend:{"use_index_cache":true,"index_topk_pattern":"FFS"}', "FFS"),  # of C4 layers
        ("deepseek_v4", 'atom:{"use_index_cache":true,"index_topk_pattern":"FFFSS"}', "FSS"),  # of all five
        ("deepseek_v4", "vllm-ascend:freq:2", "FFS"),
        ("hy_v4", 'transformers:{"index_topk_pattern":"FSSS"}', "FFFF"),  # its config's indexer_types win
        ("mistral_large4", 'vllm:{"use_index_cache":true,"index_topk_pattern":"FSSS"}', "FFFF"),  # outside text_config
        ("mistral_large4", 'vllm:{"text_config":{"use_index_cache":true,"index_topk_pattern":"FSSS"}}', "FSSS"),
        ("deepseek_v4", "atom:freq:2", "FSF"),  # by the number among the C4 layers
        ("deepseek_v4", "vllm:freq:2", None),
    ],
)
def test_an_engines_settings_are_read_as_an_evaluation_reads_them(
    family: str, spec: str, letters: str | None, tmp_path: Path
) -> None:
    path = tiny_families.save_checkpoint(tmp_path, family)
    layout = inspect(open_checkpoint(str(path)))
    target = Target(layout.model_type, "", layout.start_pattern, "", layers=layout.backbone)
    ways = (
        lambda: resolve_specs([spec], target)[-1].pattern,  # an evaluation's
        lambda: applied(icsearch.load(str(path), spec)),
        lambda: applied(icsearch.apply_pattern(icsearch.load(str(path)), spec)),
    )
    for way in ways:
        if letters is None:
            with pytest.raises(PatternError, match="how vLLM reads index_topk_freq for deepseek_v4 is not known"):
                way()
        else:
            assert way().letters == letters


def test_public_names_are_listed() -> None:
    assert {"load", "apply_pattern", "restore"} <= set(dir(icsearch))
