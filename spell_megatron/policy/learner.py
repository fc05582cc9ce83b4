"""The learner: one Megatron policy in any layout, updated from batches of weighted tokens.

It knows groups, tokens and weights, and no role. The loss is the sum over all response tokens of the batch
divided by their number, exactly, whatever the split over ranks, streams and pipeline stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from spell_megatron.base.files import hf_config
from spell_megatron.config import PolicyConfig
from spell_megatron.policy.experts import ExpertLoad
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.kernels import flash
from spell_megatron.policy.layout import check_layout
from spell_megatron.policy.loss import SURROGATES, TokenTerms, token_losses
from spell_megatron.policy.model import SpanModel, build_chunks, token_grain
from spell_megatron.policy.optimizer import build_optimizer, wrap_data_parallel
from spell_megatron.policy.replay import Choices, Replay, replayed
from spell_megatron.policy.send import send
from spell_megatron.policy.soundness import (
    UnsoundError,
    first_unsound,
    norms,
    unsound_batch,
    unsound_scores,
)
from spell_megatron.policy.spans import SpanPlan, plan_spans
from spell_megatron.policy.stream import Stream, plan_streams
from spell_megatron.policy.world import World, be_deterministic
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.contents import read_contents
from spell_megatron.weights.convert import load_weights, stream_weights
from spell_megatron.weights.families import Family
from spell_megatron.weights.files import ModelFolder, write_model

PerSample = list[list[np.ndarray]]
"""`[group][sample]` -> float32 `[response tokens]`, aligned with a batch's groups."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs and entropies of a batch's response tokens, complete on every rank."""

    logprobs: PerSample
    entropy: PerSample

    def mean_entropy(self, labels: Sequence[str]) -> dict[str, float]:
        """In nats: over all response tokens as `policy/entropy`, and `<label>/entropy` over each label's groups."""
        by_label: dict[str, list[np.ndarray]] = {}
        for group, label in zip(self.entropy, labels, strict=True):
            by_label.setdefault(label, []).extend(group)
        whole = [sample for samples in by_label.values() for sample in samples]
        named = {"policy": whole, **by_label}
        return {
            f"{name}/entropy": float(np.concatenate(parts).mean()) for name, parts in named.items() if parts
        }


@dataclass(frozen=True, slots=True)
class Update:
    """What one call of `Learner.update` did."""

    loss: float
    grad_norm: float
    lr: float
    said: Mapping[str, float]
    """What the loss says of itself, by names: means over the batch's tokens."""
    tokens: int
    """Tokens computed on this rank, prompts included."""
    scores: Scores
    """Before the (first) update: of the weights that the batch was sampled from."""
    expert_load: tuple[float, ...] = ()
    """For each layer, tokens of the busiest expert over the mean of all; empty without experts."""
    router_gap: float | None = None
    """Share of tokens times layers whose experts, told by the engine, are not those that the learner would choose;
    None without router replay."""
    replayed: float = 0.0
    """Share of response tokens whose experts the engine told."""

    def router_metrics(self) -> dict[str, float]:
        """The most and the mean uneven layer: with expert parallelism the busiest expert sets the pace. And where the
        engine's choice was replayed, for how many tokens it was known, and how often it differs."""
        load, metrics = self.expert_load, dict[str, float]()
        if load:
            metrics = {"policy/expert_load_max": max(load), "policy/expert_load_mean": float(np.mean(load))}
        if self.router_gap is not None:
            metrics |= {"mismatch/router": self.router_gap, "policy/replayed": self.replayed}
        return metrics


Judge = Callable[[Scores], UnsoundError | None]
"""A reason not to make an update, seen from its scores; the same on every rank."""


def main_gradient(weight: Tensor) -> Tensor:
    """The float32 gradient of a parameter, which Megatron adds up in a buffer of its own."""
    gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
    return gradient


