"""The numbers of a learner, looked at on every rank around each optimizer step: all ranks go on, or none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spell_megatron.policy.agreement import share
from spell_megatron.policy.optimizer import main_gradient
from spell_megatron.policy.scores import Scores
from spell_megatron.policy.soundness import UnsoundError, first_unsound, norms, unsound_scores
from spell_megatron.policy.world import World

Judge = Callable[[Scores], UnsoundError | None]
"""A reason not to make an update, seen from its scores. Asked on rank 0."""


class Inspection:
    """Looks at what this rank holds of a model, which is all by the time that it is called (`Learner.settle`).

    `models` are its chunks under Megatron's data parallelism. Every method is a collective, and raises UnsoundError on
    every rank where any has a reason.
    """

    def __init__(self, models: Sequence[Any], world: World, max_growth: float) -> None:
        self._models, self._world, self._max_growth = models, world, max_growth

    def begin(self) -> Tensor:
        """The norm of the weights that this rank holds."""
        norm = self._weight_norm()
        if not self._everywhere(norm.isfinite()):
            raise self._first("weights are", first_unsound(self._named()), touched=True)
        return norm

    def before_step(self, scores: Scores, loss: float, judge: Judge, *, touched: bool) -> None:
        """Log-probs, entropies, loss and gradients; `touched` where an earlier step has changed the weights."""
        fault = share(lambda: unsound_scores(scores.logprobs, scores.entropy) or judge(scores), self._world)
        if fault is None and not math.isfinite(loss):
            fault = UnsoundError("the loss is not finite")
        buffers = [
            buffer.grad_data for m in self._models for buffer in (*m.buffers, *m.expert_parallel_buffers)
        ]
        if fault is None and not self._everywhere(norms(buffers).isfinite().all()):
            gradients = ((name, main_gradient(p)) for name, p in self._named() if p.requires_grad)
            fault = self._first("gradients are", first_unsound(gradients))
        if fault is not None:
            fault.touched = touched
            raise fault

    def after_steps(self, before: Tensor) -> None:
        """Whether anything is left of the weights, whose norm was `before`."""
        now = self._weight_norm()
        if not self._everywhere((now <= self._max_growth * before) & now.isfinite()):
            raise self._first("after the update weights are", first_unsound(self._named()), touched=True)

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for model in self._models:
            yield from model.module.named_parameters()

    def _weight_norm(self) -> Tensor:
        """Of all that this rank holds; a NaN anywhere is a NaN here."""
        norm: Tensor = torch.linalg.vector_norm(norms(p for _, p in self._named()))
        return norm

    def _everywhere(self, sound: Tensor) -> bool:
        """Whether something holds on every rank."""
        verdict = sound.to(self._world.device, torch.int32)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict)  # the host decides by it

    def _first(self, what: str, name: str, *, touched: bool = False) -> UnsoundError:
        """What is wrong, with the first parameter that it is seen at on any rank."""
        names: list[Any] = [None] * self._world.size
        dist.all_gather_object(names, name)
        name = next(filter(None, names), "")
        how = f"not finite at {name}" if name else "far too large"
        return UnsoundError(f"{what} {how}", touched=touched)
