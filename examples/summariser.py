"""A role of one's own: a summariser, whose summary the responders read beside the documents.

It reads all documents of the cluster once the question is there, and writes one summary. It is paid by what its readers
earn on average, and compared with the summaries of its task in the batch. In the toy world a summary is what the model
quotes when it is asked the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from spell_megatron import config
from spell_megatron.selfplay.advantages import compare
from spell_megatron.selfplay.averages import lengths, mean
from spell_megatron.selfplay.episode import Episode, Turn
from spell_megatron.selfplay.fitting import PROMPT_TOO_LONG
from spell_megatron.selfplay.groups import group_of
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.selfplay.roles import Chosen, Role, Step
from spell_megatron.selfplay.writer import Job, Writer
from spell_megatron.types import Document


class Summariser(Role):
    name = "summariser"
    templates: ClassVar = {
        "summariser.j2": '<text> {{ documents | map(attribute="text") | join(" ") }} </text> <ask> {{ question.text }}'
    }

    async def play(self, writer: Writer, job: Job, episode: Episode) -> Episode:
        tokens = self.tokens(writer.settings.sampling)
        prompt = writer.fit(
            lambda shown: writer.prompts.render(self.name, job.task, question=episode.posed, documents=shown),
            job.cluster.documents,
            tokens,
        )
        if prompt is None:
            return replace(episode, outcome=PROMPT_TOO_LONG)
        rollout, text = await writer.write(prompt, tokens, writer.name(job, self.name))
        return replace(episode, turns=(*episode.turns, Turn(self.name, rollout, text)))

    def reading(self, episode: Episode, documents: Sequence[Document]) -> Sequence[Document]:
        summaries = (strip_thinking(turn.text) for turn in self._turns([episode]))
        return [*documents, *(Document("summary", text, "Summary") for text in summaries if text)]

    def earn(self, episode: Episode, settings: config.SelfPlayConfig) -> Episode:
        earned = episode.mean_reward if episode.answered else None
        turns = (replace(t, reward=earned) if t.role == self.name else t for t in episode.turns)
        return replace(episode, turns=tuple(turns))

    def choose(self, step: Step) -> Chosen:
        """The summaries of the kept questions."""
        pairs = [(e.task, turn) for e in step.kept for turn in self._turns([e]) if turn.reward is not None]
        tasks, turns = [task for task, _ in pairs], [turn for _, turn in pairs]
        advantages = compare(step.settings, [turn.reward or 0.0 for turn in turns], tasks, tasks)
        groups = [group_of([t.rollout], [value]) for t, value in zip(turns, advantages.values, strict=True)]
        return Chosen(groups, tasks, advantages)

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, float | None]:
        turns = self._turns(episodes)
        return {
            "summariser/reward": mean(turn.reward for turn in turns if turn.reward is not None),
            **lengths(self.name, [turn.rollout for turn in turns]),
        }

    def _turns(self, episodes: Sequence[Episode]) -> list[Turn]:
        return [turn for episode in episodes for turn in episode.turns if turn.role == self.name]
