"""Searches by several real processes: the same bits as one, however they share the work and whatever ends them."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_cli import same_result

import tiny
from icsearch.cli import app
from several import BIN, Ranks, accelerate, environment, launched, torchrun

pytestmark = pytest.mark.alone

RESTING = """
import os, pathlib
from dataclasses import replace
from icsearch.__main__ import main
from icsearch.planning import memory
from icsearch.sweep import branches

planned, put = memory.fit, branches.InCpuMemory.put

def noted(self, value):
    pathlib.Path({folder!r}, "offloaded" + os.environ["RANK"]).touch()
    return put(self, value)

memory.fit = lambda *given: replace(planned(*given), in_cpu_memory=10**9)
branches.InCpuMemory.put = noted
main()
"""
TIMEOUT = 60  # seconds without a sign of life: on a busy machine a process may come to its turn late
SHORT = 5  # where a process gives none
GRACE = 30  # more that an end may take on a busy machine


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with layers enough that a run takes some seconds."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("glm"), num_hidden_layers=8, first_k_dense_replace=4)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 sequences: in batches of 2 the last one is smaller, and with 3 data ranks the last wave is."""
    return tiny.save_tokens(tmp_path_factory.mktemp("many"), sequences=15, length=150)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokens(tmp_path_factory.mktemp("heldout"), sequences=3, seed=2)


def greedy(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1, "--num-shared", 3, "--timeout", TIMEOUT, "--quiet"]
    return ["greedy", model, "--calibration", tokens, "--out", out, *fixed, *more]


def alone(arguments: list[object]) -> None:
    """The same command by one process with one thread: this one."""
    assert app._run([str(argument) for argument in arguments], debug=True) == 0


