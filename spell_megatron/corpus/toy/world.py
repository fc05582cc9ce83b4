"""A small world of people and shops, written as documents: endless, checkable, and not to be memorised.

A cluster is six to eight documents about people who know each other and shops that they own.
Everything is drawn afresh, so that only reading helps. Three kinds of questions make sense:

    doc_general_qa   a trait or a link of a subject, directly or over a link ("the friend of Nora")
    docmath_qa       sum or difference of two prices or two people's savings
    doc_mc           a doc_general_qa whose answer is a person, with four people to choose from

Train and held-out worlds share no document: a document belongs to the half that a digest of its
text says, and is drawn again until it falls into the wanted one.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from spell_megatron.corpus.templates import LETTERS, TASKS, reader
from spell_megatron.corpus.toy import grammar, words
from spell_megatron.corpus.toy.grammar import FRIEND, LINKS, OWNER, RELATIONS, TRAITS, Sum
from spell_megatron.types import Cluster, Document, Question

DOMAIN = "toy"
LARGEST = 12
"""Prices and savings are 1 to this."""
HELD_OUT = 1
TRAIN = 0


@dataclass(frozen=True)
class Scale:
    """How much a cluster holds, as inclusive ranges."""

    people: tuple[int, int] = (4, 5)
    shops: tuple[int, int] = (2, 3)
    traits: tuple[int, int] = (2, 3)
    items: tuple[int, int] = (3, 3)
    paraphrases: bool = True


WHOLE = Scale()
"""The world as it is; smaller ones are for lessons."""


@dataclass(frozen=True)
class Fact:
    """One sentence of a document. `relation` is a Relation's name, `savings`, or the item that is sold."""

    subject: str
    relation: str
    value: str
    sentence: str

    @property
    def quote(self) -> str:
        """The sentence in the plain wording of a careful reader."""
        if self.relation == "savings":
            return grammar.SAVINGS[0].format(s=self.subject, v=self.value)
        if self.relation in RELATIONS:
            return RELATIONS[self.relation].facts[0].format(s=self.subject, v=self.value)
        return grammar.PRICE[0].format(s=self.subject, i=self.relation, v=self.value)


@dataclass(frozen=True)
class Derived:
    """A question with the facts that answer it, in the order in which one looks them up."""

    question: Question
    steps: tuple[Fact, ...]
    result: str
    """The value: the answer itself, or what the answer's letter stands for."""
    sum: str = ""
    """The calculation, where there is one."""


# --- documents -----------------------------------------------------------------------------------


def toy_cluster(seed: int, index: int, half: int = TRAIN, scale: Scale = WHOLE) -> Cluster:
    """The `index`-th cluster of the world `seed`; the same arguments give the same cluster."""
    rng = random.Random(f"{seed}/{half}/{index}")
    people = rng.sample(words.NAMES, rng.randint(*scale.people))
    shops = rng.sample(words.SHOPS, rng.randint(*scale.shops))
    subjects = [*people, *shops]
    rng.shuffle(subjects)
    identity = f"{DOMAIN}-{seed}-{half}-{index}"
    return Cluster(
        id=identity,
        domain=DOMAIN,
        documents=tuple(
            Document(id=f"{identity}/{subject}", title=subject, text=_text(rng, subject, people, half, scale))
            for subject in subjects
        ),
    )


def toy_clusters(seed: int, half: int = TRAIN) -> Iterator[Cluster]:
    """All clusters of the world `seed`, without end."""
    return (toy_cluster(seed, index, half) for index in itertools.count())


def _text(rng: random.Random, subject: str, people: Sequence[str], half: int, scale: Scale) -> str:
    write = _person if subject in people else _shop
    while True:
        sentences = write(rng, subject, people, scale)
        rng.shuffle(sentences)
        text = " ".join(sentences)
        if zlib.crc32(text.encode()) % 2 == half:
            return text


def _person(rng: random.Random, name: str, people: Sequence[str], scale: Scale) -> list[str]:
    say = _speaker(rng, scale)
    traits = rng.sample(TRAITS, rng.randint(*scale.traits))
    return [
        say(grammar.SAVINGS, s=name, v=str(rng.randint(1, LARGEST))),
        say(FRIEND.facts, s=name, v=rng.choice([other for other in people if other != name])),
        *(say(trait.facts, s=name, v=rng.choice(trait.values)) for trait in traits),
    ]


def _shop(rng: random.Random, name: str, people: Sequence[str], scale: Scale) -> list[str]:
    say = _speaker(rng, scale)
    items = rng.sample(words.ITEMS, rng.randint(*scale.items))
    prices = (rng.randint(1, LARGEST) for _ in items)
    return [
        say(OWNER.facts, s=name, v=rng.choice(people)),
        *(
            say(grammar.PRICE, s=name, i=item, v=str(price))
            for item, price in zip(items, prices, strict=True)
        ),
    ]


