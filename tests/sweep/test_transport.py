"""What goes from one process of a pipeline to the next: every tensor once, and the same branches come out."""

from __future__ import annotations

import json

import pytest
import torch

from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model.families.calls import Handed
from icsearch.sweep.branches import Branch
from icsearch.sweep.distributed.transport import Packet, _pack, _unpack


def branches() -> list[Branch]:
    """Two batches; the second branch has borrowed the selections of the first, the third has none yet."""
    selections = [torch.randint(0, 9, (2, 5, 3), dtype=torch.int32) for _ in range(2)]
    states = [[torch.randn(2, 5, 4, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)]
    return [
        Branch([Pattern("FFFF"), Pattern("FFFS")], states[0], selections),
        Branch([Pattern("FFSF")], states[1], selections),
        Branch([Pattern("FSFF")], states[2], [None, None]),
    ]


def test_packed_and_unpacked() -> None:
    packet = Packet(branches(), 12, 34, ("a note",))
    header, tensors = _pack(packet)
    assert len(tensors) == 6 + 2  # shared selections go once
    header = json.loads(json.dumps(header))
    assert [(list(t.shape), f"torch.{dtype}") for t, (_, dtype) in zip(tensors, header["tensors"], strict=True)] == [
        (shape, str(t.dtype)) for t, (shape, _) in zip(tensors, header["tensors"], strict=True)
    ]
    found = _unpack(header, [tensor.clone() for tensor in tensors])
    assert (found.layer_sequences, found.bytes_read, found.notes) == (12, 34, ("a note",))
    for one, other in zip(found.branches, packet.branches, strict=True):
        assert one.patterns == other.patterns
        assert all(map(torch.equal, one.hidden_states, other.hidden_states))
    first, second, third = (branch.selections for branch in found.branches)
    assert all(map(torch.equal, first, packet.branches[0].selections))
    assert [id(selection) for selection in first] == [id(selection) for selection in second]
    assert third == [None, None]


def test_a_table_goes_forth_and_back() -> None:
    """States and what is handed on beside them, selections with the types that they had, cotangents; in their nests."""
    borrowed, states = torch.ones(2, 3, dtype=torch.uint8), torch.randn(2, 5)
    latents = Handed(None, {"shared": {"rope": (torch.randn(2), torch.randn(3))}})
    forth = [[states, latents, [[borrowed, torch.int32], [borrowed, torch.int32]]], [states, None, []]]
    header, tensors = _pack(Packet([], passes=forth))
    assert len(tensors) == 4
    (first, second) = _unpack(json.loads(json.dumps(header)), tensors).passes
    assert torch.equal(first[0], states) and torch.equal(second[0], states) and second[1:] == [None, []]
    assert isinstance(first[1], Handed) and first[1].selection is None
    assert all(map(torch.equal, first[1].more["shared"]["rope"], latents.more["shared"]["rope"]))
    (one, dtype), (other, _) = first[2]
    assert one is other and torch.equal(one, borrowed) and dtype == torch.int32
    back = [[[torch.randn(2), torch.randn(3)], [torch.randn(2), torch.randn(3)]]]
    header, tensors = _pack(Packet([], passes=back))
    found = _unpack(json.loads(json.dumps(header)), tensors).passes
    for cotangent, other in zip(*found, *back, strict=True):
        assert all(map(torch.equal, cotangent, other)) and len(cotangent) == len(other) == 2


def test_no_branches_are_a_packet_too() -> None:
    """Where all branches of a sweep begin behind a block, that block has nothing to hand on."""
    header, tensors = _pack(Packet([], 0))
    assert (_unpack(header, tensors).branches, tensors) == ([], [])


def test_a_selection_that_is_no_tensor_is_refused() -> None:
    branch = Branch([Pattern("FF")], [torch.zeros(1)], [{"mask": 1}])
    with pytest.raises(ModelError, match="a selection of type dict cannot go to another process: give --pp 1"):
        _pack(Packet([branch], 0))
