"""The learner: one Megatron policy in any layout, updated from batches of weighted tokens.

It knows groups, tokens and weights, and no role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from spell_megatron.base.files import hf_config
from spell_megatron.config import PolicyConfig
from spell_megatron.policy.experts import ExpertLoad
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.inspection import Inspection, Judge
from spell_megatron.policy.kernels import flash
from spell_megatron.policy.layout import check_policy
from spell_megatron.policy.loss import SURROGATES
from spell_megatron.policy.model import SpanModel, build_chunks
from spell_megatron.policy.objective import Objective
from spell_megatron.policy.optimizer import build_optimizer, wrap_data_parallel
from spell_megatron.policy.passes import Pass, Passes
from spell_megatron.policy.replay import Replay, check_experts, replayed
from spell_megatron.policy.scores import PerSample, Scores, joined
from spell_megatron.policy.soundness import UnsoundError, unsound_batch
from spell_megatron.policy.world import World, be_deterministic
from spell_megatron.types import TrainBatch
from spell_megatron.weights.contents import read_contents
from spell_megatron.weights.convert import load_weights, stream_weights
from spell_megatron.weights.families import Family
from spell_megatron.weights.files import ModelFolder, write_model


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
    """Before the (first) update: of the weights that the batch was sampled from. On rank 0."""
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


class HeldPolicy:
    """The model of a policy on this rank of `world`, with a folder's weights: to be scored with, streamed and written.

    It takes the memory of the weights and no more: what trains them is a `Learner`'s.
    """

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
        self._contents = read_contents(folder, families)
        self.shape = self._contents.shape
        check_policy(policy, self.shape, world.size)
        self.dtype = getattr(torch, policy.dtype)
        flash.choose(policy.attention)
        if policy.deterministic:
            be_deterministic(world.device)
        self.chunks = self._load()
        self.models: Sequence[Any] = self.chunks
        """What a pass runs over."""
        self.sampled = sampled or Sampled()
        self.replay = Replay(self.chunks, world.device) if policy.router_replay else None
        self._passes = Passes(policy, self.shape, world)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def score(self, batch: TrainBatch) -> Scores:
        """Log-probs and entropies of every response token under the present weights, on rank 0. A collective.

        Raises as `check_batch`.
        """
        self.check_batch(batch)
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

    def check_batch(self, batch: TrainBatch) -> None:
        """Raise UnsoundError, or SpellError for experts that are another model's, on every rank: the batch is the same
        on all, and what only some of them compute would leave the others waiting."""
        if (fault := unsound_batch(batch, self.shape.vocab)) is not None:
            raise fault
        if self.replay:
            check_experts(batch, self.shape)

    def settle(self) -> None:
        """Wait until the weights are the present ones, which they always are where nothing trains them."""

    def _load(self) -> list[SpanModel]:
        """Chunks of the model with the folder's weights."""
        chunks = build_chunks(self.policy, self.shape, self.folder)
        load_weights(chunks, self.shape, ModelFolder(self._contents))
        return chunks

    def _score(self, batch: TrainBatch, models: Sequence[Any], *, everywhere: bool = False) -> Scores:
        return self._passes.run(batch, models, self.sampled).scores(everywhere=everywhere)


