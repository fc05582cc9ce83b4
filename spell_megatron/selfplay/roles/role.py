"""What a role is: what it writes in an episode, what that earns, what of it is trained on, and what is told of it.

The policy plays every role with the same weights. Roles take part in an episode in their order (`selfplay.roles`); a
new one is a subclass with its template (see `examples/summariser`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, ClassVar

from spell_megatron import config
from spell_megatron.selfplay.advantages import Advantages
from spell_megatron.selfplay.baselines import Baselines
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.roles.trial import Trial
from spell_megatron.types import Document, Group, Question

if TYPE_CHECKING:
    from spell_megatron.selfplay.prompts import Prompts
    from spell_megatron.selfplay.writer import Job, Writer


@dataclass(frozen=True, slots=True)
class Chosen:
    """What of a role is trained on in a step: groups, the task of each, and what there is to say of their advantages
    (`advantage/<role>/<name>` in metrics) and of the choice (`batch/<name>`)."""

    groups: Sequence[Group] = ()
    tasks: Sequence[str] = ()
    advantages: Advantages = field(default_factory=lambda: Advantages([]))
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """What a batch is chosen from: a step's episodes, and the first N kept ones of them."""

    episodes: Sequence[Episode]
    kept: Sequence[Episode]
    settings: config.SelfPlayConfig
    random: Random
    baselines: Baselines | None = None


class Role:
    """One part that the policy plays. Stateless; one instance of each is in the registry."""

    name: ClassVar[str]
    """In recipes, in the names of templates (`{name}_{task}.j2`, `{name}.j2`) and of metrics."""
    templates: ClassVar[Mapping[str, str]] = {}
    """Templates by file name, of a role that the styles of `model.prompts` do not know."""

    def tokens(self, sampling: config.SamplingConfig) -> int:
        """Tokens of one completion at most."""
        return int(getattr(sampling, self.tokens_key(sampling)))

    def tokens_key(self, sampling: config.SamplingConfig) -> str:
        """The key of `selfplay.sampling` that says so; a role without one writes as much as a responder."""
        return f"{self.name}_tokens" if hasattr(sampling, f"{self.name}_tokens") else "responder_tokens"

    async def play(self, writer: Writer, job: Job, episode: Episode) -> Episode:
        """The episode with what this role wrote. With an `outcome` it ends here."""
        return episode

    def reading(self, episode: Episode, documents: Sequence[Document]) -> Sequence[Document]:
        """What responders read, as this role leaves it."""
        return documents

    async def judge(
        self, writer: Writer, job: Job, episode: Episode, response: Response, number: int
    ) -> Response:
        """The `number`th response with what this role says of it, as soon as it is there."""
        return response

    def earn(self, episode: Episode, settings: config.SelfPlayConfig) -> Episode:
        """The episode with what this role earned, when every role has played."""
        return episode

    def choose(self, step: Step) -> Chosen:
        """What of this role is trained on, each token with its advantage."""
        return Chosen()

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, float | None]:
        """Figures of a step by their flat names; None is left out."""
        return {}

    def trials(self, prompts: Prompts, question: Question, key: str | None) -> Iterable[Trial]:
        """Messages of every kind, made of samples, before a run starts."""
        return ()
