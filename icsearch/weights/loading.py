"""Loading a checkpoint: its weights into a model, checked, whole or some layers of it, and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from icsearch.errors import ModelError, first_line
from icsearch.families.classes import auto_class
from icsearch.memory import is_out_of_memory, out_of_memory
from icsearch.model import DsaModel
from icsearch.weights.checkpoint import Checkpoint
from icsearch.weights.holding import CPU, DISK, RESIDENT, LayerWeights, StreamedWeights
from icsearch.weights.layout import DTYPES, cannot_build, config_dtype, load_config
from icsearch.weights.reader import Reader


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    block_elements: int | None = None,
    layers: range | None = None,
    offload: str = RESIDENT,
) -> DsaModel:
    """Load a checked checkpoint, and check that it is a whole DSA model; raises ModelError, OutOfMemoryError.

    With `layers`, a contiguous range of decoder layers, only those are read, the embedding where layer 0 is among
    them, final norm and LM head where the last one is; the rest stays on meta. `offload` says where the weights of
    decoder layers rest: `none`, on the device; `cpu`, in CPU memory; `disk`, in the checkpoint. What is no decoder
    layer always stays on the device: embedding and LM head are small against the layers, and every wave needs them.
    """
    place = resolve_device(device)
    with _out_of_memory_named(), _bars_off():
        model = _empty_model(checkpoint, dtype, trust_remote_code)
        reader = Reader(checkpoint, model, model.dtype, place)
        held = range(len(reader.layers)) if layers is None else layers
        reader.read_outside(held)
        return DsaModel(model, block_elements, _layer_weights(reader, held, offload), place)


def _layer_weights(reader: Reader, held: range, offload: str) -> LayerWeights:
    """The decoder layers: read now, or when they are wanted."""
    if offload == DISK:
        return StreamedWeights(held, reader.read_layer, reader.drop_layer, reader.bytes_read)
    if offload == CPU:
        for index in held:
            reader.park_layer(index)
        return StreamedWeights(held, reader.fetch_layer, reader.drop_layer, reader.bytes_moved)
    for index in held:
        reader.read_layer(index)
    return LayerWeights(held, reader.bytes_read)


def _empty_model(checkpoint: Checkpoint, dtype: str, trust_remote_code: bool) -> Any:
    """The model with its parameters on meta. Its buffers are real: no checkpoint holds all of them."""
    from accelerate import init_empty_weights

    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    config = load_config(checkpoint, trust_remote_code)
    wanted = config_dtype(config) if dtype == "auto" else DTYPES[dtype]
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise cannot_build(checkpoint, error) from error
    for one in (model.config, model.config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config  # weights are dequantised as they are read
    _load_generation_config(checkpoint, model)
    return model.eval().requires_grad_(False)


def _load_generation_config(checkpoint: Checkpoint, model: Any) -> None:
    from transformers import GenerationConfig

    path = checkpoint.directory / "generation_config.json"
    if not path.exists():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ... by the kind of damage
        raise ModelError(
            f"transformers cannot use {path} ({first_line(error)}): download it again, or remove it"
        ) from error


@contextlib.contextmanager
def _out_of_memory_named() -> Iterator[None]:
    """Within the block, memory that runs out is an error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


@contextlib.contextmanager
def _bars_off() -> Iterator[None]:
    """Within the block, transformers shows no bars; behind it, those of the program around are as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
