"""The role-balanced batch of one optimizer update.

N kept questions give N·G responder samples and N questioner samples; failures of the questioner join
them, and so do some of the verifier's groups: what is taken of a role is the role's to choose. Behind
this file there are no roles, only groups whose tokens have weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from spell_megatron import config
from spell_megatron.selfplay.baselines import Baselines
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.gating import sampled_entropy, without_negatives
from spell_megatron.selfplay.roles import ROLES, Role, Step
from spell_megatron.types import TrainBatch


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch for the learner, and of each of its groups the role and task, for metrics only.

    `facts` are metrics of how it was chosen.
    """

    train: TrainBatch
    roles: tuple[str, ...]
    tasks: tuple[str, ...]
    facts: Mapping[str, float] = field(default_factory=dict)

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


def compose(
    episodes: Sequence[Episode],
    settings: config.SelfPlayConfig,
    random: Random,
    baselines: Baselines | None = None,
    roles: Sequence[Role] = tuple(ROLES.values()),
) -> Batch:
    """Build the batch of a step's episodes: its first N kept ones and what goes with them."""
    kept = [episode for episode in episodes if episode.kept][: settings.questions]
    step = Step(episodes, kept, settings, random, baselines)
    chosen = {role.name: role.choose(step) for role in roles}
    train = TrainBatch(tuple(group for of_role in chosen.values() for group in of_role.groups))
    bound = settings.beyond.negatives_below
    gated = bound is not None and sampled_entropy(train) > bound
    facts = {"batch/questions": float(len(kept))} | ({"batch/gated": float(gated)} if gated else {})
    for name, of_role in chosen.items():
        facts |= {f"batch/{fact}": value for fact, value in of_role.facts.items()}
        facts |= {f"advantage/{name}/{fact}": value for fact, value in of_role.advantages.metrics.items()}
    return Batch(
        without_negatives(train) if gated else train,
        tuple(name for name, of_role in chosen.items() for _ in of_role.groups),
        tuple(task for of_role in chosen.values() for task in of_role.tasks),
        facts,
    )
