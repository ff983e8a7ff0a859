"""A model run layer by layer: what the layers are called with, and which of them a process has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from icsearch.core.errors import ModelError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.families.calls import LayerCall
from icsearch.model.kernels import find_rotation, random_copy
from icsearch.model.model import DsaModel

loading.quiet_transformers()


def heard_calls(dsa: DsaModel, input_ids: torch.Tensor) -> list[LayerCall]:
    """The slow, obvious twin: a whole forward of the model's own, and what its layers were really called with."""
    calls: list[LayerCall] = []
    cheapest = Pattern(FULL + SHARED * (len(dsa.slots) - 1))
    with dsa.running(cheapest) as store:

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = {name: None if value is store.selection else value for name, value in kwargs.items()}
            calls.append(LayerCall(args[1:], own))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in dsa.layers]
        dsa._decode(input_ids)
        for hook in hooks:
            hook.remove()
    return calls


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, (tuple, list)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("block_elements", [None, 2000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 40), (2, 33)])
def test_calls_without_weights_are_the_models_own(
    family_checkpoint: Path, block_elements: int | None, dtype: str, shape: tuple[int, int]
) -> None:
    """Two sequences: a family that unpacks what a layer returns must not unpack the batch."""
    source = open_checkpoint(str(family_checkpoint))
    dsa = loading.load(source, dtype=dtype, block_elements=block_elements)
    ids = torch.randint(0, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    found, expected = dsa.capture_calls(ids), heard_calls(dsa, ids)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.kwargs.keys() == other.kwargs.keys()
        assert same(one.args, other.args)
        assert all(same(one.kwargs[name], other.kwargs[name]) for name in other.kwargs), other.kwargs.keys()
    assert all("forward" not in vars(layer) for layer in dsa.layers)


def test_calls_need_no_layer(family_checkpoint: Path) -> None:
    source, ids = open_checkpoint(str(family_checkpoint)), torch.zeros((2, 20), dtype=torch.long)
    whole, middle = loading.load(source), loading.load(source, layers=range(2, 4))
    for one, other in zip(middle.capture_calls(ids), whole.capture_calls(ids), strict=True):
        assert same(list(one.kwargs.values()), list(other.kwargs.values()))


def test_a_whole_forward_without_all_layers_is_refused(glm_checkpoint: Path) -> None:
    dsa = loading.load(open_checkpoint(str(glm_checkpoint)), layers=range(0, 3))
    with pytest.raises(ModelError, match="needs all weights on the device"):
        dsa.final_hidden_states(torch.zeros((1, 20), dtype=torch.long), dsa.start_pattern)


def test_the_layout_of_rotations_does_not_follow_weights(family_checkpoint: Path) -> None:
    dsa = loading.load(open_checkpoint(str(family_checkpoint)), dtype="bfloat16")
    indexer: Any = dsa.slots[0].inner
    before = {name: tensor.clone() for name, tensor in indexer.state_dict().items()}
    copied = random_copy(indexer)
    assert find_rotation(copied) is find_rotation(indexer)
    assert all(tensor.dtype == torch.float32 for tensor in copied.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in indexer.state_dict().items())
