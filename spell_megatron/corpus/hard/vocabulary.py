"""Every word of the hard world, and what deserves a token of its own in a tokenizer for it."""

from __future__ import annotations

from spell_megatron.corpus.hard import grammar, reading, words
from spell_megatron.corpus.hard.grammar import MEASURES, PRICE, RELATIONS
from spell_megatron.corpus.hard.world import FULL, SMALL
from spell_megatron.corpus.templates import LETTERS, phrases

_MOST_ADDED = 3
"""Numbers in the longest sum."""
_JOINING = (",", "-", "and", "or")
"""In lists and keys."""

_RELATIONS = (*RELATIONS.values(), PRICE)
_SENTENCES = (
    *(fact for relation in _RELATIONS for fact in relation.facts),
    *(decoy for relation in _RELATIONS for decoy in relation.decoys),
    *(question for relation in _RELATIONS for question in relation.questions),
    *(relation.long_form for relation in _RELATIONS),
    *grammar.FILLERS,
    *grammar.SHOP_FILLERS,
    grammar.OUT_OF_DATE,
    grammar.NEXT_KEY,
    grammar.LAST_KEY,
    *reading.FORMS,
)
_VALUES = (
    *words.NAMES,
    *words.SURNAMES,
    *words.SHOPS,
    *words.TRADES,
    *words.ITEMS,
    *words.SYNONYMS,
    *words.KEY_PARTS,
    *(value for relation in RELATIONS.values() for value in relation.values),
)
_NOUNS = tuple(noun for relation in _RELATIONS for noun in relation.nouns)

WORDS = (
    *_VALUES,
    *(f"-{part}" for part in words.KEY_PARTS),
    *(str(number) for number in range(_MOST_ADDED * SMALL.largest + 1)),
    *_JOINING,
)
TEMPLATES = (
    *_SENTENCES,
    *(f"{begins} {noun} of" for noun in _NOUNS for begins in ("What is the", "the")),
    *(f"Which has the {most} {measure.name}:" for measure in MEASURES for most in ("highest", "lowest")),
    grammar.PLUS,
    grammar.MINUS,
)
"""For a tokenizer: a question that ends in a noun, and a link of a chain, is one token."""


def vocabulary() -> list[str]:
    """The tokens, as `grammar.tokens` counts them, of all documents, questions and answers; each once."""
    found = [*_VALUES, *(str(number) for number in range(_MOST_ADDED * FULL.largest + 1))]
    found += [
        token
        for template in (*_NOUNS, *_SENTENCES)
        for part in phrases(template)
        for token in grammar.split(part)
    ]
    return list(dict.fromkeys([*found, *_JOINING, *LETTERS]))
