"""The verifier reads question, reference and answer, without documents, and votes G times on each response.

The majority is the verdict (equation 5), and a vote is paid for agreeing with it. Verdicts are cheap and plentiful:
floor(N·G·share/G) whole groups of them are drawn at random, so that they do not drown the other two roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from spell_megatron import config
from spell_megatron.selfplay import voting
from spell_megatron.selfplay.averages import lengths, mean
from spell_megatron.selfplay.episode import Episode, Judgement, Response
from spell_megatron.selfplay.groups import Earned, compared_within, whole
from spell_megatron.selfplay.parsing import parse_verdict
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.roles.role import Chosen, Role, Step
from spell_megatron.selfplay.roles.trial import Trial
from spell_megatron.selfplay.writer import Job, Writer, together
from spell_megatron.types import Question


class Verifier(Role):
    name = "verifier"

    async def judge(
        self, writer: Writer, job: Job, episode: Episode, response: Response, number: int
    ) -> Response:
        """G verdicts on one answer. A prompt that does not fit leaves the rule alone."""
        question, answer, settings = episode.posed, response.answer, writer.settings
        if not settings.judge or answer is None:
            return response
        tokens = self.tokens(settings.sampling)
        prompt = writer.fit(lambda _: writer.prompts.verifier(question, answer), (), tokens)
        if prompt is None:
            return response
        written = await together(
            writer.write(prompt, tokens, writer.name(job, self.name, number, voter))
            for voter in range(settings.group_size)
        )
        votes = [None if rollout.finish == "length" else parse_verdict(text) for rollout, text in written]
        verdict = voting.verdict_of(votes, settings)
        judgements = tuple(
            Judgement(rollout, text, vote, voting.vote_reward(vote, verdict, settings.invalid_vote_reward))
            for (rollout, text), vote in zip(written, votes, strict=True)
        )
        return replace(response, judgements=judgements, verdict=verdict)

    def choose(self, step: Step) -> Chosen:
        """Where fewer groups are usable than wanted, none is used."""
        settings = step.settings
        verifies = settings.judge and settings.train_verifier
        pool = usable_groups(step.episodes, settings) if verifies else []
        wanted = verifier_groups(len(step.kept), settings) if verifies else 0
        drawn = step.random.sample(pool, wanted) if wanted <= len(pool) else []
        earned = [
            Earned(
                episode.task,
                [j.rollout for j in response.judgements],
                [j.reward for j in response.judgements],
            )
            for episode, response in drawn
        ]
        groups, advantages = compared_within(earned, settings)
        facts = {"verifier_pool": len(pool), "verifier_wanted": wanted}
        return Chosen(groups, [group.task for group in earned], advantages, facts)

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, float | None]:
        judged = [response for episode in episodes for response in episode.responses if response.judgements]
        decided = [response for response in judged if response.verdict is not None]
        judgements = [judgement for response in judged for judgement in response.judgements]
        return {
            "verifier/reward": mean(judgement.reward for judgement in judgements),
            **lengths(self.name, [judgement.rollout for judgement in judgements]),
            "verifier/invalid": mean(judgement.vote is None for judgement in judgements),
            "verifier/yes": mean(response.verdict for response in decided if response.verdict is not None),
            "verifier/no_majority": mean(response.verdict is None for response in judged),
            "verifier/rule_agreement": mean(response.verdict == response.rule for response in decided),
            "verifier/self_consistency": mean(voting.agreement(r.votes, r.verdict) for r in decided),
        }

    def trials(self, prompts: Prompts, question: Question, key: str | None) -> Iterable[Trial]:
        said = "what-the-responder-said"
        shown = (question.text, question.answer, said)
        yield Trial("question, reference and answer", prompts.verifier(question, said), shown)


def usable_groups(
    episodes: Sequence[Episode], settings: config.SelfPlayConfig
) -> list[tuple[Episode, Response]]:
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


def verifier_groups(questions: int, settings: config.SelfPlayConfig) -> int:
    """floor(N·G·share/G), with share = 1/G where none is given."""
    share = 1 / settings.group_size if settings.verifier_share is None else settings.verifier_share
    return whole(questions * share)
