"""Sizes of blocks, and which attention is the cheaper one."""

from __future__ import annotations

from icsearch.model.shape import MIN_BLOCK, block_size, default_batch_size, gathering_pays


def test_a_block_fills_its_buffer_and_is_never_tiny() -> None:
    assert block_size(10, 1000) == 100
    assert block_size(10**6, 1) == block_size(10**6, 2**10) == MIN_BLOCK


def test_short_sequences_share_a_call() -> None:
    assert [default_batch_size(length, 24) for length in (16, 256, 1024, 65536)] == [24, 4, 1, 1]


def test_gathering_pays_for_long_inputs_and_few_tokens() -> None:
    shape = {"heads": 4, "key_dim": 32, "value_dim": 32, "latent": 32, "rope": 16}
    assert gathering_pays(2048, 32, **shape)
    assert not gathering_pays(2048, 2000, **shape)
    assert not gathering_pays(64, 48, **shape)
    chosen = [gathering_pays(length, 256, **shape) for length in (512, 1024, 4096, 16384)]
    assert chosen == sorted(chosen)  # once it pays, it does for anything longer