class Learner:
    """A policy, its optimizer and its schedule on this rank of `world`."""

    def __init__(
        self,
        policy: PolicyConfig,
        folder: Path,
        world: World,
        *,
        sampled: Sampled | None = None,
        families: Sequence[str] = (),
    ) -> None:
        self.policy, self.folder, self.world = policy, folder, world
        self.surrogate = SURROGATES.find(policy.loss.surrogate, "policy.loss.surrogate")
        self._contents = read_contents(folder, families)
        self.shape = self._contents.shape
        check_layout(policy.layout, self.shape, world.size)
        self.dtype = getattr(torch, policy.dtype)
        flash.choose(policy.attention)
        if policy.deterministic:
            be_deterministic(world.device)
        self.chunks = build_chunks(policy, self.shape, folder)
        self.sampled = sampled or Sampled()
        load_weights(self.chunks, self.shape, ModelFolder(self._contents))
        self.expert_load = ExpertLoad(self.chunks, self.shape, world.device)
        self.replay = self._build_replay() if policy.router_replay else None
        self.reference = self._build_reference() if policy.loss.kl > 0 else None
        self.models = wrap_data_parallel(self.chunks, policy.optimizer)
        self.optimizer, self.schedule = build_optimizer(self.models, policy.optimizer, self.dtype)
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        if policy.optimizer.overlap:
            config.no_sync_func = (
                [m.no_sync for m in self.models] if len(self.models) > 1 else self.models[0].no_sync
            )

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def update(self, batch: TrainBatch, judge: Judge = lambda _: None) -> Update:
        """Train on a batch: `policy.minibatches` optimizer updates. The same batch on every rank.

        Raises UnsoundError on every rank where numbers are not finite or `judge` objects, before the optimizer steps;
        and after it, where nothing is left of the weights.
        """
        if (fault := unsound_batch(batch)) is not None:
            raise fault
        size = self.check()
        old = self.score(batch).logprobs if self.policy.minibatches > 1 else None
        reference = self._score(batch, self.reference).logprobs if self.reference else None
        parts = _minibatches(batch, self.policy.minibatches)
        self.expert_load.clear()
        if self.replay:
            self.replay.clear()
        total, tokens, lengths, scores = 0.0, 0, list[float](), list[Scores]()
        said = np.zeros(len(self.surrogate.metrics))
        for part, offset in parts:
            self._zero_grad()
            run = self._begin(part, _part(old, offset, part), _part(reference, offset, part))
            self._run(run, run_loss=partial(self._loss, run), train=True)
            scores.append(self._collect(run))
            values = self._reduce(run)
            self._check(scores[-1], values[0], judge, touched=bool(lengths))
            _, grad_norm, _ = self.optimizer.step()
            self.schedule.step(1)
            lengths.append(float(grad_norm))
            total += values[0] / max(values[1], 1.0) / len(parts)
            said += values[2:]
            tokens += run.tokens
        self._check_weights(size)
        merged = Scores(
            [group for score in scores for group in score.logprobs],
            [group for score in scores for group in score.entropy],
        )
        return Update(
            loss=total,
            grad_norm=float(np.mean(lengths)),
            lr=self.optimizer.param_groups[0]["lr"],
            said=dict(
                zip(self.surrogate.metrics, (said / max(batch.response_tokens, 1)).tolist(), strict=True)
            ),
            tokens=tokens,
            scores=Scores(old, merged.entropy) if old is not None else merged,
            expert_load=self.expert_load.per_layer(),
            router_gap=self.replay.differing() if self.replay else None,
            replayed=replayed(batch),
        )

    def check(self) -> Tensor:
        """The norm of the weights that this rank holds. Raises UnsoundError on every rank where any has none."""
        norm = self._weight_norm()
        if not self._everywhere(norm.isfinite()):
            fault = self._first("weights are", first_unsound(self.named_parameters()))
            fault.touched = True
            raise fault
        return norm

    def _check(self, scores: Scores, loss: float, judge: Judge, *, touched: bool) -> None:
        """Raise UnsoundError on every rank where any has a reason not to step."""
        fault = unsound_scores(scores.logprobs, scores.entropy) or judge(scores)
        if fault is None and not math.isfinite(loss):
            fault = UnsoundError("the loss is not finite")
        buffers = [
            buffer.grad_data for m in self.models for buffer in (*m.buffers, *m.expert_parallel_buffers)
        ]
        if fault is None and not self._everywhere(norms(buffers).isfinite().all()):
            gradients = ((name, main_gradient(p)) for name, p in self.named_parameters() if p.requires_grad)
            fault = self._first("gradients are", first_unsound(gradients))
        if fault is not None:
            fault.touched = touched
            raise fault

    def _check_weights(self, before: Tensor) -> None:
        """Raise UnsoundError on every rank where the update wrecked the weights of any; `before` is their norm."""
        now = self._weight_norm()
        most = self.policy.optimizer.max_growth
        if not self._everywhere((now <= most * before) & now.isfinite()):
            fault = self._first("after the update weights are", first_unsound(self.named_parameters()))
            fault.touched = True
            raise fault

    def _weight_norm(self) -> Tensor:
        """The norm of all that this rank holds; a NaN anywhere is a NaN here."""
        self.settle()
        norm: Tensor = torch.linalg.vector_norm(norms(p for _, p in self.named_parameters()))
        return norm

    def _everywhere(self, sound: Tensor) -> bool:
        """Whether something holds on every rank."""
        verdict = sound.to(self.world.device, torch.int32)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict)  # the host decides by it

    def _first(self, what: str, name: str) -> UnsoundError:
        """What is wrong, with the first parameter that it is seen at on any rank."""
        names: list[Any] = [None] * self.world.size
        dist.all_gather_object(names, name)
        name = next(filter(None, names), "")
        return UnsoundError(f"{what} not finite at {name}" if name else f"{what} far too large")

    def gradients(self, batch: TrainBatch) -> float:
        """Forward and backward without an update; the gradients stay in `main_grad`. Returns the loss."""
        self._zero_grad()
        run = self._begin(batch)
        self._run(run, run_loss=partial(self._loss, run), train=True)
        values = self._reduce(run)
        return values[0] / max(values[1], 1.0)

    def score(self, batch: TrainBatch) -> Scores:
        """Log-probs and entropies of every response token under the present weights."""
        self.settle()
        return self._score(batch, self.models)

    def weights(
        self, value: Callable[[Tensor], Tensor] | None = None, *, family: Family | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Stream `(Hugging Face name, full tensor)`; a collective, see `stream_weights`."""
        self.settle()
        return stream_weights(self.chunks, self.shape, value, family)

    def engine_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same by the names that engines know (`weights/known.py`)."""
        return self.weights(family=self.shape.family.known)

    def save_hf(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (rank 0 writes, every rank takes part)."""
        config = hf_config(self.folder) | {"dtype": str(self.dtype).removeprefix("torch.")}
        write_model(folder, self.weights(), source=self.folder, config=config, write=self.world.is_main)

    def settle(self) -> None:
        """Wait for parameters that an overlapped optimizer step still gathers: before, they are old."""
        if self.policy.optimizer.overlap:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _build_reference(self) -> list[SpanModel]:
        """The model that the run began with, frozen."""
        chunks = build_chunks(self.policy, self.shape, self.folder)
        load_weights(chunks, self.shape, ModelFolder(self._contents))
        for chunk in chunks:
            chunk.requires_grad_(False)
        return chunks

    @torch.no_grad()
    def _score(self, batch: TrainBatch, models: Sequence[Any]) -> Scores:
        run = self._begin(batch)
        self._run(run, run_loss=partial(self._observe, run), train=False, models=models)
        return self._collect(run)

    # One forward(-backward) pass over a batch, in Megatron's schedules

    def _run(
        self,
        run: _Run,
        *,
        run_loss: Callable[[SpanPlan, Stream, Any], Any],
        train: bool,
        models: Sequence[Any] = (),
    ) -> None:
        models = models or self.models
        streams = self._streams(run.batch)
        for model in models:
            getattr(model, "module", model).sampled = self.sampled  # under DDP, or bare
            model.train(train)
        plans = [self._plan(run.batch, stream) for stream in streams]
        run.tokens = sum(plan.ids.shape[1] for plan in plans)
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, run_loss),
            data_iterator=[iter(zip(plans, streams, strict=True)) for _ in models],
            model=list(models),
            num_microbatches=len(streams),
            seq_length=1,  # lengths vary; the schedules exchange them
            micro_batch_size=1,
            forward_only=not train,
        )

    def _streams(self, batch: TrainBatch) -> Sequence[Stream]:
        shape = self.shape
        expert = 3 * shape.experts_per_token * shape.expert_ffn
        linear = shape.hidden * (3 * shape.ffn if not shape.experts else expert)
        linear += shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        return plan_streams(
            batch,
            budget=self.policy.stream_tokens,
            data_size=self.world.data_size,
            multiple=self.policy.layout.pipeline if self.policy.layout.virtual_pipeline else 1,
            share_prompts=self.policy.share_prompts,
            token_work=linear / (2 * shape.heads * shape.head_dim),
        )[self.world.data_rank]

    def _build_replay(self) -> Replay:
        if not self.shape.experts:
            raise SpellError(f"policy.router_replay is for mixtures of experts, and {self.folder} is dense")
        return Replay(self.chunks, self.world.device)

    def _plan(self, batch: TrainBatch, stream: Stream) -> SpanPlan:
        plan = plan_spans(
            stream.layout(batch),
            cp_size=self.world.context_size,
            cp_rank=self.world.context_rank,
            multiple=token_grain(self.policy),
            device=self.world.device,
        )
        if self.replay:
            plan.choices = Choices.of(batch, stream, plan.sources, self.shape)
        return plan

    def _begin(
        self, batch: TrainBatch, old: PerSample | None = None, reference: PerSample | None = None
    ) -> _Run:
        return _Run(batch, self.world.device, old, reference, said=len(self.surrogate.metrics))

    def _loss(
        self, run: _Run, plan: SpanPlan, stream: Stream, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Megatron's contract: summed loss, what to divide by, what to report."""
        logprobs, entropy = output
        run.keep(plan, stream, logprobs.detach(), entropy.detach())
        samples = list(stream.samples(run.batch))
        config = self.policy.loss

        def tokens(rows: Iterable[Any]) -> Tensor:
            """Values of the stream's response tokens, those of this rank's rows."""
            flat = np.concatenate([np.zeros(0), *rows]).astype(np.float32)
            return send(torch.from_numpy(flat[plan.row_ids]), logprobs.device)

        def scored(scores: PerSample | None) -> Tensor | None:
            return None if scores is None else tokens(scores[group][i] for group, i, _ in samples)

        old = scored(run.old)
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
                reference=scored(run.reference),
                sequence_log_ratio=sequence,
            ),
            config,
            self.surrogate,
        )
        count = plan.rows.numel()
        if config.normalisation == "sequence_length":
            count = plan.first_rows * config.max_response_tokens
        if config.normalisation == "group_mean":
            shares = run.batch.group_shares()
            losses = losses * tokens(np.full(len(s.tokens), shares[group]) for group, _, s in samples)
        total = losses.sum()
        run.sums += torch.stack((total.detach(), *(value.sum() for value in said)))
        run.denominator += count
        return total, _count(count, logprobs.device), {}

    def _observe(
        self, run: _Run, plan: SpanPlan, stream: Stream, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        run.keep(plan, stream, *output)
        return output[0].sum(), _count(0, output[0].device), {}

    def _zero_grad(self) -> None:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _reduce(self, run: _Run) -> list[float]:
        """Loss, denominator and what the loss says, summed over data- and context-parallel ranks, known on every rank
        (the last stage has them). The host waits here, once for all streams: whether to step depends on it."""
        loss, *said = run.sums
        summed = torch.stack((loss, torch.full_like(loss, run.denominator), *said))
        dist.all_reduce(summed, group=mpu.get_data_parallel_group(with_context_parallel=True))
        pipeline = mpu.get_pipeline_model_parallel_group()
        dist.broadcast(
            summed, src=dist.get_global_rank(pipeline, dist.get_world_size(pipeline) - 1), group=pipeline
        )
        return list(map(float, summed.tolist()))

    def _collect(self, run: _Run) -> Scores:
        """Put the rows of all ranks in their places."""
        scores = Scores(_blank(run.batch), _blank(run.batch))
        last = self.world.last_stage and mpu.get_tensor_model_parallel_rank() == 0
        mine = list(run.rows()) if last else []
        everyone: list[Any] = [mine]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, mine)
        for rows in everyone:
            for group, sample, places, logprobs, entropy in rows:
                scores.logprobs[group][sample][places] = logprobs
                scores.entropy[group][sample][places] = entropy
        return scores


