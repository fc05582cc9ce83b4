"""One question from its prompt to its rewards, without a barrier between the roles.

    ask ─ parse ─ probe ─┬─ respond ─ grade ─┬─ judge          G responses, each judged G times
                         │                   └─ judge …
                         └─ respond …

A question goes to its responders the moment that it parses, a response to its verifiers the moment
that it is complete; hundreds of pipelines share the engine's batch. Every rollout's seed is a hash of
its place, so that what is sampled does not depend on what finishes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any, TypeVar

from spell_megatron import config
from spell_megatron.selfplay import curriculum, rewards, voting
from spell_megatron.selfplay.answerability import UNANSWERABLE, probed_documents
from spell_megatron.selfplay.episode import Episode, Judgement, Response
from spell_megatron.selfplay.evidence import REQUEST, numbered
from spell_megatron.selfplay.fitting import Fitted, fit
from spell_megatron.selfplay.grading import extract_answer, is_correct
from spell_megatron.selfplay.memory import Remembered
from spell_megatron.selfplay.parsing import OVER_LONG, Failure, parse_question, parse_verdict
from spell_megatron.selfplay.ports import Codec, Generator, Judge, Opinion
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.seeds import Name, random_of, seed_of
from spell_megatron.types import Cluster, Document, Question, Rollout

T = TypeVar("T")
PROMPT_TOO_LONG = "dropped:prompt_too_long"
_OPENING = 12
"""Tokens at a prompt's end in which a template may open a thought."""


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


