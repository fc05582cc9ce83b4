"""The routers: how precise they are, and how evenly they spread tokens over a layer's experts.

Nothing balances them here (an auxiliary loss would pull against the reward), so the spread is watched: a
router that collapses shows as a load that grows. Forward hooks count what the routers choose; the counts
stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from spell_megatron.weights.shape import ModelShape


class ExpertLoad:
    """Counts, over all ranks, the tokens that every expert gets between `clear` and `per_layer`.

    Full recomputation runs a forward pass twice and so counts it twice: shares are the same.
    """

    def __init__(self, chunks: Iterable[Any], shape: ModelShape, device: torch.device) -> None:
        self._counts = torch.zeros(shape.layers, shape.experts, dtype=torch.int64, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, Router):
                    module.register_forward_hook(partial(self._count, module.layer_number - 1))

    def clear(self) -> None:
        self._counts.zero_()

    def per_layer(self) -> tuple[float, ...]:
        """Busiest expert over the mean of all, for every layer. A collective, except without experts."""
        if not self._counts.numel():
            return ()
        # Ranks of one stage hold disjoint tokens, and each stage its own layers: the sum is the model's.
        total = self._counts.clone()
        dist.all_reduce(total)
        counts = total.double()
        return tuple((counts.amax(1) / counts.mean(1).clamp(min=1e-9)).tolist())

    def _count(self, layer: int, _router: Any, _inputs: Any, routed: tuple[Tensor, Tensor]) -> None:
        self._counts[layer] += routed[1].sum(0)


def round_router_logits(chunk: Any, dtype: torch.dtype) -> None:
    """Have router logits rounded to `dtype`, as the gates of vLLM and transformers do.

    What follows is float32: the chosen experts' weights are that in vLLM, too.
    """
    for module in chunk.modules():
        if isinstance(module, Router):
            module.gating = partial(_rounded, module.gating, dtype)


def _rounded(gating: Callable[[Tensor], Tensor], dtype: torch.dtype, hidden: Tensor) -> Tensor:
    logits = gating(hidden)
    return logits.to(dtype).to(logits.dtype)
