"""How the toy world speaks: every sentence and question it can contain, as templates.

A template both writes and reads (`corpus.templates`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from spell_megatron.corpus.toy import words


@dataclass(frozen=True)
class Relation:
    """Something that a subject has exactly one of, and the ways to say and to ask it."""

    name: str
    noun: str
    """How a two-hop question calls it: `the {noun} of …`."""
    facts: tuple[str, ...]
    """Paraphrases of the fact; the first is the one a careful reader quotes."""
    questions: tuple[str, ...]
    long_form: str
    """A longer way to name the value. It ends with the value."""
    values: tuple[str, ...] = ()
    """What it can be; empty where it is a person of the same cluster."""


def _noun_question(noun: str) -> str:
    return f"What is the {noun} of {{s}}?"


CITY = Relation(
    "city",
    "home",
    ("{s} lives in {v}.", "The home of {s} is {v}."),
    ("Where does {s} live?", _noun_question("home")),
    "the city of {v}",
    words.CITIES,
)
JOB = Relation(
    "job",
    "job",
    ("{s} works as {v}.", "The job of {s} is {v}."),
    ("What does {s} work as?", _noun_question("job")),
    "the trade of {v}",
    words.JOBS,
)
PET = Relation(
    "pet",
    "pet",
    ("{s} keeps a {v}.", "The pet of {s} is {v}."),
    ("What does {s} keep?", _noun_question("pet")),
    "a pet that is a {v}",
    words.PETS,
)
GAME = Relation(
    "game",
    "game",
    ("{s} plays {v}.", "The game of {s} is {v}."),
    ("What does {s} play?", _noun_question("game")),
    "the game of {v}",
    words.GAMES,
)
FRIEND = Relation(
    "friend",
    "friend",
    ("{s} visits {v}.", "The friend of {s} is {v}."),
    ("Who does {s} visit?", _noun_question("friend")),
    "somebody called {v}",
)
OWNER = Relation(
    "owner",
    "owner",
    ("{s} belongs to {v}.", "The owner of {s} is {v}."),
    ("Who does {s} belong to?", _noun_question("owner")),
    "somebody called {v}",
)

TRAITS = (CITY, JOB, PET, GAME)
LINKS = (FRIEND, OWNER)
RELATIONS = {relation.name: relation for relation in (*TRAITS, *LINKS)}

SAVINGS = ("{s} saves {v}.", "The savings of {s} are {v}.")
PRICE = ("{s} sells {i} for {v}.", "At {s} the price of {i} is {v}.")


@dataclass(frozen=True)
class Sum:
    """A question about two numbers; `ordered` where it only makes sense with the larger one first."""

    template: str
    sign: int
    ordered: bool = False


SAVINGS_SUMS = (
    Sum("What is the sum of the savings of {a} and {b}?", +1),
    Sum("What is the difference of the savings of {a} and {b}?", -1),
    Sum("How much do {a} and {b} save together?", +1),
    Sum("How much more does {a} save than {b}?", -1, ordered=True),
)
PRICE_SUMS = (
    Sum("What is the sum of the prices of {a} and {b} at {s}?", +1),
    Sum("What is the difference of the prices of {a} and {b} at {s}?", -1),
    Sum("How much do {a} and {b} cost together at {s}?", +1),
    Sum("How much more does {a} cost than {b} at {s}?", -1, ordered=True),
)
PLUS = "{x} + {y} = {v}."
MINUS = "{x} and {y} differ by {v}."


def via(link: Relation, subject: str) -> str:
    """A subject by way of another: `the friend of Nora`."""
    return f"the {link.noun} of {subject}"


_LINK = "|".join(link.noun for link in LINKS)
VIA = re.compile(rf"the ({_LINK}) of (\w+)")
SLOTS = {
    "v": r"[\w-]+",
    "i": r"\w+",
    **dict.fromkeys("sab", rf"(?:the (?:{_LINK}) of )?\w+"),
}
