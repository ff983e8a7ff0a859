"""The second-order table: the same bits however it is made, and what is refused; its twin: tests of families."""

from __future__ import annotations

import gc
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import native_fixtures
import tiny
from icsearch.cli import app
from icsearch.core.errors import IcsearchError
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.model.shape import DISK, RESIDENT
from icsearch.planning import memory
from icsearch.runs.journal import Event
from icsearch.sweep import fisher
from icsearch.sweep.branches import Batch, InCpuMemory, OnDisk, cut_batches, cut_waves
from icsearch.sweep.fisher import DRAWING_ROWS, FisherSweep, draw_labels, drawing_numbers

CPU = torch.device("cpu")
LAYERS, SEQUENCES, DRAWS, SEED = 6, 5, 2, 7


def load(directory: Path, offload: str = RESIDENT, block_elements: int | None = 2**12) -> DsaModel:
    return loading.load(open_checkpoint(str(directory)), device="cpu", block_elements=block_elements, offload=offload)


@pytest.fixture(scope="module")
def dsa(glm_checkpoint: Path) -> DsaModel:
    return load(glm_checkpoint)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Of 2, 2 and 1 sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, tiny.VOCABULARY, (SEQUENCES, 40), generator=generator)
    return cut_batches(ids, torch.rand(ids.shape, generator=generator) < 0.8, 2)


def made(sweep: FisherSweep, batches: list[Batch], per_wave: int = 1) -> list[Event]:
    """The events of all waves, but for their times."""
    events = [event for wave in cut_waves(batches, per_wave) for event in sweep.events(wave, lambda _: None)]
    return [{name: value for name, value in event.items() if name != "seconds"} for event in events]


@pytest.fixture(scope="module")
def expected(dsa: DsaModel, batches: list[Batch]) -> list[Event]:
    return made(FisherSweep(dsa, DRAWS, SEED), batches)


def test_the_shapes_of_a_table(expected: list[Event]) -> None:
    assert [event["sequences"] for event in expected] == [[0, 2], [2, 4], [4, 5]]
    for event in expected:
        sequences = event["sequences"][1] - event["sequences"][0]
        assert [len(draws) for draws in event["drawn"]] == [DRAWS] * sequences
        triangles = [*event["true"], *(triangle for draws in event["drawn"] for triangle in draws)]
        assert len(event["true"]) == sequences
        assert all([len(row) for row in triangle] == list(range(LAYERS)) for triangle in triangles)
        numbers = [value for triangle in triangles for row in triangle for value in row]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("per_wave", [2, 3])
def test_waves_change_no_bit(dsa: DsaModel, batches: list[Batch], expected: list[Event], per_wave: int) -> None:
    assert made(FisherSweep(dsa, DRAWS, SEED), batches, per_wave) == expected


def test_another_order_or_another_beginning_changes_no_bit(
    dsa: DsaModel, batches: list[Batch], expected: list[Event]
) -> None:
    """As where a run goes on behind what its journal has."""
    assert made(FisherSweep(dsa, DRAWS, SEED), batches[::-1]) == expected[::-1]
    assert made(FisherSweep(dsa, DRAWS, SEED), batches[1:], 2) == expected[1:]


@pytest.mark.parametrize("per_wave", [1, 3])
def test_places_change_no_bit(
    dsa: DsaModel, batches: list[Batch], expected: list[Event], tmp_path: Path, per_wave: int
) -> None:
    for place in (Copying(CPU), OnDisk(tmp_path / "states", CPU)):
        assert made(FisherSweep(dsa, DRAWS, SEED, place), batches, per_wave) == expected
        if isinstance(place, Copying):
            assert place.fetched > 100


class Copying(InCpuMemory):
    """Stands for a device apart: only copies enter and leave a layer call."""

    fetched = 0

    def fetch(self, value: Any) -> Any:
        self.fetched += value is not None
        return torch.clone(value) if isinstance(value, torch.Tensor) else super().fetch(value)