class _Run:
    """One pass over a batch: what it needs, and what it leaves on this rank."""

    def __init__(
        self,
        batch: TrainBatch,
        device: torch.device,
        old: PerSample | None,
        reference: PerSample | None,
        said: int,
    ) -> None:
        self.batch, self.old, self.reference = batch, old, reference
        self.kept: list[tuple[SpanPlan, Stream, Tensor]] = []
        self.sums = torch.zeros(1 + said, dtype=torch.float64, device=device)
        """Loss and what it says, of the streams so far; on the device, as long as there are more."""
        self.denominator, self.tokens = 0, 0

    def keep(self, plan: SpanPlan, stream: Stream, logprobs: Tensor, entropy: Tensor) -> None:
        """What became of a stream; it stays on the device until all are through."""
        self.kept.append((plan, stream, torch.stack((logprobs, entropy)).float()))

    def rows(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """`(group, sample, places, log-probs, entropies)` of this rank's rows. Here the host waits for all streams."""
        if not self.kept:
            return
        values = torch.cat([values for *_, values in self.kept], 1).cpu().numpy()
        ends = np.cumsum([values.shape[1] for *_, values in self.kept])
        for (plan, stream, _), (logprobs, entropy) in zip(
            self.kept, np.split(values, ends[:-1], axis=1), strict=True
        ):
            ids, responses = plan.row_ids, plan.response_ids
            bounds = np.searchsorted(responses, np.arange(responses.max(initial=-1) + 2))
            start = 0
            for index, (group, i, sample) in enumerate(stream.samples(self.batch)):
                if index + 1 < len(bounds):
                    mine = slice(bounds[index], bounds[index + 1])
                    yield group, i, ids[mine] - start, logprobs[mine], entropy[mine]
                start += len(sample.tokens)


def _forward_step(
    run_loss: Callable[[SpanPlan, Stream, Any], Any], data: Iterator[tuple[SpanPlan, Stream]], model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    plan, stream = next(data)
    output = model(plan.ids, plan.positions, None, packed_seq_params=plan)
    return output, partial(run_loss, plan, stream)


def _response_means(values: Tensor, plan: SpanPlan, responses: int) -> Tensor:
    """For every local row, the mean of `values` over its whole response, context-parallel ranks included."""
    sums, ids = values.new_zeros(2, responses), send(torch.from_numpy(plan.response_ids), values.device)
    sums[0].index_add_(0, ids, values)
    sums[1].index_add_(0, ids, torch.ones_like(values))
    dist.all_reduce(sums, group=mpu.get_context_parallel_group())
    return (sums[0] / sums[1].clamp(min=1))[ids]


def _count(tokens: int, device: torch.device) -> Tensor:
    """In the form in which Megatron wants it; filled there, since a copy would be waited for."""
    return torch.full((), tokens, dtype=torch.int, device=device)


def _minibatches(batch: TrainBatch, count: int) -> list[tuple[TrainBatch, int]]:
    """Consecutive parts of a batch, with the index of their first group."""
    bounds = np.linspace(0, len(batch.groups), min(count, max(len(batch.groups), 1)) + 1).astype(int)
    return [(TrainBatch(batch.groups[a:b]), int(a)) for a, b in pairwise(bounds)]


def _part(scores: PerSample | None, offset: int, part: TrainBatch) -> PerSample | None:
    """The scores of a minibatch's groups."""
    return None if scores is None else scores[offset : offset + len(part.groups)]


def _blank(batch: TrainBatch) -> PerSample:
    return [[np.full(len(s.tokens), np.nan, np.float32) for s in group.samples] for group in batch.groups]
