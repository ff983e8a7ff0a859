"""Parameters counted from a config alone, beside those of the models as they are shipped."""

from __future__ import annotations

import pytest
import torch
import transformers

from icsearch.core.errors import ModelError
from icsearch.model.families.decoder import decoder_layers
from icsearch.model.shape import ModelShape


@pytest.mark.parametrize(
    ("config", "model", "within"),
    [
        ("AXK2Config", "AXK2ForCausalLM", 0.0),
        ("MistralLarge4Config", "MistralLarge4ForConditionalGeneration", 2e-4),
        ("Dots3NoteConfig", "Dots3NoteForConditionalGeneration", 1e-2),
    ],
)
def test_decoder_layers(config: str, model: str, within: float) -> None:
    """Exact where all layers are alike; where some have no RoPE, or a sliding window, nearly so."""
    made = getattr(transformers, config)()
    with torch.device("meta"):
        layers = decoder_layers(getattr(transformers, model)._from_config(made))
    shape = ModelShape.from_config(made.get_text_config().to_dict())
    found = [sum(one.numel() for one in layer.parameters()) for layer in layers]
    assert [shape.layer_parameters(index) for index in range(len(layers))] == pytest.approx(found, rel=within, abs=0)


@pytest.mark.parametrize(
    "config", ["HYV4Config", "DeepseekV4Config", "Glm5NextConfig", "MiniMaxM3VLConfig", "Qwen4ExpConfig"]
)
def test_what_is_not_counted_is_refused(config: str) -> None:
    with pytest.raises(ModelError, match="is not counted here|the cost is counted for models"):
        ModelShape.from_config(getattr(transformers, config)().to_dict())
