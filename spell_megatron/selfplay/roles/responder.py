"""The responder reads all documents of the cluster and answers the question G times.

A response is paid by the rule and by those who judged it (equation 6), and compared with the others to its prompt
(equation 8). The mean is the question's difficulty, which is what the questioner is paid by.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spell_megatron import config
from spell_megatron.selfplay import rewards
from spell_megatron.selfplay.answering import answer, answer_prompt
from spell_megatron.selfplay.averages import by_task, lengths, mean
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.evidence import evidence_score
from spell_megatron.selfplay.fitting import PROMPT_TOO_LONG, Fitted
from spell_megatron.selfplay.groups import Earned, compared_within
from spell_megatron.selfplay.outvoting import outvoted
from spell_megatron.selfplay.ports import Opinion
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.roles.role import Chosen, Role, Step
from spell_megatron.selfplay.roles.trial import DOCUMENTS, TEXTS, Trial
from spell_megatron.selfplay.writer import Job, Writer, together
from spell_megatron.types import Question


def _evidence(episode: Episode, response: Response) -> float:
    """0 for a response that was cut, which has no answer either."""
    return 0.0 if response.rollout.finish == "length" else evidence_score(response.text, episode.documents)


BONUSES: Mapping[str, Callable[[Episode, Response], float]] = {"evidence": _evidence}
"""What a response earns besides, in advantages alone, by the key of `selfplay.beyond` that is its weight."""


class Responder(Role):
    name = "responder"

    async def play(self, writer: Writer, job: Job, episode: Episode) -> Episode:
        """G responses, each judged as soon as it is there."""
        documents: Sequence[Any] = job.cluster.documents
        for role in writer.roles:
            documents = role.reading(episode, documents)
        prompt = answer_prompt(writer, episode, documents)
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        responses = await together(
            self._judged_answer(writer, job, episode, prompt, number)
            for number in range(writer.settings.group_size)
        )
        varied = rewards.has_variance([response.reward for response in responses])
        outcome = rewards.KEPT if varied else rewards.ZERO_VARIANCE
        if writer.settings.beyond.outvoting and outvoted(responses, episode.task):
            outcome = rewards.OUTVOTED
        if not all(is_settled(response, writer.settings) for response in responses):
            outcome = rewards.UNJUDGED
        return replace(
            episode, responses=tuple(responses), outcome=outcome, cut_tokens=episode.cut_tokens + prompt.cut
        )

    async def _judged_answer(
        self, writer: Writer, job: Job, episode: Episode, prompt: Fitted, number: int
    ) -> Response:
        """One response, its verdicts, and what all make of it."""
        settings = writer.settings
        beside = settings.external_judge.place == "beside"
        response = await answer(writer, episode, prompt, writer.name(job, self.name, number))
        if response.answer is not None:
            both: list[Coroutine[Any, Any, Any]] = [
                _judged(writer, job, episode, response, number),
                _opinion(writer, episode, response),
            ]
            response, opinion = await together(both)
            rule = response.rule if beside or opinion.score is None else opinion.score
            response = replace(response, rule=rule, judged=opinion.score, unjudged=opinion.fault)
        opinions = (response.rule, response.verdict, response.judged if beside else None)
        return replace(response, reward=rewards.responder_reward(opinions, settings.combine))

    def choose(self, step: Step) -> Chosen:
        earned = [
            Earned(
                episode.task,
                [response.rollout for response in episode.responses],
                [_worth(episode, response, step.settings.beyond) for response in episode.responses],
            )
            for episode in step.kept
        ]
        groups, advantages = compared_within(earned, step.settings)
        return Chosen(groups, [group.task for group in earned], advantages)

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, float | None]:
        responses = [(e.task, response) for e in episodes if e.answered for response in e.responses]
        return {
            "responder/reward": mean(response.reward for _, response in responses),
            **by_task("responder/reward", [(task, response.reward) for task, response in responses]),
            "responder/rule": mean(response.rule for _, response in responses),
            "responder/no_answer": mean(response.answer is None for _, response in responses),
            **lengths(self.name, [response.rollout for _, response in responses]),
            "responder/prompt_tokens": mean(len(response.rollout.prompt) for _, response in responses),
        }

    def trials(self, prompts: Prompts, question: Question, key: str | None) -> Iterable[Trial]:
        shown = (*TEXTS, question.text, *question.options.values())
        yield Trial("documents, question and choices", prompts.responder(question, DOCUMENTS), shown)
        yield Trial("the question", prompts.responder(question, ()), (question.text,))


async def _judged(writer: Writer, job: Job, episode: Episode, response: Response, number: int) -> Response:
    """The response with what every role says of it."""
    for role in writer.roles:
        response = await role.judge(writer, job, episode, response, number)
    return response


async def _opinion(writer: Writer, episode: Episode, response: Response) -> Opinion:
    """The external judge's, where there is one and the reward hangs on it."""
    question, settings = episode.posed, writer.settings
    beside = settings.external_judge.place == "beside"
    settled = beside and rewards.is_settled((response.rule,), settings.combine)
    if writer.judge is None or question.options or settled or response.answer is None:
        return Opinion(None)
    return await writer.judge(question, response.answer)


def is_settled(response: Response, settings: config.SelfPlayConfig) -> bool:
    """Whether it has its reward, though the external judge may have failed."""
    beside = settings.external_judge.place == "beside"
    opinions = (response.rule, response.verdict) if beside else (response.verdict,)
    return not response.unjudged or rewards.is_settled(opinions, settings.combine)


def _worth(episode: Episode, response: Response, beyond: config.BeyondConfig) -> float:
    """What a response is compared by: its reward, and what it earns besides."""
    weights: dict[str, float] = {name: getattr(beyond, name) for name in BONUSES}
    return response.reward + sum(
        weight * BONUSES[name](episode, response) for name, weight in weights.items() if weight
    )
