"""The questioner reads some documents of a cluster and writes a question with its answer.

It is paid by how hard its question turned out (equation 7) and compared with the questions of its task in the batch
(equation 9). Besides the kept questions it is trained on failures, task by task as many as there are good ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random

from spell_megatron import config
from spell_megatron.selfplay import curriculum, rewards
from spell_megatron.selfplay.advantages import Advantages, compare
from spell_megatron.selfplay.averages import by_task, lengths, mean
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.fitting import PROMPT_TOO_LONG
from spell_megatron.selfplay.groups import group_of, whole
from spell_megatron.selfplay.lookup import looked_up
from spell_megatron.selfplay.novelty import distinct_share, novelties
from spell_megatron.selfplay.parsing import OVER_LONG, parse_question
from spell_megatron.selfplay.probes import answerable, ground
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.roles.role import Chosen, Role, Step
from spell_megatron.selfplay.roles.trial import DOCUMENTS, TEXTS, Trial
from spell_megatron.selfplay.tasks import TASKS, Failure
from spell_megatron.selfplay.writer import Job, Writer
from spell_megatron.types import Question

PEERS: Mapping[str, Callable[[Episode], Hashable]] = {
    "task": lambda episode: episode.task,
    "task_documents": lambda episode: (episode.task, len(episode.documents)),
}
"""Whom a question is compared with: those of its task (eq. 9), or those about as many documents besides, as Dr. Zero
(arXiv 2601.07055) groups its proposals by hops."""


class Questioner(Role):
    name = "questioner"

    async def play(self, writer: Writer, job: Job, episode: Episode) -> Episode:
        """A question that passed every check, unless the job brings one."""
        if job.question is not None:
            return episode
        for part in (self._ask, looked_up, ground, answerable):
            if not episode.outcome:
                episode = await part(writer, job, episode)
        return episode

    async def _ask(self, writer: Writer, job: Job, episode: Episode) -> Episode:
        settings, draw = writer.settings, writer.random(job, "curriculum")
        key = TASKS[job.task].key(draw)
        chosen = curriculum.choose_documents(
            len(job.cluster.documents), job.history, settings.documents, draw
        )
        episode = replace(episode, documents=chosen, key=key)
        history, tokens = [entry.question for entry in job.history], self.tokens(settings.sampling)
        prompt = writer.fit(
            lambda documents: writer.prompts.questioner(job.task, documents, history, key),
            [job.cluster.documents[index] for index in chosen],
            tokens,
        )
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        rollout, text = await writer.write(prompt, tokens, writer.name(job, self.name))
        question: Question | Failure = OVER_LONG
        if rollout.finish != "length":
            question = parse_question(
                text,
                job.task,
                key,
                count=writer.codec.count,
                max_reference_tokens=settings.max_reference_tokens,
                examples=writer.examples(job.task),
            )
        episode = replace(episode, asked=rollout, asked_text=text, cut_tokens=prompt.cut)
        if isinstance(question, Failure):
            return replace(episode, outcome=question.outcome)
        return replace(episode, question=question)

    def earn(self, episode: Episode, settings: config.SelfPlayConfig) -> Episode:
        if episode.asked is None:
            return episode
        return replace(
            episode, reward=rewards.questioner_reward(episode.outcome, episode.mean_reward, settings)
        )

    def choose(self, step: Step) -> Chosen:
        if not step.settings.train_questioner:
            return Chosen(facts={"failures": 0})
        failures = choose_failures(step.kept, step.episodes, step.settings.failure_ratio, step.random)
        asked = [
            episode for episode in (*step.kept, *failures) if episode.asked and episode.reward is not None
        ]
        advantages = self._compared(asked, step)
        groups = [
            group_of([episode.asked], [value])
            for episode, value in zip(asked, advantages.values, strict=True)
            if episode.asked
        ]
        return Chosen(groups, [episode.task for episode in asked], advantages, {"failures": len(failures)})

    def _compared(self, episodes: Sequence[Episode], step: Step) -> Advantages:
        tasks, earned = [e.task for e in episodes], [e.reward or 0.0 for e in episodes]
        if step.baselines is not None:
            return Advantages(step.baselines.advantages(tasks, earned))
        peers = [PEERS[step.settings.beyond.questioner_peers](episode) for episode in episodes]
        return compare(step.settings, earned, peers, tasks)

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, float | None]:
        asked = [episode for episode in episodes if episode.asked]
        rollouts = [episode.asked for episode in asked if episode.asked]
        rewarded = [(e.task, e.reward) for e in asked if e.reward is not None]
        return {
            "questioner/reward": mean(reward for _, reward in rewarded),
            **by_task("questioner/reward", rewarded),
            **lengths(self.name, rollouts),
            "questioner/prompt_tokens": mean(len(rollout.prompt) for rollout in rollouts),
            "questioner/documents": mean(len(e.documents) for e in asked),
            "questioner/document_share": mean(
                len(e.documents) / e.cluster_documents for e in asked if e.documents
            ),
            "questioner/remembered": mean(len(e.history) for e in asked),
            "questioner/format_errors": mean(e.outcome == rewards.BAD_FORMAT for e in asked),
            "questioner/ungrounded": mean(e.outcome == rewards.BAD_GROUND for e in asked if e.probe),
            "questioner/cut_tokens": mean(e.cut_tokens for e in asked),
            "questioner/novelty": mean(novelties(episodes)),
            "questioner/distinct": distinct_share(asked),
            "questioner/unanswerable": mean(not e.answerability.rule for e in asked if e.answerability),
        }

    def trials(self, prompts: Prompts, question: Question, key: str | None) -> Iterable[Trial]:
        first = prompts.questioner(question.task, DOCUMENTS, (), key)
        later = prompts.questioner(question.task, DOCUMENTS, (question,), key)
        yield Trial("the documents", first, TEXTS)
        yield Trial("documents and earlier questions", later, (*TEXTS, question.text))


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
        drawn = random.sample(failed, min(len(failed), whole(owed)))
        chosen += drawn
        owed -= len(drawn)
    return chosen