def _speaker(rng: random.Random, scale: Scale) -> Callable[..., str]:
    def say(paraphrases: tuple[str, ...], **slots: str) -> str:
        return rng.choice(paraphrases if scale.paraphrases else paraphrases[:1]).format(**slots)

    return say


# --- reading -------------------------------------------------------------------------------------

_READERS = [
    *((name, reader(fact, grammar.SLOTS)) for name, relation in RELATIONS.items() for fact in relation.facts),
    *(("savings", reader(fact, grammar.SLOTS)) for fact in grammar.SAVINGS),
    *(("", reader(fact, grammar.SLOTS)) for fact in grammar.PRICE),
]


class ToyFacts:
    """What a set of documents says: facts by subject and relation."""

    def __init__(self, documents: Sequence[Document]) -> None:
        sentences = (
            part + "." for document in documents for part in document.text.split(".") if part.strip()
        )
        facts = (_read(sentence.strip()) for sentence in sentences)
        self.facts = {(fact.subject, fact.relation): fact for fact in facts if fact}

    def find(self, expression: str, relation: str) -> tuple[Fact, ...] | None:
        """The facts that lead from a subject, or `the friend of` one, to a value; None if one is missing."""
        hop: tuple[Fact, ...] = ()
        if met := grammar.VIA.fullmatch(expression):
            first = self.facts.get((met[2], met[1]))
            if first is None:
                return None
            hop, expression = (first,), first.value
        last = self.facts.get((expression, relation))
        return (*hop, last) if last else None

    def price(self, item: str, shop: str) -> tuple[Fact, ...] | None:
        """What leads to an item's price; None for what only sounds like an item: "the price of friend"."""
        return None if item in (*RELATIONS, "savings") else self.find(shop, item)

    def values(self, relation: str) -> list[str]:
        """Every value that the documents give for a relation, in their order, without repeats."""
        return list(dict.fromkeys(fact.value for fact in self.facts.values() if fact.relation == relation))

    def of(self, relations: Sequence[str]) -> list[Fact]:
        return [fact for fact in self.facts.values() if fact.relation in relations]

    @property
    def prices(self) -> list[Fact]:
        return [fact for fact in self.facts.values() if fact.relation not in (*RELATIONS, "savings")]


def _read(sentence: str) -> Fact | None:
    for name, pattern in _READERS:
        if met := pattern.fullmatch(sentence):
            return Fact(met["s"], name or met["i"], met["v"], sentence)
    return None


# --- questions -----------------------------------------------------------------------------------


def ask(
    documents: Sequence[Document], task: str, rng: random.Random, *, hops: float = 0.4, key: str = ""
) -> Derived | None:
    """A random question that `documents` answer; None where they answer none of this task.

    `hops` is the share of questions that go over a link, where there is one; `key` the letter of
    the right choice (drawn where empty).
    """
    reading = ToyFacts(documents)
    if task == "docmath_qa":
        return _ask_sum(reading, rng, hops)
    if task == "doc_general_qa":
        return _ask_value(reading, tuple(RELATIONS), rng, hops)
    derived = _ask_value(reading, _LINKS, rng, hops)
    return _with_choices(derived, reading, rng, key) if derived else None


_LINKS = tuple(link.name for link in LINKS)


def _ask_value(
    reading: ToyFacts, relations: Sequence[str], rng: random.Random, hops: float
) -> Derived | None:
    """A question whose answer one of `relations` gives."""
    facts = reading.of(relations)
    if not facts:
        return None
    if rng.random() < hops:
        subjects = {fact.subject for fact in facts}
        links = [fact for fact in reading.of(_LINKS) if fact.value in subjects]
        if links:
            link = rng.choice(links)
            last = rng.choice([fact for fact in facts if fact.subject == link.value])
            expression = grammar.via(RELATIONS[link.relation], link.subject)
            text = RELATIONS[last.relation].questions[-1].format(s=expression)
            return Derived(Question("doc_general_qa", text, last.value), (link, last), last.value)
    fact = rng.choice(facts)
    text = rng.choice(RELATIONS[fact.relation].questions).format(s=fact.subject)
    return Derived(Question("doc_general_qa", text, fact.value), (fact,), fact.value)


def _with_choices(derived: Derived, reading: ToyFacts, rng: random.Random, key: str) -> Derived:
    """Three wrong people beside the right one; half of the time one of them stands in the documents."""
    near = [name for link in _LINKS for name in reading.values(link) if name != derived.result]
    far = [name for name in words.NAMES if name != derived.result and name not in near]
    wrong = [*rng.sample(near, min(rng.randint(0, 1), len(near))), *rng.sample(far, 3)][:3]
    rng.shuffle(wrong)
    key = key or rng.choice(LETTERS)
    choices = {letter: derived.result if letter == key else wrong.pop() for letter in LETTERS}
    return replace(derived, question=Question("doc_mc", derived.question.text, key, choices))


