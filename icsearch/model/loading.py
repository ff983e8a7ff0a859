"""A checkpoint's weights put into a model, checked, whole or some layers of it; and its tokenizer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from icsearch.core.errors import ModelError
from icsearch.core.text import first_line
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.conversion import Conversion, check_finite, check_rehearsed, layer_prefix
from icsearch.model.families.decoder import auto_class, decoder_layers
from icsearch.model.formats.weights import weights_of
from icsearch.model.layout import DTYPES, building, config_dtype, load_config
from icsearch.model.machine import is_out_of_memory, out_of_memory
from icsearch.model.model import DsaModel, LayerWeights, StreamedWeights
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.model.shards import Shards


class Reader:
    """Reads for one empty model of transformers on one device. Raises ModelError where the checkpoint does not fit.

    Weights are converted on the CPU and then brought to the device.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self._checkpoint = checkpoint
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.shards = Shards(checkpoint.shards)
        self._weights = weights_of(checkpoint, self.shards)
        self._conversion = Conversion(model, dtype)
        rehearsed = self._conversion.rehearse(self._weights)
        self._tied, self.left_out = check_rehearsed(checkpoint, model, rehearsed)
        self._of_layer: list[list[str]] = [[] for _ in self.layers]  # the tensors that make each layer
        self._outside: dict[str, str] = {}  # the others that are of use, with the parameter of each
        self._known_finite: set[int] = set()
        self._in_cpu_memory: dict[int, dict[str, torch.Tensor]] = {}
        prefix, parameters = layer_prefix(model), set(model.state_dict())
        floating = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
        for name, target in self._conversion.targets(self._weights).items():
            stored = self._weights[name].get_dtype()
            if target in floating and stored.startswith(("I", "U", "BOOL")):
                raise ModelError(  # some quantisations are nothing but whole numbers in place of weights
                    f"tensor {name} of {checkpoint.name} is {stored}: expected floating-point weights, or a "
                    "quantization_config in config.json that says how they are stored; convert the checkpoint, or use "
                    "its own config"
                )
            if target not in parameters:
                continue  # such as the layers of an MTP head
            if target.startswith(prefix):
                self._of_layer[int(target.removeprefix(prefix).partition(".")[0])].append(name)
            else:
                self._outside[name] = target

    def read_layer(self, index: int) -> int:
        """Read one decoder layer's weights, and bring them to the device; returns the bytes that were read."""
        before = self.shards.bytes_read
        self._read(index)
        with self._beside():
            self.layers[index].to(self._device)
        return self.shards.bytes_read - before

    def _read(self, index: int) -> None:
        """Read one decoder layer's weights; the first time, look whether all are finite."""
        self._conversion.fill({name: self._weights[name] for name in self._of_layer[index]})
        if index not in self._known_finite:
            check_finite(self._checkpoint, self.layers[index].state_dict(prefix=f"{layer_prefix(self.model)}{index}."))
            self._known_finite.add(index)

    def offload_layer(self, index: int) -> None:
        """Read one decoder layer's weights, and hold them in CPU memory until `fetch_layer` wants them."""
        self._read(index)
        self._in_cpu_memory[index] = self.layers[index].state_dict()
        self.drop_layer(index)

    def fetch_layer(self, index: int) -> int:
        """Bring one offloaded decoder layer to the device; returns its bytes."""
        from accelerate.utils import set_module_tensor_to_device

        with self._beside():
            for name, tensor in self._in_cpu_memory[index].items():
                set_module_tensor_to_device(
                    self.layers[index], name, self._device, tensor, tensor.dtype, clear_cache=False
                )
        return sum(tensor.nbytes for tensor in self._in_cpu_memory[index].values())

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Within the block, what is brought to a CUDA device comes beside what computes there; then it is all there."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def drop_layer(self, index: int) -> None:
        """Let one decoder layer's weights go; buffers that are in no checkpoint stay."""
        from accelerate.utils import set_module_tensor_to_device

        if self._stream is not None:  # its memory may be filled again at once: wait for what still computes with it
            torch.cuda.current_stream(self._device).synchronize()
        layer = self.layers[index]
        for name in layer.state_dict():
            set_module_tensor_to_device(layer, name, "meta")

    def read_outside(self, held: range) -> None:
        """Read what is no decoder layer and bring it to the device, as far as these layers need it: see `load`."""
        first, last = 0 in held, len(self.layers) - 1 in held
        tied = bool(self.model.all_tied_weights_keys) and (first or last)  # then embedding and LM head are one
        wanted = {  # what goes with the first or the last layer; all else is read
            self.model.get_input_embeddings(): first or tied,
            getattr(self.model.get_decoder(), "norm", None): last,
            self.model.get_output_embeddings(): last or tied,
        }
        unwanted = tuple(f"{path}." for path, module in self.model.named_modules() if not wanted.get(module, True))
        names = [name for name, target in self._outside.items() if not target.startswith(unwanted)]
        self._conversion.fill({name: self._weights[name] for name in names})
        if first or last:
            self.model.tie_weights(missing_keys=set(self._tied), recompute_mapping=False)
        here = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        check_finite(self._checkpoint, here)
        if self._device.type != "cpu":
            self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self._device))


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
    try:
        with _bars_off():
            model = _empty_model(checkpoint, dtype, trust_remote_code)
            reader = Reader(checkpoint, model, model.dtype, place)
            held = range(len(reader.layers)) if layers is None else layers
            reader.read_outside(held)
            if offload == DISK:
                weights: LayerWeights = StreamedWeights(held, reader.read_layer, reader.drop_layer)
            elif offload == CPU:
                for index in held:
                    reader.offload_layer(index)
                weights = StreamedWeights(held, reader.fetch_layer, reader.drop_layer)
            else:
                for index in held:
                    reader.read_layer(index)
                weights = LayerWeights(held, reader.shards.bytes_read)
            weights.left_out = reader.left_out
            return DsaModel(model, block_elements, weights, place)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


def bring_up(
    checkpoint: Checkpoint,
    options: dict[str, Any],
    trust_remote_code: bool,
    layers: range | None = None,
    offload: str = RESIDENT,
) -> DsaModel:
    """As `load`, under the options of a run; sets threads and, on CUDA, deterministic algorithms for the process.

    Expert routing would add with atomics otherwise. torch warns of a kernel that has no deterministic form; the sweep
    turns such warnings into notes of the run.
    """
    torch.set_num_threads(options["threads"])
    device = options["device"]
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.matmul.allow_tf32 = False
    # By its number: a thread of its own, such as one that reads weights ahead, would take `cuda` for the first one.
    device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    return load(
        checkpoint,
        dtype=options["dtype"],
        device=device,
        trust_remote_code=trust_remote_code,
        block_elements=options.get("block_elements"),
        layers=layers,
        offload=offload,
    )


def _empty_model(checkpoint: Checkpoint, dtype: str, trust_remote_code: bool) -> Any:
    """The model with its parameters on meta. Its buffers are real: no checkpoint holds all of them."""
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    config = load_config(checkpoint, trust_remote_code)
    wanted = config_dtype(checkpoint) if dtype == "auto" else DTYPES[dtype]
    with building(checkpoint), init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    for settings in (model.config, model.config.get_text_config()):
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config  # weights are dequantised as they are read
    if (path := checkpoint.directory / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
        except Exception as error:  # OSError, ValueError, ... by the kind of damage
            raise ModelError(
                f"transformers cannot use {path} ({first_line(error)}): download it again, or remove it"
            ) from error
    return model.eval().requires_grad_(False)


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