def test_files_go_with_their_states(dsa: DsaModel, batches: list[Batch], tmp_path: Path) -> None:
    """Also those of a run that was killed, and those of one that failed."""
    directory = tmp_path / "states"
    directory.mkdir()
    (directory / "0").write_bytes(b"of a run that was killed")
    place = Counting(directory, CPU)
    assert not list(directory.iterdir())
    made(FisherSweep(dsa, DRAWS, SEED, place), batches, 3)
    # each of three batches: the embedding, a state and a selection of each layer; one of each pair is read off again
    assert place.most >= 3 * (2 * LAYERS + 1)
    assert not list(directory.iterdir())
    with pytest.raises(ZeroDivisionError):
        FisherSweep(dsa, DRAWS, SEED, place).run(batches, lambda _: 1 // 0)
    gc.collect()
    assert not list(directory.iterdir())


class Counting(OnDisk):
    """Files at once, at most."""

    most = 0

    def put(self, value: Any) -> Any:
        placed = super().put(value)
        self.most = max(self.most, len(list(self._directory.iterdir())))
        return placed


@pytest.mark.parametrize("together", [1, 2])
def test_a_run_whose_entries_are_on_disk(
    glm_checkpoint: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """In a directory of the run, which is gone when it is done."""
    planned, seen = memory.plan_table, list[int]()
    put = OnDisk.put

    def noted(place: OnDisk, value: Any) -> Any:
        seen.append(len(list((tmp_path / "disk" / "entries").iterdir())))
        return put(place, value)

    def run(out: Path) -> list[Event]:
        arguments = ["fisher", glm_checkpoint, "--calibration", tokens, "--out", out, "--num-shared", 2, "--draws", 2]
        assert app._run([*map(str, arguments), "--batch-size", "2", "--threads", "1", "--quiet"], debug=True) == 0
        lines = (out / "journal.jsonl").read_text().splitlines()
        found = [event for event in map(json.loads, lines) if event["event"] == "fisher"]
        return [{name: value for name, value in event.items() if name != "seconds"} for event in found]

    expected = run(tmp_path / "device")
    monkeypatch.setattr(
        memory, "plan_table", lambda *given: replace(planned(*given), place=DISK, batches_per_wave=together)
    )
    monkeypatch.setattr(OnDisk, "put", noted)
    assert run(tmp_path / "disk") == expected
    assert max(seen) >= 2 * LAYERS * together
    assert not (tmp_path / "disk" / "entries").exists()


def test_parts_of_an_event_are_put_together(expected: list[Event]) -> None:
    """Of two processes, each with the rows of half the layers."""
    for event in expected:
        parts = []
        for held in (range(3), range(3, LAYERS)):
            own = {
                "true": [[row if layer in held else [] for layer, row in enumerate(t)] for t in event["true"]],
                "drawn": [
                    [[row if layer in held else [] for layer, row in enumerate(t)] for t in draws]
                    for draws in event["drawn"]
                ],
            }
            parts.append({**event, **own, "layer_sequences": len(held), "weight_bytes": 7, "notes": [str(held.start)]})
        joined = fisher.join_events(parts)
        assert joined == {**event, "layer_sequences": LAYERS, "weight_bytes": 14, "notes": ["0", "3"]}


@pytest.mark.parametrize("letters", ["FFFFFF", "FSFFSS"])
def test_layers_in_two_parts(tmp_path: Path, batches: list[Batch], letters: str) -> None:
    """As two processes have them, with states on disk; also of a checkpoint whose last layers share by themselves."""
    types = ["full" if letter == "F" else "shared" for letter in letters]
    source = open_checkpoint(str(native_fixtures.save_native(tmp_path / "model", "glm_moe_dsa", indexer_types=types)))
    expected = made(FisherSweep(loading.load(source, block_elements=2**12), DRAWS, SEED), batches, 3)
    first, last = (
        FisherSweep(
            loading.load(source, block_elements=2**12, layers=layers), DRAWS, SEED, OnDisk(tmp_path / name, CPU)
        )
        for name, layers in (("first", range(2)), ("last", range(2, LAYERS)))
    )
    through = first.begin(batches)
    first.forth(through, lambda _: None)
    arrived = last.take_up(batches, first.hand_on(through))
    assert len(set(arrived[0].selections)) == letters[:2].count("F")
    last.forth(arrived, lambda _: None)
    last.turn(arrived)
    last.back(arrived, lambda _: None)
    first.take_back(through, last.hand_back(arrived))
    first.back(through, lambda _: None)
    parts = [sweep.events_of(passes, [], 0.0, 0) for sweep, passes in ((first, through), (last, arrived))]
    joined = [fisher.join_events(part) for part in zip(*parts, strict=True)]
    assert [{name: value for name, value in event.items() if name != "seconds"} for event in joined] == expected
    assert not [*(tmp_path / "first").iterdir(), *(tmp_path / "last").iterdir()]
    if letters != "FFFFFF":
        assert all(triangle[4][3] == triangle[5][3] == triangle[1][0] == 0 for triangle in joined[0]["true"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.bool])
def test_what_is_on_disk_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    place = OnDisk(tmp_path / "states", CPU)
    value = torch.randn(3, 5, 4).mul(9).to(dtype).transpose(0, 1)[1:]
    placed = place.put(value)
    assert [path.stat().st_size for path in (tmp_path / "states").iterdir()] == [value.numel() * value.element_size()]
    for _ in range(2):
        assert torch.equal(place.fetch(placed), value)
    assert place.fetch(place.put(None)) is None
    (file,) = (tmp_path / "states").iterdir()
    file.write_bytes(b"cut")
    with pytest.raises(IcsearchError, match="shorter than it was written"):
        place.fetch(placed)


@pytest.mark.parametrize("per_wave", [1, 3])
def test_streamed_weights(glm_checkpoint: Path, batches: list[Batch], expected: list[Event], per_wave: int) -> None:
    """The same bits; each layer is read once forth and once back for each wave, however many batches it has."""
    streamed = load(glm_checkpoint, DISK)
    read: list[int] = []
    own = streamed.weights._fetch  # type: ignore[attr-defined]
    streamed.weights._fetch = lambda index: read.append(index) or own(index)  # type: ignore[attr-defined]
    events = made(FisherSweep(streamed, DRAWS, SEED), batches, per_wave)
    waves = -(-len(batches) // per_wave)
    turns = [*range(LAYERS), *reversed(range(LAYERS))]
    assert read == turns * waves
    layers = sum(tensor.nbytes for layer in load(glm_checkpoint).layers for tensor in layer.state_dict().values())
    assert sum(event.pop("weight_bytes", 0) for event in events) == 2 * layers * waves
    assert events == expected


def test_more_draws_leave_the_others_as_they_are(dsa: DsaModel, batches: list[Batch], expected: list[Event]) -> None:
    more = made(FisherSweep(dsa, DRAWS + 2, SEED), batches)
    for event, before in zip(more, expected, strict=True):
        assert [draws[:DRAWS] for draws in event["drawn"]] == before["drawn"]
        assert event["true"] == before["true"]
        assert all(draws[DRAWS] not in draws[:DRAWS] for draws in event["drawn"])


def test_another_seed_draws_others(dsa: DsaModel, batches: list[Batch], expected: list[Event]) -> None:
    other = made(FisherSweep(dsa, DRAWS, SEED + 1), batches)
    assert all(one["drawn"] != before["drawn"] for one, before in zip(other, expected, strict=True))
    assert [one["true"] for one in other] == [before["true"] for before in expected]


def test_what_does_not_count_has_no_gradient(dsa: DsaModel) -> None:
    """Nothing counted: all zeros. What is counted in two parts adds up, but for rounding."""
    ids = torch.randint(0, tiny.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(4))
    half = torch.arange(40).unsqueeze(0) % 2 == 0

    def numbers(counted: torch.Tensor) -> Any:
        (event,) = made(FisherSweep(dsa, DRAWS, SEED), cut_batches(ids, counted, 1))
        triangles = [*event["drawn"][0], event["true"][0]]
        return np.array([value for triangle in triangles for row in triangle for value in row])

    parts, whole = numbers(half) + numbers(~half), numbers(torch.ones_like(half))
    assert not numbers(torch.zeros_like(half)).any()
    assert np.abs(numbers(half) - whole).max() > 0.1 * np.abs(whole).max()
    assert np.abs(parts - whole).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("pair_cost", [0.0, 0.31])
def test_the_cost_is_counted(dsa: DsaModel, batches: list[Batch], pair_cost: float) -> None:
    """A run forth, one again, a backward for each draw and for the text's labels; and pairs as they are weighed."""
    heard: list[int] = []
    events = [
        event
        for wave in cut_waves(batches, 2)
        for event in FisherSweep(dsa, DRAWS, SEED, pair_cost=pair_cost).events(wave, heard.append)
    ]
    for event in events:
        sequences = event["sequences"][1] - event["sequences"][0]
        pairs = sum(round(sequences * (2 + DRAWS + layer * pair_cost)) for layer in range(LAYERS))
        assert event["layer_sequences"] == sequences * LAYERS + pairs
    assert sum(heard) == sum(event["layer_sequences"] for event in events)


@pytest.mark.parametrize(
    ("where", "call", "line"),
    [  # of three batches, of 2 sequences and once 1, call by call: the second batch at layer 3, 2 or 4, or at the head
        ("run_layer", 3 * 3 + 1, "the states behind decoder layer 3 are not finite in sequence 3"),
        ("differentiate", 3 * 3 + 1, "a gradient at decoder layer 2 is not finite in sequence 3"),
        ("_inner", (3 * 5 + 4) * (DRAWS + 1), "a number of DSA layer 4 is not finite in sequence 3"),
        ("label_cotangents", 1, "a gradient at the LM head is not finite in sequence 3"),
    ],
)
def test_what_is_not_finite_is_named(
    dsa: DsaModel, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, where: str, call: int, line: str
) -> None:
    owner: Any = dsa if where == "run_layer" else fisher
    own, calls = getattr(owner, where), itertools.count()

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        tensor = {"differentiate": lambda: found.entry[-1][0], "label_cotangents": lambda: found[-1]}.get(where)
        if next(calls) == call:
            (tensor() if tensor else found)[1].view(-1)[-1] = float("nan")
        return found

    monkeypatch.setattr(owner, where, spoilt)
    with pytest.raises(IcsearchError, match=line):
        FisherSweep(dsa, DRAWS, SEED).run(batches)


def test_labels_follow_the_model(dsa: DsaModel) -> None:
    """Chi-square over a small vocabulary; numbers of positions, sequences, draws and seeds have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    positions, draws = 3 * DRAWING_ROWS - 5, 200
    probabilities = torch.randn(1, 7, generator=generator).softmax(-1).repeat(positions, 1)
    uniform = torch.from_numpy(drawing_numbers(SEED, 4, draws, positions))
    labels = draw_labels(probabilities, uniform)
    assert labels.shape == (draws, positions)
    observed = torch.bincount(labels.flatten(), minlength=7).double()
    wanted = probabilities[0].double() * draws * positions
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    assert 0.5 < chi_square < 22.5  # 6 degrees of freedom: 0.2% and 0.1% lie outside
    certain = torch.eye(7)[torch.arange(positions) % 7]
    assert torch.equal(draw_labels(certain, uniform), (torch.arange(positions) % 7).expand(draws, -1))


def test_drawing_numbers_follow_from_sequence_and_position_alone() -> None:
    numbers = drawing_numbers(SEED, 4, 2, 30)
    assert np.array_equal(numbers, drawing_numbers(SEED, 4, 5, 90)[:2, :30])
    others = [drawing_numbers(SEED, 5, 2, 30), drawing_numbers(SEED + 1, 4, 2, 30)]
    assert not np.isin(numbers, np.concatenate(others)).any()
    assert len(np.unique(numbers)) == numbers.size
    assert (numbers >= 0).all() and (numbers < 1).all()
