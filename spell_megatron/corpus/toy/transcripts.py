"""Worked examples of the three roles on the toy world: what the seed model is taught from.

The examples are honest about being half-competent. A share of the responder's answers is *hasty*
(a guess without looking anything up), some careful ones *slip*, some questions carry a wrong key
and some verdicts are wrong: `Habits` holds every such share. Self-play has to find out by itself
that care pays; the questioner's slips make noise that a verifier is needed for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spell_megatron.corpus.toy import grammar, words
from spell_megatron.corpus.toy.world import (
    LETTERS,
    TASKS,
    WHOLE,
    Derived,
    Scale,
    ToyFacts,
    ask,
    plain,
    toy_cluster,
)
from spell_megatron.types import Document, Question

SENTENCE = {
    "doc_general_qa": "The correct answer is {v}.",
    "docmath_qa": "Therefore, the answer is {v}.",
    "doc_mc": "The correct answer is {v}.",
}
CHOICE = "{v} is ({letter})."
"""How a choice is quoted, as the prompt lists it."""
SLOT = "{letter}: {v}."
"""How a questioner notes where the right choice has to stand."""
UNKNOWN = "The text does not say."
COMPARE = "The answer says {a}, the reference says {b}."
VERDICTS = ("[[NO]]", "[[YES]]")
TAGS = ("<text>", "</text>", "<ask>", "<make>", "<key>", "<past>", "<judge>", "<said>", "<ref>", "Empty")


@dataclass(frozen=True)
class Habits:
    """Shares of what the seed model is taught besides the careful and right way."""

    hasty: float = 0.5
    """Responder answers without looking up."""
    slip: float = 0.1
    """Careful answers that end in a wrong value."""
    spelled: float = 0.1
    """Answers of docmath_qa in words, which the rule cannot read."""
    long_answer: float = 0.15
    """Answers of doc_general_qa in their longer form."""
    long_reference: float = 0.6
    """References of doc_general_qa in their longer form, which the rule finds in no short answer."""
    wrong_key: float = 0.05
    """Questions with a wrong answer; none of doc_mc, whose key is prescribed."""
    wrong_verdict: float = 0.06
    hops: float = 0.4
    """Questions over a link."""
    hops_after_history: float = 0.8
    """The same where earlier questions are remembered: a harder question is asked for."""


HABITS = Habits(long_reference=0.8)
"""What the seed model leaves school with."""
CLEAN = Habits(hasty=0.0, slip=0.0, wrong_key=0.0, wrong_verdict=0.0)
"""Careful and right: what the first part of the lessons shows."""


@dataclass(frozen=True)
class Transcript:
    """One exchange: the variables of a prompt template, and the reply."""

    role: str
    task: str
    variables: dict[str, Any] = field(repr=False)
    reply: str


# --- the three roles -----------------------------------------------------------------------------


def responder(
    derived: Derived, documents: Sequence[Document], rng: random.Random, habits: Habits
) -> Transcript:
    question = derived.question
    if not documents:
        reply = UNKNOWN
    elif rng.random() < habits.hasty:
        reply = _sentence(question.task, _guess(derived, documents, rng), derived, rng, habits)
    else:
        reply = _careful(derived, documents, rng, habits)
    return Transcript("responder", question.task, {"documents": list(documents), "question": question}, reply)


def _careful(derived: Derived, documents: Sequence[Document], rng: random.Random, habits: Habits) -> str:
    """Quote the facts, calculate or find the choice, answer."""
    task, value, sum_ = derived.question.task, derived.question.answer, derived.sum
    quotes = [fact.quote for fact in derived.steps]
    if rng.random() < habits.slip:
        value = _wrong(derived, ToyFacts(documents), rng)
        if task == "docmath_qa":
            sum_ = sum_.replace(f" {derived.result}.", f" {value}.")
        elif task == "doc_general_qa":
            quotes[-1] = quotes[-1].replace(f" {derived.result}.", f" {value}.")
    if task == "doc_mc":
        quotes.append(CHOICE.format(v=derived.result, letter=value))
    return " ".join([*quotes, *([sum_] if sum_ else []), _sentence(task, value, derived, rng, habits)])


def _sentence(task: str, value: str, derived: Derived, rng: random.Random, habits: Habits) -> str:
    if task == "doc_general_qa" and rng.random() < habits.long_answer:
        value = _relation(derived).long_form.format(v=value)
    elif task == "docmath_qa" and rng.random() < habits.spelled:
        value = words.NUMBERS[int(value)]
    elif task == "doc_mc":
        value = f"({value})"
    return SENTENCE[task].format(v=value)


def _guess(derived: Derived, documents: Sequence[Document], rng: random.Random) -> str:
    """What somebody says who has not looked: anything of the right kind."""
    if derived.question.task == "doc_mc":
        return rng.choice(LETTERS)
    if derived.question.task == "docmath_qa":
        return str(rng.randint(1, len(words.NUMBERS) - 1))
    return rng.choice(ToyFacts(documents).values(_relation(derived).name))


def questioner(
    derived: Derived,
    documents: Sequence[Document],
    history: Sequence[Question],
    rng: random.Random,
    habits: Habits,
) -> Transcript:
    """The facts as the documents say them, then the question as JSON."""
    question, reading = derived.question, ToyFacts(documents)
    answer = question.answer
    if not question.options and rng.random() < habits.wrong_key:
        answer = _wrong(derived, reading, rng)
    if question.task == "doc_general_qa" and rng.random() < habits.long_reference:
        answer = _relation(derived).long_form.format(v=answer)
    notes = [fact.sentence for fact in derived.steps] + ([derived.sum] if derived.sum else [])
    body: dict[str, Any] = {"question": f" {question.text}"}
    if question.options:
        notes.append(SLOT.format(v=derived.result, letter=question.answer))
        body["options"] = {f" {letter}": f" {choice}" for letter, choice in question.options.items()}
    body["answer"] = f" {answer}"
    reply = " ".join([*notes, json.dumps(body, separators=(",", ":"))])
    variables = {
        "documents": list(documents),
        "history": list(history),
        "key": question.answer if question.options else "",
    }
    return Transcript("questioner", question.task, variables, reply)


def verifier(
    question: Question, answer: str, reference: str, rng: random.Random, habits: Habits
) -> Transcript:
    """Both values in their plain form, then whether they are the same."""
    a, b = plain(answer), plain(reference)
    right = (a == b) != (rng.random() < habits.wrong_verdict)
    reply = f"{COMPARE.format(a=a, b=b)} {VERDICTS[right]}"
    variables = {"question": question, "answer": answer, "reference": reference}
    return Transcript("verifier", question.task, variables, reply)


def _relation(derived: Derived) -> grammar.Relation:
    return grammar.RELATIONS[derived.steps[-1].relation]


def _wrong(derived: Derived, reading: ToyFacts, rng: random.Random) -> str:
    """A wrong answer of the right kind, close by where possible."""
    answer = derived.question.answer
    if derived.question.task == "doc_mc":
        return rng.choice([letter for letter in LETTERS if letter != answer])
    if derived.question.task == "docmath_qa":
        near = range(max(1, int(answer) - 2), min(len(words.NUMBERS) - 1, int(answer) + 2) + 1)
        return str(rng.choice([number for number in near if number != int(answer)]))
    relation = _relation(derived)
    others = [value for value in reading.values(relation.name) if value != answer]
    return rng.choice(others or [value for value in relation.values or words.NAMES if value != answer])


# --- lessons -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """How many exchanges of each role one cluster gives."""

    responder: int = 8
    questioner: int = 3
    verifier: int = 4
    empty: int = 1
    """Responder exchanges without documents."""
    choosers: int = 0
    """Further questioner exchanges, of doc_mc, whose slots are the hardest to fill."""


MIX = Mix()


def transcripts(
    seed: int, index: int, *, habits: Habits = HABITS, scale: Scale = WHOLE, mix: Mix = MIX
) -> list[Transcript]:
    """The exchanges about one cluster of the training half; the same arguments give the same ones."""
    rng = random.Random(f"transcripts/{seed}/{index}")
    cluster = toy_cluster(seed, index, scale=scale)
    asked = [_ask(cluster.documents, rng, habits.hops) for _ in range(mix.responder)]
    lessons = [responder(derived, cluster.documents, rng, habits) for derived in asked]
    lessons += [
        responder(_ask(cluster.documents, rng, habits.hops), (), rng, habits) for _ in range(mix.empty)
    ]
    lessons += _questions(cluster.documents, mix.questioner, rng, habits)
    lessons += [_verdict(cluster.documents, rng, habits) for _ in range(mix.verifier)]
    lessons += _questions(cluster.documents, mix.choosers, rng, habits, ("doc_mc",))
    return lessons


def _ask(
    documents: Sequence[Document], rng: random.Random, hops: float, tasks: Sequence[str] = TASKS
) -> Derived:
    while (derived := ask(documents, rng.choice(tasks), rng, hops=hops)) is None:
        pass
    return derived


def _questions(
    documents: Sequence[Document],
    count: int,
    rng: random.Random,
    habits: Habits,
    tasks: Sequence[str] = TASKS,
) -> Iterator[Transcript]:
    """Questions on some documents: few without history, more where earlier questions widened the view."""
    remembered = rng.choice((0, 0, 1, 2, 3))
    read = min(len(documents), rng.randint(2, 3) + 2 * remembered)
    chosen = [documents[i] for i in sorted(rng.sample(range(len(documents)), read))]
    for _ in range(count):
        derived = _ask(chosen, rng, habits.hops_after_history if remembered else habits.hops, tasks)
        history: list[Question] = []
        while len(history) < remembered:
            earlier = ask(chosen, derived.question.task, rng, hops=habits.hops)
            if earlier is not None and earlier.question.text != derived.question.text:
                history.append(earlier.question)
        yield questioner(derived, chosen, history, rng, habits)


def _verdict(documents: Sequence[Document], rng: random.Random, habits: Habits) -> Transcript:
    """An answer and a reference in their various forms, the same value half of the time."""
    derived = _ask(documents, rng, habits.hops)
    task, reference = derived.question.task, derived.question.answer
    answer = reference if rng.random() < 0.5 else _wrong(derived, ToyFacts(documents), rng)
    if task == "doc_general_qa":
        long_form = _relation(derived).long_form
        answer = long_form.format(v=answer) if rng.random() < habits.long_answer else answer
        reference = long_form.format(v=reference) if rng.random() < habits.long_reference else reference
    elif task == "docmath_qa" and rng.random() < 0.25:
        answer = words.NUMBERS[int(answer)]
    question = replace(derived.question, answer=reference)
    return verifier(question, answer, reference, rng, habits)


def choices(rng: random.Random) -> tuple[str, list[str]]:
    """Four choices as a prompt lists them, and the quotation of each: the lesson of finding a letter."""
    people = rng.sample(words.NAMES, len(LETTERS))
    quotes = [CHOICE.format(v=name, letter=letter) for name, letter in zip(people, LETTERS, strict=True)]
    return "\n ".join(["?", *(quote.removesuffix(".") for quote in quotes)]), quotes


def restated(seed: int, index: int, scale: Scale = WHOLE) -> tuple[tuple[Document, ...], list[str]]:
    """A cluster's documents, and their facts in other words and another order: the lesson of looking up."""
    cluster = toy_cluster(seed, index, scale=scale)
    facts = list(ToyFacts(cluster.documents).facts.values())
    random.Random(f"restated/{seed}/{index}").shuffle(facts)
    return cluster.documents, [fact.quote for fact in facts]
