"""The role-balanced batch of one optimizer update.

N kept questions give N·G responder samples and N questioner samples; failures of the questioner join
them, task by task as many as there are good ones; and floor(N·G·share/G) whole verifier groups are
drawn at random, so that the cheap, plentiful verdicts do not drown the other two roles. Advantages
become token weights here: behind this file there are no roles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from spell_megatron import config
from spell_megatron.selfplay import rewards, voting
from spell_megatron.selfplay.advantages import SCALES, standardise_by
from spell_megatron.selfplay.baselines import Baselines
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.evidence import evidence_score
from spell_megatron.selfplay.gating import sampled_entropy, without_negatives
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
    gated: bool = False
    """Whether negative advantages were left out (`selfplay.beyond.negatives_below`)."""

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


BONUSES: Mapping[str, Callable[[Episode, Response], float]] = {
    "evidence": lambda episode, response: evidence_score(response.text, episode.documents),
}
"""What a response earns besides, in advantages alone, by the key of `selfplay.beyond` that is its weight."""

PEERS: Mapping[str, Callable[[Episode], Hashable]] = {
    "task": lambda episode: episode.task,
    "task_documents": lambda episode: (episode.task, len(episode.documents)),
}
"""Whom a question is compared with: those of its task (eq. 9), or those about as many documents besides, as Dr. Zero
(arXiv 2601.07055) groups its proposals by hops."""


def compose(
    episodes: Sequence[Episode],
    settings: config.SelfPlay,
    random: Random,
    baselines: Baselines | None = None,
) -> Batch:
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
        for episode, advantage in zip(asked, _asked(asked, settings.beyond, baselines), strict=True):
            entries.append(("questioner", episode.task, _group([episode.asked], [advantage])))
    answers = [(e.task, [(r.rollout, _worth(e, r, settings.beyond)) for r in e.responses]) for e in kept]
    verdicts = [(e.task, [(j.rollout, j.reward) for j in r.judgements]) for e, r in verified]
    entries += [("responder", *entry) for entry in _groups(answers, settings.beyond.std)]
    entries += [("verifier", *entry) for entry in _groups(verdicts, settings.beyond.std)]
    train = TrainBatch(tuple(group for _, _, group in entries))
    bound = settings.beyond.negatives_below
    gated = bound is not None and sampled_entropy(train) > bound
    return Batch(
        without_negatives(train) if gated else train,
        tuple(role for role, _, _ in entries),
        tuple(task for _, task, _ in entries),
        len(failures),
        len(pool),
        wanted,
        gated,
    )


def _asked(episodes: Sequence[Episode], beyond: config.Beyond, baselines: Baselines | None) -> list[float]:
    """The advantages of questions."""
    tasks, rewards = [e.task for e in episodes], [e.reward or 0.0 for e in episodes]
    if baselines is not None:
        return baselines.advantages(tasks, rewards)
    peers = [PEERS[beyond.questioner_peers](episode) for episode in episodes]
    return standardise_by(peers, rewards, list(map(SCALES[beyond.std], peers, tasks)))


def _groups(
    made: Sequence[tuple[str, Sequence[tuple[Rollout, float]]]], std: str
) -> Iterator[tuple[str, Group]]:
    """Groups of one role, each compared within itself: task, and rollouts with what each earned."""
    peers = [place for place, (_, group) in enumerate(made) for _ in group]
    rewards = [reward for _, group in made for _, reward in group]
    scales = [SCALES[std](place, made[place][0]) for place in peers]
    advantages = iter(standardise_by(peers, rewards, scales))
    for task, group in made:
        rollouts = [rollout for rollout, _ in group]
        yield task, _group(rollouts, list(islice(advantages, len(rollouts))))


def _worth(episode: Episode, response: Response, beyond: config.Beyond) -> float:
    """What a response is compared by: its reward, and what it earns besides."""
    weights = {name: getattr(beyond, name) for name in BONUSES}
    return response.reward + sum(
        weight * BONUSES[name](episode, response) for name, weight in weights.items() if weight
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
