"""What documents of the hard world say, and what a question about them comes to.

There is one way to an answer: `solve` reads a question by the forms that questions are written in, and looks its facts
up in a `Knowledge` of the documents. The generator's own questions get their answers by it, and so does `truth` the
questions of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spell_megatron.corpus.hard import grammar, words
from spell_megatron.corpus.hard.grammar import LINKS, MEASURES, PRICE, RELATIONS, TRAITS, Predicate
from spell_megatron.corpus.templates import reader
from spell_megatron.types import Document

NEXT, ASKS = "key", "question"
"""Relations of keys: the key that one leads to, the question that the last one asks."""


@dataclass(frozen=True)
class Stated:
    """A statement that holds."""

    subject: str
    relation: str
    """A relation's name, `price of {item}`, or what a key has."""
    value: str
    said: str
    """The value in the document's word for it, where there are several."""
    sentence: str
    document: str
    """Its document's id."""


class Knowledge:
    """The facts of some documents, by subject and relation."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.facts: dict[tuple[str, str], Stated] = {}
        for document in documents:
            said = grammar.sentences(document.text)
            if said and said[0] == grammar.OUT_OF_DATE:
                continue
            for sentence in said:
                if fact := read(sentence, document.id):
                    self.facts[fact.subject, fact.relation] = fact
        self.subjects = list(dict.fromkeys(s for s, relation in self.facts if relation not in (NEXT, ASKS)))
        self.keys = [s for s, relation in self.facts if relation in (NEXT, ASKS)]

    def follow(self, start: str, relations: Sequence[str]) -> tuple[Stated, ...] | None:
        """The facts that lead from a subject along relations; None if one is missing."""
        steps: list[Stated] = []
        for relation in relations:
            fact = self.facts.get((start, relation))
            if fact is None:
                return None
            steps.append(fact)
            start = fact.value
        return tuple(steps)

    def of(self, relation: str) -> list[Stated]:
        return [fact for (_, name), fact in self.facts.items() if name == relation]


def read(sentence: str, document: str = "") -> Stated | None:
    """The fact that a sentence states; None for a decoy and what says nothing."""
    if sentence.startswith("Key "):
        for relation, pattern in zip((NEXT, ASKS), grammar.KEY_READERS, strict=True):
            if met := pattern.fullmatch(sentence):
                return Stated(met[1], relation, met[2], met[2], sentence, document)
        return None
    for relation, phrase, pattern in grammar.READERS:
        if phrase in sentence and (met := pattern.fullmatch(sentence)):
            slots = met.groupdict()
            name = price(slots["i"]) if "i" in slots else relation
            return Stated(met["s"], name, words.meant(met["v"]), met["v"], sentence, document)
    return None


def price(item: str) -> str:
    return f"{PRICE.name} of {item}"


_LONG_FORMS = [reader(form, grammar.SLOTS) for form in dict.fromkeys(r.long_form for r in (*TRAITS, *LINKS))]


def plain(answer: str) -> str:
    """The bare value in an answer: `the city of Rome` is Rome, `a hound` is dog."""
    text = answer.strip(" .()")
    for pattern in _LONG_FORMS:
        if met := pattern.fullmatch(text):
            text = met["v"]
    text = re.sub(r"^(?:an?|the) ", "", text)
    return words.meant(text)


# --- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """What a question comes to. `links` are the facts that have to be found one after another."""

    kind: str
    value: str
    steps: tuple[Stated, ...]
    """All facts needed, each once, in the order in which one looks them up."""
    links: int

    @property
    def documents(self) -> int:
        """How many documents hold the facts."""
        return len({fact.document for fact in self.steps})


WHAT, WHAT_PRICE = "What is the {r} of {s}?", "What is the price of {i} at {s}?"
SUMS = ("What is the sum of {q}?", "What do {q} come to together?")
DIFFERENCES = ("What is the difference between {q}?", "By how much do {q} differ?")
HIGHEST, LOWEST = "Which has the highest {m}: {l}?", "Which has the lowest {m}: {l}?"
KEYS = "What is the answer to the question that key {k} leads to?"
FORMS = (WHAT, WHAT_PRICE, *SUMS, *DIFFERENCES, HIGHEST, LOWEST, KEYS)
"""The forms of questions, besides the direct ones of each relation. Lists read `A, B and C` (`or`)."""

_NAMED = {noun: relation for relation in RELATIONS.values() for noun in relation.nouns}
_VIA = "|".join(noun for link in LINKS for noun in link.nouns)
_EXPRESSION = rf"(?:the (?:{_VIA}) of )*{grammar.SUBJECT}"
_MEASURE = "|".join([*(measure.name for measure in MEASURES), rf"{PRICE.name} of [a-z]+"])
_QUANTITY = re.compile(rf"the ({_MEASURE}) (?:of|at) ({_EXPRESSION})")
_SLOTS = {
    "r": "|".join(_NAMED),
    "s": _EXPRESSION,
    "i": "[a-z]+",
    "m": _MEASURE,
    "q": ".+",
    "l": ".+",
    "k": grammar.KEY,
}
_Slots = dict[str, Any]


def _chain(reading: Knowledge, expression: str, last: str) -> tuple[Stated, ...] | None:
    """The facts from an expression's subject along its links, and the one of the relation `last` at their end.

    None where one is missing, or the expression is none: a model may list anything.
    """
    if not re.fullmatch(_EXPRESSION, expression):
        return None
    *nouns, subject = re.sub(rf"the ({_VIA}) of ", r"\1/", expression).split("/")
    return reading.follow(subject, [*(_NAMED[noun].name for noun in reversed(nouns)), last])


def _value(reading: Knowledge, expression: str, relation: str) -> Solution | None:
    steps = _chain(reading, expression, relation)
    return Solution("value", steps[-1].value, steps, len(steps)) if steps else None


def _calculated(reading: Knowledge, slots: _Slots, sign: int) -> Solution | None:
    quantities = [_QUANTITY.fullmatch(part) for part in _parts(slots["q"], "and")]
    chains = [_chain(reading, met[2], met[1]) for met in quantities if met]
    found = [chain for chain in chains if chain]
    if len(found) != len(quantities) or len(found) < 2 or (sign < 0 and len(found) > 2):
        return None
    first, *others = (int(chain[-1].value) for chain in found)
    return _joined("sum", str(abs(first + sign * sum(others))), found)


def _extreme(reading: Knowledge, slots: _Slots, best: Callable[[Sequence[int]], int]) -> Solution | None:
    chains = [_chain(reading, expression, slots["m"]) for expression in _parts(slots["l"], "or")]
    found = [chain for chain in chains if chain]
    values = [int(chain[-1].value) for chain in found]
    if len(found) != len(chains) or len(found) < 2 or values.count(best(values)) != 1:
        return None
    return _joined("comparison", found[values.index(best(values))][-1].subject, found)


def _joined(kind: str, value: str, chains: Sequence[tuple[Stated, ...]]) -> Solution:
    steps = tuple(dict.fromkeys(fact for chain in chains for fact in chain))
    return Solution(kind, value, steps, max(map(len, chains)))


def _keys(reading: Knowledge, key: str) -> Solution | None:
    steps: list[Stated] = []
    while (fact := reading.facts.get((key, NEXT))) and fact not in steps:
        steps.append(fact)
        key = fact.value
    last = reading.facts.get((key, ASKS))
    inner = solve(reading, last.value) if last and not last.value.startswith(_KEYS_BEGIN) else None
    if last is None or inner is None:
        return None
    return replace(inner, kind="keys", steps=(*steps, last, *inner.steps), links=len(steps) + 1 + inner.links)


_KEYS_BEGIN = KEYS.partition("{")[0]


def _parts(text: str, word: str) -> list[str]:
    """The members of `A, B and C`."""
    return re.split(rf", | {word} ", text)


def _direct(relation: Predicate) -> Callable[[Knowledge, _Slots], Solution | None]:
    return lambda reading, slots: _value(reading, slots["s"], relation.name)


_FORMS: list[tuple[re.Pattern[str], Callable[[Knowledge, _Slots], Solution | None]]] = [
    (reader(form, _SLOTS), solved)
    for forms, solved in (
        *((relation.questions, _direct(relation)) for relation in RELATIONS.values()),
        ((WHAT,), lambda reading, slots: _value(reading, slots["s"], _NAMED[slots["r"]].name)),
        ((WHAT_PRICE,), lambda reading, slots: _value(reading, slots["s"], price(slots["i"]))),
        (SUMS, lambda reading, slots: _calculated(reading, slots, +1)),
        (DIFFERENCES, lambda reading, slots: _calculated(reading, slots, -1)),
        ((HIGHEST,), lambda reading, slots: _extreme(reading, slots, max)),
        ((LOWEST,), lambda reading, slots: _extreme(reading, slots, min)),
        ((KEYS,), lambda reading, slots: _keys(reading, slots["k"])),
    )
    for form in forms
]


def solve(reading: Knowledge, text: str) -> Solution | None:
    """What a question comes to; None where it is not of this world, or the documents do not say."""
    text = " ".join(text.split())
    for pattern, solved in _FORMS:
        if met := pattern.fullmatch(text):
            return solved(reading, met.groupdict())
    return None
