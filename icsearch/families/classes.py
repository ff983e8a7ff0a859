"""Which of transformers' classes a checkpoint's model is made by: multimodal checkpoints come under other auto classes.

A multimodal model is built whole, with its towers, so that names in the checkpoint, saving and generation stay its
own; what is searched is its language model.
"""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The auto class under which transformers makes a language model of this config.

    The class that the checkpoint names as its architecture comes first, then text before images. Where there is none,
    AutoModelForCausalLM, which says so.
    """
    import transformers

    known = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    )
    able = [one for one in known if type(config) in one._model_mapping or one.__name__ in _remote(config)]
    named = [one for one in able if set(_classes(one, config)) & set(config.architectures or ())]
    return next(iter(named + able), known[0])


def _remote(config: Any) -> dict[str, str]:
    """Auto classes for which the checkpoint brings code of its own."""
    return getattr(config, "auto_map", None) or {}


def _classes(auto: Any, config: Any) -> list[str]:
    """Names of the classes that an auto class has for this config."""
    if type(config) not in auto._model_mapping:
        return []
    found = auto._model_mapping[type(config)]
    return [one.__name__ for one in (found if isinstance(found, (list, tuple)) else [found])]
