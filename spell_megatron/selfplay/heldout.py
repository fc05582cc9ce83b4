"""Held-out accuracy: questions that nobody trains on, measured by the rule alone.

Rewards of self-play compare the policy with its own references; this number does not, and shows
whether it learns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from spell_megatron import config
from spell_megatron.selfplay.fitting import fit
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.parsing import is_reachable
from spell_megatron.selfplay.ports import Codec, Generator
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.seeds import seed_of
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.selfplay.writer import together, written
from spell_megatron.types import Cluster, Question, SpellError


@dataclass(frozen=True, slots=True)
class HeldOutScore:
    """Share of correct samples: overall, by task, by label (`links/3`), and of every question in the order given.

    `best` is the share of questions with a correct sample (pass@k for k samples), by task and label, `mean` of all.
    """

    mean: float
    by_task: dict[str, float]
    by_label: dict[str, float]
    per_question: list[float]
    best: dict[str, float]


def known(questions: Sequence[tuple[Cluster, Question]]) -> list[tuple[Cluster, Question]]:
    """The questions, each with the name of its task. Raises SpellError for a task that there is not, and for an answer
    that nobody can give: what is asked of a questioner's is asked of a file's."""
    named = [
        (cluster, replace(question, task=TASKS.find(question.task, f"heldout.path, question {number}").name))
        for number, (cluster, question) in enumerate(questions, start=1)
    ]
    for cluster, question in named:
        if not is_reachable(question):
            raise SpellError(
                f"heldout.path: the question {cluster.id} (file/line) cannot be answered: as {question.task} a response"
                f" that states {question.answer!r} would count as wrong"
            )
    return named


async def accuracy(
    generator: Generator,
    codec: Codec,
    prompts: Prompts,
    questions: Sequence[tuple[Cluster, Question]],
    *,
    samples: int,
    sampling: config.SamplingConfig,
    seed: int,
    max_model_len: int,
) -> HeldOutScore:
    """Answer every question `samples` times over its whole cluster.

    Seeds depend on the place in `questions` alone, so that two policies are compared on equal draws.
    A question whose prompt does not fit, and a completion cut at the limit, count as wrong.
    """

    async def score(place: int, cluster: Cluster, question: Question) -> float:
        limit = max_model_len - sampling.responder_tokens
        prompt = fit(lambda shown: prompts.responder(question, shown), cluster.documents, codec, limit)
        if prompt is None:
            return 0.0
        rollouts = await generator.generate(
            prompt.tokens,
            seeds=[seed_of(seed, "heldout", place, sample) for sample in range(samples)],
            max_tokens=sampling.responder_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        return fmean(
            rule_reward(question.task, written(codec, rollout), question) if rollout.finish == "stop" else 0.0
            for rollout in rollouts
        )

    scores = await together(score(place, *entry) for place, entry in enumerate(questions))
    by_task: dict[str, list[float]] = defaultdict(list)
    by_label: dict[str, list[float]] = defaultdict(list)
    for (_, question), value in zip(questions, scores, strict=True):
        by_task[question.task].append(value)
        for label in question.labels.items():
            by_label["/".join(label)].append(value)
    everything = {"mean": scores} if scores else {}
    best = {
        name: [float(value > 0) for value in values]
        for name, values in (everything | by_task | by_label).items()
    }
    return HeldOutScore(
        fmean(scores) if scores else 0.0, _means(by_task), _means(by_label), scores, _means(best)
    )


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: fmean(values[name]) for name in sorted(values)}
