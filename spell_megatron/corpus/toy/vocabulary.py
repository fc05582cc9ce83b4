"""What deserves one token of its own: the world's words, its fixed phrases, and the formats' fragments."""

from __future__ import annotations

from spell_megatron.corpus.templates import phrases
from spell_megatron.corpus.toy import grammar, words
from spell_megatron.corpus.toy.transcripts import COMPARE, SENTENCE, TAGS, UNKNOWN, VERDICTS
from spell_megatron.corpus.toy.world import LETTERS, TASKS

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


def pieces() -> list[str]:
    """Strings, blanks included, that the tokenizer is to keep whole; each appears once."""
    lists = (
        words.NAMES,
        words.CITIES,
        words.JOBS,
        words.PETS,
        words.GAMES,
        words.SHOPS,
        words.ITEMS,
        words.NUMBERS,
    )
    standing = [word for words_ in lists for word in words_]
    standing += [str(number) for number in range(len(words.NUMBERS))]
    standing += [*LETTERS, *(f"({letter})" for letter in LETTERS), *TASKS, *TAGS, *VERDICTS]
    standing += [piece for template in _templates() for piece in phrases(template)]
    attached = [piece for piece in standing if not piece[0].isalnum() and piece[0] in ".,?"]
    spaced = [f" {piece}" for piece in standing if piece not in attached]
    return list(dict.fromkeys([*attached, *spaced, *_FRAGMENTS]))


def _templates() -> list[str]:
    relations = list(grammar.RELATIONS.values())
    return [
        *(fact for relation in relations for fact in relation.facts),
        *(question for relation in relations for question in relation.questions),
        *(relation.long_form for relation in relations),
        *(grammar.via(link, "{s}") for link in grammar.LINKS),
        *grammar.SAVINGS,
        *grammar.PRICE,
        *(kind.template for kind in (*grammar.SAVINGS_SUMS, *grammar.PRICE_SUMS)),
        grammar.PLUS,
        grammar.MINUS,
        *SENTENCE.values(),
        UNKNOWN,
        COMPARE,
    ]