@pytest.fixture(scope="module")
def whole(deeper: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    alone(greedy(deeper, longer, out))
    return out


def losses(run: Path) -> dict[tuple[object, ...], float]:
    """Every sum of a journal by set, measure, pattern and sequence. One that is there twice must be so bit for bit."""
    found: dict[tuple[object, ...], float] = {}
    for line in (run / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        for measure in {"nll", "kl"} & event.keys():
            for pattern, sums in zip(event["patterns"], event[measure], strict=True):
                for sequence, value in enumerate(sums, event["sequences"][0]):
                    key = (event.get("set"), measure, pattern, sequence)
                    assert found.setdefault(key, value) == value, key
    assert found
    return found


def layer_evaluations(run: Path) -> float:
    found: float = json.loads((run / "pattern.json").read_text())["cost"]["layer_evaluations"]
    return found


def assert_same(run: Path, expected: Path) -> None:
    assert same_result(run, expected)
    assert losses(run) == losses(expected)


def test_data_parallel_through_torchrun(glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    alone(greedy(glm_checkpoint, tokens, tmp_path / "one"))
    done = launched(torchrun(2), greedy(glm_checkpoint, tokens, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 of 6 layers keep their indexer") == 1  # the others say nothing
    assert_same(tmp_path / "two", tmp_path / "one")
    assert layer_evaluations(tmp_path / "two") == layer_evaluations(tmp_path / "one")  # what is kept is the same


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lm-loss", "kl"])
def test_states_that_rest_in_cpu_memory(deeper: Path, longer: Path, tmp_path: Path, objective: str) -> None:
    """As on CUDA devices without room for them: each process's own, by its own hand. Copies change no bit."""
    script = tmp_path / "script.py"
    script.write_text(RESTING.format(folder=str(tmp_path)))
    alone(greedy(deeper, longer, tmp_path / "one", "--objective", objective))
    command = [*torchrun(2), str(script), *map(str, greedy(deeper, longer, tmp_path / "two", "--objective", objective))]
    done = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("offloaded*")) == ["offloaded0", "offloaded1"]
    assert_same(tmp_path / "two", tmp_path / "one")


def test_layer_parallel(glm_checkpoint: Path, tokens: Path, heldout: Path, tmp_path: Path) -> None:
    """By KL, with a refinement; the stages are the pipeline's blocks unless others are asked for."""
    more = ["--objective", "kl", "--refine", "swaps", "--refine-on", heldout]
    alone(greedy(glm_checkpoint, tokens, tmp_path / "one", "--stages", 2, *more))
    with Ranks(2, greedy(glm_checkpoint, tokens, tmp_path / "two", "--pp", 2, *more), tmp_path / "logs") as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
        assert ranks.said(1) == ""
    assert_same(tmp_path / "two", tmp_path / "one")
    assert layer_evaluations(tmp_path / "two") == layer_evaluations(tmp_path / "one")


def test_one_is_killed_and_the_run_resumed_by_another_number(
    deeper: Path, longer: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = greedy(deeper, longer, out, "--dp", 2, "--timeout", SHORT)
    with Ranks(2, command, tmp_path / "logs") as ranks:
        ranks.wait_for_lines(out / "journal.jsonl", 8)
        ranks.processes[1].send(signal.SIGKILL)
        started = time.monotonic()
        assert ranks.wait([0]) == [1]
        assert time.monotonic() - started < SHORT + GRACE
        (line,) = ranks.complaints(0)
        assert f"rank 1 gave no sign of life for {SHORT} s" in line
    assert not (out / "pattern.json").exists()
    alone(greedy(deeper, longer, out))
    assert_same(out, whole)


def test_a_pipeline_names_the_layer_of_a_loss_that_is_not_finite(
    glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    """It is the last process that sees the loss, and another one that has the layer."""
    copy = Path(shutil.copytree(glm_checkpoint, tmp_path / "copy"))
    tiny.overflow_in(copy, 1)
    out = tmp_path / "run"
    with Ranks(2, greedy(copy, tokens, out, "--pp", 2), tmp_path / "logs") as ranks:
        assert ranks.wait() == [1, 1]
        (line,) = ranks.complaints(0)
        assert "the loss of sequence 0 under FFFFFF is nan, first seen behind decoder layer 1:" in line
    assert [line for line in (out / "journal.jsonl").read_text().splitlines() if "nan" in line.lower()] == []


def assert_refused(ranks: Ranks, text: str) -> None:
    """One line for all of them, and exit status 2 of each."""
    statuses = ranks.wait()
    assert statuses == [2] * len(statuses)
    (line,) = ranks.complaints(0)
    assert text in line
    assert [ranks.said(rank) for rank in range(1, len(statuses))] == [""] * (len(statuses) - 1)


def test_bad_input_is_one_line_and_exit_2_on_every_rank(glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    command = greedy(glm_checkpoint, tokens, tmp_path / "run", "--dp", 3)
    with Ranks(2, command, tmp_path / "logs") as ranks:
        assert_refused(ranks, "--dp 3 needs a multiple of 3 processes, and 2 were started")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pp", 2, "--stages", 5], "--stages 5 cuts 6 DSA layers into 3 blocks"),
        (["--memory", "1KB"], "memory budget 1.0 kB is too small"),
        (["--device", "cuda:0"], "--device cuda:0 is one device, and 2 processes were started"),
    ],
)
def test_more_bad_input(glm_checkpoint: Path, tokens: Path, tmp_path: Path, arguments: list[object], text: str) -> None:
    with Ranks(2, greedy(glm_checkpoint, tokens, tmp_path / "run", *arguments), tmp_path / "logs") as ranks:
        assert_refused(ranks, text)


def _without_seconds(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("seconds", "time")}


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--offload", "disk"]])
def test_an_evaluation_by_several(glm_checkpoint: Path, tokens: Path, tmp_path: Path, more: list[object]) -> None:
    """The journal is that of one process, event for event, but for how long each took."""
    patterns = ["--pattern", "uniform:1/2", "--pattern", "FSSFSS", "--pattern", "full"]
    fixed = ["--batch-size", 2, "--threads", 1, "--timeout", TIMEOUT, "--quiet", *patterns]
    one, two = (["eval", glm_checkpoint, "--calibration", tokens, "--out", tmp_path / name, *fixed] for name in "ab")
    alone(one)
    with Ranks(2, [*two, *more], tmp_path / "logs") as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
        assert ranks.said(1) == ""
    rows = [json.loads((tmp_path / name / "eval.json").read_text())["rows"] for name in "ab"]
    assert rows[0] == rows[1]
    if not more:
        assert events(tmp_path / "a") == events(tmp_path / "b")


@pytest.mark.slow
def test_a_baseline_by_several(glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    fixed = ["--batch-size", 2, "--threads", 1, "--timeout", TIMEOUT, "--quiet", "--num-shared", 3]
    one, two = (["dp-baseline", glm_checkpoint, "--calibration", tokens, "--out", tmp_path / n, *fixed] for n in "ab")
    alone(one)
    done = launched(torchrun(2), two)
    assert done.returncode == 0, done.stderr
    assert same_result(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    similarity = [[e for e in events(tmp_path / name) if e["event"] == "similarity"] for name in "ab"]
    assert similarity[0] == similarity[1] != []


def events(run: Path) -> list[dict[str, Any]]:
    lines = (run / "journal.jsonl").read_text().splitlines()
    return [_without_seconds(json.loads(line)) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "how", "more"),
    [
        (4, ["--pp", 2], ["--stages", 1]),
        (4, ["--pp", 4], ["--stages", 1, "--objective", "kl", "--memory", "3.5MB", "--block-elements", 1024]),
        (2, ["--pp", 2], ["--stages", 2]),
        (4, ["--dp", 2, "--pp", 2], ["--stages", 1, "--objective", "kl"]),
        (3, ["--dp", 3], ["--stages", 4]),
    ],
)
def test_every_grid(
    deeper: Path, longer: Path, tmp_path: Path, processes: int, how: list[object], more: list[object]
) -> None:
    alone(greedy(deeper, longer, tmp_path / "one", *more))
    done = launched(torchrun(processes), greedy(deeper, longer, tmp_path / "several", *how, *more))
    assert done.returncode == 0, done.stderr
    assert same_result(tmp_path / "several", tmp_path / "one")
    assert losses(tmp_path / "several") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("grid", [["--dp", 2], ["--pp", 2, "--stages", 1]])
def test_streamed_weights_in_every_process(
    deeper: Path, longer: Path, whole: Path, tmp_path: Path, grid: list[object]
) -> None:
    """Each process reads the layers of its block, once for each wave; a wave has batches for all of them."""
    out = tmp_path / "run"
    with Ranks(2, greedy(deeper, longer, out, *grid, "--offload", "disk"), tmp_path / "logs") as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert same_result(out, whole)
    assert losses(out) == losses(whole)
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    read = [event["weight_bytes"] for event in events if event["event"] == "losses"]
    layers = _layer_bytes(deeper)
    if grid[0] == "--dp":
        assert read[0] == 2 * layers  # both read all layers
    else:
        assert read[0] == layers  # each read half of them


def _layer_bytes(checkpoint: Path) -> int:
    """What the shards hold of decoder layers."""
    found = 0
    for shard in checkpoint.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if ".layers." in name]
        found += sum(last - first for first, last in spans)
    return found


@pytest.mark.slow
def test_through_accelerate(deeper: Path, longer: Path, whole: Path, tmp_path: Path) -> None:
    done = launched(accelerate(2), greedy(deeper, longer, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 3])
def test_the_others_say_who_is_gone(deeper: Path, longer: Path, whole: Path, tmp_path: Path, killed: int) -> None:
    """A launcher tells the others to end. The run goes on with two processes, arranged otherwise."""
    out = tmp_path / "run"
    command = greedy(deeper, longer, out, "--dp", 2, "--pp", 2, "--stages", 1)
    with Ranks(4, command, tmp_path / "logs") as ranks:
        ranks.wait_for_lines(out / "journal.jsonl", 5)
        ranks.processes[killed].send(signal.SIGKILL)
        others = [rank for rank in range(4) if rank != killed]
        for rank in others:
            ranks.processes[rank].send(signal.SIGTERM)
        assert ranks.wait(others) == [1, 1, 1]
        for rank in others:
            (line,) = ranks.complaints(rank)
            assert f"rank {rank}: " in line
            assert f"rank {killed}" in line.replace(f"rank {rank}: ", "")
    done = launched(torchrun(2), greedy(deeper, longer, out))
    assert done.returncode == 0, done.stderr
    assert_same(out, whole)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_in_time(deeper: Path, longer: Path, tmp_path: Path) -> None:
    """Stopped, it is as one behind a network that is gone; where it wakes up, it ends too."""
    out = tmp_path / "run"
    command = greedy(deeper, longer, out, "--pp", 2, "--timeout", SHORT)
    with Ranks(2, command, tmp_path / "logs") as ranks:
        ranks.wait_for_lines(out / "journal.jsonl", 5)
        ranks.processes[1].send(signal.SIGSTOP)
        started = time.monotonic()
        assert ranks.wait([0]) == [1]
        assert time.monotonic() - started < SHORT + GRACE
        assert "rank 1 gave no sign of life" in ranks.complaints(0)[0]
        ranks.processes[1].send(signal.SIGCONT)
        assert ranks.wait([1]) == [1]
        assert len(ranks.complaints(1)) == 1


@pytest.mark.slow
def test_interrupted_and_continued(deeper: Path, longer: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [part for part in greedy(deeper, longer, out, "--dp", 2) if part != "--quiet"]
    with Ranks(2, command, tmp_path / "logs") as ranks:
        ranks.wait_for_lines(out / "journal.jsonl", 5)
        ranks.processes[0].send(signal.SIGINT)  # the others hear of it
        assert ranks.wait() == [130, 130]
        assert f"interrupted; the same command continues {out}" in ranks.said(0)
        assert ranks.said(1) == ""
    with Ranks(2, greedy(deeper, longer, out, "--dp", 2), tmp_path / "logs") as ranks:
        assert ranks.wait() == [0, 0]
    assert_same(out, whole)


@pytest.mark.slow
def test_another_checkpoint_on_another_machine_is_refused(tokens: Path, tmp_path: Path) -> None:
    """Each rank starts in a folder of its own, and finds other weights under the same name."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for seed, folder in enumerate(folders):
        tiny.save_checkpoint(folder / "model", seed=seed)
    command = greedy(Path("model"), tokens, tmp_path / "run")
    with Ranks(2, command, tmp_path / "logs", folders=folders) as ranks:
        assert_refused(ranks, "rank 1 has another checkpoint under the name model than rank 0")
    assert not (tmp_path / "run" / "journal.jsonl").exists()


@pytest.mark.slow
def test_a_checkpoint_that_one_machine_lacks_is_named(tokens: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    folders[1].mkdir()
    tiny.save_checkpoint(folders[0] / "model")
    command = greedy(Path("model"), tokens, tmp_path / "run")
    with Ranks(2, command, tmp_path / "logs", folders=folders) as ranks:
        assert ranks.wait() == [2, 2]
        assert "rank 1 failed: no checkpoint at model" in ranks.complaints(0)[0]


@pytest.mark.slow
def test_out_of_memory_on_one_rank_names_it(deeper: Path, tmp_path: Path) -> None:
    """An address space somewhat smaller than what layer calls of the reference modules on long sequences have taken."""
    tokens = tiny.save_tokens(tmp_path / "long", sequences=16, length=500)
    long_calls = ["--dp", 2, "--kernels", "reference", "--batch-size", 8]
    with Ranks(2, greedy(deeper, tokens, tmp_path / "free", *long_calls), tmp_path / "logs") as ranks:
        ranks.wait_for_lines(tmp_path / "free" / "journal.jsonl", 2)
        status = Path(f"/proc/{ranks.processes[1].pid}/status").read_text()
        (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmPeak"))
    limit = int(kilobytes) * 1024 - (100 << 20)  # one call takes 8 x 500^2 x 25 x 4 bytes = 200 MB
    limited = partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))  # it goes to the process pickled
    command = greedy(deeper, tokens, tmp_path / "run", *long_calls)
    with Ranks(2, command, tmp_path / "logs", {1: limited}) as ranks:
        assert ranks.wait() == [1, 1]
        for rank in range(2):
            (line,) = ranks.complaints(rank)
            assert "rank 1" in line
            assert "out of memory" in line
            assert "--memory" in line


def table(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1, "--num-shared", 3, "--draws", 2, "--timeout", TIMEOUT, "--quiet"]
    return ["fisher", model, "--calibration", tokens, "--out", out, *fixed, *more]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The events of a run's table."""
    found = [event for event in events(run) if event["event"] == "fisher"]
    assert found
    return found


@pytest.mark.parametrize("how", ["--dp", "--pp"])
def test_a_table_by_several(glm_checkpoint: Path, tokens: Path, tmp_path: Path, how: str) -> None:
    """Its bits, its cost and what comes of it are those of one process."""
    more = ["--stages", 2]
    alone(table(glm_checkpoint, tokens, tmp_path / "one", *more))
    with Ranks(2, table(glm_checkpoint, tokens, tmp_path / "two", *more, how, 2), tmp_path / "logs") as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
        assert ranks.said(1) == ""
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    assert same_result(tmp_path / "two", tmp_path / "one")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "how", "more"),
    [
        (4, ["--pp", 4], []),
        (4, ["--dp", 2, "--pp", 2], ["--block-elements", 1024]),
        (3, ["--dp", 3], ["--offload", "disk"]),
        (2, ["--pp", 2], ["--offload", "disk"]),
        (2, ["--pp", 2], ["--kernels", "reference"]),
    ],
)
def test_a_table_on_every_grid(
    deeper: Path, longer: Path, tmp_path: Path, processes: int, how: list[object], more: list[object]
) -> None:
    """15 sequences in batches of 2; with streamed weights each process reads its layers twice for each wave."""
    stages = ["--stages", 4 if how[0] == "--pp" and how[1] == 4 else 2 if "--pp" in how else 1]
    kernels = [option for option in more if option not in ("--offload", "disk")]
    alone(table(deeper, longer, tmp_path / "one", *stages, *kernels))
    with Ranks(processes, table(deeper, longer, tmp_path / "two", *stages, *how, *more), tmp_path / "logs") as ranks:
        assert ranks.wait() == [0] * processes, ranks.said(0)
    found = rows_of(tmp_path / "two")
    read = [event.pop("weight_bytes", 0) for event in found]
    assert found == rows_of(tmp_path / "one")
    if "disk" in more:
        waves = 3 if how[0] == "--dp" else -(-8 // 2)  # of dp one each; of pp two batches, by what a pipeline shares
        assert sum(read) == 2 * waves * _layer_bytes(deeper)
    else:
        assert not any(read)
    assert same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--dp", "--pp"])
def test_a_table_goes_on_where_a_process_was_killed(deeper: Path, longer: Path, tmp_path: Path, how: str) -> None:
    alone(table(deeper, longer, tmp_path / "one", "--stages", 2))
    out, more = tmp_path / "run", ["--stages", 2, how, 2, "--timeout", SHORT]
    with Ranks(2, table(deeper, longer, out, *more), tmp_path / "logs") as ranks:
        ranks.wait_for_lines(out / "journal.jsonl", 2)
        ranks.processes[1].send(signal.SIGKILL)
        assert ranks.wait([0]) == [1]
    alone(table(deeper, longer, out, "--stages", 2))
    assert rows_of(out) == rows_of(tmp_path / "one")
    assert same_result(out, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--dp", "--pp"])
def test_a_table_that_is_not_finite_names_layer_and_sequence(longer: Path, tmp_path: Path, how: str) -> None:
    model = tiny.save_checkpoint(tmp_path / "model", num_hidden_layers=4, shard_size="5GB")
    tiny.overflow_in(model, 3)
    with Ranks(2, table(model, longer, tmp_path / "run", how, 2), tmp_path / "logs") as ranks:
        assert_refused(ranks, "the states behind decoder layer 3 are not finite in sequence")