class Learner(HeldPolicy):
    """A policy with its optimizer and its schedule."""

    models: list[DistributedDataParallel]

    def __init__(
        self,
        policy: PolicyConfig,
        folder: Path,
        world: World,
        *,
        sampled: Sampled | None = None,
        families: Sequence[str] = (),
    ) -> None:
        self.surrogate = SURROGATES.find(policy.loss.surrogate, "policy.loss.surrogate")
        super().__init__(policy, folder, world, sampled=sampled, families=families)
        self.expert_load = ExpertLoad(self.chunks, self.shape, world.device)
        self.reference = self._build_reference() if policy.loss.kl > 0 else None
        self.models = wrap_data_parallel(self.chunks, policy.optimizer)
        self.optimizer, self.schedule = build_optimizer(self.models, policy.optimizer, self.dtype)
        self._inspection = Inspection(self.models, world, policy.optimizer.max_growth)
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        if policy.optimizer.overlap:
            config.no_sync_func = (
                [m.no_sync for m in self.models] if len(self.models) > 1 else self.models[0].no_sync
            )

    def update(self, batch: TrainBatch, judge: Judge = lambda _: None) -> Update:
        """Train on a batch: `policy.minibatches` optimizer updates. The same batch on every rank.

        Raises UnsoundError on every rank where numbers are not finite, ids no tokens, or `judge` objects, before the
        optimizer steps; and after it, where nothing is left of the weights.
        """
        self.check_batch(batch)
        size = self.check()
        # From the second minibatch on the ratio is to the policy before the first; any rank may get any sample then.
        old = (
            self._score(batch, self.models, everywhere=True).logprobs if self.policy.minibatches > 1 else None
        )
        reference = self._score(batch, self.reference, everywhere=True).logprobs if self.reference else None
        parts = _dealt(len(batch.groups), self.policy.minibatches)
        self.expert_load.clear()
        if self.replay:
            self.replay.clear()
        total, tokens, lengths, scores = 0.0, 0, list[float](), list[Scores]()
        said = np.zeros(len(self.surrogate.metrics))
        for places in parts:
            part = TrainBatch(tuple(batch.groups[place] for place in places))
            objective = self._objective(part, _of(old, places), _of(reference, places))
            done = self._train(part, objective)
            scores.append(done.scores())
            loss, sums, trained = objective.reduced(done.tokens)
            try:
                self._inspection.before_step(scores[-1], loss, judge, touched=bool(lengths))
            except UnsoundError as unsound:
                unsound.group = None if unsound.group is None else places[unsound.group]
                raise
            _, grad_norm, _ = self.optimizer.step()
            lengths.append(float(grad_norm))
            total += loss / len(parts)
            said += sums
            tokens += trained
        self.settle()
        self._inspection.after_steps(size)
        rate = self.optimizer.param_groups[0]["lr"]
        self.schedule.step(1)
        seen = joined(parts, scores)
        return Update(
            loss=total,
            grad_norm=float(np.mean(lengths)),
            lr=rate,
            said=dict(
                zip(self.surrogate.metrics, (said / max(batch.response_tokens, 1)).tolist(), strict=True)
            ),
            tokens=tokens,
            scores=replace(seen, logprobs=old) if old is not None and self.world.is_main else seen,
            expert_load=self.expert_load.per_layer(),
            router_gap=self.replay.differing() if self.replay else None,
            replayed=replayed(batch),
        )

    def check(self) -> Tensor:
        """The norm of the weights that this rank holds. Raises UnsoundError on every rank where any has none."""
        self.settle()
        return self._inspection.begin()

    def gradients(self, batch: TrainBatch) -> float:
        """Forward and backward without an update; the gradients stay in `main_grad`. Returns the loss."""
        objective = self._objective(batch)
        self._train(batch, objective)
        return objective.reduced()[0]

    def settle(self) -> None:
        """Wait for parameters that an overlapped optimizer step still gathers: before, they are old."""
        if self.policy.optimizer.overlap:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _build_reference(self) -> list[SpanModel]:
        """The model that the run began with, frozen."""
        chunks = self._load()
        for chunk in chunks:
            chunk.requires_grad_(False)
        return chunks

    def _objective(
        self, batch: TrainBatch, old: PerSample | None = None, reference: PerSample | None = None
    ) -> Objective:
        loss, device = self.policy.loss, self.world.device
        return Objective(batch, loss, self.surrogate, device, old=old, reference=reference)

    def _train(self, batch: TrainBatch, objective: Objective) -> Pass:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._passes.run(batch, self.models, self.sampled, objective)


def _dealt(groups: int, count: int) -> list[range]:
    """The groups of each minibatch. They are dealt in turns: a batch comes sorted by whoever made its groups, and an
    update should see all of them."""
    parts = min(count, max(groups, 1))
    return [range(first, groups, parts) for first in range(parts)]


def _of(scores: PerSample | None, places: Sequence[int]) -> PerSample | None:
    """The scores of some groups."""
    return None if scores is None else [scores[place] for place in places]
