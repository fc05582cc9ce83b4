"""What deserves a token of its own in the toy world."""

from __future__ import annotations

from spell_megatron.corpus.toy import grammar, words

_NUMBERS = tuple(str(number) for number in range(len(words.NUMBERS)))
_RELATIONS = tuple(grammar.RELATIONS.values())

WORDS = (
    *words.NAMES,
    *words.CITIES,
    *words.JOBS,
    *words.PETS,
    *words.GAMES,
    *words.SHOPS,
    *words.ITEMS,
    *words.NUMBERS,
    *_NUMBERS,
)
TEMPLATES = (
    *(fact for relation in _RELATIONS for fact in relation.facts),
    *(question for relation in _RELATIONS for question in relation.questions),
    *(relation.long_form for relation in _RELATIONS),
    *(grammar.via(link, "{s}") for link in grammar.LINKS),
    *grammar.SAVINGS,
    *grammar.PRICE,
    *(kind.template for kind in (*grammar.SAVINGS_SUMS, *grammar.PRICE_SUMS)),
    grammar.PLUS,
    grammar.MINUS,
)