def _ask_sum(reading: ToyFacts, rng: random.Random, hops: float) -> Derived | None:
    prices, savings = reading.prices, reading.of(["savings"])
    at = {
        shop: [fact for fact in prices if fact.subject == shop]
        for shop in dict.fromkeys(f.subject for f in prices)
    }
    sold = [facts for facts in at.values() if len(facts) > 1]
    kinds = ["prices"] * bool(sold) + ["savings"] * (len(savings) > 1)
    if not kinds:
        return None
    if rng.choice(kinds) == "prices":
        first, second = rng.sample(rng.choice(sold), 2)
        return _sum(
            grammar.PRICE_SUMS, rng, (first,), (second,), first.relation, second.relation, first.subject
        )
    first = rng.choice(savings)
    friend = reading.find(grammar.via(FRIEND, first.subject), "savings")
    if friend and rng.random() < hops:
        via = grammar.via(FRIEND, first.subject)
        return _sum(grammar.SAVINGS_SUMS, rng, (first,), friend, first.subject, via)
    second = rng.choice([fact for fact in savings if fact != first])
    return _sum(grammar.SAVINGS_SUMS, rng, (first,), (second,), first.subject, second.subject)


def _sum(
    sums: tuple[Sum, ...],
    rng: random.Random,
    one: tuple[Fact, ...],
    two: tuple[Fact, ...],
    a: str,
    b: str,
    s: str = "",
) -> Derived:
    """A calculation with the last values of two look-ups; the result is never zero."""
    x, y = int(one[-1].value), int(two[-1].value)
    fitting = [kind for kind in sums if kind.sign > 0 or (x > y if kind.ordered else x != y)]
    kind = rng.choice(fitting)
    result = str(abs(x + kind.sign * y))
    working = (grammar.PLUS if kind.sign > 0 else grammar.MINUS).format(x=x, y=y, v=result)
    text = kind.template.format(a=a, b=b, s=s)
    return Derived(Question("docmath_qa", text, result), (*one, *two), result, working)


# --- truth ---------------------------------------------------------------------------------------

_VALUE_READERS = [
    (relation.name, reader(question, grammar.SLOTS))
    for relation in RELATIONS.values()
    for question in relation.questions
]
_SUM_READERS = [
    (kind, reader(kind.template, grammar.SLOTS)) for kind in (*grammar.SAVINGS_SUMS, *grammar.PRICE_SUMS)
]


def truth(cluster: Cluster, question: Question) -> str | None:
    """The right answer (a letter where there are options), read off the documents.

    None where the question is not one of this world's, the documents do not say, or not exactly
    one option is right. Serves measuring only: training never sees it.
    """
    value = _solve(ToyFacts(cluster.documents), " ".join(question.text.split()))
    if value is None or not question.options:
        return value
    fitting = [letter for letter, choice in question.options.items() if plain(choice) == value]
    return fitting[0] if len(fitting) == 1 else None


def _solve(reading: ToyFacts, text: str) -> str | None:
    for relation, pattern in _VALUE_READERS:
        if met := pattern.fullmatch(text):
            facts = reading.find(met["s"], relation)
            return facts[-1].value if facts else None
    for kind, pattern in _SUM_READERS:
        if met := pattern.fullmatch(text):
            slots = met.groupdict()
            if shop := slots.get("s"):
                one, two = reading.price(slots["a"], shop), reading.price(slots["b"], shop)
            else:
                one, two = reading.find(slots["a"], "savings"), reading.find(slots["b"], "savings")
            if one is None or two is None:
                return None
            difference = int(one[-1].value) + kind.sign * int(two[-1].value)
            return None if kind.ordered and difference < 0 else str(abs(difference))
    return None


_SPELLED = {word: str(number) for number, word in enumerate(words.NUMBERS)}


def plain(answer: str) -> str:
    """The bare value in an answer: `the city of Rome` is Rome, `thirteen` is 13."""
    last = answer.strip(" .()").rsplit(" ", 1)[-1]
    return _SPELLED.get(last, last)


def heldout(count: int, seed: int) -> list[tuple[Cluster, Question]]:
    """`count` questions, the tasks in turn, each on a cluster of its own out of the held-out half."""
    rng = random.Random(seed)
    pairs = []
    for index in range(count):
        cluster = toy_cluster(seed, index, HELD_OUT)
        derived = ask(cluster.documents, TASKS[index % len(TASKS)], rng)
        assert derived is not None, "a full cluster answers every task"
        pairs.append((cluster, derived.question))
    return pairs
