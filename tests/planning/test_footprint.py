"""Memory of one call: moments by hand, growth; `test_peak` compares with what a process takes."""

from __future__ import annotations

from dataclasses import replace

from icsearch.planning.footprint import Call, drawing_bytes, head_bytes
from icsearch.planning.modelfile import open_model_file
from plan_fixtures import DEEPSEEK, GLM


def test_experts_take_most_per_token_up_to_a_chunk() -> None:
    """Rows of hidden size for every (token, expert) pair, in and out in bfloat16, weighted twice in float32."""
    for name, hidden in ((GLM, 6144), (DEEPSEEK, 7168)):
        shape = open_model_file(name).shape
        one_chunk, longer = Call(shape, 1, 8192, 2, 2**26).moments(), Call(shape, 1, 65536, 2, 2**26).moments()
        pairs = 8192 * 8 * hidden * (2 + 2 + 4 + 4)
        assert max(one_chunk, key=one_chunk.__getitem__) == "experts"
        assert one_chunk["experts"] == pairs + 8192 * 2 * hidden * 2
        assert longer["experts"] == pairs + 65536 * 3 * hidden * 2


def test_moments_grow_with_tokens_and_blocks_do_not() -> None:
    call = Call(open_model_file("demo").shape, 1, 2048, 4, 2**19)
    twice = replace(call, batch_size=2)
    for name, size in call.moments().items():
        assert size < twice.moments()[name] <= 2 * size
    assert replace(call, block_elements=2**20).bytes > call.bytes


def test_a_head_holds_a_chunk_of_logits() -> None:
    assert head_bytes(5000, 10, 1000, 2, 2) == 5000 * 10 * 2 + 1024 * 1000 * (2 + 2 * 4)
    assert head_bytes(5000, 10, 1000, 4, 2) == 5000 * 10 * 4 + 1024 * 1000 * 2 * 4  # float32 is not copied
    assert head_bytes(5000, 1000, 10, 2, 2) == 5000 * 1000 * 3 * 4  # a wide model's norm


def test_what_a_differentiated_layer_takes() -> None:
    """More for each cotangent; and of tokens, but for blocks, in proportion."""
    for name, width in (("demo", 4), (GLM, 2), (DEEPSEEK, 2)):
        call = Call(open_model_file(name).shape, 1, 8192, width, 2**19)
        few, more = call.back_moments(2), call.back_moments(5)
        assert all(few[moment] < more[moment] for moment in few)
        longer = replace(call, batch_size=2).back_moments(2)
        assert all(few[moment] < longer[moment] <= 2 * few[moment] for moment in few)


def test_a_layer_of_glm_by_hand() -> None:
    """Behind attention, at 1,000 tokens and with one cotangent: experts' gates, products and outputs count most."""
    moment = Call(open_model_file(GLM).shape, 1, 1000, 2, 2**26).back_moments(1)["behind attention"]
    heads, hidden, pairs = 64, 6144, 8
    before = hidden * 2 + 1000 * 4 + (heads * 256 + 576) * 2 + heads * 256 * 2 + hidden * 4 + (2048 + 576) * 4
    graph = pairs * (3 * 2048 * 2 + hidden * 2 + 5 * 8) + 3 * 2048 * 2 + hidden * 4
    assert moment == 1000 * (before + hidden * 2 + heads * 256 * 2 + hidden * 2 + graph + pairs * 2 * hidden * 4)


def test_drawing_holds_a_chunk_of_logits() -> None:
    assert drawing_bytes(5000, 10, 1000, 4, 3) == 5000 * 10 * 4 * 4 + 1024 * 1000 * 16 + 128 * 1000 * 16
    assert drawing_bytes(50, 10, 1000, 2, 3) == 50 * 10 * 2 * 4 + 50 * 1000 * 20 + 50 * 1000 * 16
