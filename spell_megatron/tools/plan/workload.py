"""How much there is to compute in one step: the batch's groups, the engine's prompts and answers. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from spell_megatron.config import Config, PolicyConfig, SelfPlayConfig
from spell_megatron.policy.layout import depth
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.types import Group, Sample, TrainBatch
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of the prompts and answers of a step."""

    question_prompt: int
    question: int
    prompt: int
    response: int
    judge_prompt: int
    verdict: int

    @classmethod
    def of(cls, config: Config, assumed: Assumptions) -> Lengths:
        documents, limits = config.corpus.cluster_tokens, config.selfplay.sampling

        def mean(limit: int, fill: float = assumed.response_fill) -> int:
            return max(1, round(limit * fill))

        template = min(assumed.template_tokens, documents)
        return cls(
            question_prompt=round(documents * assumed.reading_share) + template,
            question=mean(limits.questioner_tokens),
            prompt=documents + template,
            response=mean(limits.responder_tokens),
            judge_prompt=template,
            verdict=mean(limits.verifier_tokens, assumed.verdict_fill),
        )


@cache
def expected_batch(play: SelfPlayConfig, lengths: Lengths) -> TrainBatch:
    """A training batch of the mean lengths, role-balanced as the algorithm makes it. Its tokens are only counted."""
    groups: list[Group] = []
    groups += [_group(lengths.prompt, lengths.response, play.group_size)] * play.questions
    if play.train_questioner:
        count = round(play.questions * (1 + play.failure_ratio))
        groups += [_group(lengths.question_prompt, lengths.question, 1)] * count
    if play.judge and play.train_verifier:
        share = play.verifier_share if play.verifier_share is not None else 1 / play.group_size
        groups += [_group(lengths.judge_prompt, lengths.verdict, play.group_size)] * int(
            play.questions * share
        )
    return TrainBatch(tuple(groups))


def _group(prompt: int, response: int, count: int) -> Group:
    return Group(range(prompt), (Sample(range(response), ()),) * count)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the engine reads and writes in one step. `read` counts a shared prompt once: it is cached."""

    read: float
    read_pairs: float
    """Query-key pairs of reading."""
    written: float
    """Sampled tokens."""
    context: float
    """Mean context of a sampled token."""

    @classmethod
    def of(cls, config: Config, lengths: Lengths, assumed: Assumptions) -> Rollouts:
        play = config.selfplay
        asked = play.round_questions
        answered = asked * (assumed.grounded_share if play.grounding else 1.0)
        judged = answered * play.group_size if play.judge else 0.0
        prompts = [
            (asked, lengths.question_prompt, 1, lengths.question),
            (asked if play.grounding else 0, lengths.judge_prompt, 1, lengths.response),
            (answered, lengths.prompt, play.group_size, lengths.response),
            (judged, lengths.judge_prompt, play.group_size, lengths.verdict),
        ]
        written = sum(count * samples * reply for count, _, samples, reply in prompts)
        return cls(
            read=sum(count * prompt for count, prompt, *_ in prompts),
            read_pairs=sum(count * prompt**2 / 2 for count, prompt, *_ in prompts),
            written=written,
            context=sum(n * k * reply * (prompt + reply / 2) for n, prompt, k, reply in prompts) / written,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of one forward pass over some text."""

    dense: float
    """Matrix products outside experts, the head included."""
    expert: float
    attention: float

    @property
    def total(self) -> float:
        return self.dense + self.expert + self.attention

    def over(self, parts: int) -> Work:
        """An equal share."""
        return Work(self.dense / parts, self.expert / parts, self.attention / parts)


@dataclass(frozen=True, slots=True)
class PassCount:
    """How often a batch passes a layer, on the mean of all layers."""

    layers: float
    """Forward, but for attention."""
    attention: float
    """Forward."""
    backward: int


SCORING = PassCount(layers=1.0, attention=1.0, backward=0)
"""For log-probs alone."""


def passes(policy: PolicyConfig, shape: ModelShape) -> PassCount:
    """Of training, with what is computed again."""
    chunk = depth(policy, shape)
    again = chunk.recomputed / (chunk.recomputed + chunk.offloaded + chunk.kept)
    return PassCount(1 + again, 1 + again if policy.recompute == "full" else 1.0, backward=1)


def scorings(policy: PolicyConfig) -> int:
    """Passes over the batch for log-probs alone: of the policy before the first of several minibatches, and of the
    reference model (`policy/learner.py`)."""
    return (policy.minibatches > 1) + (policy.loss.kl > 0)


def head_work(shape: ModelShape, rows: float) -> float:
    """Operations of projecting hidden states to logits."""
    return 2 * rows * shape.hidden * shape.vocab


def head_backward(rows: float, chunk: int) -> float:
    """What the backward pass of so many rows multiplies, in forward passes: two, and the logits of all chunks but the
    last again (`policy/head.py`)."""
    return 2 + (math.ceil(rows / chunk) - 1) * chunk / rows


def forward_work(shape: ModelShape, tokens: float, pairs: float, head_rows: float) -> Work:
    """`tokens` pass the layers, `pairs` of a query and a key meet in each, `head_rows` are projected to logits."""
    projections = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    dense = projections + (shape.hidden * shape.experts if shape.experts else 3 * shape.hidden * shape.ffn)
    expert = 3 * shape.hidden * shape.expert_ffn * shape.experts_per_token
    return Work(
        dense=2 * tokens * shape.layers * dense + head_work(shape, head_rows),
        expert=2 * tokens * shape.layers * expert,
        attention=4 * pairs * shape.layers * shape.heads * shape.head_dim,
    )


def batch_work(shape: ModelShape, groups: Iterable[tuple[int, list[int]]], *, shared: bool) -> Work:
    """One forward pass over `(prompt, responses)` groups, a prompt computed once or with every response."""
    tokens = pairs = rows = 0.0
    for prompt, replies in groups:
        copies = 1 if shared else len(replies)
        tokens += copies * prompt + sum(replies)
        pairs += copies * prompt**2 / 2 + sum(reply * (prompt + reply / 2) for reply in replies)
        rows += sum(replies)
    return forward_work(shape, tokens, pairs, rows)


def group_lengths(batch: TrainBatch) -> Iterator[tuple[int, list[int]]]:
    for group in batch.groups:
        yield len(group.prompt), [len(sample.tokens) for sample in group.samples]
