"""What a role writes with: prompts that fit, completions by seeds that are named by their place, and their texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Protocol, TypeVar

from spell_megatron import config
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.fitting import Fitted, fit
from spell_megatron.selfplay.memory import Remembered
from spell_megatron.selfplay.ports import Codec, Generator, Judge
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.reading.thoughts import OPEN, opens_thought
from spell_megatron.selfplay.seeds import Name, random_of, seed_of
from spell_megatron.types import Cluster, Document, Question, Rollout

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """What one episode starts from. With `question` given, nothing is asked (static questions)."""

    step: int
    round: int
    index: int
    cluster: Cluster
    task: str
    history: tuple[Remembered, ...] = ()
    question: Question | None = None


class Company(Protocol):
    """What the responder asks of every role of the episode (see `Role`)."""

    def reading(self, episode: Episode, documents: Sequence[Document]) -> Sequence[Document]: ...

    async def judge(
        self, writer: Writer, job: Job, episode: Episode, response: Response, number: int
    ) -> Response: ...


class Writer:
    """Has the policy write, for one role after another. `max_model_len` bounds prompt and completion, in tokens."""

    def __init__(
        self,
        settings: config.SelfPlayConfig,
        *,
        roles: Sequence[Company],
        prompts: Prompts,
        codec: Codec,
        generator: Generator,
        seed: int,
        max_model_len: int,
        judge: Judge | None = None,
    ) -> None:
        self.settings, self.roles, self.judge = settings, roles, judge
        self.prompts, self.codec = prompts, codec
        self.examples = cache(prompts.examples)
        self._generator, self._seed, self._max_model_len = generator, seed, max_model_len

    def fit(
        self, render: Callable[[Sequence[Document]], str], documents: Sequence[Document], tokens: int
    ) -> Fitted | None:
        """The prompt before a completion of so many tokens, documents cut as need be; None where none fits."""
        return fit(render, documents, self.codec, self._max_model_len - tokens)

    async def write(self, prompt: Fitted, tokens: int, name: Sequence[Name]) -> tuple[Rollout, str]:
        """One completion and its text."""
        sampling = self.settings.sampling
        [rollout] = await self._generator.generate(
            prompt.tokens,
            seeds=[seed_of(*name)],
            max_tokens=tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        return rollout, written(self.codec, rollout)

    def name(self, job: Job, what: str, *place: int) -> tuple[Name, ...]:
        """The name of one draw of an episode."""
        return (self._seed, job.step, job.round, job.index, what, *place)

    def random(self, job: Job, what: str) -> Random:
        return random_of(*self.name(job, what))


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def written(codec: Codec, rollout: Rollout) -> str:
    """The text of a completion, with the `<think>` that the chat template opened for it at the prompt's end."""
    opened = OPEN if opens_thought(rollout.prompt, codec.decode) else ""
    return f"{opened}{codec.decode(rollout.tokens)}"
