"""SPECs: every form, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from engine_files import part_read
from icsearch.commands.specs import Target, resolve_specs
from icsearch.core.errors import PatternError
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile, Step
from icsearch.engines.export import export
from icsearch.engines.table import ENGINES
from icsearch.model.config import Backbone

TARGET = Target("glm_moe_dsa", "this", Pattern("FFFF"), "here")
FILE = PatternFile(
    Pattern("FSSF"),
    (0, 1, 2, 3),
    "greedy",
    steps=(Step(1, 2, 2.5, 0.1, 0.01, "FFSF"), Step(2, 1, 2.75, 0.35, 0.02, "FSSF")),
    model={"model_type": "glm_moe_dsa", "fingerprint": "this"},
    calibration={"fingerprint": "there"},
)


def saved(path: Path, file: PatternFile = FILE) -> str:
    path.mkdir(parents=True, exist_ok=True)
    file.save(path / "pattern.json")
    return str(path / "pattern.json")


def letters(*specs: str, target: Target = TARGET, force: bool = False) -> list[str]:
    return [named.pattern.letters for named in resolve_specs(specs, target, force=force)][1:]


def test_every_form(tmp_path: Path) -> None:
    path = saved(tmp_path / "run")
    assert letters("uniform:1/2", "fssf", path, str(tmp_path / "run"), f"{path}@3/4") == [
        "FSFS",
        "FSSF",
        "FSSF",
        "FFSF",
    ]
    assert resolve_specs([], TARGET)[0].name == "full"
    assert letters("full") == []  # it is always there


def test_retentions_expand_every_run(tmp_path: Path) -> None:
    found = resolve_specs([saved(tmp_path / "run")], TARGET, [Fraction(3, 4), Fraction(1, 2)])
    assert [named.pattern.letters for named in found] == ["FFFF", "FFSF", "FSSF"]
    assert found[1].name == "greedy run @3/4"


def test_in_sample_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "run")
    assert [named.in_sample for named in resolve_specs([path], TARGET)] == [False, False]
    same = replace(TARGET, calibration_fingerprint="there")
    assert [named.in_sample for named in resolve_specs([path], same)] == [False, True]


def test_other_models_are_refused_unless_forced(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", replace(FILE, model={"model_type": "deepseek_v32"}))
    with pytest.raises(PatternError, match="model type deepseek_v32, this model has glm_moe_dsa"):
        letters(path)
    (named,) = resolve_specs([path], TARGET, force=True)[1:]
    assert named.foreign
    with pytest.raises(PatternError, match="layers 78, this model has 4.*cannot be run here"):
        letters("published:glm-5-1-4", force=True)


def test_other_weights_are_labelled(tmp_path: Path) -> None:
    path = saved(tmp_path / "run")
    (named,) = resolve_specs([path], replace(TARGET, fingerprint="other"))[1:]
    assert named.foreign


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("FSXF", "'X' at position 2"),
        ("FSS", "3 letters, the model has 4"),
        ("SFFF", "starts with S"),
        ("uniform:2", "out of range"),
        ("uniform:", "not a number"),
        ("published:gpt", "known are .*glm-4.7-flash"),
        ("published:../glm-5-1-4", "no published pattern"),
        ("nowhere.json", "unknown pattern"),
        ("", "unknown pattern"),
    ],
)
def test_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(PatternError, match=words) as caught:
        letters(spec)
    assert "\n" not in str(caught.value)


def test_full_where_the_checkpoint_shares(tmp_path: Path) -> None:
    native = replace(TARGET, start=Pattern("FFSF"))
    with pytest.raises(PatternError, match="asks F of layer 2"):
        letters("uniform:1/2", target=native)
    assert letters("FSSF", target=native) == ["FSSF"]


def test_same_name_twice_gets_its_letters(tmp_path: Path) -> None:
    first = saved(tmp_path / "a" / "run")
    second = saved(tmp_path / "b" / "run", replace(FILE, pattern=Pattern("FFSF"), steps=()))
    names = [named.name for named in resolve_specs([first, second], TARGET)]
    assert names == ["full", "greedy run FSSF", "greedy run FFSF"]


def test_shared_sequences_are_in_sample_too(tmp_path: Path) -> None:
    """Other batches that hold some of the searched sequences do not make a pattern held-out."""
    file = replace(FILE, calibration={"fingerprint": "there", "sequences": ["aa", "bb"]})
    path = saved(tmp_path / "run", file)
    for sequences, expected in ((frozenset({"bb", "cc"}), True), (frozenset({"cc"}), False)):
        (named,) = resolve_specs([path], replace(TARGET, sequences=sequences))[1:]
        assert named.in_sample == expected


def test_a_run_without_steps_holds_one_pattern_only(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", replace(FILE, steps=(), method="dp-baseline"))
    assert letters(f"{path}@1/2") == ["FSSF"]
    with pytest.raises(PatternError, match="no pattern with 1 F layers"):
        letters(f"{path}@1/4")


# --- what an engine is given ----------------------------------------------------------------------------------------

OVERRIDES = '{"use_index_cache": true, "index_topk_pattern": "FSSF"}'


def test_settings_of_an_engine_are_specs(tmp_path: Path) -> None:
    config = {"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 1}
    write_object(tmp_path / "config.json", config)
    path = str(tmp_path / "config.json")
    vllm = f"vllm:{OVERRIDES}"
    specs = [vllm, f"atom: {OVERRIDES}", "vllm:freq:3", "megatron:freq:3", f"transformers:{path}", f"vllm:{tmp_path}"]
    assert letters(*specs) == ["FSSF", "FSSF", "FFSS", "FSSF", "FSFS", "FSFS"]
    (named,) = resolve_specs([vllm], TARGET)[1:]
    assert (named.name, named.method) == ("as vLLM", "imported")
    assert named.notes == ()
    off = '{"use_index_cache": false, "index_topk_pattern": "FSSF"}'
    assert letters(f"vllm:{off}", f"atom:{off}") == ["FSSF", "FFFF"]  # vLLM does not read the switch


def test_an_engine_must_be_named(tmp_path: Path) -> None:
    write_object(tmp_path / "config.json", {"model_type": "glm_moe_dsa", "num_hidden_layers": 4})
    for spec in (OVERRIDES, "freq:3", str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(PatternError, match="none is named: give --engine NAME, or NAME: in front, one of .*vllm"):
            letters(spec)


def test_a_command_line_is_no_spec() -> None:
    with pytest.raises(PatternError, match="a command line is not read here: give the JSON object behind"):
        letters(f"vllm serve MODEL --hf-overrides '{OVERRIDES}'")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_export_prints_is_a_spec(engine: str) -> None:
    file = replace(FILE, pattern=Pattern("FFSS"), model={"model_type": "glm_moe_dsa", "num_hidden_layers": 4})
    assert letters(f"{engine}:{part_read(export(file, engine))}") == ["FFSS"]


def test_an_engines_letters_count_decoder_layers() -> None:
    target = replace(TARGET, start=Pattern("FFF"), layers=Backbone(6, (1, 3, 4), "glm_moe_dsa"))
    assert letters('vllm:{"use_index_cache": true, "index_topk_pattern": "SFSSFS"}', target=target) == ["FSF"]
    assert letters("vllm:freq:4", target=target) == ["FSS"]  # FFSSSF over all six


def test_the_config_of_another_model_is_refused_unless_forced(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v32", "num_hidden_layers": 4, "index_topk_pattern": "FSSF"}
    write_object(tmp_path / "config.json", config)
    with pytest.raises(PatternError, match="model type deepseek_v32, this model has glm_moe_dsa"):
        letters(f"vllm:{tmp_path}")
    assert letters(f"vllm:{tmp_path}", force=True) == ["FSSF"]
    write_object(tmp_path / "config.json", {**config, "num_hidden_layers": 5})
    with pytest.raises(PatternError, match="5 letters|has 5 layers, the model 4|has 4 letters"):
        letters(f"vllm:{tmp_path}", force=True)


def test_full_of_an_engine_where_the_checkpoint_shares() -> None:
    with pytest.raises(PatternError, match="asks F of layer 2"):
        letters("vllm:freq:2,offset:3", target=replace(TARGET, start=Pattern("FFSF"), model_type=""))
