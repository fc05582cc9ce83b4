"""The hard world's documents: people and shops with look-alikes, in long texts where most sentences answer nothing.

Everything is drawn afresh for a cluster. Training and held-out halves share no subject and no key: a name belongs to
the half that a digest of it says. So they share no document that states a fact, and no question.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from spell_megatron.corpus.hard import grammar, words
from spell_megatron.corpus.hard.grammar import FRIEND, LINKS, MEASURES, PERSON, PRICE, SHOP, TRAITS, Predicate
from spell_megatron.corpus.hard.reading import WHAT
from spell_megatron.types import Cluster, Document

TRAIN, HELD_OUT = 0, 1
_OTHER_WORD = 0.5
"""Share of values with a synonym that are said by it."""


@dataclass(frozen=True)
class Extent:
    """How much a cluster holds, as inclusive ranges."""

    people: tuple[int, int] = (7, 12)
    shops: tuple[int, int] = (4, 8)
    outdated: tuple[int, int] = (1, 4)
    """Documents that are out of date, about subjects that have another one."""
    traits: tuple[int, int] = (4, 6)
    items: tuple[int, int] = (12, 24)
    goods: int = 30
    """Different items on sale in a cluster: few of them, so that shops compare."""
    chains: tuple[int, int] = (2, 3)
    """Chains of keys."""
    keys: tuple[int, int] = (3, 5)
    """Links of a chain."""
    tokens: tuple[int, int] = (600, 1500)
    """Tokens of a document."""
    largest: int = 40
    """Measures are 1 to this."""
    similar: float = 0.5
    """Share of subjects that have a word of their name from another one of the cluster."""
    decoys: float = 0.4
    """Share of the sentences without a fact that look like one; 0 for none at all."""
    wordings: int = 2
    """Ways to say a fact, at most."""
    times: int = 1
    """Documents are so many times as long: more padding between the same facts."""


FULL = Extent()
SMALL = Extent(
    people=(4, 5),
    shops=(3, 3),
    outdated=(0, 1),
    traits=(2, 3),
    items=(2, 3),
    goods=4,
    chains=(1, 2),
    keys=(2, 3),
    tokens=(60, 130),
    largest=12,
)


def half_of(name: str) -> int:
    """The half that a subject or a key belongs to."""
    return zlib.crc32(name.encode()) % 2


def cluster(identity: str, domain: str, half: int, scale: Extent) -> Cluster:
    """A cluster of documents, of which `identity` settles everything that the other arguments do not.

    Clusters that differ in `scale.times` alone state the same facts in the same words.
    """
    rng, padding = (random.Random(f"{identity}/{half}/{part}") for part in ("facts", "padding"))
    cast = _Cast.drawn(rng, half, scale)
    holds = {subject: _facts(rng, subject, cast, scale) for subject in cast.subjects}
    notes = [_Note.written(rng, subject, said, cast, scale) for subject, said in holds.items()]
    for sentence in _chains(rng, half, cast, scale):
        room = [note for note in notes if note.length + grammar.LONGEST_SENTENCE <= scale.tokens[1]]
        rng.choice(room).add(sentence)
    for subject in rng.sample(cast.subjects, rng.randint(*scale.outdated)):
        before = [_another(rng, one, subject, cast) for one in holds[subject]]
        notes.append(_Note.written(rng, subject, before, cast, scale, outdated=True))
    rng.shuffle(notes)
    for note in notes:
        rng.shuffle(note.sentences)
        note.pad(padding, cast, scale)
    return Cluster(
        identity,
        domain,
        tuple(Document(f"{identity}/{i}", note.text, note.subject) for i, note in enumerate(notes)),
    )


# --- who there is --------------------------------------------------------------------------------


@dataclass
class _Cast:
    """The subjects of a cluster, the goods they trade, and who is whose friend: one ring through all people."""

    people: list[str]
    shops: list[str]
    goods: list[str]
    friends: dict[str, str]
    largest: int

    @classmethod
    def drawn(cls, rng: random.Random, half: int, scale: Extent) -> _Cast:
        people = subjects(rng, half, rng.randint(*scale.people), PERSON, scale.similar)
        shops = subjects(rng, half, rng.randint(*scale.shops), SHOP, scale.similar)
        ring = rng.sample(people, len(people))
        friends = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
        return cls(people, shops, rng.sample(words.ITEMS, scale.goods), friends, scale.largest)

    @property
    def subjects(self) -> list[str]:
        return [*self.people, *self.shops]

    def value(self, rng: random.Random, relation: Predicate, subject: str) -> str:
        """Any value of a relation, in any of its words."""
        if relation.to:
            others = self.shops if relation.to == SHOP else self.people
            return rng.choice([other for other in others if other != subject])
        if not relation.values:
            return str(rng.randint(1, self.largest))
        value = rng.choice(relation.values)
        other = [word for word, meant in words.SYNONYMS.items() if meant == value]
        return rng.choice(other) if other and rng.random() < _OTHER_WORD else value


def subjects(rng: random.Random, half: int, count: int, kind: str, similar: float = 0.0) -> list[str]:
    """Different names of a kind out of a half; a share `similar` has one of its two words from another."""
    firsts, seconds = (words.SHOPS, words.TRADES) if kind == SHOP else (words.NAMES, words.SURNAMES)
    made: list[str] = []
    while len(made) < count:
        first, second = rng.choice(firsts), rng.choice(seconds)
        if made and rng.random() < similar:
            like = rng.choice(made).split()
            first, second = (like[0], second) if rng.random() < 0.5 else (first, like[1])
        name = f"{first} {second}"
        if half_of(name) == half and name not in made:
            made.append(name)
    return made


# --- what is said --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """A fact before it is a sentence. `item` is what a price is of."""

    relation: Predicate
    value: str
    item: str = ""

    def sentence(self, rng: random.Random, templates: Sequence[str], subject: str) -> str:
        return rng.choice(templates).format(s=subject, v=self.value, i=self.item)


def _facts(rng: random.Random, subject: str, cast: _Cast, scale: Extent) -> list[_Said]:
    """What holds of a subject: all of its links and measures, and some traits or prices."""
    kind = grammar.kind(subject)
    standing = [relation for relation in (*LINKS, *MEASURES) if relation.of == kind]
    said = [_Said(relation, cast.value(rng, relation, subject)) for relation in standing]
    if kind == SHOP:
        items = rng.sample(cast.goods, min(rng.randint(*scale.items), len(cast.goods)))
        return said + [_Said(PRICE, cast.value(rng, PRICE, subject), item) for item in items]
    said = [replace(one, value=cast.friends[subject]) if one.relation is FRIEND else one for one in said]
    traits = rng.sample(TRAITS, rng.randint(*scale.traits))
    return said + [_Said(trait, cast.value(rng, trait, subject)) for trait in traits]


def _another(rng: random.Random, one: _Said, subject: str, cast: _Cast) -> _Said:
    """The same with a value that does not mean the same."""
    other = one
    while words.meant(other.value) == words.meant(one.value):
        other = replace(one, value=cast.value(rng, one.relation, subject))
    return other


def _decoy(rng: random.Random, subject: str, said: Sequence[_Said], cast: _Cast) -> str:
    """What was, is wished for or is not, of something that the document states."""
    one = _another(rng, rng.choice(said), subject, cast)
    return one.sentence(rng, one.relation.decoys, subject)


def _chains(rng: random.Random, half: int, cast: _Cast, scale: Extent) -> list[str]:
    """Sentences of chains of keys, each with a question about one fact of a person at its end."""
    made: list[str] = []
    keys: list[str] = []
    while len(keys) < scale.chains[1] * scale.keys[1]:
        key = "-".join(rng.choices(words.KEY_PARTS, k=4))
        if half_of(key) == half and key not in keys:
            keys.append(key)
    for _ in range(rng.randint(*scale.chains)):
        chain = [keys.pop() for _ in range(rng.randint(*scale.keys))]
        made += [grammar.NEXT_KEY.format(k=k, n=n) for k, n in pairwise(chain)]
        question = WHAT.format(r=rng.choice(("friend", "workplace")), s=rng.choice(cast.people))
        made.append(grammar.LAST_KEY.format(k=chain[-1], q=question))
    return made


# --- documents -----------------------------------------------------------------------------------


@dataclass
class _Note:
    """A document in the making."""

    subject: str
    said: list[_Said]
    sentences: list[str]
    outdated: bool
    length: int = 0
    """Tokens."""

    @classmethod
    def written(
        cls,
        rng: random.Random,
        subject: str,
        said: list[_Said],
        cast: _Cast,
        scale: Extent,
        outdated: bool = False,
    ) -> _Note:
        """With all facts, and a first decoy."""
        note = cls(subject, said, [], outdated, grammar.tokens(grammar.OUT_OF_DATE) * outdated)
        for one in said:
            note.add(one.sentence(rng, one.relation.facts[: scale.wordings], subject))
        if scale.decoys:
            note.add(_decoy(rng, subject, said, cast))
        return note

    @property
    def text(self) -> str:
        return " ".join([grammar.OUT_OF_DATE] * self.outdated + self.sentences)

    def add(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.length += grammar.tokens(sentence)

    def pad(self, rng: random.Random, cast: _Cast, scale: Extent) -> None:
        """Sentences without a fact up to a length that `scale` allows, the old ones spread among them."""
        least, most = (tokens * scale.times for tokens in scale.tokens)
        length, stated = rng.randint(least, most - grammar.LONGEST_SENTENCE), self.sentences
        self.sentences = []
        while self.length < length:
            self.add(_padding(rng, self.subject, self.said, cast, scale))
        places = sorted(rng.choices(range(len(self.sentences) + 1), k=len(stated)), reverse=True)
        for place, sentence in zip(places, reversed(stated), strict=True):
            self.sentences.insert(place, sentence)


def _padding(rng: random.Random, subject: str, said: Sequence[_Said], cast: _Cast, scale: Extent) -> str:
    """A sentence without a fact."""
    if rng.random() < scale.decoys:
        return _decoy(rng, subject, said, cast)
    fillers = grammar.SHOP_FILLERS if grammar.kind(subject) == SHOP else grammar.FILLERS
    return rng.choice(fillers).format(
        s=subject,
        i=rng.choice(words.ITEMS),
        c=rng.choice(words.CITIES),
        d=rng.randint(1, cast.largest),
    )
