"""Worked examples of the three roles on the toy world (`corpus.demonstrations`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spell_megatron.corpus.demonstrations import Demonstrations, Exercise, Habits
from spell_megatron.corpus.toy import grammar, words
from spell_megatron.corpus.toy.vocabulary import TEMPLATES, WORDS
from spell_megatron.corpus.toy.world import WHOLE, Derived, Scale, ToyFacts, ask, plain, toy_cluster
from spell_megatron.types import Cluster, Document

HABITS = Habits(long_reference=0.8)
"""What the seed model leaves its lessons with."""


def _exercise(derived: Derived, documents: Sequence[Document]) -> Exercise:
    question, relation = derived.question, grammar.RELATIONS.get(derived.steps[-1].relation)

    def guess(rng: random.Random) -> str:
        if relation is None or question.task == "docmath_qa":
            return str(rng.randint(1, len(words.NUMBERS) - 1))
        return rng.choice(ToyFacts(documents).values(relation.name))

    def wrong(rng: random.Random) -> str:
        answer = question.answer
        if relation is None or question.task == "docmath_qa":
            near = range(max(1, int(answer) - 2), min(len(words.NUMBERS) - 1, int(answer) + 2) + 1)
            return str(rng.choice([number for number in near if number != int(answer)]))
        others = [value for value in ToyFacts(documents).values(relation.name) if value != answer]
        return rng.choice(others or [value for value in relation.values or words.NAMES if value != answer])

    return Exercise(
        question,
        tuple(fact.quote for fact in derived.steps),
        tuple(fact.sentence for fact in derived.steps),
        derived.result,
        relation.long_form if relation else "{v}",
        guess,
        wrong,
        derived.sum,
    )


def _draw(documents: Sequence[Document], task: str, rng: random.Random, hops: float) -> Exercise | None:
    derived = ask(documents, task, rng, hops=hops)
    return _exercise(derived, documents) if derived else None


def _cluster(seed: int, index: int, scale: Scale) -> Cluster:
    return toy_cluster(seed, index, scale=scale)


def _restated(documents: Sequence[Document]) -> list[tuple[str, str]]:
    return [(fact.quote, fact.value) for fact in ToyFacts(documents).facts.values()]


def _spelled(number: str) -> str:
    return words.NUMBERS[int(number)]


DEMONSTRATIONS = Demonstrations(
    "toy", _cluster, _draw, _restated, words.NAMES, plain, WORDS, TEMPLATES, WHOLE, _spelled
)
