"""What the nucleus costs beside the products of the head.

    python -m benchmarks.nucleus [--rows 64] [--vocabulary 151936] [--hidden 2048] [--json]

Forward and backward of the head with `top_p` 0.95 and without, and its three products alone. `flat` logits are a
random model's, of which a third are in the nucleus; `peaked` ones a trained model's, of which a few are.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.common import median_seconds, show
from megatron_patches.cpu_products import product
from spell_megatron.config import LayoutConfig
from spell_megatron.policy.head import Sampled, token_logprobs
from spell_megatron.policy.world import start_world, stop_world

SPREADS = {"flat": 1.0, "peaked": 4.0}
"""Deviation of the logits, in nats."""


def main(
    rows: Annotated[int, typer.Option(min=1, help="Response tokens.")] = 64,
    vocabulary: Annotated[int, typer.Option(min=2)] = 151_936,
    hidden: Annotated[int, typer.Option(min=1)] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    world, cases = start_world(LayoutConfig(), seed=0, timeout_seconds=600), list[dict[str, Any]]()
    like: dict[str, Any] = {"device": world.device}
    like["dtype"] = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    weight = torch.randn(vocabulary, hidden, **like).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=world.device)
    for name, spread in SPREADS.items():
        x = torch.randn(rows, hidden, **like).mul_(spread / hidden**0.5).requires_grad_()
        whole, cut = (
            median_seconds(partial(_head, x, weight, targets, top_p), rounds) for top_p in (1.0, 0.95)
        )
        products = median_seconds(partial(_products, x, weight), rounds)
        cases.append(
            {
                "logits": name,
                "products": products,
                "head": whole,
                "with nucleus": cut,
                "ratio": (cut - whole) / products,
            }
        )
    stop_world()
    show(f"the nucleus over the head's products, {rows} rows of {vocabulary} logits", cases, as_json)


def _head(x: Tensor, weight: Tensor, targets: Tensor, top_p: float) -> None:
    group = dist.group.WORLD
    logprobs, _ = token_logprobs(x, weight, targets, sampled=Sampled(1.0, top_p), chunk=1024, tp_group=group)
    torch.autograd.grad(logprobs.sum(), (x, weight))


@torch.no_grad()
def _products(x: Tensor, weight: Tensor) -> None:
    grad = product(x, weight.t())
    product(grad, weight)
    product(grad.t(), x)


if __name__ == "__main__":
    typer.run(main)
