"""Experts: how precise their routers are, how evenly these spread tokens, and how often results are sent back.

Nothing balances routers here (an auxiliary loss would pull against the reward), so the spread is watched: a
router that collapses shows as a load that grows. Forward hooks count what the routers choose; the counts
stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
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


def combine_once(layers: Iterable[Any]) -> None:
    """Have experts' results sent back once, in layers that are recomputed: in the first forward pass alone.

    Nobody reads a layer's output the second time. What follows it has its own input, and no gradient behind the experts
    needs a value: not that of sending back, not of the tokens' order, not of the residual sum. Gradients are the same
    bits. DeepEP's dispatchers keep what they do.
    """
    for layer in layers:
        mlp = layer.mlp
        if isinstance(mlp, MoELayer) and isinstance(mlp.token_dispatcher, MoEAlltoAllTokenDispatcher):
            mlp.combine = partial(_combined, mlp)


def _combined(mlp: Any, output: Tensor) -> Tensor:
    """Experts' results `[routed tokens here, hidden]` to the ranks of their tokens, `[routed tokens, hidden]`."""
    dispatcher = mlp.token_dispatcher
    if mlp.training and torch.is_grad_enabled() and mlp.ep_group.size() > 1:  # the second time
        sent, received = dispatcher.output_splits, dispatcher.input_splits
        return _Unsent.apply(output, mlp.ep_group, sent, received)  # type: ignore[no-any-return, no-untyped-call]
    found: Tensor = dispatcher.token_combine(output)
    return found


class _Unsent(torch.autograd.Function):
    """An all-to-all of which only the gradient is exchanged; its result has no values."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, group: Any, sent: Any, received: Any) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return output.new_empty(int(sum(received)), output.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(ctx.group, grad, ctx.sent, ctx.received), None, None, None
