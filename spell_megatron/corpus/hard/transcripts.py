"""Worked examples of the three roles on the hard world (`corpus.demonstrations`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spell_megatron.corpus.demonstrations import Demonstrations, Exercise, Habits
from spell_megatron.corpus.hard import grammar, words
from spell_megatron.corpus.hard.asking import LINKS_ASKED, Asked, answering, ask
from spell_megatron.corpus.hard.grammar import MEASURES, PRICE, RELATIONS
from spell_megatron.corpus.hard.reading import ASKS, NEXT, Knowledge, Solution, Stated, plain
from spell_megatron.corpus.hard.vocabulary import TEMPLATES, WORDS
from spell_megatron.corpus.hard.world import SMALL, TRAIN, Extent, cluster, half_of, subjects
from spell_megatron.types import Cluster, Document

SMALL_HABITS = Habits(spelled=0.0, long_reference=0.2, hops=0.5)
"""What the seed model leaves its lessons with. No number of this world is spelled."""
_NAMES = tuple(dict.fromkeys((*words.CITIES, *words.PETS, *words.GAMES, *words.INSTRUMENTS, *words.DISHES)))


def _quote(fact: Stated) -> str:
    """The fact in the plain wording, its value in the document's word."""
    if fact.relation in (NEXT, ASKS):
        return fact.sentence
    name, _, item = fact.relation.partition(" of ")
    relation = PRICE if item else RELATIONS[name]
    return relation.facts[0].format(s=fact.subject, i=item, v=fact.said)


def _calculated(solution: Solution) -> str:
    """The sum or difference of the measures that were found."""
    if solution.kind != "sum":
        return ""
    kinds = (PRICE.name, *(measure.name for measure in MEASURES))
    total, *others = (int(fact.value) for fact in solution.steps if fact.relation.split()[0] in kinds)
    if total + sum(others) != int(solution.value):
        return grammar.MINUS.format(x=total, y=others[0], v=solution.value)
    said = []
    for number in others:
        said.append(grammar.PLUS.format(x=total, y=number, v=total + number))
        total += number
    return " ".join(said)


def _exercise(asked: Asked, documents: Sequence[Document]) -> Exercise:
    question, solution = asked.question, asked.solution
    relation = answering(solution) if question.task != "docmath_qa" else PRICE

    def near() -> list[str]:
        """Other values of the kind that the documents name."""
        return [fact.said for fact in Knowledge(documents).of(relation.name)]

    def guess(rng: random.Random) -> str:
        if question.task == "docmath_qa":
            return str(rng.randint(1, 2 * SMALL.largest))
        return rng.choice(near() or [question.answer])

    def wrong(rng: random.Random) -> str:
        if question.task == "docmath_qa":
            right = int(question.answer)
            return str(rng.choice([n for n in range(max(1, right - 2), right + 3) if n != right]))
        far = relation.values or subjects(rng, half_of(solution.value), 2, relation.to)
        others = [value for value in near() if plain(value) != solution.value]
        return rng.choice(others or [value for value in far if value != solution.value])

    return Exercise(
        question,
        tuple(_quote(fact) for fact in solution.steps),
        tuple(fact.sentence for fact in solution.steps),
        solution.value if question.options else question.answer,
        relation.long_form,
        guess,
        wrong,
        _calculated(solution),
    )


def _draw(documents: Sequence[Document], task: str, rng: random.Random, hops: float) -> Exercise | None:
    links = 1
    while links < LINKS_ASKED[-1] and rng.random() < hops:
        links += 1
    asked = ask(documents, task, rng, links=links, paraphrased=0.0)
    return _exercise(asked, documents) if asked else None


def _cluster(seed: int, index: int, scale: Extent) -> Cluster:
    return cluster(f"lessons-{seed}-{index}", "hard-small", TRAIN, scale)


def _restated(documents: Sequence[Document]) -> list[tuple[str, str]]:
    facts = [fact for fact in Knowledge(documents).facts.values() if fact.relation not in (NEXT, ASKS)]
    return [(_quote(fact), fact.said) for fact in facts]


SMALL_DEMONSTRATIONS = Demonstrations(
    "hard-small", _cluster, _draw, _restated, _NAMES, plain, WORDS, TEMPLATES, SMALL
)
