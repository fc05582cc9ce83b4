"""Every word of the hard world: what a tokenizer with a token for each word has to know."""

from __future__ import annotations

from spell_megatron.corpus.hard import grammar, reading, words
from spell_megatron.corpus.hard.asking import LETTERS
from spell_megatron.corpus.hard.grammar import PRICE, RELATIONS
from spell_megatron.corpus.templates import phrases

_MOST_ADDED = 3
"""Numbers in the longest sum."""
_JOINING = (",", "-", "and", "or")
"""In lists and keys."""


def vocabulary() -> list[str]:
    """The tokens, as `grammar.tokens` counts them, of all documents, questions and answers; each once."""
    lists = (
        words.NAMES,
        words.SURNAMES,
        words.SHOPS,
        words.TRADES,
        words.ITEMS,
        tuple(words.SYNONYMS),
        words.KEY_PARTS,
        *(relation.values for relation in RELATIONS.values()),
    )
    found = [word for listed in lists for word in listed]
    found += [str(number) for number in range(_MOST_ADDED * grammar.LARGEST + 1)]
    found += [
        token for template in _templates() for part in phrases(template) for token in grammar.split(part)
    ]
    return list(dict.fromkeys([*found, *_JOINING, *LETTERS]))


def _templates() -> list[str]:
    relations = [*RELATIONS.values(), PRICE]
    return [
        *(noun for relation in relations for noun in relation.nouns),
        *(fact for relation in relations for fact in relation.facts),
        *(decoy for relation in relations for decoy in relation.decoys),
        *(question for relation in relations for question in relation.questions),
        *(relation.long_form for relation in relations),
        *grammar.FILLERS,
        *grammar.SHOP_FILLERS,
        grammar.OUT_OF_DATE,
        grammar.NEXT_KEY,
        grammar.LAST_KEY,
        *reading.FORMS,
    ]
