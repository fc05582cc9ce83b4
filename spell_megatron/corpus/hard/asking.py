"""Questions about documents of the hard world, by task, kind and number of links; and the held-out set.

    doc_general_qa   a trait or a link of a subject, who has most of something, what a chain of keys asks
    docmath_qa       a measure, a sum of two or three, a difference
    doc_mc           a trait, a link or a comparison with four values to choose from

A held-out question has its number of links, of documents and more for labels, by which it is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count as counted

from spell_megatron.corpus.hard import grammar, words
from spell_megatron.corpus.hard.grammar import PRICE, RELATIONS, Predicate
from spell_megatron.corpus.hard.reading import Knowledge, Solution, plain, solve
from spell_megatron.corpus.hard.texts import Texts
from spell_megatron.corpus.hard.world import half_of, subjects
from spell_megatron.corpus.templates import LETTERS, TASKS
from spell_megatron.types import Cluster, Document, Question

LINKS_ASKED = (1, 2, 3, 4)
LENGTHS = (1, 2, 4)
"""Lengths of held-out documents, in those of the training half."""
PARAPHRASED = 0.2
"""Share of general questions, keys apart, whose reference is in other words than the documents': the rule finds it
in no answer that quotes them."""
_FURTHER = 1_000_000
"""Between the numbers of held-out clusters that are tried for one question."""
_ALIKE = 0.5
"""Share of made-up choices that have a word of their name from another one."""
_TRIES = 4
"""Texts of a kind that are tried before it counts as one that the documents do not answer."""


@dataclass(frozen=True)
class Asked:
    """A question with what answers it."""

    question: Question
    solution: Solution


_KINDS: dict[str, dict[str, Callable[[Texts], str | None]]] = {
    "doc_general_qa": {"value": Texts.value, "comparison": Texts.comparison, "keys": Texts.keys},
    "docmath_qa": {"value": Texts.number, "sum": Texts.sum},
    "doc_mc": {"value": Texts.value, "comparison": Texts.comparison},
}


def ask(
    documents: Sequence[Document],
    task: str,
    rng: random.Random,
    *,
    links: int | None = None,
    kind: str | None = None,
    paraphrased: float = PARAPHRASED,
    key: str = "",
) -> Asked | None:
    """A random question that `documents` answer; None where they answer none of this task.

    `links` and `kind` ("value", "sum", "comparison", "keys") are drawn where not given, `key` is the letter of the
    right choice.
    """
    reading = Knowledge(documents)
    for wanted in (links,) if links else rng.sample(LINKS_ASKED, len(LINKS_ASKED)):
        texts, known = Texts(reading, rng, wanted), _KINDS[task]
        for one in (kind,) if kind else rng.sample(list(known), len(known)):
            for _ in range(_TRIES):
                text = known[one](texts)
                solution = solve(reading, text) if text else None
                if text and solution:
                    question = _question(reading, task, text, solution, rng, paraphrased, key)
                    return Asked(question, solution)
    return None


def truth(cluster: Cluster, question: Question) -> str | None:
    """The right answer in its plain form (a letter where there are options), read off the documents.

    None where the question is not one of this world's, the documents do not say, or not exactly one option is right.
    """
    solution = solve(Knowledge(cluster.documents), question.text)
    if solution is None or not question.options:
        return solution.value if solution else None
    fitting = [letter for letter, choice in question.options.items() if plain(choice) == solution.value]
    return fitting[0] if len(fitting) == 1 else None


def reach(cluster: Cluster, question: Question) -> Solution | None:
    """What a question needs of the cluster: its `links`, its `documents` and its facts; None as for `truth`."""
    return solve(Knowledge(cluster.documents), question.text)


def heldout(count: int, drawn: Callable[[int, int], Cluster]) -> Iterator[tuple[Cluster, Question]]:
    """`count` questions: each at three lengths, tasks in turn, every number of links.

    `drawn(index, times)` makes held-out clusters. The three lengths ask the same about the same facts. References are
    in the documents' words.
    """
    cells = [(task, links) for links in LINKS_ASKED for task in TASKS]
    for place in range(-(-count // len(LENGTHS))):
        task, links = cells[place % len(cells)]
        index, question = next(_asked(place, task, links, drawn))
        for times in LENGTHS[: count - place * len(LENGTHS)]:
            made = drawn(index, times)
            labels = question.labels | {"length": f"{times}x"}
            yield replace(made, id=f"{made.id}/{times}x"), replace(question, labels=labels)


def _asked(
    place: int, task: str, links: int, drawn: Callable[[int, int], Cluster]
) -> Iterator[tuple[int, Question]]:
    """Numbers of clusters that answer a question like this, with it: nearly always the first one does."""
    for index in counted(place, step=_FURTHER):
        made = drawn(index, 1)
        derived = ask(made.documents, task, random.Random(made.id), links=links, paraphrased=0.0)
        if derived:
            yield index, derived.question


# --- answers -------------------------------------------------------------------------------------


def _question(
    reading: Knowledge,
    task: str,
    text: str,
    solution: Solution,
    rng: random.Random,
    paraphrased: float,
    key: str,
) -> Question:
    """With its reference, or with choices."""
    labels = {
        "kind": solution.kind,
        "links": str(solution.links),
        "documents": str(solution.documents),
    }
    if task == "doc_mc":
        key = key or rng.choice(LETTERS)
        return Question(task, text, key, _choices(reading, solution, rng, key), labels)
    if task == "docmath_qa" or solution.kind == "keys":
        return Question(task, text, solution.value, labels=labels)
    said = solution.value if solution.kind == "comparison" else solution.steps[-1].said
    answer = _in_other_words(solution, said, rng) if rng.random() < paraphrased else said
    return Question(task, text, answer, labels=labels)


def _in_other_words(solution: Solution, said: str, rng: random.Random) -> str:
    """The answer by a longer form, or by a synonym where there is one."""
    alike = [word for word in (solution.value, *words.SYNONYMS) if plain(word) == solution.value]
    return rng.choice([answering(solution).long_form.format(v=said), *(w for w in alike if w != said)])


def answering(solution: Solution) -> Predicate:
    """A relation that has values like the answer."""
    last = solution.steps[-1].relation
    if solution.kind != "comparison":
        return RELATIONS[last]
    return grammar.SUPPLIER if last == "staff" or last.startswith(PRICE.name) else grammar.FRIEND


def _choices(reading: Knowledge, solution: Solution, rng: random.Random, key: str) -> dict[str, str]:
    """Four values, the right one at `key`; two of the wrong ones out of the documents where there are so many."""
    relation = answering(solution)
    near = [fact.value for fact in reading.of(relation.name)]
    if relation.to:
        near += [subject for subject in reading.subjects if grammar.kind(subject) == relation.to]
    near = [value for value in dict.fromkeys(near) if value != solution.value]
    far = relation.values or subjects(rng, half_of(solution.value), 2 * len(LETTERS), relation.to, _ALIKE)
    rng.shuffle(near)
    wrong = near[:2]
    while len(wrong) < len(LETTERS) - 1:
        if (value := rng.choice(far)) not in (solution.value, *wrong):
            wrong.append(value)
    rng.shuffle(wrong)
    return {letter: solution.value if letter == key else wrong.pop() for letter in LETTERS}
