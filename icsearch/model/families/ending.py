"""What comes behind the last decoder layer: the final norm and the LM head, with what families put around them.

Hyper-connections leave several streams of states, which a head of their own collapses before the norm, or in its
stead. The LM head may be kept in float32, and its logits be capped. Whether that is all is tried once on each model
against its own forward: a family that does something else is refused, and not scored wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.model.families.calls import PROBE_TOKENS, LayerOutput, embedding_nothing, in_order, same_values

Head = Callable[[torch.Tensor], torch.Tensor]


def streams(config: Any) -> int:
    """Streams of hidden states between decoder layers: 1, or those of a family's hyper-connections."""
    return int(getattr(config, "hc_mult", None) or getattr(config, "hc_count", None) or 1)


class Ending:
    """The end of one model: states behind the last decoder layer to normed states, and these to logits."""

    def __init__(self, model: Any, layers: list[nn.Module]) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._layers = layers
        self._checked = False
        module = model.get_output_embeddings()
        if module is None:
            raise ModelError(f"{type(model).__name__} has no LM head: expected a model that predicts the next token")
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        weight = getattr(module, "weight", None)
        plain = cap is None and (weight is None or weight.dtype == model.dtype)
        self.head: Head = module if plain else _OddHead(module, cap)

    def norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] states of the last layer, or more streams of them, to the [B, T, D] that the LM head takes.

        Raises ModelError where this is not what the model itself does.
        """
        if not self._checked:
            self._check(hidden_states)
            self._checked = True
        return self._norm(hidden_states)

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hasattr(self._decoder, "hyper_connection_mixer"):
            return self._decoder.hyper_connection_mixer(hidden_states)
        if hasattr(self._decoder, "hc_head"):
            hidden_states = self._decoder.hc_head(hidden_states)
        return self._decoder.norm(hidden_states)

    @torch.inference_mode()
    def _check(self, like: torch.Tensor) -> None:
        """Our end and the model's own, on made-up states of a few tokens."""
        made_up = torch.linspace(-1, 1, like[:1, :PROBE_TOKENS].numel(), device=like.device).to(like.dtype)
        made_up = made_up.view(1, PROBE_TOKENS, *like.shape[2:])
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=like.device)
        # Where a config asks for the experts' balancing loss: there are no routers in a forward without layers.
        asked = "output_router_logits" in inspect.signature(self._model.forward).parameters
        more = {"output_router_logits": False} if asked else {}
        with embedding_nothing(self._model), in_order(self._layers, lambda *_, **__: made_up.as_subclass(LayerOutput)):
            logits = self._model(input_ids=ids, use_cache=False, **more).logits.as_subclass(torch.Tensor)
        known = any(hasattr(self._decoder, name) for name in ("norm", "hyper_connection_mixer"))
        # Weights that make NaN of anything are not this check's business.
        if known and same_values(self.head(self._norm(made_up)), logits):
            return
        raise ModelError(
            f"{type(self._model).__name__} does more between its last decoder layer and its logits than a final norm "
            "and an LM head, which is all that is known here: this family cannot be searched"
        )


class _OddHead:
    """An LM head kept in another type than the states, or whose logits are capped at plus and minus `cap`."""

    def __init__(self, module: Any, cap: float | None) -> None:
        self._module = module
        self._cap = cap

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._module(states.to(self._module.weight.dtype))
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap
