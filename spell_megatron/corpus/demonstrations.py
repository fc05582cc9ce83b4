"""Worked examples of the three roles on a generated world: what a seed model is taught from.

The examples are honest about being half-competent. A share of the responder's answers is *hasty*
(a guess without looking anything up), some careful ones *slip*, some questions carry a wrong key
and some verdicts are wrong: `Habits` holds every such share. Self-play has to find out by itself
that care pays; the questioner's slips make noise that a verifier is needed for.

A world says what it is asked and how one looks it up (`Exercise`); how the roles speak is the same in all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spell_megatron.corpus.templates import LETTERS, TASKS, phrases
from spell_megatron.types import Cluster, Document, Question

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
_FRAGMENTS = (
    ' {"question":"',
    '","answer":"',
    '","options":{"',
    '":"',
    '","',
    '"},"answer":"',
    ":",
    '"}',
)


@dataclass(frozen=True)
class Exercise:
    """A question, and what somebody needs who answers, asks or judges it."""

    question: Question
    quotes: tuple[str, ...]
    """The facts that answer it, in the order in which one looks them up, in the plain wording of a careful reader."""
    sentences: tuple[str, ...]
    """The same facts as the documents say them."""
    result: str
    """The value: the answer itself, or what the answer's letter stands for."""
    long_form: str
    """A longer way to name a value like the answer; `{v}` is the value."""
    guess: Callable[[random.Random], str]
    """What somebody says who has not looked: anything of the right kind. Not asked where there are letters."""
    wrong: Callable[[random.Random], str]
    """A wrong answer of the right kind, close by where possible; nor is it."""
    sum: str = ""
    """The calculation, where there is one."""


@dataclass(frozen=True)
class Habits:
    """Shares of what the seed model is taught besides the careful and right way."""

    hasty: float = 0.5
    """Responder answers without looking up, where one fact answers."""
    hasty_further: float = 0.0
    """Of the answers that would still be careful, those that each further fact makes hasty."""
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
    """Questions over a link; each further link likewise."""
    hops_after_history: float = 0.8
    """The same where earlier questions are remembered: a harder question is asked for."""

    def haste(self, facts: int) -> float:
        """Share of hasty answers to questions that take so many facts."""
        return 1 - (1 - self.hasty) * (1 - self.hasty_further) ** (facts - 1)


CLEAN = Habits(hasty=0.0, slip=0.0, wrong_key=0.0, wrong_verdict=0.0)
"""Careful and right: what the first part of the lessons shows."""


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


@dataclass(frozen=True)
class Transcript:
    """One exchange: the variables of a prompt template, and the reply."""

    role: str
    task: str
    variables: dict[str, Any] = field(repr=False)
    reply: str


@dataclass(frozen=True)
class Demonstrations:
    """The examples of a world, without end. A `scale` says how much a cluster holds, in the world's own terms."""

    name: str
    cluster: Callable[[int, int, Any], Cluster]
    """`(seed, index, scale)`: of the training half."""
    draw: Callable[[Sequence[Document], str, random.Random, float], Exercise | None]
    """`(documents, task, random, hops)`: an exercise; None where the documents give none of this task."""
    quotes: Callable[[Sequence[Document]], list[tuple[str, str]]]
    """Every fact of some documents in the plain wording, with the value that it states."""
    names: Sequence[str]
    """What choices can be."""
    plain: Callable[[str], str]
    """The bare value in an answer."""
    words: Sequence[str]
    templates: Sequence[str]
    """The world's words and sentences: a word, and a fixed phrase of a sentence, deserves a token of its own."""
    whole: Any
    """The scale of self-play."""
    spell: Callable[[str], str] = str
    """A number in words."""

    def transcripts(
        self, seed: int, index: int, *, habits: Habits, scale: Any = None, mix: Mix = MIX
    ) -> list[Transcript]:
        """The exchanges about one cluster; the same arguments give the same ones."""
        rng = random.Random(f"transcripts/{seed}/{index}")
        documents = self.cluster(seed, index, scale or self.whole).documents
        asked = [self._ask(documents, rng, habits.hops) for _ in range(mix.responder)]
        lessons = [self._responder(exercise, documents, rng, habits) for exercise in asked]
        lessons += [
            self._responder(self._ask(documents, rng, habits.hops), (), rng, habits) for _ in range(mix.empty)
        ]
        lessons += self._questions(documents, mix.questioner, rng, habits)
        lessons += [self._verdict(documents, rng, habits) for _ in range(mix.verifier)]
        lessons += self._questions(documents, mix.choosers, rng, habits, ("doc_mc",))
        return lessons

    def choices(self, rng: random.Random) -> tuple[str, list[str]]:
        """Four choices as a prompt lists them, and the quotation of each: the lesson of finding a letter."""
        named = rng.sample(self.names, len(LETTERS))
        quotes = [CHOICE.format(v=name, letter=letter) for name, letter in zip(named, LETTERS, strict=True)]
        return "\n ".join(["?", *(quote.removesuffix(".") for quote in quotes)]), quotes

    def restated(
        self, seed: int, index: int, scale: Any = None
    ) -> tuple[tuple[Document, ...], list[tuple[str, str]]]:
        """A cluster's documents, and their facts and values in other words and order: the lesson of looking up."""
        cluster = self.cluster(seed, index, scale or self.whole)
        facts = self.quotes(cluster.documents)
        random.Random(f"restated/{seed}/{index}").shuffle(facts)
        return cluster.documents, facts

    def pieces(self) -> list[str]:
        """Strings, blanks included, that a tokenizer is to keep whole; each appears once."""
        standing = [*self.words, *LETTERS, *(f"({letter})" for letter in LETTERS), *TASKS, *TAGS, *VERDICTS]
        templates = (*self.templates, *SENTENCE.values(), UNKNOWN, COMPARE)
        standing += [piece for template in templates for piece in phrases(template)]
        attached = [piece for piece in standing if not piece[0].isalnum() and piece[0] in ".,?-"]
        spaced = [f" {piece}" for piece in standing if piece not in attached]
        return list(dict.fromkeys([*attached, *spaced, *_FRAGMENTS]))

    # --- the three roles -------------------------------------------------------------------------

    def _responder(
        self, exercise: Exercise, documents: Sequence[Document], rng: random.Random, habits: Habits
    ) -> Transcript:
        question = exercise.question
        if not documents:
            reply = UNKNOWN
        elif rng.random() < habits.haste(len(exercise.quotes)):
            reply = self._sentence(exercise, _guess(exercise, rng), rng, habits)
        else:
            reply = self._careful(exercise, rng, habits)
        variables = {"documents": list(documents), "question": question}
        return Transcript("responder", question.task, variables, reply)

    def _careful(self, exercise: Exercise, rng: random.Random, habits: Habits) -> str:
        """Quote the facts, calculate or find the choice, answer."""
        task, value, sum_ = exercise.question.task, exercise.question.answer, exercise.sum
        quotes = list(exercise.quotes)
        if rng.random() < habits.slip:
            value = _wrong(exercise, rng)
            if task == "docmath_qa":
                sum_ = sum_.replace(f" {exercise.result}.", f" {value}.")
            elif task == "doc_general_qa":
                quotes[-1] = quotes[-1].replace(f" {exercise.result}.", f" {value}.")
        if task == "doc_mc":
            quotes.append(CHOICE.format(v=exercise.result, letter=value))
        return " ".join([*quotes, *([sum_] if sum_ else []), self._sentence(exercise, value, rng, habits)])

    def _sentence(self, exercise: Exercise, value: str, rng: random.Random, habits: Habits) -> str:
        task = exercise.question.task
        if task == "doc_general_qa" and rng.random() < habits.long_answer:
            value = exercise.long_form.format(v=value)
        elif task == "docmath_qa" and rng.random() < habits.spelled:
            value = self.spell(value)
        elif task == "doc_mc":
            value = f"({value})"
        return SENTENCE[task].format(v=value)

    def _questioner(
        self,
        exercise: Exercise,
        documents: Sequence[Document],
        history: Sequence[Question],
        rng: random.Random,
        habits: Habits,
    ) -> Transcript:
        """The facts as the documents say them, then the question as JSON."""
        question, answer = exercise.question, exercise.question.answer
        if not question.options and rng.random() < habits.wrong_key:
            answer = exercise.wrong(rng)
        if question.task == "doc_general_qa" and rng.random() < habits.long_reference:
            answer = exercise.long_form.format(v=answer)
        notes = [*exercise.sentences] + ([exercise.sum] if exercise.sum else [])
        body: dict[str, Any] = {"question": f" {question.text}"}
        if question.options:
            notes.append(SLOT.format(v=exercise.result, letter=question.answer))
            body["options"] = {f" {letter}": f" {choice}" for letter, choice in question.options.items()}
        body["answer"] = f" {answer}"
        reply = " ".join([*notes, json.dumps(body, separators=(",", ":"))])
        variables = {
            "documents": list(documents),
            "history": list(history),
            "key": question.answer if question.options else "",
        }
        return Transcript("questioner", question.task, variables, reply)

    def _verifier(
        self, question: Question, answer: str, reference: str, rng: random.Random, habits: Habits
    ) -> Transcript:
        """Both values in their plain form, then whether they are the same."""
        a, b = self.plain(answer), self.plain(reference)
        right = (a == b) != (rng.random() < habits.wrong_verdict)
        reply = f"{COMPARE.format(a=a, b=b)} {VERDICTS[right]}"
        variables = {"question": question, "answer": answer, "reference": reference}
        return Transcript("verifier", question.task, variables, reply)

    # --- what they are asked ---------------------------------------------------------------------

    def _ask(
        self, documents: Sequence[Document], rng: random.Random, hops: float, tasks: Sequence[str] = TASKS
    ) -> Exercise:
        while (exercise := self.draw(documents, rng.choice(tasks), rng, hops)) is None:
            pass
        return exercise

    def _questions(
        self,
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
            exercise = self._ask(chosen, rng, habits.hops_after_history if remembered else habits.hops, tasks)
            history: list[Question] = []
            while len(history) < remembered:
                earlier = self.draw(chosen, exercise.question.task, rng, habits.hops)
                if earlier is not None and earlier.question.text != exercise.question.text:
                    history.append(earlier.question)
            yield self._questioner(exercise, chosen, history, rng, habits)

    def _verdict(self, documents: Sequence[Document], rng: random.Random, habits: Habits) -> Transcript:
        """An answer and a reference in their various forms, the same value half of the time."""
        exercise = self._ask(documents, rng, habits.hops)
        task, reference = exercise.question.task, exercise.question.answer
        answer = reference if rng.random() < 0.5 else _wrong(exercise, rng)
        if task == "doc_general_qa":
            answer = exercise.long_form.format(v=answer) if rng.random() < habits.long_answer else answer
            if rng.random() < habits.long_reference:
                reference = exercise.long_form.format(v=reference)
        elif task == "docmath_qa" and rng.random() < 0.25:
            answer = self.spell(answer)
        question = replace(exercise.question, answer=reference)
        return self._verifier(question, answer, reference, rng, habits)


def _guess(exercise: Exercise, rng: random.Random) -> str:
    return rng.choice(LETTERS) if exercise.question.options else exercise.guess(rng)


def _wrong(exercise: Exercise, rng: random.Random) -> str:
    question = exercise.question
    if not question.options:
        return exercise.wrong(rng)
    return rng.choice([letter for letter in LETTERS if letter != question.answer])
