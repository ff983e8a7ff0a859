"""Fills a model whose parameters are on meta from a checkpoint's shards: what is no decoder layer, and layer by layer.

One way of reading serves all: a model that is read whole, some layers of one, layers that are read again and again. So
the weights have the same bits, and lie in memory alike, whichever it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from icsearch.errors import ModelError
from icsearch.families.decoder import decoder_layers
from icsearch.weights.checkpoint import Checkpoint
from icsearch.weights.conversion import Conversion, check_finite, check_rehearsed, layer_prefix
from icsearch.weights.fp8 import check_none_quantised, make_quantizer
from icsearch.weights.shards import Shards


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
        self._shards = Shards(checkpoint.shards)
        quantizer = make_quantizer(checkpoint)
        if quantizer is None:
            check_none_quantised(checkpoint, self._shards)
        self._conversion = Conversion(model, dtype, quantizer)
        self._tied = check_rehearsed(checkpoint, model, self._conversion.rehearse(self._shards))
        if quantizer is None:
            self._check_floating()
        self._of_layer, self._outside = self._sorted()
        self._known_finite: set[int] = set()
        self._parked: dict[int, dict[str, torch.Tensor]] = {}
        self._moved = 0

    def _sorted(self) -> tuple[list[list[str]], dict[str, str]]:
        """The checkpoint's tensors that make each layer, and the others that are of use, with the parameter of each."""
        prefix, parameters = layer_prefix(self.model), set(self.model.state_dict())
        of_layer: list[list[str]] = [[] for _ in self.layers]
        outside: dict[str, str] = {}
        for name, target in self._conversion.targets(self._shards).items():
            if target not in parameters:
                continue  # such as the layers of an MTP head
            if target.startswith(prefix):
                of_layer[int(target.removeprefix(prefix).partition(".")[0])].append(name)
            else:
                outside[name] = target
        return of_layer, outside

    def _check_floating(self) -> None:
        """Raise ModelError where whole numbers are stored in place of weights: some quantisations are nothing else."""
        parameters = dict(self.model.named_parameters())
        for name, target in self._conversion.targets(self._shards).items():
            weight, stored = parameters.get(target), self._shards[name].dtype
            if weight is not None and weight.is_floating_point() and stored.startswith(("I", "U", "BOOL")):
                raise ModelError(
                    f"tensor {name} of {self._checkpoint.name} is {stored}: expected floating-point weights, as "
                    "config.json names no quantization_config; convert the checkpoint, or use its own config"
                )

    def bytes_read(self) -> int:
        """Bytes of weights read from the shards so far."""
        return self._shards.bytes_read

    def bytes_moved(self) -> int:
        """Bytes of parked weights brought to the device so far."""
        return self._moved

    def read_layer(self, index: int) -> None:
        """Read one decoder layer's weights, and bring them to the device."""
        self._read(index)
        with self._beside():
            self.layers[index].to(self._device)

    def _read(self, index: int) -> None:
        """Read one decoder layer's weights; the first time, look whether all are finite."""
        self._conversion.fill({name: self._shards[name] for name in self._of_layer[index]})
        if index not in self._known_finite:
            check_finite(self._checkpoint, self.layers[index].state_dict(prefix=f"{layer_prefix(self.model)}{index}."))
            self._known_finite.add(index)

    def park_layer(self, index: int) -> None:
        """Read one decoder layer's weights, and keep them in CPU memory until `fetch_layer` wants them."""
        self._read(index)
        self._parked[index] = self.layers[index].state_dict()
        self.drop_layer(index)

    def fetch_layer(self, index: int) -> None:
        """Bring one parked decoder layer to the device."""
        from accelerate.utils import set_module_tensor_to_device

        with self._beside():
            for name, tensor in self._parked[index].items():
                set_module_tensor_to_device(
                    self.layers[index], name, self._device, tensor, tensor.dtype, clear_cache=False
                )
                self._moved += tensor.nbytes

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
        unwanted = self._unwanted(first, last)
        names = [name for name, target in self._outside.items() if target not in unwanted]
        self._conversion.fill({name: self._shards[name] for name in names})
        if first or last:
            self.model.tie_weights(missing_keys=set(self._tied), recompute_mapping=False)
        check_finite(self._checkpoint, {name: one for name, one in self.model.state_dict().items() if not one.is_meta})
        if self._device.type != "cpu":
            self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self._device))

    def _unwanted(self, first: bool, last: bool) -> set[str]:
        """The parameters outside of the layers that go with the first or the last layer, where that one is not held."""
        tied = bool(self.model.all_tied_weights_keys) and (first or last)  # then embedding and LM head are one
        wanted = {
            self.model.get_input_embeddings(): first or tied,
            getattr(self.model.get_decoder(), "norm", None): last,
            self.model.get_output_embeddings(): last or tied,
        }
        paths = [f"{path}." for path, module in self.model.named_modules() if not wanted.get(module, True)]
        return {target for target in self._outside.values() if target.startswith(tuple(paths))}
