"""How the hard world speaks: every sentence that its documents can contain, as templates.

Who or what a document is about is a *subject*: a person ("Nora Berg") or a shop ("Acorn Books"). A relation is
something of which a subject has exactly one: a trait, a link to another subject, or a measure, which is a number.
A relation's `decoys` look like facts and are none: what was, is wished for, or is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from spell_megatron.corpus.hard import words
from spell_megatron.corpus.templates import phrases, reader

PERSON, SHOP = "person", "shop"


@dataclass(frozen=True)
class Predicate:
    """A relation: something of which a subject has exactly one, and the ways to say and to ask it."""

    nouns: tuple[str, ...]
    """How a chain calls it, `the {noun} of …`; the first is its name."""
    facts: tuple[str, ...]
    decoys: tuple[str, ...]
    """Sentences of the same words that say something else; the first marks the value as outdated."""
    questions: tuple[str, ...] = ()
    """Direct ways to ask, besides `What is the {noun} of …?`."""
    of: str = PERSON
    """The kind of subject that has it."""
    to: str = ""
    """The kind of subject that it leads to; empty for a trait or a measure."""
    values: tuple[str, ...] = ()
    """What it can be; empty where it is a subject of the same cluster."""
    long_form: str = "{v}"
    """A longer way to name the value."""

    @property
    def name(self) -> str:
        return self.nouns[0]


TRAITS = (
    Predicate(
        ("home", "residence"),
        ("{s} lives in {v}.", "The home of {s} is {v}."),
        ("{s} lived in {v} until last year.", "{s} would like to live in {v}.", "{s} does not live in {v}."),
        ("Where does {s} live?",),
        values=words.CITIES,
        long_form="the city of {v}",
    ),
    Predicate(
        ("job", "profession"),
        ("{s} works as {v}.", "The job of {s} is {v}."),
        ("{s} worked as {v} until last year.", "{s} would like to work as {v}."),
        ("What does {s} work as?",),
        values=words.JOBS,
        long_form="the trade of {v}",
    ),
    Predicate(
        ("pet", "animal"),
        ("{s} keeps a {v}.", "The pet of {s} is a {v}."),
        ("{s} kept a {v} until last year.", "{s} would like to keep a {v}.", "{s} does not keep a {v}."),
        ("What does {s} keep?",),
        values=words.PETS,
        long_form="a pet that is a {v}",
    ),
    Predicate(
        ("game", "pastime"),
        ("{s} plays {v}.", "The game of {s} is {v}."),
        ("{s} played {v} until last year.", "{s} would like to play {v}."),
        ("Which game does {s} play?",),
        values=words.GAMES,
        long_form="the game of {v}",
    ),
    Predicate(
        ("instrument",),
        ("{s} practises the {v}.", "The instrument of {s} is the {v}."),
        ("{s} practised the {v} until last year.", "{s} does not practise the {v}."),
        ("What does {s} practise?",),
        values=words.INSTRUMENTS,
        long_form="an instrument called {v}",
    ),
    Predicate(
        ("dish", "meal"),
        ("{s} likes {v} best.", "The dish of {s} is {v}."),
        ("{s} liked {v} best until last year.", "{s} does not like {v}."),
        ("What does {s} like best?",),
        values=words.DISHES,
        long_form="a plate of {v}",
    ),
)

FRIEND = Predicate(
    ("friend", "companion"),
    ("{s} is a friend of {v}.", "The friend of {s} is {v}."),
    ("{s} was a friend of {v} until last year.", "{s} would like to meet {v}."),
    to=PERSON,
    long_form="somebody called {v}",
)
WORKPLACE = Predicate(
    ("workplace", "employer"),
    ("{s} is employed at {v}.", "The workplace of {s} is {v}."),
    ("{s} was employed at {v} until last year.", "{s} is not employed at {v}."),
    ("Where is {s} employed?",),
    to=SHOP,
    long_form="a shop called {v}",
)
OWNER = Predicate(
    ("owner", "proprietor"),
    ("{s} belongs to {v}.", "The owner of {s} is {v}."),
    ("{s} belonged to {v} until last year.", "{s} does not belong to {v}."),
    ("Who does {s} belong to?",),
    of=SHOP,
    to=PERSON,
    long_form="somebody called {v}",
)
SUPPLIER = Predicate(
    ("supplier", "source"),
    ("{s} is supplied by {v}.", "The supplier of {s} is {v}."),
    ("{s} was supplied by {v} until last year.", "{s} is not supplied by {v}."),
    ("By whom is {s} supplied?",),
    of=SHOP,
    to=SHOP,
    long_form="a shop called {v}",
)
LINKS = (FRIEND, WORKPLACE, OWNER, SUPPLIER)

MEASURES = (
    Predicate(
        ("budget",),
        ("{s} has a budget of {v}.", "The budget of {s} is {v}."),
        ("{s} had a budget of {v} until last year.", "{s} would like a budget of {v}."),
    ),
    Predicate(
        ("age",),
        ("{s} has the age {v}.", "The age of {s} is {v}."),
        ("{s} had the age {v} some years ago.", "{s} does not have the age {v}."),
    ),
    Predicate(
        ("staff",),
        ("{s} has a staff of {v}.", "The staff of {s} counts {v}."),
        ("{s} had a staff of {v} until last year.", "{s} does not have a staff of {v}."),
        of=SHOP,
    ),
)
PRICE = Predicate(
    ("price",),
    ("{s} sells {i} for {v}.", "At {s} the price of {i} is {v}."),
    ("{s} sold {i} for {v} until last year.", "{s} does not sell {i} for {v}."),
    of=SHOP,
)
"""The measure of an item at a shop: a fact of it belongs to the relation `price of {item}`."""

RELATIONS = {relation.name: relation for relation in (*TRAITS, *LINKS, *MEASURES)}

OUT_OF_DATE = "This note is out of date."
"""How a document begins whose statements hold no more: they are worded like facts."""
NEXT_KEY = "Key {k} leads to key {n}."
LAST_KEY = "Key {k} asks: {q}"
"""A chain of keys ends in a question."""

PLUS, MINUS = "{x} + {y} = {v}.", "{x} and {y} differ by {v}."
"""How a reader calculates."""

FILLERS = (
    "{s} bought a {i} on day {d}.",
    "{s} wrote a letter on day {d}.",
    "{s} took a long walk on day {d}.",
    "It rained in {c} on day {d}.",
    "Nobody can say who lost the {i}.",
    "The train to {c} was late on day {d}.",
    "A new bridge was opened in {c}.",
)
SHOP_FILLERS = (
    "{s} was closed on day {d}.",
    "{s} moved a {i} into its window on day {d}.",
    "Somebody asked for a {i} at {s}.",
    *FILLERS[3:],
)
LONGEST_SENTENCE = 32
"""Tokens; no template makes a longer one."""

SUBJECT = r"[A-Z][a-z]+ [A-Z][a-z]+"
KEY = r"[a-z]\d(?:-[a-z]\d){3}"
SLOTS = {
    "s": SUBJECT,
    "v": rf"{SUBJECT}|\w+",
    "i": r"[a-z]+",
    "k": KEY,
    "n": KEY,
    "q": r"[A-Z][^?.]*\?",
}
_SENTENCE = re.compile(r"[^.?]+[.?]")
_TOKEN = re.compile(r"[^\W_]+|[^\w\s]")

READERS = [
    (relation.name, max(phrases(fact), key=len), reader(fact, SLOTS))
    for relation in (*RELATIONS.values(), PRICE)
    for fact in relation.facts
]
"""How facts are read: relation, words without which a sentence need not be tried, pattern."""
KEY_READERS = (reader(NEXT_KEY, SLOTS), reader(LAST_KEY, SLOTS))


def kind(subject: str) -> str:
    """What a subject is, by its second word."""
    return SHOP if subject.split()[1] in words.TRADES else PERSON


def sentences(text: str) -> list[str]:
    return [" ".join(sentence.split()) for sentence in _SENTENCE.findall(text)]


def split(text: str) -> list[str]:
    """The words and marks of a text."""
    return _TOKEN.findall(text)


def tokens(text: str) -> int:
    """The length of a text: a tokenizer with a token for each word counts the same."""
    return len(split(text))
