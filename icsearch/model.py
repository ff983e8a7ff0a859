"""The only file that knows transformers model classes: load a checkpoint, run it layer by layer with F/S roles."""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icsearch.checkpoint import Checkpoint
from icsearch.errors import ModelError, first_line
from icsearch.kernels import (
    DENSE,
    Blockwise,
    Observer,
    attending,
    compressed,
    dense_core,
    find_rotation,
    has_arithmetic,
    mask_stand_in,
)
from icsearch.memory import is_out_of_memory, out_of_memory
from icsearch.pattern import FULL, SHARED, Pattern
from icsearch.slot import SelectionStore, find_indexers, put_slot

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer beside the hidden states, as the model's own forward passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DsaModel:
    """A loaded model with a slot in place of each indexer.

    Positions count DSA layers from 0 (the letters of a pattern); `layer_indices[position]` is the decoder layer.
    With `block_elements`, layers compute with the block-wise arithmetic of `ops`, else as transformers wrote them.
    That holds for every method here; the model's own `generate` and `forward` stay the model's own.
    """

    def __init__(self, model: Any, block_elements: int | None = None) -> None:  # a causal LM of transformers
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.layers: list[nn.Module] = list(getattr(self.decoder, "layers", []))  # other names: no DSA family
        self.lm_head: nn.Module = model.get_output_embeddings()
        owners = indexer_owners(model)
        self.layer_indices = [index for index, _ in owners]
        self.owners = [owner for _, owner in owners]
        self.slots = [put_slot(owner, position) for position, owner in enumerate(self.owners)]
        self.native_shared = [slot.position for slot in self.slots if slot.inner is None]
        self._slot_of = dict(zip(self.layer_indices, self.slots, strict=True))
        self._observer: Observer | None = None
        self.blockwise = None if block_elements is None else self._make_blockwise(block_elements)

    @property
    def has_arithmetic(self) -> bool:
        """Whether the block-wise arithmetic knows all attention layers of this model, and there is no other kind."""
        known = all(has_arithmetic(owner, slot.inner) for owner, slot in zip(self.owners, self.slots, strict=True))
        return known and len(self.slots) == len(self.layers)

    def _make_blockwise(self, block_elements: int) -> Blockwise:
        indexer = next(slot.inner for slot in self.slots if slot.inner is not None)
        return Blockwise(find_rotation(indexer), block_elements)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def start_pattern(self) -> Pattern:
        """All F but for the layers that the checkpoint itself shares: the unmodified model."""
        return Pattern("".join(SHARED if slot.inner is None else FULL for slot in self.slots))

    @contextlib.contextmanager
    def running(self, pattern: Pattern) -> Iterator[SelectionStore]:
        """Within the block, the model's own forward follows the pattern; afterwards it is as it was before."""
        store = SelectionStore(pattern)
        before = [slot.store for slot in self.slots]
        for slot in self.slots:
            slot.store = store
        try:
            yield store
        finally:
            for slot, earlier in zip(self.slots, before, strict=True):
                slot.store = earlier

    def final_hidden_states(self, input_ids: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """One whole forward by the model's own code: [B, T] ids to [B, T, D] states after the final norm."""
        with self.running(pattern):
            return self._decode(input_ids).last_hidden_state

    def _decode(self, input_ids: torch.Tensor) -> Any:
        """The decoder's own forward, with the arithmetic of this model."""
        mask = None if self.blockwise is None else mask_stand_in(input_ids)
        with self._computing():
            return self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the block, layers compute with the arithmetic of this model, and the observer hears of them."""
        with contextlib.ExitStack() as stack:
            if self.blockwise is not None:
                stack.enter_context(compressed(self.owners))
                stack.enter_context(attending(self.config, self.blockwise.core, self._observer))
                stack.enter_context(self._selecting(self.blockwise.select))
            elif self._observer is not None:
                stack.enter_context(attending(self.config, dense_core, self._observer))
            yield

    @contextlib.contextmanager
    def _selecting(self, select: Callable[..., Any]) -> Iterator[None]:
        for slot in self.slots:
            slot.arithmetic = select
        try:
            yield
        finally:
            for slot in self.slots:
                slot.arithmetic = None

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the block, every DSA layer that runs reports its core attention; its result stays what it was."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def capture_calls(self, input_ids: torch.Tensor) -> list[LayerCall]:
        """Each decoder layer's call arguments for [B, T] inputs of this shape, from one forward of the model's own.

        Masks, positions and rotary embeddings are then the model's own; without padding they depend on the shape
        alone. A family that hands the selection from layer to layer as an argument gets None there: the slots
        supply it, and the captured one belonged to other tokens.
        """
        calls: list[LayerCall] = []
        cheapest = Pattern(FULL + SHARED * (len(self.slots) - 1))  # the arguments do not depend on the roles
        with self.running(cheapest) as store, contextlib.ExitStack() as hooks:

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                own = {k: None if v is store.selection else v for k, v in kwargs.items()}
                calls.append(LayerCall(args[1:], own))

            for layer in self.layers:
                hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            self._decode(input_ids)
        return calls

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The states that the model's own forward hands to its first decoder layer: [B, T] to [B, T, D]."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _FirstLayerReached(args[0])

        hook = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._decode(input_ids)
        except _FirstLayerReached as reached:
            return reached.hidden_states
        finally:
            hook.remove()
        raise ModelError("the model's forward never called its first decoder layer: this family is not supported")

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, call: LayerCall, store: SelectionStore
    ) -> torch.Tensor:
        """One decoder layer on [B, T, D] states, in the role that the store's pattern gives it; updates the store."""
        slot = self._slot_of.get(index)
        if slot is not None:
            before, slot.store = slot.store, store
        try:
            with self._computing():
                output = self.layers[index](hidden_states, *call.args, **call.kwargs)
        finally:
            if slot is not None:
                slot.store = before
        return output[0] if isinstance(output, tuple) else output

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm between the last decoder layer and the LM head."""
        return self.decoder.norm(hidden_states)


def indexer_owners(model: Any) -> list[tuple[int, nn.Module]]:
    """(decoder layer, module whose `indexer` makes its selection) of each DSA layer of a transformers model, in order.

    `indexer` is None on layers that the checkpoint itself shares, and a slot where one has been put.
    """
    native = native_types(model.config.get_text_config())
    owners = []
    for index, layer in enumerate(getattr(model.get_decoder(), "layers", [])):
        for owner, indexer in find_indexers(layer):
            # None elsewhere: a layer of another kind in a family that mixes them
            if indexer is not None or native.get(index) == "shared":
                owners.append((index, owner))
    return owners


def layer_width(layer: nn.Module) -> int:
    """Numbers per token that a layer holds at once at most: in and out of all its projections, experts aside."""
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return sum(module.in_features + module.out_features for module in linear)


class _FirstLayerReached(Exception):
    """Carries the embedded states out of the model's forward."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


@dataclass(frozen=True)
class Layout:
    """What a search needs to know of a model before its weights are read."""

    model_type: str
    num_layers: int  # decoder layers
    layer_indices: tuple[int, ...]  # the decoder layer of each DSA layer
    native_shared: tuple[int, ...]  # DSA layers that the checkpoint itself shares
    wrapper_config: bool  # the language model's config sits in text_config
    dtype: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    attention_heads: int
    index_topk: int
    index_heads: int
    index_head_dim: int
    num_parameters: int
    has_arithmetic: bool  # whether the block-wise arithmetic knows these layers
    layer_width: int  # numbers per token that a layer's projections hold at once

    @property
    def start_pattern(self) -> Pattern:
        """All F but for the native S layers: the unmodified model."""
        native = set(self.native_shared)
        return Pattern("".join(SHARED if p in native else FULL for p in range(len(self.layer_indices))))

    def count_layer_runs(self, patterns: Iterable[Pattern]) -> int:
        """Layer runs that one sweep of these patterns takes: the nodes of their tree of prefixes."""
        letters = {str(pattern) for pattern in patterns}
        runs = 0
        for index in range(self.num_layers):
            decided = bisect.bisect_right(self.layer_indices, index)
            runs += len({text[:decided] for text in letters})
        return runs


def inspect(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Layout:
    """Build the model without memory and read its layout; raises ModelError where it has no indexers."""
    config = _load_config(checkpoint, trust_remote_code)
    skeleton = DsaModel(_skeleton(checkpoint, config, trust_remote_code))
    indexer = next((slot.inner for slot in skeleton.slots if slot.inner is not None), None)
    if indexer is None:
        raise ModelError(
            f"{checkpoint.name} is a {config.model_type} model and has no indexers: "
            "expected a DeepSeek-Sparse-Attention checkpoint such as deepseek_v32 or glm_moe_dsa"
        )
    text_config = skeleton.config
    if min(indexer.index_topk, indexer.n_heads, indexer.head_dim) < 1:
        raise ModelError(
            f"config.json of {checkpoint.name} has index_topk {indexer.index_topk}, index_n_heads {indexer.n_heads}, "
            f"index_head_dim {indexer.head_dim}: expected positive numbers; use the config that belongs to the weights"
        )
    return Layout(
        model_type=config.model_type,
        num_layers=len(skeleton.layers),
        layer_indices=tuple(skeleton.layer_indices),
        native_shared=tuple(skeleton.native_shared),
        wrapper_config=text_config is not config,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=text_config.max_position_embeddings,
        attention_heads=text_config.num_attention_heads,
        index_topk=int(indexer.index_topk),
        index_heads=int(indexer.n_heads),
        index_head_dim=int(indexer.head_dim),
        num_parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()),
        has_arithmetic=skeleton.has_arithmetic,
        layer_width=max(layer_width(layer) for layer in skeleton.layers),
    )


def _skeleton(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config whose numbers do not fit together fails in any way torch knows
        raise ModelError(
            f"transformers cannot build {checkpoint.name} from its config.json ({first_line(error)}): "
            "check the config against the model that it belongs to"
        ) from error


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    block_elements: int | None = None,
) -> DsaModel:
    """Load a checked checkpoint through transformers, and check that it is a whole DSA model; raises ModelError."""
    config = _load_config(checkpoint, trust_remote_code)
    model, info = _load_weights(checkpoint, config, dtype, trust_remote_code)
    _check_loading(checkpoint, config, info)
    _check_finite(checkpoint, model)
    model.eval().requires_grad_(False)
    try:
        return DsaModel(model.to(resolve_device(device)), block_elements)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


def quiet_transformers() -> None:
    """Keep transformers' bars and load reports off the terminal: what matters of them becomes an error here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own tokenizer, or None where it brings none; raises ModelError for a damaged one."""
    from transformers import AutoTokenizer

    if not any(checkpoint.directory.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... by the kind of damage
        raise ModelError(
            f"the tokenizer in {checkpoint.directory} cannot be used ({first_line(error)}): "
            "download it again, or give ready tokens (a directory with calibration.safetensors)"
        ) from error


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}: give auto, cpu, cuda or cuda:0") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"no CUDA device is available for --device {device}: give cpu or auto")
    if resolved.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not supported: give auto, cpu, cuda or cuda:0")
    return resolved


def native_types(config: Any) -> dict[int, str]:
    """Decoder layer to `full` or `shared` where the config itself says so (GLM-5.2 style), else empty."""
    return dict(enumerate(getattr(config, "indexer_types", None) or []))


def _load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # unknown model_type, remote code refused, a value of the wrong type
        raise ModelError(
            f"transformers cannot use {checkpoint.directory / 'config.json'} ({first_line(error)}): "
            "check model_type and its values, or pass --trust-remote-code if the checkpoint brings its own code"
        ) from error


def _load_weights(
    checkpoint: Checkpoint, config: Any, dtype: str, trust_remote_code: bool
) -> Any:  # (model, loading info)
    from transformers import AutoModelForCausalLM

    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            attn_implementation=DENSE,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported by _check_loading, in one line
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise ModelError(
            f"transformers cannot load the weights of {checkpoint.name} ({first_line(error)}): "
            "check that config.json and the shards belong together"
        ) from error


def _check_loading(checkpoint: Checkpoint, config: Any, info: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: it fills missing weights at random."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} tensors of {checkpoint.name} disagree with config.json: {name} has shape "
            f"{list(found)}, expected {list(expected)}; use the config that belongs to these weights"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{len(missing)} tensors that config.json calls for are not in the weights of {checkpoint.name}, such as "
            f"{missing[0]}: use the config that belongs to these weights, or download the missing shard"
        )
    if unexpected := sorted(name for name in info["unexpected_keys"] if not _has_no_use(name, config, checkpoint)):
        raise ModelError(
            f"{len(unexpected)} tensors of {checkpoint.name} have no place in the model that config.json describes, "
            f"such as {unexpected[0]}: use the config that belongs to these weights"
        )


def _has_no_use(name: str, config: Any, checkpoint: Checkpoint) -> bool:
    """True for weights that a whole checkpoint may carry unused: MTP layers, indexers of native S layers."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    if found is None:
        return False
    layer, text_config = int(found[1]), config.get_text_config()
    raw = checkpoint.config.get("text_config", checkpoint.config)
    mtp = range(text_config.num_hidden_layers, text_config.num_hidden_layers + raw.get("num_nextn_predict_layers", 0))
    return layer in mtp or (".indexer." in name and native_types(text_config).get(layer) == "shared")


def _check_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{bad} of {tensor.numel()} values of {name} in {checkpoint.name} are NaN or infinite: "
                "expected finite weights; download or convert the checkpoint again"
            )