class Pipeline:
    """Runs jobs. `max_model_len` bounds a prompt and its completion together, in tokens."""

    def __init__(
        self,
        settings: config.SelfPlay,
        *,
        prompts: Prompts,
        codec: Codec,
        generator: Generator,
        seed: int,
        max_model_len: int,
        judge: Judge | None = None,
    ) -> None:
        self._settings, self._prompts, self._codec, self._generator = settings, prompts, codec, generator
        self._seed, self._max_model_len = seed, max_model_len
        self._examples = cache(prompts.examples)
        self._external = judge
        checks = {self._ground: settings.grounding, self._read: settings.beyond.answerability is not None}
        self._checks = [check for check, wanted in checks.items() if wanted]
        """What a question must pass before it is answered."""

    async def run(self, job: Job) -> Episode:
        """The whole episode. Raises what the generator raises; cancelling it cancels its requests."""
        episode = Episode(
            job.step,
            job.round,
            job.index,
            job.cluster.id,
            job.cluster.domain,
            job.task,
            len(job.cluster.documents),
            history=job.history,
            question=job.question,
        )
        if job.question is None:
            for part in (self._ask, *self._checks):
                if not episode.outcome:
                    episode = await part(job, episode)
        if not episode.outcome:
            episode = await self._respond(job, episode)
        if episode.asked is None:
            return episode
        return replace(
            episode, reward=rewards.questioner_reward(episode.outcome, episode.mean_reward, self._settings)
        )

    async def _ask(self, job: Job, episode: Episode) -> Episode:
        """The questioner reads some documents and writes a question."""
        draw = self._random(job, "curriculum")
        key = curriculum.choose_key(draw) if job.task == "doc_mc" else None
        chosen = curriculum.choose_documents(
            len(job.cluster.documents), job.history, self._settings.documents, draw
        )
        episode = replace(episode, documents=chosen, key=key)
        history = [entry.question for entry in job.history]
        prompt = fit(
            lambda documents: self._prompts.questioner(job.task, documents, history, key),
            [job.cluster.documents[index] for index in chosen],
            self._codec,
            self._limit(self._settings.sampling.questioner_tokens),
        )
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        rollout, text = await self._generate(
            prompt, self._settings.sampling.questioner_tokens, self._name(job, "questioner")
        )
        question: Question | Failure = OVER_LONG
        if rollout.finish != "length":
            question = parse_question(
                text,
                job.task,
                key,
                count=self._codec.count,
                max_reference_tokens=self._settings.max_reference_tokens,
                examples=self._examples(job.task),
            )
        episode = replace(episode, asked=rollout, asked_text=text, cut_tokens=prompt.cut)
        if isinstance(question, Failure):
            return replace(episode, outcome=question.outcome)
        return replace(episode, question=question)

    async def _ground(self, job: Job, episode: Episode) -> Episode:
        """The responder without documents: what it answers correctly needs no reading."""
        prompt = self._responder_prompt(episode, ())
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        probe = await self._answer(episode, prompt, self._name(job, "probe"))
        grounded = probe.rule < self._settings.grounding_threshold
        return replace(episode, probe=probe, outcome="" if grounded else rewards.BAD_GROUND)

    async def _read(self, job: Job, episode: Episode) -> Episode:
        """The responder with what the questioner read, among distractors: what it misses cannot be answered."""
        documents = job.cluster.documents
        chosen = probed_documents(
            len(documents),
            episode.documents,
            self._settings.beyond.answerability or 0,
            self._random(job, "distractors"),
        )
        prompt = self._responder_prompt(episode, [documents[index] for index in chosen])
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        probe = await self._answer(episode, prompt, self._name(job, "answerability"))
        return replace(episode, answerability=probe, outcome="" if probe.rule else UNANSWERABLE)

    async def _respond(self, job: Job, episode: Episode) -> Episode:
        """G responses over all documents of the cluster, each judged as soon as it is there."""
        prompt = self._responder_prompt(episode, job.cluster.documents)
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        responses = await together(
            self._judged_answer(job, episode, prompt, number) for number in range(self._settings.group_size)
        )
        outcome = (
            rewards.KEPT if rewards.has_variance([r.reward for r in responses]) else rewards.ZERO_VARIANCE
        )
        if not all(map(self._is_settled, responses)):
            outcome = rewards.UNJUDGED
        return replace(
            episode, responses=tuple(responses), outcome=outcome, cut_tokens=episode.cut_tokens + prompt.cut
        )

    async def _judged_answer(self, job: Job, episode: Episode, prompt: Fitted, number: int) -> Response:
        """One response, its verdicts, and what all make of it."""
        response = await self._answer(episode, prompt, self._name(job, "responder", number))
        if response.answer is not None:
            both: list[Coroutine[Any, Any, Any]] = [
                self._verified(job, episode, response, number),
                self._opinion(episode, response),
            ]
            response, opinion = await together(both)
            rule = response.rule
            if opinion.score is not None and self._settings.external_judge.place == "rule":
                rule = opinion.score
            response = replace(response, rule=rule, judged=opinion.score, unjudged=opinion.fault)
        opinions = (response.rule, response.verdict, response.judged)
        return replace(response, reward=rewards.responder_reward(opinions, self._settings.combine))

    async def _opinion(self, episode: Episode, response: Response) -> Opinion:
        """The external judge's, where there is one and the reward hangs on it."""
        question, settings = _asked(episode), self._settings
        beside = settings.external_judge.place == "beside"
        settled = beside and rewards.is_settled((response.rule,), settings.combine)
        if self._external is None or question.options or settled or response.answer is None:
            return Opinion(None)
        return await self._external(question, response.answer)

    def _is_settled(self, response: Response) -> bool:
        """Whether it has its reward, though the external judge may have failed."""
        beside = self._settings.external_judge.place == "beside"
        opinions = (response.rule, response.verdict) if beside else (response.verdict,)
        return not response.unjudged or rewards.is_settled(opinions, self._settings.combine)

    async def _verified(self, job: Job, episode: Episode, response: Response, number: int) -> Response:
        """The response with the verifier's verdicts on it."""
        if not self._settings.judge or response.answer is None:
            return response
        verdict, judgements = await self._judge(job, episode, response.answer, number)
        return replace(response, judgements=judgements, verdict=verdict)

    async def _answer(self, episode: Episode, prompt: Fitted, name: Sequence[Name]) -> Response:
        """One response and the rule's opinion of it."""
        question = _asked(episode)
        rollout, text = await self._generate(prompt, self._settings.sampling.responder_tokens, name)
        answer = None if rollout.finish == "length" else extract_answer(question.task, text)
        rule = float(answer is not None and is_correct(question.task, answer, question.answer))
        return Response(rollout, text, answer, rule, reward=rule)

    async def _judge(
        self, job: Job, episode: Episode, answer: str, number: int
    ) -> tuple[int | None, tuple[Judgement, ...]]:
        """G verdicts on one answer. A prompt that does not fit leaves the rule alone."""
        question, limit = _asked(episode), self._settings.sampling.verifier_tokens
        prompt = fit(lambda _: self._prompts.verifier(question, answer), (), self._codec, self._limit(limit))
        if prompt is None:
            return None, ()
        written = await together(
            self._generate(prompt, limit, self._name(job, "verifier", number, judge))
            for judge in range(self._settings.group_size)
        )
        votes = [None if rollout.finish == "length" else parse_verdict(text) for rollout, text in written]
        verdict = voting.verdict_of(votes, self._settings)
        return verdict, tuple(
            Judgement(
                rollout, text, vote, voting.vote_reward(vote, verdict, self._settings.invalid_vote_reward)
            )
            for (rollout, text), vote in zip(written, votes, strict=True)
        )

    def _responder_prompt(self, episode: Episode, documents: Sequence[Document]) -> Fitted | None:
        question, evidence = _asked(episode), bool(self._settings.beyond.evidence and documents)
        return fit(
            lambda shown: self._prompts.responder(question, shown) + (REQUEST if evidence else ""),
            numbered(documents) if evidence else documents,
            self._codec,
            self._limit(self._settings.sampling.responder_tokens),
        )

    async def _generate(self, prompt: Fitted, max_tokens: int, name: Sequence[Name]) -> tuple[Rollout, str]:
        """One completion and its text."""
        sampling = self._settings.sampling
        [rollout] = await self._generator.generate(
            prompt.tokens,
            seeds=[seed_of(*name)],
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        return rollout, written(self._codec, rollout)

    def _limit(self, completion: int) -> int:
        """Tokens that a prompt may have, before a completion of that many."""
        return self._max_model_len - completion

    def _name(self, job: Job, role: str, *place: int) -> tuple[Name, ...]:
        return (self._seed, job.step, job.round, job.index, role, *place)

    def _random(self, job: Job, role: str) -> Random:
        return random_of(*self._name(job, role))


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
    opened = codec.decode(rollout.prompt[-_OPENING:]).rstrip().endswith("<think>")
    return f"{'<think>' if opened else ''}{codec.decode(rollout.tokens)}"


def _asked(episode: Episode) -> Question:
    if episode.question is None:
        raise ValueError("the episode has no question yet")
    return episode.question
