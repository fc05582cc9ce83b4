"""Router replay: train with the experts that the engine chose.

A token whose router logits lie close together goes to one expert in the engine and to another here, and then its
log-prob is another function's. Where the engine tells what it chose, the learner sends every token to the same
experts; how much each of them counts is computed here, and so the gradient reaches the router through these weights
(arXiv 2510.11370). A token without a choice of the engine's (padding, a response's last one, samples of no engine or
of a journal, which does not hold them) goes where the learner would send it.

megatron-core's own replay (transformer/moe/router_replay.py) keeps one choice for all that is under way, and leaves
it to the caller to tell a forward pass from one that is repeated in the backward pass. Here the choice is part of the
stream's plan, which a layer is handed in either, whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from spell_megatron.policy.send import send
from spell_megatron.policy.stream import Stream
from spell_megatron.types import Experts, SpellError, TrainBatch
from spell_megatron.weights.shape import ModelShape

_OWN = -1
"""In place of an expert: the learner's own choice."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the engine chose for the rows that a rank computes of a stream. Nothing is copied before a layer asks."""

    parts: tuple[tuple[Experts | None, int], ...]
    """For prompt, response, response, …: the experts of its first tokens, and how many tokens it has."""
    sources: np.ndarray
    """Which of these tokens every row is, `[rows]`; -1 for padding."""
    top_k: int

    @classmethod
    def of(cls, batch: TrainBatch, stream: Stream, sources: np.ndarray, shape: ModelShape) -> Choices:
        parts: list[tuple[Experts | None, int]] = []
        for part in stream.parts:
            group = batch.groups[part.group]
            parts.append((group.experts, len(group.prompt)))
            parts += [(group.samples[i].experts, len(group.samples[i].tokens)) for i in part.samples]
        return cls(tuple(parts), sources, shape.experts_per_token)

    def layer(self, number: int) -> Tensor:
        """Experts of the rows in one layer, int64 `[rows, top k]`; `_OWN` where the engine chose none."""
        tokens = sum(count for _, count in self.parts)
        chosen = np.full((tokens + 1, self.top_k), _OWN, dtype=np.int64)  # the last one is padding's
        start = 0
        for experts, count in self.parts:
            if experts is not None:
                chosen[start : start + len(experts)] = experts[:, number]
            start += count
        return torch.from_numpy(chosen[self.sources])


class Replay:
    """The routers of this rank's layers, told what to choose, and how often they would have chosen otherwise."""

    def __init__(self, chunks: Iterable[Any], device: torch.device) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        for chunk in chunks:
            for layer in chunk.modules():
                router = getattr(layer.mlp, "router", None) if isinstance(layer, TransformerLayer) else None
                if isinstance(router, Router):
                    router.router_replay = told = _Told(self._counts)
                    layer.register_forward_pre_hook(partial(told.listen, router), with_kwargs=True)

    def clear(self) -> None:
        self._counts.zero_()

    def differing(self) -> float | None:
        """Share of tokens times layers for which the routers themselves would have chosen other experts, over all
        ranks; None where nothing was replayed. A collective. A pass that is repeated counts twice."""
        total = self._counts.clone()
        dist.all_reduce(total)
        differing, told = total.tolist()
        return differing / told if told else None


class _Told(RouterReplay):
    """What one router is told to choose, in the place where megatron-core asks for it."""

    def __init__(self, counts: Tensor) -> None:  # upstream's would enter it into a list that never ends
        self._counts, self._given = counts, None

    _given: Tensor | None

    def listen(self, router: Router, _layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before a layer runs, or runs again in the backward pass: take its rows from the plan."""
        choices: Choices | None = kwargs["packed_seq_params"].choices
        self._given = None
        if choices is not None:
            rows = choices.layer(router.layer_number - 1)
            if router.config.sequence_parallel:
                size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
                rows = rows.chunk(size)[rank]
            self._given = send(rows, self._counts.device)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores `[tokens, experts]` to those of the chosen experts and their numbers, `[tokens, top k]` each."""
        assert default_compute_topk is not None
        if self._given is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            told = self._given[:, :1] != _OWN
            chosen = torch.where(told, self._given, own)
            other = (chosen.sort(-1).values != own.sort(-1).values).any(-1)
            self._counts += torch.stack((other.sum(), told.sum()))
        return scores.gather(1, chosen), chosen


def check_experts(batch: TrainBatch, shape: ModelShape) -> None:
    """Raise SpellError where what an engine chose for a prompt or a response is not of a model of this shape."""
    for group in batch.groups:
        for experts, ids in ((group.experts, group.prompt), *((s.experts, s.tokens) for s in group.samples)):
            if experts is None:
                continue
            wanted, most = (shape.layers, shape.experts_per_token), int(experts.max(initial=0))
            if experts.shape[1:] != wanted or len(experts) > len(ids) or most >= shape.experts:
                raise SpellError(
                    f"an engine's experts of {len(ids)} tokens have the shape {list(experts.shape)} and numbers up to"
                    f" {most}, and this model has {shape.layers} layers and {shape.experts_per_token} of"
                    f" {shape.experts} experts a token: policy.router_replay needs engines of the model that is trained"
                )


def replayed(batch: TrainBatch) -> float:
    """Share of response tokens in samples whose experts the engine told."""
    told = [len(s.tokens) * (s.experts is not None) for group in batch.groups for s in group.samples]
    return sum(told) / max(batch.response_tokens, 1)
