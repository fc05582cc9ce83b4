"""The loss of a batch: given stream by stream, and summed over all of them and over the ranks.

It is the sum over the batch's response tokens divided by their number (or as `policy.loss.normalisation` says),
exactly, whatever the split over ranks, streams and pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from spell_megatron.config import LossConfig
from spell_megatron.policy.loss import Surrogate, TokenTerms, token_losses
from spell_megatron.policy.scores import PerSample
from spell_megatron.policy.send import send
from spell_megatron.policy.spans import SpanPlan
from spell_megatron.policy.stream import Stream
from spell_megatron.types import TrainBatch


class Objective:
    """A `passes.StreamLoss` that remembers its sums.

    `old` and `reference` are log-probs before the first update and of the reference model, on every rank; without `old`
    the present ones are taken.
    """

    def __init__(
        self,
        batch: TrainBatch,
        config: LossConfig,
        surrogate: Surrogate,
        device: torch.device,
        *,
        old: PerSample | None = None,
        reference: PerSample | None = None,
    ) -> None:
        self._batch, self._config, self._surrogate = batch, config, surrogate
        self._old, self._reference = old, reference
        self._shares = batch.group_shares()
        self._sums = torch.zeros(1 + len(surrogate.metrics), dtype=torch.float64, device=device)
        """Loss and what it says, of the streams so far; on the device, as long as there are more."""
        self._denominator = 0

    def __call__(
        self, plan: SpanPlan, stream: Stream, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, int]:
        samples = list(stream.samples(self._batch))
        config = self._config

        def tokens(rows: Iterable[Any]) -> Tensor:
            """Values of the stream's response tokens, those of this rank's rows."""
            flat = np.concatenate([np.zeros(0), *rows]).astype(np.float32)
            return send(torch.from_numpy(flat[plan.row_ids]), logprobs.device)

        def scored(scores: PerSample | None) -> Tensor | None:
            return None if scores is None else tokens(scores[group][i] for group, i, _ in samples)

        old = scored(self._old)
        if old is None:
            old = logprobs.detach()
        engine = tokens(s.logprobs for *_, s in samples) if config.importance_cap is not None else None
        sequence = None
        if config.ratio == "sequence":
            sequence = _response_means(logprobs.detach() - old, plan, len(samples))
        losses, *said = token_losses(
            TokenTerms(
                logprobs=logprobs,
                entropy=entropy,
                weights=tokens(s.weights for *_, s in samples),
                old=old,
                engine=engine,
                reference=scored(self._reference),
                sequence_log_ratio=sequence,
            ),
            config,
            self._surrogate,
        )
        count = plan.rows.numel()
        if config.normalisation == "sequence_length":
            count = plan.first_rows * config.max_response_tokens
        if config.normalisation == "group_mean":
            losses = losses * tokens(np.full(len(s.tokens), self._shares[group]) for group, _, s in samples)
        total = losses.sum()
        self._sums += torch.stack((total.detach(), *(value.sum() for value in said)))
        self._denominator += count
        return total, count

    def reduced(self, tokens: int = 0) -> tuple[float, list[float], int]:
        """Loss, the sums of what it says, and that of `tokens`, over data- and context-parallel ranks, known on every
        rank (the last stage has them). The host waits here, once for all streams: whether to step depends on it."""
        loss, *said = self._sums
        counts = (torch.full_like(loss, count) for count in (self._denominator, tokens))
        summed = torch.stack((loss, *counts, *said))
        dist.all_reduce(summed, group=mpu.get_data_parallel_group(with_context_parallel=True))
        pipeline = mpu.get_pipeline_model_parallel_group()
        dist.broadcast(
            summed, src=dist.get_global_rank(pipeline, dist.get_world_size(pipeline) - 1), group=pipeline
        )
        total, denominator, whole, *sums = map(float, summed.tolist())
        return total / max(denominator, 1.0), sums, int(whole)


def _response_means(values: Tensor, plan: SpanPlan, responses: int) -> Tensor:
    """For every local row, the mean of `values` over its whole response, context-parallel ranks included."""
    sums, ids = values.new_zeros(2, responses), send(torch.from_numpy(plan.response_ids), values.device)
    sums[0].index_add_(0, ids, values)
    sums[1].index_add_(0, ids, torch.ones_like(values))
    dist.all_reduce(sums, group=mpu.get_context_parallel_group())
    return (sums[0] / sums[1].clamp(min=1))[ids]
