"""The texts of questions: of every kind, with so many links as are wanted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from spell_megatron.corpus.hard import reading as forms
from spell_megatron.corpus.hard.grammar import LINKS, MEASURES, PRICE, RELATIONS, TRAITS
from spell_megatron.corpus.hard.reading import Knowledge, Stated, solve

_TRIES = 8
"""Paths that are looked at for one with a fact of the wanted kind at its end."""


@dataclass(frozen=True)
class Path:
    """A subject by way of links: `the owner of Acorn Books`, and who that is."""

    text: str
    end: str


class Texts:
    """Writes questions about what was read; a method gives None where nothing of its kind can be asked.

    Of several subjects one is at the end of a path with all the links, and the others are named.
    """

    def __init__(self, reading: Knowledge, rng: random.Random, links: int) -> None:
        self._reading, self._rng, self._links = reading, rng, links

    def value(self) -> str | None:
        """A trait, or a further link."""
        path, fact = self._last([relation.name for relation in (*TRAITS, *LINKS)])
        if fact is None:
            return None
        relation = RELATIONS[fact.relation]
        form = self._rng.choice([forms.WHAT, *relation.questions])
        return form.format(r=self._rng.choice(relation.nouns), s=path.text)

    def number(self) -> str | None:
        path, fact = self._last(self._measures)
        return f"What is {_quantity(path, fact)}?" if fact else None

    def sum(self) -> str | None:
        """The sum of two or three numbers of a kind, or the difference of two, which is never zero."""
        path, fact = self._last(self._measures)
        if fact is None:
            return None
        kind, differs = fact.relation.split()[0], self._rng.random() < 0.5
        alike = [one for one in self._reading.facts.values() if one.relation.split()[0] == kind]
        others = self._some(
            [one for one in alike if one != fact and not (differs and one.value == fact.value)],
            1 if differs else 2,
        )
        if not others:
            return None
        quantities = [
            _quantity(path, fact),
            *(_quantity(Path(one.subject, one.subject), one) for one in others),
        ]
        form = self._rng.choice(forms.DIFFERENCES if differs else forms.SUMS)
        return form.format(q=self._listed(quantities, "and"))

    def comparison(self) -> str | None:
        """Who of two to four has the most or the least of something."""
        path, fact = self._last(self._measures)
        if fact is None:
            return None
        others = self._some([one for one in self._reading.of(fact.relation) if one.subject != path.end], 3)
        if not others:
            return None
        form = self._rng.choice((forms.HIGHEST, forms.LOWEST))
        members = [path.text, *(one.subject for one in others)]
        return form.format(m=fact.relation, l=self._listed(members, "or"))

    def keys(self) -> str | None:
        """A key that is as many links from the answer to its question."""
        texts = [forms.KEYS.format(k=key) for key in self._reading.keys]
        met = [text for text in texts if (found := solve(self._reading, text)) and found.links == self._links]
        return self._rng.choice(met) if met else None

    @cached_property
    def _paths(self) -> list[Path]:
        """Every way from a subject to one with facts, one link less than wanted, through no subject twice."""

        def onward(path: Path, met: tuple[str, ...]) -> Iterator[Path]:
            if len(met) == self._links:
                yield path
                return
            for link in LINKS:
                fact = self._reading.facts.get((path.end, link.name))
                if fact and fact.value in self._reading.subjects and fact.value not in met:
                    text = f"the {self._rng.choice(link.nouns)} of {path.text}"
                    yield from onward(Path(text, fact.value), (*met, fact.value))

        return [path for s in self._reading.subjects for path in onward(Path(s, s), (s,))]

    @cached_property
    def _measures(self) -> list[str]:
        """Names of the relations that are numbers; a price is one for every item."""
        named = dict.fromkeys(relation for _, relation in self._reading.facts)
        return [
            *(measure.name for measure in MEASURES),
            *(name for name in named if name.startswith(PRICE.name)),
        ]

    def _last(self, relations: Sequence[str]) -> tuple[Path, Stated] | tuple[Path, None]:
        """A path and a fact of one of the relations at its end."""
        for path in self._rng.sample(self._paths, min(len(self._paths), _TRIES)):
            facts = [fact for name in relations if (fact := self._reading.facts.get((path.end, name)))]
            if facts:
                return path, self._rng.choice(facts)
        return Path("", ""), None

    def _some(self, facts: Sequence[Stated], most: int) -> list[Stated]:
        return self._rng.sample(facts, min(self._rng.randint(1, most), len(facts)))

    def _listed(self, parts: list[str], word: str) -> str:
        self._rng.shuffle(parts)
        return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def _quantity(path: Path, fact: Stated) -> str:
    return f"the {fact.relation} {'at' if fact.relation.startswith(PRICE.name) else 'of'} {path.text}"
