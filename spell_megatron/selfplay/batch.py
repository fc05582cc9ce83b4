"""The role-balanced batch of one optimizer update.

N kept questions give N·G responder samples and N questioner samples; failures of the questioner join
them, task by task as many as there are good ones; and floor(N·G·share/G) whole verifier groups are
drawn at random, so that the cheap, plentiful verdicts do not drown the other two roles. Advantages
become token weights here: behind this file there are no roles.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from spell_megatron import config
from spell_megatron.selfplay import rewards, voting
from spell_megatron.selfplay.advantages import standardise, standardise_by
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.types import Group, Rollout, Sample, TrainBatch

_ROUNDING = 1e-9
"""Products such as 3 · (1/3) may fall short of a whole number by less than this."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch for the learner, and of each of its groups the role and task, for metrics only.

    `failures` are the failed questions in it. `verifier_pool` usable verifier groups were there,
    `verifier_wanted` asked for: where the pool is smaller, none is used.
    """

    train: TrainBatch
    roles: tuple[str, ...]
    tasks: tuple[str, ...]
    failures: int
    verifier_pool: int
    verifier_wanted: int

    def samples(self, role: str) -> int:
        """Samples of one role in the batch."""
        return sum(len(g.samples) for g, r in zip(self.train.groups, self.roles, strict=True) if r == role)

    def without(self, dropped: Collection[int]) -> Batch:
        """The batch without some groups, by their places."""
        kept = [place for place in range(len(self.roles)) if place not in dropped]
        return replace(
            self,
            train=self.train.without(dropped),
            roles=tuple(self.roles[place] for place in kept),
            tasks=tuple(self.tasks[place] for place in kept),
        )


def compose(episodes: Sequence[Episode], settings: config.SelfPlay, random: Random) -> Batch:
    """Build the batch of a step's episodes: its first N kept ones and what goes with them."""
    kept = [episode for episode in episodes if episode.kept][: settings.questions]
    failures = (
        choose_failures(kept, episodes, settings.failure_ratio, random) if settings.train_questioner else []
    )
    verifies = settings.judge and settings.train_verifier
    pool = usable_groups(episodes, settings) if verifies else []
    wanted = verifier_groups(len(kept), settings) if verifies else 0
    verified = random.sample(pool, wanted) if wanted <= len(pool) else []

    entries: list[tuple[str, str, Group]] = []
    if settings.train_questioner:
        asked = [episode for episode in (*kept, *failures) if episode.asked and episode.reward is not None]
        advantages = standardise_by([e.task for e in asked], [e.reward or 0.0 for e in asked])
        for episode, advantage in zip(asked, advantages, strict=True):
            entries.append(("questioner", episode.task, _group([episode.asked], [advantage])))
    for episode in kept:
        group = _group(
            [response.rollout for response in episode.responses],
            standardise([response.reward for response in episode.responses]),
        )
        entries.append(("responder", episode.task, group))
    for episode, response in verified:
        group = _group(
            [judgement.rollout for judgement in response.judgements],
            standardise([judgement.reward for judgement in response.judgements]),
        )
        entries.append(("verifier", episode.task, group))
    return Batch(
        TrainBatch(tuple(group for _, _, group in entries)),
        tuple(role for role, _, _ in entries),
        tuple(task for _, task, _ in entries),
        len(failures),
        len(pool),
        wanted,
    )


def choose_failures(
    kept: Sequence[Episode], episodes: Sequence[Episode], ratio: float, random: Random
) -> list[Episode]:
    """Failed questions, drawn at random: per task `ratio` as many as kept ones.

    What a task cannot supply is asked of the next task; what the last cannot supply is left out.
    """
    chosen: list[Episode] = []
    owed = 0.0
    for task in sorted({episode.task for episode in episodes}):
        owed += ratio * sum(episode.task == task for episode in kept)
        failed = [e for e in episodes if e.task == task and e.outcome in rewards.FAILURES and e.asked]
        drawn = random.sample(failed, min(len(failed), math.floor(owed + _ROUNDING)))
        chosen += drawn
        owed -= len(drawn)
    return chosen


def usable_groups(episodes: Sequence[Episode], settings: config.SelfPlay) -> list[tuple[Episode, Response]]:
    """Every response whose verdicts teach the verifier, whatever became of its question."""
    return [
        (episode, response)
        for episode in episodes
        for response in episode.responses
        if not response.unjudged
        and voting.is_usable(
            response.votes,
            response.verdict,
            response.rule,
            bounds=settings.verifier_agreement,
            consistent=settings.verifier_consistency == "maj_cons",
        )
    ]


def verifier_groups(questions: int, settings: config.SelfPlay) -> int:
    """floor(N·G·share/G), with share = 1/G where none is given."""
    share = 1 / settings.group_size if settings.verifier_share is None else settings.verifier_share
    return math.floor(questions * share + _ROUNDING)


def _group(rollouts: Sequence[Rollout | None], advantages: Sequence[float]) -> Group:
    """Rollouts of one prompt; every token of a response carries the response's advantage."""
    present = [rollout for rollout in rollouts if rollout is not None]
    samples = tuple(
        Sample(
            rollout.tokens,
            [advantage] * len(rollout.tokens),
            rollout.logprobs,
            rollout.version,
            rollout.updates,
            rollout.experts,
        )
        for rollout, advantage in zip(present, advantages, strict=True)
    )
    return Group(present[0].prompt, samples, present[0].prompt_experts)
