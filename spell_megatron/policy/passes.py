"""A forward (and backward) pass over a batch: streams through Megatron's schedules, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from spell_megatron.config import PolicyConfig
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.model import token_grain
from spell_megatron.policy.replay import Choices
from spell_megatron.policy.scores import Row, Scores, gather
from spell_megatron.policy.spans import SpanPlan, plan_spans
from spell_megatron.policy.stream import Stream, plan_streams
from spell_megatron.policy.world import World
from spell_megatron.types import TrainBatch
from spell_megatron.weights.shape import ModelShape

StreamLoss: TypeAlias = Callable[[SpanPlan, Stream, Tensor, Tensor], tuple[Tensor, int]]
"""Given a stream, its plan, and log-probs and entropies of this rank's rows, `[rows]` each: the summed loss, and what
to divide it by."""


@dataclass
class Pass:
    """What a pass over a batch left on this rank."""

    batch: TrainBatch
    world: World
    tokens: int = 0
    """Tokens computed on this rank, prompts included."""
    _kept: list[tuple[SpanPlan, Stream, Tensor]] = field(default_factory=list)

    def keep(self, plan: SpanPlan, stream: Stream, logprobs: Tensor, entropy: Tensor) -> None:
        """What became of a stream; it stays on the device until all are through."""
        self._kept.append((plan, stream, torch.stack((logprobs, entropy)).float()))

    def scores(self, *, everywhere: bool = False) -> Scores:
        """Those of the whole batch, on rank 0 or on every rank. A collective."""
        has_rows = self.world.last_stage and mpu.get_tensor_model_parallel_rank() == 0
        return gather(self.batch, self._rows() if has_rows else (), self.world, everywhere=everywhere)

    def _rows(self) -> Iterator[Row]:
        """This rank's. Here the host waits for all streams."""
        if not self._kept:
            return
        values = torch.cat([values for *_, values in self._kept], 1).cpu().numpy()
        ends = np.cumsum([values.shape[1] for *_, values in self._kept])
        for (plan, stream, _), (logprobs, entropy) in zip(
            self._kept, np.split(values, ends[:-1], axis=1), strict=True
        ):
            ids, responses = plan.row_ids, plan.response_ids
            bounds = np.searchsorted(responses, np.arange(responses.max(initial=-1) + 2))
            start = 0
            for index, (group, i, sample) in enumerate(stream.samples(self.batch)):
                if index + 1 < len(bounds):
                    mine = slice(bounds[index], bounds[index + 1])
                    yield group, i, ids[mine] - start, logprobs[mine], entropy[mine]
                start += len(sample.tokens)


class Passes:
    """Makes passes of models of one shape, as a policy's configuration says."""

    def __init__(self, policy: PolicyConfig, shape: ModelShape, world: World) -> None:
        self._policy, self._shape, self._world = policy, shape, world

    def run(
        self, batch: TrainBatch, models: Sequence[Any], sampled: Sampled, loss: StreamLoss | None = None
    ) -> Pass:
        """Forward, and with a loss backward: gradients are added to what the models hold. The same batch on every
        rank; log-probs are those of the distribution `sampled`."""
        done = Pass(batch, self._world)
        streams = self._streams(batch)
        for model in models:
            getattr(model, "module", model).sampled = sampled  # under DDP, or bare
            model.train(loss is not None)
        plans = [self._plan(batch, stream) for stream in streams]
        done.tokens = sum(plan.ids.shape[1] for plan in plans)
        with torch.set_grad_enabled(loss is not None):
            get_forward_backward_func()(
                forward_step_func=partial(_forward_step, partial(_keep, done, loss)),
                data_iterator=[iter(zip(plans, streams, strict=True)) for _ in models],
                model=list(models),
                num_microbatches=len(streams),
                seq_length=1,  # lengths vary; the schedules exchange them
                micro_batch_size=1,
                forward_only=loss is None,
            )
        return done

    def _streams(self, batch: TrainBatch) -> Sequence[Stream]:
        """This rank's."""
        shape, policy = self._shape, self._policy
        expert = 3 * shape.experts_per_token * shape.expert_ffn
        linear = shape.hidden * (3 * shape.ffn if not shape.experts else expert)
        linear += shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        return plan_streams(
            batch,
            budget=policy.stream_tokens,
            data_size=self._world.data_size,
            multiple=policy.layout.pipeline if policy.layout.virtual_pipeline else 1,
            share_prompts=policy.share_prompts,
            token_work=linear / (2 * shape.heads * shape.head_dim),
        )[self._world.data_rank]

    def _plan(self, batch: TrainBatch, stream: Stream) -> SpanPlan:
        plan = plan_spans(
            stream.layout(batch),
            cp_size=self._world.context_size,
            cp_rank=self._world.context_rank,
            multiple=token_grain(self._policy),
            device=self._world.device,
        )
        if self._policy.router_replay:
            plan.choices = Choices.of(batch, stream, plan.sources, self._shape)
        return plan


def _forward_step(
    finish: Callable[[SpanPlan, Stream, Any], Any], data: Iterator[tuple[SpanPlan, Stream]], model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    plan, stream = next(data)
    output = model(plan.ids, plan.positions, None, packed_seq_params=plan)
    return output, partial(finish, plan, stream)


def _keep(
    done: Pass, loss: StreamLoss | None, plan: SpanPlan, stream: Stream, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Megatron's contract: summed loss, what to divide by, what to report."""
    logprobs, entropy = output
    done.keep(plan, stream, logprobs.detach(), entropy.detach())
    total, count = loss(plan, stream, logprobs, entropy) if loss else (logprobs.sum(), 0)
    # Filled on the device, since a copy would be waited for.
    return total, torch.full((), count, dtype=torch.int, device=logprobs.device), {}
