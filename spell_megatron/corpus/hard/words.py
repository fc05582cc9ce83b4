"""The vocabulary of the hard world: the toy world's words, and what makes subjects and values alike."""

from __future__ import annotations

from spell_megatron.corpus.toy import words as toy
from spell_megatron.corpus.toy.words import CITIES, GAMES, JOBS, SHOPS

__all__ = [
    "CITIES",
    "DISHES",
    "GAMES",
    "INSTRUMENTS",
    "ITEMS",
    "JOBS",
    "KEY_PARTS",
    "NAMES",
    "PETS",
    "SHOPS",
    "SURNAMES",
    "SYNONYMS",
    "TRADES",
    "meant",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = tuple(
    name
    for name in toy.NAMES
    if not any(other.lower().endswith(name.lower()) for other in toy.NAMES if other != name)
)
"""No name is the end of another ("Anna", "Hanna"): a rule that looks for the one would find the other."""

PETS, ITEMS = (tuple(word for word in listed if word[0] not in "aeiou") for listed in (toy.PETS, toy.ITEMS))
"""What "a" goes with."""

SURNAMES = _words("""
Abbott Barlow Berg Carver Dalton Ellis Farrow Foster Garland Hale Holt Jensen Keller Lang Marsh Moreau Nash Novak
Osborn Parker Quinn Reed Rossi Sharp Stone Sutton Thorne Vance Vogel Walsh Weber Winter York Zeller
""")

TRADES = _words("Books Cafe Flowers Market Stores Tools Toys Traders")
"""Second words of shops."""

INSTRUMENTS = _words("""
accordion banjo bassoon cello clarinet cornet flute guitar harp mandolin oboe organ piano recorder sitar
trombone trumpet tuba ukulele viola violin zither
""")

DISHES = _words("""
bread cheese curry dumplings goulash lasagna lentils noodles omelette pancakes pasta pizza porridge risotto salad
sausages soup steak stew sushi tacos trout waffles
""")

SYNONYMS = {
    "attorney": "lawyer",
    "goldsmith": "jeweler",
    "hairdresser": "barber",
    "mariner": "sailor",
    "physician": "doctor",
    "vocalist": "singer",
    "chauffeur": "driver",
    "joiner": "carpenter",
    "magistrate": "judge",
    "seamster": "tailor",
    "angler": "fisher",
    "veterinarian": "vet",
    "hound": "dog",
    "bunny": "rabbit",
    "hog": "pig",
    "serpent": "snake",
    "stag": "deer",
    "mare": "horse",
    "fiddle": "violin",
    "broth": "soup",
    "spaghetti": "pasta",
    "draughts": "checkers",
    "grappling": "wrestling",
}
"""Another word for a value: documents, answers and references may use either."""


def meant(word: str) -> str:
    """The value that a word stands for."""
    return SYNONYMS.get(word, word)


KEY_PARTS = tuple(f"{letter}{digit}" for letter in "bcdfghjkmp" for digit in range(10))
"""What keys are made of, four parts each."""
